"""DELLA: drop entries at random, the small ones more often, rescale, elect signs, average what agrees.

    rank    r_j in 1..n of |tau_ij| within its row, ascending
    keep    with probability q_j = (density - epsilon) + 2 epsilon (r_j - 1) / (n - 1), divided by q_j
    merge   mean of what has the sign of the sum, entry by entry (`merger: ties`), or the sum (`task_arithmetic`)
    apply   merged = base + scaling_factor * merge

MagPrune. Rows run along the first axis (kernels flattened); a tensor with one axis is one row, and a row of one entry
has q = density. Epsilon 0 is DARE. The numbers of an entry come from (seed, tensor name, task name) and its place.

Cost: one pass; each tensor as a whole, sorted row by row. Prefer it over `dare_ties` where magnitude tells what a
fine-tune learnt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Annotated, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from superpose.maths.randomness import Generator
from superpose.methods.task_arithmetic import TaskArithmeticOptions, task_arithmetic
from superpose.methods.ties import TiesOptions, ties
from superpose.options import Range
from superpose.registry import Cost, merge_method


@dataclass(frozen=True, kw_only=True)
class DellaOptions:
    """Options of DELLA."""

    density: Annotated[float, Range(0.001, 1)] = 0.7
    """Mean probability of an entry to be kept (1 less the drop rate, 0.3 in the authors' README)."""
    epsilon: Annotated[float, Range(0, 0.5)] = 0.07
    """Half the span of the probabilities (half the window_size, 0.14 in the authors' README)."""
    scaling_factor: Annotated[float, Range(-10, 10)] = 1.1
    """Factor on the merged task vector (lambda in the authors' README: 1.1)."""
    merger: Literal["ties", "task_arithmetic"] = "ties"
    """What follows the dropping: TIES' election and mean, or the plain sum (mergekit's della_linear)."""

    def __post_init__(self) -> None:
        if not self.density - self.epsilon > 0 or self.density + self.epsilon > 1:
            raise ValueError(
                f"density {self.density:g} with epsilon {self.epsilon:g} reaches outside (0, 1]:"
                " density - epsilon has to be above 0, and density + epsilon at most 1"
            )


def della_cost(shape: Sequence[int], tasks: int, options: DellaOptions) -> Cost:
    """Return what one tensor takes: random numbers, ranks, probabilities and a quotient of 8 bytes an entry."""
    del options
    numel = prod(shape)
    return Cost(numel * (8 * tasks + 56), 100.0 * numel * tasks)


@merge_method(
    "della",
    options=DellaOptions,
    source="Deep et al. 2024, arXiv:2406.11617, MagPrune, elect, fuse",
    cost=della_cost,
    plain={"density": 1.0, "epsilon": 0.0, "scaling_factor": 1.0},
)
def della(
    task_vectors: Float[Tensor, "tasks *shape"],
    options: DellaOptions,
    *,
    generator: Generator,
    weights: Float[Tensor, " tasks"] | None = None,
) -> Float[Tensor, "*shape"]:
    """Drop by rank within the row, rescale, elect signs, and average what agrees.

    Args:
        task_vectors: tuned minus base.
        options: see `DellaOptions`.
        generator: the tensor's random numbers.
        weights: one factor per task, as in TIES and task arithmetic.

    Returns:
        The merged task vector.
    """
    rows = [_drop_by_rank(row, options, generator.uniform(i, row.shape)) for i, row in enumerate(task_vectors)]
    kept = torch.stack(rows)
    if options.merger == "task_arithmetic":
        return task_arithmetic(kept, TaskArithmeticOptions(scaling_factor=options.scaling_factor), weights=weights)
    return ties(kept, TiesOptions(density=1.0, scaling_factor=options.scaling_factor), weights=weights)


def keep_probabilities(task_vector: Float[Tensor, "*shape"], density: float, epsilon: float) -> Float[Tensor, "*shape"]:
    """Return each entry's probability to be kept, by the rank of its magnitude in its row, in float64.

    Args:
        task_vector: one task's; ties in magnitude are ranked by index, the lower the lower.
        density: mean probability.
        epsilon: how far the probabilities reach from it.

    Returns:
        Probabilities from density - epsilon, for a row's smallest entry, to density + epsilon.
    """
    shape = task_vector.shape
    rows = task_vector.reshape(shape[0], -1) if len(shape) > 1 else task_vector.reshape(1, -1)
    entries = rows.shape[1]
    if entries < 2:
        return torch.full(shape, density, dtype=torch.float64, device=task_vector.device)
    steps = torch.arange(entries, dtype=torch.float64, device=rows.device) / (entries - 1)
    by_rank = (density - epsilon) + 2 * epsilon * steps
    order = rows.abs().argsort(dim=1, stable=True)
    probabilities = torch.empty(rows.shape, dtype=torch.float64, device=rows.device)
    return probabilities.scatter_(1, order, by_rank.expand(rows.shape)).reshape(shape)


def _drop_by_rank(
    task_vector: Float[Tensor, "*shape"], options: DellaOptions, uniform: Float[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    if not task_vector.numel():
        return task_vector
    probabilities = keep_probabilities(task_vector, options.density, options.epsilon)
    kept = uniform.to(task_vector.device) < probabilities
    return torch.where(kept, task_vector / probabilities, 0.0).to(task_vector.dtype)
