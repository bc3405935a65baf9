"""Singular features of a task matrix: only those that carry something, accurate down to the cut."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

SMALL = 128
"""Up to this size, float32's cut lies below what a Gram matrix in float64 resolves."""


@dataclass(frozen=True)
class Features:
    """The kept part of a thin singular value decomposition, u @ diag(s) @ vh, s descending."""

    u: Float[Tensor, "out rank"]
    s: Float[Tensor, " rank"]
    vh: Float[Tensor, "rank in_"]

    @property
    def count(self) -> int:
        """Number of features."""
        return len(self.s)

    def take(self, start: int, stop: int) -> Features:
        """Return features start..stop, in order of strength."""
        return Features(self.u[:, start:stop], self.s[start:stop], self.vh[start:stop])

    def matrix(self) -> Float[Tensor, "out in_"]:
        """Return the matrix these features add up to."""
        return (self.u * self.s) @ self.vh


def thin_svd(matrix: Float[Tensor, "out in_"]) -> Features:
    """Return the singular features of a matrix, those of numerical rank only.

    float32 goes through the eigenvectors of the smaller Gram matrix in float64: about three times faster than a
    decomposition in float32 for oblong matrices and no slower for square ones. Squaring costs half the digits, which
    float64 has to spare: at the cut (see `numerical_rank`) singular values are still right to about 1e-6 relative.
    Small matrices, whose cut is lower, and float64 input have no digits to spare and take the decomposition itself.

    Args:
        matrix: finite, float32 or float64.

    Returns:
        Features in the dtype of the matrix; none for a zero matrix.
    """
    out, in_ = matrix.shape
    exact = matrix.double()
    if matrix.dtype != torch.float64 and max(out, in_) > SMALL:
        u, s, vh = _by_gram_matrix(exact)
    elif out < in_:  # the driver is faster on tall matrices
        v, s, uh = torch.linalg.svd(exact.T, full_matrices=False)
        u, vh = uh.T, v.T
    else:
        u, s, vh = torch.linalg.svd(exact, full_matrices=False)
    rank = numerical_rank(s, max(out, in_), matrix.dtype)
    u, s, vh = u[:, :rank], s[:rank], vh[:rank]
    return Features(u.to(matrix.dtype).contiguous(), s.to(matrix.dtype), vh.to(matrix.dtype).contiguous())


def svd_of_product(left: Float[Tensor, "out inner"], right: Float[Tensor, "inner in_"]) -> Features:
    """Return the singular features of left @ right without forming the product.

    Two QR decompositions and a small SVD, O((out + in) inner^2): the route for adapters, whose task matrix is
    scale * B @ A.
    """
    q_left, r_left = torch.linalg.qr(left)
    q_right, r_right = torch.linalg.qr(right.T)
    core = thin_svd(r_left @ r_right.T)
    rank = numerical_rank(core.s, max(left.shape[0], right.shape[1]), left.dtype)
    core = core.take(0, rank)
    return Features(q_left @ core.u, core.s, core.vh @ q_right.T)


def numerical_rank(s: Float[Tensor, " rank"], size: int, dtype: torch.dtype) -> int:
    """Return how many singular values exceed size * eps(dtype) * the largest.

    Smaller ones are rounding noise, and their directions arbitrary: as constraints they would change the merge.
    """
    if len(s) == 0 or s[0] == 0:
        return 0
    return int((s > size * torch.finfo(dtype).eps * s[0]).sum())


def leading(features: Features, rank: int | None, energy: float) -> Features:
    """Return the leading features: at most `rank` of them, and no more than hold `energy` of the squared norm.

    Args:
        features: ordered by strength.
        rank: most features to return; None for no limit.
        energy: share of the sum of squared singular values, in [0, 1]; 1 keeps every feature.

    Returns:
        The features kept, strongest first.
    """
    count = features.count if rank is None else min(rank, features.count)
    if energy < 1 and features.count:
        share = features.s.double().square().cumsum(0)
        needed = int(torch.searchsorted(share, energy * share[-1])) + 1
        count = min(count, needed)
    return features.take(0, count)


def without_ends(features: Features, smallest: float, largest: float) -> Features:
    """Return the features less the weakest and strongest, given as fractions of their number (rounded down)."""
    # The 1e-9 undoes binary rounding: 0.29 * 100 is 28.999999999999996.
    first = math.floor(largest * features.count + 1e-9)
    last = features.count - math.floor(smallest * features.count + 1e-9)
    return features.take(first, max(first, last))


def _by_gram_matrix(matrix: Float[Tensor, "out in_"]) -> tuple[Tensor, Tensor, Tensor]:
    out, in_ = matrix.shape
    tall = out >= in_
    gram = matrix.T @ matrix if tall else matrix @ matrix.T
    squares, vectors = torch.linalg.eigh(gram)
    s = squares.flip(0).clamp_min(0).sqrt()
    vectors = vectors.flip(1)
    # Only directions that may survive the caller's cut are divided by their strength.
    rank = numerical_rank(s, max(out, in_), torch.float32)
    s, vectors = s[:rank], vectors[:, :rank]
    if tall:
        return (matrix @ vectors) / s, s, vectors.T
    return vectors, s, (vectors.T @ matrix) / s[:, None]
