"""Matrices known by two thin factors, left @ right: what an adapter adds to a weight. Never written out here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from superpose.maths.svd import Features, numerical_rank, svd_of_product, thin_svd

FLAT_ENOUGH = 1e-8
"""Smallest eigenvalue of a factor's Gram matrix, relative to the largest, whose direction float64 gets from it."""


@dataclass(frozen=True)
class LowRank:
    """A matrix left @ right.

    Args:
        left: shape (out, rank).
        right: shape (rank, in).
    """

    left: Float[Tensor, "out rank"]
    right: Float[Tensor, "rank in_"]

    @property
    def rank(self) -> int:
        """Columns of `left`: at least the rank of the matrix."""
        return self.left.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the matrix."""
        return self.left.shape[0], self.right.shape[1]

    @property
    def T(self) -> LowRank:  # noqa: N802 - as of a matrix
        """The transposed matrix."""
        return LowRank(self.right.T, self.left.T)

    def matrix(self) -> Float[Tensor, "out in_"]:
        """Return the matrix written out."""
        return self.left @ self.right

    def times(self, factor: float) -> LowRank:
        """Return the matrix times a number."""
        return self if factor == 1 else LowRank(self.left * factor, self.right)

    def features(self) -> Features:
        """Return the singular features of numerical rank, O((out + in) rank^2)."""
        if not self.rank or not min(self.shape):
            return Features(self.left[:, :0], self.left.new_zeros(0), self.right[:0])
        dtype = self.left.dtype
        left = right = None
        if dtype != torch.float64:  # its own Gram matrix would be too coarse
            left, right = _factor(self.left), _factor(self.right.T)
        if left is None or right is None:
            found = svd_of_product(self.left.double(), self.right.double())
            found = found.take(0, numerical_rank(found.s, max(self.shape), dtype))
            return Features(found.u.to(dtype), found.s.to(dtype), found.vh.to(dtype))
        core = thin_svd(left.triangle @ right.triangle.T)
        core = core.take(0, numerical_rank(core.s, max(self.shape), dtype))
        u = self.left @ (left.back @ core.u).to(dtype)
        v = self.right.T @ (right.back @ core.vh.T).to(dtype)
        return Features(u, core.s.to(dtype), v.T)

    def norm(self) -> float:
        """Return the Frobenius norm."""
        if not self.rank:
            return 0.0
        left, right = self.left.double(), self.right.double()
        return float(((left.T @ left) * (right @ right.T)).sum().clamp_min(0).sqrt())

    def split(self, axis: int, sizes: Sequence[int]) -> list[LowRank]:
        """Return the blocks that the matrix splits into along its rows (0) or columns (1)."""
        if axis == 0:
            return [LowRank(block, self.right) for block in self.left.split(list(sizes))]
        return [LowRank(self.left, block) for block in self.right.split(list(sizes), dim=1)]


def zero(shape: tuple[int, int], like: Tensor) -> LowRank:
    """Return the zero matrix, of rank 0, in a tensor's dtype and place."""
    return LowRank(like.new_zeros(shape[0], 0), like.new_zeros(0, shape[1]))


def total(terms: Sequence[LowRank], factors: Sequence[float] | None = None) -> LowRank:
    """Return the sum of matrices, each times its factor; ranks add up.

    Args:
        terms: at least one.
        factors: one for each; 1 when not given.

    Returns:
        The sum.
    """
    scaled = [term.times(factor) for term, factor in zip(terms, factors or [1.0] * len(terms), strict=True)]
    return LowRank(torch.cat([term.left for term in scaled], dim=1), torch.cat([term.right for term in scaled]))


def side_by_side(blocks: Sequence[LowRank], axis: int) -> LowRank:
    """Return the matrix that `LowRank.split` splits into these blocks; ranks add up."""
    if axis == 0:
        return LowRank(torch.block_diag(*(block.left for block in blocks)), torch.cat([b.right for b in blocks]))
    return side_by_side([block.T for block in blocks], 0).T


def of_features(features: Features) -> LowRank:
    """Return the matrix that features add up to, its strengths shared between both factors."""
    root = features.s.sqrt()
    return LowRank(features.u * root, root[:, None] * features.vh)


@dataclass(frozen=True)
class _Factor:
    """A thin matrix F as Q @ triangle with orthonormal Q = F @ back; float64."""

    triangle: Float[Tensor, "kept rank"]
    back: Float[Tensor, "rank kept"]


def _factor(thin: Float[Tensor, "size rank"]) -> _Factor | None:
    """Return an orthonormal basis of a thin matrix's columns by their Gram matrix; None where float64 cannot.

    A column that the others make up, as padding with zeros does, takes no part. In between, where a direction is so
    weak beside the strongest that its square is nearly rounding, only a decomposition of the factor itself is exact.
    """
    exact = thin.double()
    squares, vectors = torch.linalg.eigh(exact.T @ exact)
    most = float(squares[-1])
    if most <= 0:
        return _Factor(vectors[:, :0].T, vectors[:, :0])
    noise = squares <= len(squares) * torch.finfo(torch.float64).eps * most
    if bool(((squares < FLAT_ENOUGH * most) & ~noise).any()):
        return None
    roots, vectors = squares[~noise].sqrt(), vectors[:, ~noise]
    return _Factor((vectors * roots).T, vectors / roots)


def in_factor_space(terms: Sequence[LowRank], left: Sequence[float], right: Sequence[float]) -> LowRank:
    """Return (sum_i left_i L_i) (sum_i right_i R_i) of matrices L_i R_i: factors added up, with cross terms.

    Args:
        terms: of equal rank; those of rank 0 take no part.
        left: factor on each left factor.
        right: factor on each right factor.

    Returns:
        A matrix of that rank.

    Raises:
        ValueError: ranks differ.
    """
    given = [entry for entry in zip(terms, left, right, strict=True) if entry[0].rank]
    if not given:
        return terms[0]
    if len({term.rank for term, _, _ in given}) > 1:
        raise ValueError("factors of different ranks cannot be added up")
    return LowRank(
        torch.stack([factor * term.left for term, factor, _ in given]).sum(dim=0),
        torch.stack([factor * term.right for term, _, factor in given]).sum(dim=0),
    )
