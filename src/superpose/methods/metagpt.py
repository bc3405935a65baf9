"""MetaGPT: task arithmetic whose coefficients are the tasks' shares of the squared norm.

    lambda_i = ||tau_i||^2 / sum_j ||tau_j||^2   over the whole model, in float64;  1/T where all are zero
    merged   = base + sum_i lambda_i tau_i

The coefficients add up to 1: a weighted average that favours the task that moved furthest, and weak for many tasks.
The task vectors can be processed first, and the norms are those of what is left: `trim` keeps the largest `density` of
the entries, `ties` those of them that agree with the elected sign (at density 1 too), `dare` drops and rescales.

Cost: one streaming pass for the norms, one more where a threshold over the model is needed, and the merge, piece by
piece. Prefer it for two or three tasks of like importance when nothing can be tuned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from superpose.maths.combine import weighted_mean
from superpose.maths.randomness import Generator, drop_and_rescale
from superpose.maths.signs import elect_signs
from superpose.maths.sparsify import Cuts, apply_cuts, find_cuts
from superpose.maths.streaming import MagnitudeSurvey, TensorChunks, Trim
from superpose.options import Range
from superpose.registry import Cost, merge_method


@dataclass(frozen=True, kw_only=True)
class MetaGptOptions:
    """Options of MetaGPT."""

    density: Annotated[float, Range(0.001, 1)] = 1.0
    """Fraction of each task vector's entries kept first; 1 as published, 0.55 combined with TIES or DARE."""
    process: Literal["trim", "ties", "dare"] = "trim"
    """How entries are left out: the smallest, those against the elected sign too, or at random with rescaling."""
    density_scope: Literal["model", "tensor"] = "model"
    """Whether `trim` and `ties` count the kept entries over the whole model (as TIES does) or in each tensor."""

    def trim(self) -> Trim:
        """Return how the task vectors are trimmed."""
        return Trim(1.0 if self.process == "dare" else self.density, self.density_scope)


@dataclass(frozen=True)
class MetaGptNumbers:
    """The coefficients, and where to cut one tensor's task vectors."""

    coefficients: tuple[float, ...]
    cuts: Cuts

    def within(self, start: int, stop: int) -> MetaGptNumbers:
        """Return the same for the entries start..stop of the flattened tensor."""
        return MetaGptNumbers(self.coefficients, self.cuts.within(start, stop))


@dataclass(frozen=True)
class Shares:
    """The finished search for thresholds, and the coefficients."""

    search: Any
    coefficients: tuple[float, ...]


def metagpt_cost(shape: Sequence[int], tasks: int, options: MetaGptOptions) -> Cost:
    """Return what a piece takes: processed task vectors, their squares in float64, signs and temporaries."""
    del options
    numel = prod(shape)
    return Cost(numel * (20 * tasks + 24), 20.0 * numel * tasks)


class MetaGptSurvey:
    """Thresholds where task vectors are trimmed, then a pass that adds up squared norms."""

    def __init__(self) -> None:
        self.magnitudes = MagnitudeSurvey()

    def memory(self, tasks: int, entries: int, dtype: torch.dtype) -> int:
        """Return the bytes that one tensor's counts take at most."""
        return self.magnitudes.memory(tasks, entries, dtype)

    def passes(self, options: MetaGptOptions, dtype: torch.dtype) -> int:
        """Return the passes for the thresholds and one for the norms."""
        return self.magnitudes.passes(options.trim(), dtype) + 1

    def reads(self, options: MetaGptOptions, dtype: torch.dtype) -> int:
        """Return how often the model is read as a rule."""
        return self.magnitudes.reads(options.trim(), dtype) + 1

    def measure(self, step: int, name: str, chunks: TensorChunks, state, options: MetaGptOptions) -> Any:
        """Return one tensor's counts, or in the last pass its tasks' squared norms."""
        if step < self.magnitudes.passes(options.trim(), chunks.dtype):
            return self.magnitudes.measure(step, name, chunks, state, options.trim())
        cuts = self.magnitudes.for_tensor(name, chunks, state, options.trim())
        total = torch.zeros(chunks.tasks, dtype=torch.float64)
        for start, chunk in chunks:
            generator = chunks.generator.within(start) if chunks.generator else None
            processed = _process(chunk, options, cuts.within(start, start + chunk.shape[1]), generator)
            total += _squared_norms(processed)
        return total

    def finish(self, step: int, total: Any, state, options: MetaGptOptions, dtype: torch.dtype) -> Any:
        """Return the state of the search, or in the end the search and the coefficients."""
        if step < self.magnitudes.passes(options.trim(), dtype):
            return self.magnitudes.finish(step, total, state, options.trim(), dtype)
        return Shares(state, _coefficients(total))

    def for_tensor(self, name: str, chunks: TensorChunks, state: Shares, options: MetaGptOptions) -> MetaGptNumbers:
        """Return the coefficients and the cuts of one tensor."""
        cuts = self.magnitudes.for_tensor(name, chunks, state.search, options.trim())
        return MetaGptNumbers(state.coefficients, cuts)


@merge_method(
    "metagpt",
    options=MetaGptOptions,
    source="Zhou et al. 2024, arXiv:2406.11385, closed form of the coefficients; no official code",
    whole_for=(),
    survey=MetaGptSurvey(),
    cost=metagpt_cost,
)
def metagpt(
    task_vectors: Float[Tensor, "tasks *shape"],
    options: MetaGptOptions,
    *,
    generator: Generator | None = None,
    survey: MetaGptNumbers | None = None,
) -> Float[Tensor, "*shape"]:
    """Add up the task vectors by their shares of the squared norm.

    Args:
        task_vectors: tuned minus base.
        options: see `MetaGptOptions`.
        generator: the tensor's random numbers; needed for `process: dare` alone.
        survey: the coefficients and this tensor's cuts; when not given, the tensor is taken for the whole model.

    Returns:
        The merged task vector.
    """
    cuts = survey.cuts if survey else find_cuts(task_vectors, options.trim().density)
    processed = _process(task_vectors, options, cuts, generator)
    coefficients = (
        survey.coefficients if survey else _coefficients(_squared_norms(processed.reshape(len(processed), -1)))
    )
    return weighted_mean(processed, coefficients)


def _process(
    task_vectors: Float[Tensor, "tasks *shape"], options: MetaGptOptions, cuts: Cuts, generator: Generator | None
) -> Float[Tensor, "tasks *shape"]:
    if options.process == "dare":
        if generator is None and options.density < 1:
            raise ValueError("process='dare' needs random numbers")
        return task_vectors if generator is None else drop_and_rescale(task_vectors, options.density, generator)
    trimmed = apply_cuts(task_vectors, cuts)
    if options.process == "trim":
        return trimmed
    agrees = trimmed * elect_signs(trimmed) > 0
    return torch.where(agrees, trimmed, 0.0)


def _squared_norms(rows: Float[Tensor, "tasks entries"]) -> Float[Tensor, " tasks"]:
    # In float64 no square of a float32 overflows, nor does one vanish.
    return rows.double().square().sum(dim=1).cpu()


def _coefficients(squared_norms: Float[Tensor, " tasks"]) -> tuple[float, ...]:
    total = float(squared_norms.sum())
    if total == 0:
        return (1 / len(squared_norms),) * len(squared_norms)
    return tuple((squared_norms / total).tolist())
