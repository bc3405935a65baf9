"""PEM composition: a convex combination of task vectors or adapters; a negative weight negates one.

    merged = base + scaling_factor * sum_i c_i tau_i,   c_i = weight_i / (sum of the positive weights)
    merged = base + scaling_factor * (sum_i c_i B_i) (sum_i |c_i| A_i)          space: factor, the paper's

Addition is weights of one sign (1/T each by default), negation the weight -1, transfer the weights a, b, -b. The paper
composes the factors of adapters, and negates by one of them (B here); that has cross terms, so that two adapters are
not the mean of what each does. In delta space, the default, this is a normalised task arithmetic. Where no weight is
positive, the sum of magnitudes divides.

Cost: one pass, piece by piece. Prefer it for task algebra: adding skills in shares, taking one away.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from superpose.maths.combine import weighted_mean
from superpose.maths.low_rank import LowRank, in_factor_space, total
from superpose.options import Range
from superpose.registry import Factored, merge_method


@dataclass(frozen=True, kw_only=True)
class PemOptions:
    """Options of PEM composition."""

    scaling_factor: Annotated[float, Range(-10, 10)] = 1.0
    """Factor on the composition; 1 in the paper, and the strength of a negation."""
    space: Literal["delta", "factor"] = "delta"
    """Whether updates are composed, or the factors of adapters (as published, with cross terms)."""


def _in_factors(tasks: Sequence[LowRank], options: PemOptions, weights: Float[Tensor, " tasks"]) -> LowRank:
    shares = _shares(weights)
    if options.space == "delta":
        return total(tasks, [share * options.scaling_factor for share in shares])
    return in_factor_space(tasks, shares, [abs(share) for share in shares]).times(options.scaling_factor)


@merge_method(
    "pem",
    options=PemOptions,
    source="Zhang et al. 2023, arXiv:2306.14870, the operators",
    whole_for=(),
    breaks={"zero": "the shares add up to 1, and the base takes one of them"},
    factored=Factored(_in_factors, splits=False),
)
def pem(
    task_vectors: Float[Tensor, "tasks *shape"],
    options: PemOptions,
    *,
    weights: Float[Tensor, " tasks"] | None = None,
) -> Float[Tensor, "*shape"]:
    """Combine task vectors in shares.

    Args:
        task_vectors: tuned minus base.
        options: see `PemOptions`.
        weights: one per task, negative to negate it; equal when not given.

    Returns:
        The merged task vector.
    """
    given = torch.ones(len(task_vectors), dtype=torch.float64) if weights is None else weights.double()
    return weighted_mean(task_vectors, _shares(given)) * options.scaling_factor


def _shares(weights: Float[Tensor, " tasks"]) -> list[float]:
    positive = weights.clamp_min(0).sum()
    divisor = float(positive if positive > 0 else weights.abs().sum())
    return (weights / divisor if divisor else weights).tolist()
