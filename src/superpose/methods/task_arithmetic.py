"""Task arithmetic: add up the task vectors, scaled.

    merged = base + scaling_factor * sum_i weight_i (tuned_i - base)

Entry by entry, on every tensor. A negative weight forgets a task. The best scaling factor falls as tasks are added:
1 for one task, about 0.3 for eight; 1/T is the average.

Cost: one pass, piece by piece. Prefer it as the first thing to try, with two or three scaling factors: on nearly
orthogonal task vectors little beats it that costs less.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from jaxtyping import Float
from torch import Tensor

from superpose.maths.low_rank import LowRank, total
from superpose.options import Range
from superpose.registry import Factored, merge_method


@dataclass(frozen=True, kw_only=True)
class TaskArithmeticOptions:
    """Options of task arithmetic."""

    scaling_factor: Annotated[float, Range(-10, 10)] = 0.3
    """Factor on the summed task vectors (lambda); 0.3 is usual for eight tasks."""


def _in_factors(tasks: Sequence[LowRank], options: TaskArithmeticOptions, weights: Float[Tensor, " tasks"]) -> LowRank:
    return total(tasks, (weights * options.scaling_factor).tolist())


@merge_method(
    "task_arithmetic",
    options=TaskArithmeticOptions,
    source="Ilharco et al. 2023, arXiv:2212.04089, section 2",
    whole_for=(),
    breaks={"same": "T identical tasks add up to T times the task; with scaling_factor 1/T it holds"},
    factored=Factored(_in_factors, splits=False),
)
def task_arithmetic(
    task_vectors: Float[Tensor, "tasks *shape"],
    options: TaskArithmeticOptions,
    *,
    weights: Float[Tensor, " tasks"] | None = None,
) -> Float[Tensor, "*shape"]:
    """Add up the task vectors, scaled.

    Args:
        task_vectors: tuned minus base.
        options: see `TaskArithmeticOptions`.
        weights: one factor per task, not normalised; 1 when not given.

    Returns:
        The merged task vector.
    """
    factors = [1.0] * len(task_vectors) if weights is None else weights.tolist()
    merged = factors[0] * task_vectors[0]
    for factor, task_vector in zip(factors[1:], task_vectors[1:], strict=True):
        merged += task_vector if factor == 1 else factor * task_vector
    merged *= options.scaling_factor
    return merged
