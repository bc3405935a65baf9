"""Parameter average, or uniform soup: the weighted mean of the tuned models.

    merged = sum_i w_i tuned_i,   w_i = weight_i / sum_j weight_j

Needs the tuned models only; the base gives names and dtypes. Safe and weak: each task's update shrinks by 1/T.

Cost: one pass, piece by piece. Prefer it for runs of one task, and as the reference that a better method has to beat.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from superpose.maths.combine import weighted_mean
from superpose.maths.low_rank import LowRank, total
from superpose.registry import Factored, merge_method


@dataclass(frozen=True, kw_only=True)
class AverageOptions:
    """The average has no options beside the models' weights."""


def _in_factors(tasks: Sequence[LowRank], options: AverageOptions, weights: Float[Tensor, " tasks"]) -> LowRank:
    return total(tasks, (weights / weights.sum()).tolist())


@merge_method(
    "average",
    options=AverageOptions,
    source="Wortsman et al. 2022, arXiv:2203.05482 (uniform soup); Choshen et al. 2022, arXiv:2204.03044",
    acts_on="weights",
    whole_for=(),
    breaks={"zero": "each update shrinks to its share: two tasks and the base make two thirds of the two"},
    factored=Factored(_in_factors, splits=False),
)
def average(
    tuned: Float[Tensor, "tasks *shape"],
    options: AverageOptions,
    *,
    weights: Float[Tensor, " tasks"] | None = None,
) -> Float[Tensor, "*shape"]:
    """Average the tuned weights.

    Args:
        tuned: the tuned models' weights.
        options: none.
        weights: one factor per model, divided by their sum; equal when not given.

    Returns:
        The mean, bit for bit the input where all models agree.
    """
    del options
    shares = [1 / len(tuned)] * len(tuned) if weights is None else (weights / weights.sum()).tolist()
    return weighted_mean(tuned, shares)
