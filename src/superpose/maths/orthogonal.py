"""Polar factors: the nearest matrix with orthonormal columns."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from superpose.maths.svd import SMALL


def polar_factor(matrix: Float[Tensor, "out in_"]) -> tuple[Float[Tensor, "out in_"], int]:
    """Return P Q^T of the thin singular value decomposition P diag(s) Q^T, and the numerical rank.

    Of a matrix that lacks rank, the factor on its own row and column space: the one of smallest norm, which is unique,
    where directions made up to fill the rank would be arbitrary. float32 goes through the smaller Gram matrix in
    float64, as in `thin_svd`: several times faster, and exact enough for columns near to orthonormal.

    Args:
        matrix: float32 or float64; its columns are unit vectors, for which the rank's cut-off is meant.

    Returns:
        The factor, in the matrix's dtype, and the rank.
    """
    if not matrix.numel():
        return matrix.clone(), 0
    exact = matrix.double()
    tall = exact if exact.shape[0] >= exact.shape[1] else exact.T
    size, dtype = max(matrix.shape), matrix.dtype
    # Unit vectors are known to the precision of their entries: a smaller singular value is rounding.
    cut = max(8 * torch.finfo(dtype).eps, size * torch.finfo(torch.float64).eps)
    if dtype == torch.float64 or size <= SMALL:
        u, s, vh = torch.linalg.svd(tall, full_matrices=False)
        rank = int((s > cut * s[0]).sum())
        factor = u[:, :rank] @ vh[:rank]
    else:
        squares, vectors = torch.linalg.eigh(tall.T @ tall)
        kept = squares > (cut * squares[-1].clamp_min(0).sqrt()) ** 2
        rank = int(kept.sum())
        vectors = vectors[:, kept]
        factor = (tall @ (vectors / squares[kept].sqrt())) @ vectors.T
    return (factor if tall is exact else factor.T).to(dtype), rank
