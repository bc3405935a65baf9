"""Interpolation on the sphere (Shoemake 1985), and angles between stacked vectors."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

NEARLY_PARALLEL = 0.9995
"""Cosine beyond which the straight line is taken: the sine of the angle is too small to divide by."""
TINY = 1e-8
"""Norm below which a vector has no direction to turn from."""
_PIECE = 1 << 18


def slerp(first: Float[Tensor, "*shape"], second: Float[Tensor, "*shape"], t: float) -> Float[Tensor, "*shape"]:
    """Return the point at share `t` of the arc from the first vector to the second.

        [ sin((1 - t) angle) first + sin(t angle) second ] / sin(angle)

    Shoemake 1985, "Animating rotation with quaternion curves". Nearly parallel or opposite vectors, and
    vectors of norm below 1e-8, are interpolated along the straight line.

    Args:
        first: where t is 0; flattened for angle and norm.
        second: where t is 1.
        t: share of the way, in [0, 1].

    Returns:
        A vector of their shape and dtype.
    """
    gram = gram_matrix(torch.stack([first.reshape(-1), second.reshape(-1)]))
    norms = gram.diagonal().sqrt()
    left, right = 1 - t, t
    if float(norms.min()) >= TINY:
        cosine = max(-1.0, min(1.0, float(gram[0, 1] / (norms[0] * norms[1]))))
        if abs(cosine) <= NEARLY_PARALLEL:
            angle = math.acos(cosine)
            left, right = math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)
    if left + right == 1:  # measured from the first, equal entries come back untouched
        return second.clone() if right == 1 else first + right * (second - first)
    return left * first + right * second


def gram_matrix(rows: Float[Tensor, "*stack tasks entries"]) -> Float[Tensor, "*stack tasks tasks"]:
    """Return the inner products of stacked vectors, added up in float64."""
    total = rows.new_zeros((*rows.shape[:-1], rows.shape[-2]), dtype=torch.float64)
    for piece in rows.split(_PIECE, dim=-1):
        exact = piece.double()
        total += exact @ exact.mT
    return total


def mean_cosine(gram: Float[Tensor, "*stack tasks tasks"]) -> Float[Tensor, "*stack"]:
    """Return the mean over all pairs of the cosine between two vectors; 0 for a pair with a zero vector.

    Args:
        gram: inner products of two vectors or more.

    Returns:
        The mean cosine of each stack.
    """
    norms = gram.diagonal(dim1=-2, dim2=-1).sqrt()
    products = norms[..., :, None] * norms[..., None, :]
    cosines = torch.where(products > 0, gram / products.clamp_min(torch.finfo(torch.float64).tiny), 0.0)
    tasks = gram.shape[-1]
    pairs = torch.triu_indices(tasks, tasks, offset=1)
    return cosines[..., pairs[0], pairs[1]].mean(dim=-1)
