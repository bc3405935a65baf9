"""Sign election and the disjoint merge of TIES (Yadav et al. 2023, arXiv:2306.01708, section 3.1)."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Tie = Literal["zero", "positive", "majority"]
Aggregate = Literal["mean", "sum", "max"]


def elect_signs(task_vectors: Float[Tensor, "tasks *shape"], tie_sign: float = 0.0) -> Float[Tensor, "*shape"]:
    """Return the sign of the tasks' sum, entry by entry; where the sum is zero, `tie_sign`."""
    # In float64 the order of the tasks does not decide what cancels; the sign of a sum of two is right in any dtype.
    total = task_vectors[0].to(torch.float64 if len(task_vectors) > 2 else task_vectors.dtype, copy=True)
    for task_vector in task_vectors[1:]:
        total += task_vector
    signs = total.sign_().to(task_vectors.dtype)
    if tie_sign == 0.0:
        return signs
    return torch.where(signs == 0, torch.full_like(signs, tie_sign), signs)


def disjoint_merge(
    task_vectors: Float[Tensor, "tasks *shape"],
    signs: Float[Tensor, "*shape"],
    *,
    aggregate: Aggregate = "mean",
    weights: Float[Tensor, " tasks"] | None = None,
) -> Float[Tensor, "*shape"]:
    """Combine, entry by entry, the values that agree with the elected sign.

    Args:
        task_vectors: trimmed and unweighted.
        signs: elected signs; an entry with sign 0 comes out as 0.
        aggregate: mean (of those that agree), sum, or max (largest magnitude).
        weights: one factor per task; a weighted mean divides by the sum of the agreeing weights.

    Returns:
        The merged task vector.
    """
    merged, total = torch.zeros_like(signs), torch.zeros_like(signs)
    chosen, agrees = torch.empty_like(signs), torch.empty_like(signs)
    for index, task_vector in enumerate(task_vectors):
        weight = 1.0 if weights is None else float(weights[index])
        # Measured along the elected sign, what agrees is what is positive.
        torch.mul(task_vector, signs, out=chosen)
        if weight != 1.0:
            chosen *= weight
        chosen.clamp_min_(0)
        if aggregate == "max":
            torch.maximum(merged, chosen, out=merged)
            continue
        merged += chosen
        if aggregate == "mean":
            torch.sign(chosen, out=agrees)
            total += agrees if abs(weight) == 1.0 else agrees.mul_(abs(weight))
    if aggregate == "mean":
        merged /= total.clamp_min_(torch.finfo(total.dtype).tiny)
    merged *= signs
    return merged
