"""DARE with task arithmetic: drop entries at random, rescale the rest, add up.

    d_i    = z_i o tau_i / density,   z_i ~ Bernoulli(density) per entry, so that E[d_i] = tau_i
    merged = base + scaling_factor * sum_i weight_i d_i

The numbers of an entry come from (seed, tensor name, task name) and its place: the same on any device, in any order.
Rescaling is by 1 / density, as in the paper; some tools match the L1 norm instead, which is not unbiased. Works for
small updates (below about 0.005; `superpose compare` says whether yours are).

Cost: one pass, piece by piece, with one random number per entry and task. Prefer it for LLM fine-tunes with tiny
updates, where dropping half to nine tenths of them costs nothing and leaves fewer collisions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from jaxtyping import Float
from torch import Tensor

from superpose.maths.randomness import Generator, drop_and_rescale
from superpose.methods.task_arithmetic import TaskArithmeticOptions, task_arithmetic
from superpose.options import Range
from superpose.registry import merge_method


@dataclass(frozen=True, kw_only=True)
class DareOptions:
    """Options of DARE with task arithmetic."""

    density: Annotated[float, Range(0.001, 1)] = 0.5
    """Probability of an entry to be kept, 1 - p in the paper (FusionBench 0.5; 0.1 to 0.5 for LLMs)."""
    scaling_factor: Annotated[float, Range(-10, 10)] = 0.3
    """Factor on the summed task vectors, as in task arithmetic; 0.3 is usual for eight tasks."""


@merge_method(
    "dare",
    options=DareOptions,
    source="Yu et al. 2024, arXiv:2311.03099, drop and rescale; Ilharco et al. 2023, arXiv:2212.04089",
    whole_for=(),
    breaks={"same": "T identical tasks add up to T times the task; with scaling_factor 1/T it holds"},
)
def dare(
    task_vectors: Float[Tensor, "tasks *shape"],
    options: DareOptions,
    *,
    generator: Generator,
    weights: Float[Tensor, " tasks"] | None = None,
) -> Float[Tensor, "*shape"]:
    """Drop, rescale, and add up.

    Args:
        task_vectors: tuned minus base.
        options: see `DareOptions`.
        generator: the tensor's random numbers.
        weights: one factor per task, not normalised; 1 when not given.

    Returns:
        The merged task vector.
    """
    kept = drop_and_rescale(task_vectors, options.density, generator)
    return task_arithmetic(kept, TaskArithmeticOptions(scaling_factor=options.scaling_factor), weights=weights)
