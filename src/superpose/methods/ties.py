"""TIES: trim each task vector, elect a sign per entry, average what agrees with it.

    trim     t_i = the `density` entries of tau_i of largest magnitude
    elect    g = sign(sum_i w_i t_i)
    merge    m = mean of the w_i t_i that have sign g, 0 where none has
    apply    merged = base + scaling_factor * m

The threshold is one per task over the whole model, as in the paper (`density_scope: model`, found in one streaming
pass as a rule), or one per task and tensor.

Cost: one streaming pass as a rule and the merge, piece by piece. Prefer it where tasks' updates are sparse and disagree
in sign.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from superpose.maths.signs import disjoint_merge, elect_signs
from superpose.maths.sparsify import Cuts, apply_cuts, find_cuts
from superpose.maths.streaming import MagnitudeSurvey, SearchState
from superpose.options import Range
from superpose.registry import merge_method


@dataclass(frozen=True, kw_only=True)
class TiesOptions:
    """Options of TIES."""

    density: Annotated[float, Range(0, 1)] = 0.2
    """Fraction of each task vector's entries kept (k in the paper)."""
    scaling_factor: Annotated[float, Range(-10, 10)] = 1.0
    """Factor on the merged task vector (lambda); the paper's 1 without validation data."""
    density_scope: Literal["model", "tensor"] = "model"
    """Whether the kept entries are counted over the whole model or in each tensor."""
    tie: Literal["zero", "positive", "majority"] = "zero"
    """Sign where the sum is exactly zero: none (the entry stays at the base), plus, or the model's majority sign."""
    aggregate: Literal["mean", "sum", "max"] = "mean"
    """How the agreeing values are combined."""


@dataclass(frozen=True)
class TiesNumbers:
    """What trimming and electing one tensor take from elsewhere: the cuts, and the sign of exact ties."""

    cuts: Cuts
    tie_sign: float = 0.0

    def within(self, start: int, stop: int) -> TiesNumbers:
        """Return the same for the entries start..stop of the flattened tensor."""
        return TiesNumbers(self.cuts.within(start, stop), self.tie_sign)


@dataclass(frozen=True)
class MajorityState:
    """The finished search for thresholds, and the model's majority sign."""

    search: SearchState | None
    tie_sign: float


class TiesSurvey:
    """Thresholds over the model; for `tie: majority` one more pass that adds up all elected signs."""

    def __init__(self) -> None:
        self.magnitudes = MagnitudeSurvey()

    def memory(self, tasks: int, entries: int, dtype: torch.dtype) -> int:
        """Return the bytes that one tensor's counts take at most."""
        return self.magnitudes.memory(tasks, entries, dtype)

    def passes(self, options: TiesOptions, dtype: torch.dtype) -> int:
        """Return the passes for the thresholds, and one for the majority sign if it is asked for."""
        return self.magnitudes.passes(options, dtype) + (options.tie == "majority")

    def reads(self, options: TiesOptions, dtype: torch.dtype) -> int:
        """Return how often the model is read as a rule."""
        return self.magnitudes.reads(options, dtype) + (options.tie == "majority")

    def measure(self, step: int, name: str, chunks, state, options: TiesOptions) -> Any:
        """Return one tensor's counts, or in the last pass the sum of its elected signs."""
        if step < self.magnitudes.passes(options, chunks.dtype):
            return self.magnitudes.measure(step, name, chunks, state, options)
        cuts = self.magnitudes.for_tensor(name, chunks, state, options)
        weights = None if chunks.weights is None else torch.tensor(chunks.weights, dtype=torch.float64)
        total = 0
        for start, chunk in chunks:
            trimmed = apply_cuts(chunk, cuts.within(start, start + chunk.shape[1]))
            total += int(elect_signs(_weighted(trimmed, weights)).sum(dtype=torch.float64))
        return total

    def finish(self, step: int, total: Any, state, options: TiesOptions, dtype: torch.dtype) -> Any:
        """Return the state of the search, or in the end the search and the majority sign."""
        if step < self.magnitudes.passes(options, dtype):
            return self.magnitudes.finish(step, total, state, options, dtype)
        return MajorityState(state, float((total > 0) - (total < 0)))

    def for_tensor(self, name: str, chunks, state, options: TiesOptions) -> TiesNumbers:
        """Return the cuts of one tensor and the sign of exact ties."""
        search, sign = state, 1.0 if options.tie == "positive" else 0.0
        if isinstance(state, MajorityState):
            search, sign = state.search, state.tie_sign
        return TiesNumbers(self.magnitudes.for_tensor(name, chunks, search, options), sign)


@merge_method(
    "ties",
    options=TiesOptions,
    source="Yadav et al. 2023, arXiv:2306.01708, Algorithm 1",
    whole_for=(),
    survey=TiesSurvey(),
)
def ties(
    task_vectors: Float[Tensor, "tasks *shape"],
    options: TiesOptions,
    *,
    weights: Float[Tensor, " tasks"] | None = None,
    survey: TiesNumbers | None = None,
) -> Float[Tensor, "*shape"]:
    """Trim, elect signs, and average what agrees.

    Args:
        task_vectors: tuned minus base.
        options: see `TiesOptions`.
        weights: one factor per task, applied before the election; the mean divides by the sum of the agreeing ones.
        survey: this tensor's numbers; when not given, the tensor is taken for the whole model.

    Returns:
        The merged task vector.
    """
    if survey is None:
        survey = TiesNumbers(find_cuts(task_vectors, options.density), 1.0 if options.tie == "positive" else 0.0)
        if options.tie == "majority":
            signs = elect_signs(_weighted(apply_cuts(task_vectors, survey.cuts), weights))
            survey = TiesNumbers(survey.cuts, float(torch.sign(signs.sum(dtype=torch.float64))))
    trimmed = apply_cuts(task_vectors, survey.cuts)
    signs = elect_signs(_weighted(trimmed, weights), survey.tie_sign)
    merged = disjoint_merge(trimmed, signs, aggregate=options.aggregate, weights=weights)
    return merged if options.scaling_factor == 1 else merged.mul_(options.scaling_factor)


def _weighted(
    task_vectors: Float[Tensor, "tasks *shape"], weights: Float[Tensor, " tasks"] | None
) -> Float[Tensor, "tasks *shape"]:
    if weights is None or bool((weights == 1).all()):
        return task_vectors
    factors = weights.to(task_vectors).reshape(-1, *[1] * (task_vectors.ndim - 1))
    return task_vectors * factors
