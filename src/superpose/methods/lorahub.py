"""LoraHub: adapters of other tasks combined with one coefficient each, chosen for a new task.

    merged = base + sum_i w_i tau_i                                 space: delta
    merged = base + (sum_i w_i B_i) (sum_i w_i A_i)                 space: factor, the paper's, quadratic in w

The coefficients w minimise, by a search without gradients from w = 0 within [-`bound`, `bound`],

    (mean loss over the examples of the new task) + penalty * mean_i |w_i|

or are the models' weights, without data or with `evaluations: 0`. The examples are those of a recipe's `task`, or of
all models' tasks. A_i and B_i carry the root of their adapter's scale each. Factor space has cross terms B_i A_j: two
adapters together are not the sum of what each does, and ranks have to agree.

Cost: one pass, in factors; the search merges and reads the examples once for each evaluation, in memory. Prefer it for
a new task of which there are a few examples; delta space, which is task arithmetic, unless coefficients from the
paper's own code are to be reproduced.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from jaxtyping import Float
from torch import Tensor

from superpose.maths.low_rank import LowRank, in_factor_space, total
from superpose.methods.task_arithmetic import TaskArithmeticOptions, task_arithmetic
from superpose.options import Range
from superpose.registry import Factored, merge_method


@dataclass(frozen=True, kw_only=True)
class LorahubOptions:
    """Options of LoraHub."""

    space: Literal["delta", "factor"] = "delta"
    """Whether updates are combined, or the factors of adapters (as published, with cross terms)."""
    evaluations: Annotated[int, Range(0, 100_000)] = 40
    """Merged models that the search tries (40 in the paper); 0 takes the models' weights as they are."""
    bound: Annotated[float, Range(0, 100)] = 1.5
    """Largest magnitude of a coefficient."""
    penalty: Annotated[float, Range(0, 100)] = 0.05
    """Factor on the coefficients' mean magnitude."""


def _in_factors(
    tasks: Sequence[LowRank],
    options: LorahubOptions,
    weights: Float[Tensor, " tasks"],
    learned: Float[Tensor, " tasks"] | None,
) -> LowRank:
    weights = weights if learned is None else learned
    if options.space == "factor":
        return in_factor_space(tasks, weights.tolist(), weights.tolist())
    return total(tasks, weights.tolist())


@merge_method(
    "lorahub",
    options=LorahubOptions,
    source="Huang et al. 2023, arXiv:2307.13269, composition, and adaptation by a search without gradients",
    whole_for=(),
    learns=lambda options: options.evaluations > 0,
    without_data="coefficients are the models' weights",
    breaks={"same": "T identical tasks add up to T times the task"},
    factored=Factored(_in_factors, splits=False),
)
def lorahub(
    task_vectors: Float[Tensor, "tasks *shape"],
    options: LorahubOptions,
    *,
    weights: Float[Tensor, " tasks"] | None = None,
    learned: Float[Tensor, " tasks"] | None = None,
) -> Float[Tensor, "*shape"]:
    """Add up the task vectors, each times its weight; `space: factor` is for adapters' factors alone.

    Args:
        task_vectors: tuned minus base.
        options: see `LorahubOptions`.
        weights: one factor per task; 1 when not given.
        learned: the coefficients that the search found, instead.

    Returns:
        The merged task vector.
    """
    del options
    weights = weights if learned is None else learned
    return task_arithmetic(task_vectors, TaskArithmeticOptions(scaling_factor=1.0), weights=weights)
