"""LoraHub: adapters of other tasks combined with one coefficient each, chosen for a new task.

    merged = base + sum_i w_i tau_i                                 space: delta
    merged = base + (sum_i w_i B_i) (sum_i w_i A_i)                 space: factor, the paper's, quadratic in w

The coefficients are the models' weights; the paper finds them, within [-1.5, 1.5], on a few examples of the new task.
A_i and B_i carry the root of their adapter's scale each. Factor space has cross terms B_i A_j: two adapters together
are not the sum of what each does, and ranks have to agree.

Cost: one pass, in factors. Prefer it with coefficients from a search on data; delta space, which is task arithmetic,
unless coefficients from the paper's own code are to be reproduced.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from superpose.maths.low_rank import LowRank, in_factor_space, total
from superpose.methods.task_arithmetic import TaskArithmeticOptions, task_arithmetic
from superpose.registry import Factored, merge_method


@dataclass(frozen=True, kw_only=True)
class LorahubOptions:
    """Options of LoraHub."""

    space: Literal["delta", "factor"] = "delta"
    """Whether updates are combined, or the factors of adapters (as published, with cross terms)."""


def _in_factors(tasks: Sequence[LowRank], options: LorahubOptions, weights: Float[Tensor, " tasks"]) -> LowRank:
    if options.space == "factor":
        return in_factor_space(tasks, weights.tolist(), weights.tolist())
    return total(tasks, weights.tolist())


@merge_method(
    "lorahub",
    options=LorahubOptions,
    source="Huang et al. 2023, arXiv:2307.13269, the composition; coefficients are the models' weights",
    whole_for=(),
    breaks={"same": "T identical tasks add up to T times the task"},
    factored=Factored(_in_factors, splits=False),
)
def lorahub(
    task_vectors: Float[Tensor, "tasks *shape"],
    options: LorahubOptions,
    *,
    weights: Float[Tensor, " tasks"] | None = None,
) -> Float[Tensor, "*shape"]:
    """Add up the task vectors, each times its weight; `space: factor` is for adapters' factors alone.

    Args:
        task_vectors: tuned minus base.
        options: see `LorahubOptions`.
        weights: one factor per task; 1 when not given.

    Returns:
        The merged task vector.
    """
    del options
    return task_arithmetic(task_vectors, TaskArithmeticOptions(scaling_factor=1.0), weights=weights)
