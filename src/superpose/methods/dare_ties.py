"""DARE with TIES: drop entries at random, rescale the rest, elect signs, average what agrees.

    d_i    = z_i o tau_i / density,   z_i ~ Bernoulli(density) per entry
    t_i    = the `ties_density` entries of d_i of largest magnitude; all of them by default
    merged = base + scaling_factor * ( mean of the t_i that have the sign of their sum, entry by entry )

Dropping takes the place of TIES' trimming, so nothing is trimmed by default. Entries dropped by all tasks stay at the
base. `aggregate: sum` adds up what agrees instead.

Cost: one pass, piece by piece, with one random number per entry and task; one pass more where `ties_density` trims
over the model. Prefer it over `dare` where tasks disagree in sign.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from superpose.maths.randomness import Generator, drop_and_rescale
from superpose.maths.streaming import TensorChunks
from superpose.methods.ties import TiesNumbers, TiesOptions, TiesSurvey, ties
from superpose.options import Range
from superpose.registry import merge_method


@dataclass(frozen=True, kw_only=True)
class DareTiesOptions:
    """Options of DARE with TIES."""

    density: Annotated[float, Range(0.001, 1)] = 0.5
    """Probability of an entry to be kept by DARE, 1 - p in the paper (FusionBench 0.5; 0.1 to 0.5 for LLMs)."""
    ties_density: Annotated[float, Range(0, 1)] = 1.0
    """Fraction of what DARE leaves that TIES keeps, of all entries; 1 trims nothing, as usual with DARE."""
    scaling_factor: Annotated[float, Range(-10, 10)] = 1.0
    """Factor on the merged task vector (lambda); 1 as in TIES."""
    density_scope: Literal["model", "tensor"] = "model"
    """Whether TIES counts the kept entries over the whole model (the paper) or in each tensor."""
    aggregate: Literal["mean", "sum"] = "mean"
    """How the agreeing values are combined; mean as in TIES, sum as mergekit does without normalising."""

    def of_ties(self) -> TiesOptions:
        """Return the options of the second step."""
        return TiesOptions(
            density=self.ties_density, scaling_factor=self.scaling_factor,
            density_scope=self.density_scope, aggregate=self.aggregate,
        )  # fmt: skip


class DareTiesSurvey:
    """TIES' survey, over what DARE leaves."""

    def __init__(self) -> None:
        self.ties = TiesSurvey()

    def memory(self, tasks: int, entries: int, dtype: torch.dtype) -> int:
        """Return the bytes that one tensor's counts take at most."""
        return self.ties.memory(tasks, entries, dtype)

    def passes(self, options: DareTiesOptions, dtype: torch.dtype) -> int:
        """Return the passes for TIES' thresholds."""
        return self.ties.passes(options.of_ties(), dtype)

    def reads(self, options: DareTiesOptions, dtype: torch.dtype) -> int:
        """Return how often the model is read as a rule."""
        return self.ties.reads(options.of_ties(), dtype)

    def measure(self, step: int, name: str, chunks: TensorChunks, state, options: DareTiesOptions) -> Any:
        """Return one tensor's counts."""
        return self.ties.measure(step, name, dropped(chunks, options.density), state, options.of_ties())

    def finish(self, step: int, total: Any, state, options: DareTiesOptions, dtype: torch.dtype) -> Any:
        """Return the state of the search."""
        return self.ties.finish(step, total, state, options.of_ties(), dtype)

    def for_tensor(self, name: str, chunks: TensorChunks, state, options: DareTiesOptions) -> TiesNumbers:
        """Return the cuts of one tensor."""
        return self.ties.for_tensor(name, dropped(chunks, options.density), state, options.of_ties())


@merge_method(
    "dare_ties",
    options=DareTiesOptions,
    source="Yu et al. 2024, arXiv:2311.03099, drop and rescale; Yadav et al. 2023, arXiv:2306.01708, Algorithm 1",
    whole_for=(),
    survey=DareTiesSurvey(),
)
def dare_ties(
    task_vectors: Float[Tensor, "tasks *shape"],
    options: DareTiesOptions,
    *,
    generator: Generator,
    weights: Float[Tensor, " tasks"] | None = None,
    survey: TiesNumbers | None = None,
) -> Float[Tensor, "*shape"]:
    """Drop, rescale, elect signs, and average what agrees.

    Args:
        task_vectors: tuned minus base.
        options: see `DareTiesOptions`.
        generator: the tensor's random numbers.
        weights: one factor per task, as in TIES.
        survey: this tensor's numbers for TIES; when not given, the tensor is taken for the whole model.

    Returns:
        The merged task vector.
    """
    kept = drop_and_rescale(task_vectors, options.density, generator)
    return ties(kept, options.of_ties(), weights=weights, survey=survey)


def dropped(chunks: TensorChunks, density: float) -> TensorChunks:
    """Return the chunks of what DARE leaves."""
    generator = chunks.generator
    if density == 1 or generator is None:
        return chunks

    def read(start: int, stop: int) -> Float[Tensor, "tasks entries"]:
        return drop_and_rescale(chunks.read(start, stop), density, generator.within(start))

    return replace(chunks, read=read)
