"""PCB-Merging: weigh each entry by how strong it is in its task and how well it goes with the others.

    a_i     = |tau_i|, clipped to its quantiles `clip` and 1 - `clip`;   c_i = sign(tau_i) a_i
    beta_i  = exp( T * N(a_i)^2 ) o tanh( tau_i o sum_j tau_j ),   N(x) = (x - min x) / (max x - min x)
    scale_i = N( max(beta_i, b_i) ),   b_i = entry number floor((1 - density) d) of the d values of beta_i, ascending
    merged  = base + scaling_factor * sum_i weight_i c_i scale_i / sum_i scale_i

Quantiles, minima and maxima are of each task's whole task vector, exact. As in the authors' root script (the paper
has a softmax); the threshold's own entry gets scale 0, each task's best entry 1. Where all entries that count are
equal, N divides by zero there: here they get 1 if they agree with the sum, and 0 in a task of zeros. A task with fewer
entries than `clip` cuts off is clipped to nothing, with a warning: `clip` 0 keeps it.

Cost: six streaming passes (two for the quantiles, four for the thresholds) in constant memory, and the merge; all in
float64, piece by piece. Prefer it where tasks compete for the same entries and few of those matter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import prod
from typing import Annotated

import torch
from jaxtyping import Float
from torch import Tensor

from superpose.maths import order_statistics
from superpose.maths.order_statistics import Place
from superpose.maths.streaming import TensorChunks
from superpose.maths.tallies import Tally
from superpose.options import Range
from superpose.registry import Caution, Cost, Merged, merge_method

SMALLEST_SUM = 1e-12
"""Sum of scales below which the quotient is held (the authors' code)."""


@dataclass(frozen=True, kw_only=True)
class PcbOptions:
    """Options of PCB-Merging."""

    density: Annotated[float, Range(0.001, 1)] = 0.1
    """Fraction of each task vector's entries that count (r; the authors' 0.1 for language, 0.05 vision, 0.2 IA3)."""
    scaling_factor: Annotated[float, Range(-10, 10)] = 1.2
    """Factor on the merged task vector (lambda; the authors' vision script 1.2, searched in 0.8 to 2.2 for T5)."""
    clip: Annotated[float, Range(0, 0.4)] = 0.0001
    """Fraction of entries clipped at either end of the magnitudes (q; the authors' root script 0.0001, others 0.01)."""


@dataclass(frozen=True)
class TaskNumbers:
    """What one task's scales need from the whole model.

    Args:
        low: smallest magnitude after clipping.
        high: largest magnitude after clipping.
        threshold: value of beta below which an entry does not count.
        best: largest value of beta.
    """

    low: float
    high: float
    threshold: float = 0.0
    best: float = 0.0


@dataclass(frozen=True)
class PcbNumbers:
    """The numbers of all tasks; the same for every tensor."""

    by_task: tuple[TaskNumbers, ...]

    def within(self, start: int, stop: int) -> PcbNumbers:
        """Return the same: nothing depends on the place."""
        del start, stop
        return self


@dataclass
class Counts:
    """Counts of one pass, of a tensor or of several."""

    numel: int
    counts: Tally

    def __iadd__(self, other: Counts) -> Counts:
        self.numel += other.numel
        self.counts += other.counts
        return self


@dataclass(frozen=True)
class PcbState:
    """How far the search has come: places searched now, and the quantiles once they are known."""

    numel: int
    places: tuple[Place, ...]
    quantiles: tuple[TaskNumbers, ...] = ()


def pcb_cost(shape: Sequence[int], tasks: int, options: PcbOptions) -> Cost:
    """Return what a piece takes: everything again in float64, and the betas."""
    del options
    numel = prod(shape)
    return Cost(8 * numel * (2 * tasks + 6), 100.0 * numel * tasks)


class PcbSurvey:
    """Two places of every task's magnitudes (the quantiles), then two of its betas (threshold and largest)."""

    def memory(self, tasks: int, entries: int, dtype: torch.dtype) -> int:
        """Return the bytes that one tensor's counts take at most."""
        del dtype
        return 2 * tasks * order_statistics.row_bytes(entries, torch.float64)

    def passes(self, options: PcbOptions, dtype: torch.dtype) -> int:
        """Return the passes for the quantiles and for the betas, which are float64."""
        del options
        return order_statistics.passes(dtype) + order_statistics.passes(torch.float64)

    def measure(self, step: int, name: str, chunks: TensorChunks, state: PcbState | None, options) -> Counts:
        """Return one tensor's counts of the next digit."""
        del name, options
        first = order_statistics.passes(chunks.dtype)
        on_betas = step >= first
        step, dtype = (step - first, torch.float64) if on_betas else (step, chunks.dtype)
        places = state.places if state else _two_places(chunks.tasks)
        counts = order_statistics.no_counts(len(places), step, dtype)
        for _, chunk in chunks:
            values = _betas(chunk, state.quantiles) if on_betas and state else chunk.abs()
            order_statistics.count(values, step, places, counts)
        return Counts(chunks.numel, counts)

    def finish(self, step: int, total: Counts, state: PcbState | None, options: PcbOptions, dtype) -> PcbState:
        """Return the places with one more digit; after the quantiles, begin with the betas."""
        numel = total.numel
        first = order_statistics.passes(dtype)
        on_betas = step >= first
        if state is None:
            state = PcbState(numel, _two_places(total.counts.rows // 2, *_quantile_ranks(numel, options.clip)))
        digit, kept = (step - first, torch.float64) if on_betas else (step, dtype)
        places = order_statistics.narrow(state.places, total.counts, digit, kept)
        if step == first - 1:
            values = [order_statistics.value_of(place, dtype) for place in places]
            quantiles = tuple(TaskNumbers(low, high) for low, high in zip(values[::2], values[1::2], strict=True))
            ranks = _threshold_rank(numel, options.density), max(numel - 1, 0)
            return PcbState(numel, _two_places(len(quantiles), *ranks), quantiles)
        return PcbState(numel, places, state.quantiles)

    def for_tensor(self, name: str, chunks: TensorChunks, state: PcbState, options: PcbOptions) -> PcbNumbers:
        """Return the numbers of all tasks."""
        del name, chunks, options
        values = [order_statistics.value_of(place, torch.float64) for place in state.places]
        found = zip(state.quantiles, values[::2], values[1::2], strict=True)
        return PcbNumbers(tuple(TaskNumbers(q.low, q.high, threshold, best) for q, threshold, best in found))


@merge_method(
    "pcb",
    options=PcbOptions,
    source="Du et al. 2024, arXiv:2410.02396, balancing, drop and rescale; as in the authors' root script",
    whole_for=(),
    survey=PcbSurvey(),
    cost=pcb_cost,
    breaks={
        "single": "one task comes back on its strongest entries, the largest of them clipped",
        "same": "as one task: on its strongest entries, clipped",
        "zero": "the number of tasks is in the exponent, and weighs strong entries against well-matched ones",
        "scale": "the hyperbolic tangent bends large products; for small task vectors a factor comes out",
    },
    plain={"density": 1.0, "scaling_factor": 1.0, "clip": 0.0},
)
def pcb(
    task_vectors: Float[Tensor, "tasks *shape"],
    options: PcbOptions,
    *,
    weights: Float[Tensor, " tasks"] | None = None,
    survey: PcbNumbers | None = None,
) -> Merged:
    """Combine the task vectors, each entry by the tasks' scales there.

    Args:
        task_vectors: tuned minus base.
        options: see `PcbOptions`.
        weights: one factor per task (lambda_i in the paper); 1 when not given.
        survey: the tasks' numbers; when not given, the tensor is taken for the whole model.

    Returns:
        The merged task vector; with a warning where clipping leaves nothing of a task.
    """
    flat = task_vectors.reshape(len(task_vectors), -1)
    if survey is None:
        survey = _numbers(flat, options)
    betas = _betas(flat, survey.by_task)
    merged = torch.zeros_like(betas[0])
    total = torch.zeros_like(betas[0])
    for task, (row, beta, numbers) in enumerate(zip(flat, betas, survey.by_task, strict=True)):
        exact, scale = row.double(), _scale(beta, numbers)
        clipped = exact.sign() * exact.abs().clamp(numbers.low, numbers.high)
        merged += clipped * scale * (1.0 if weights is None else float(weights[task]))
        total += scale
    merged = options.scaling_factor * merged / total.clamp_min(SMALLEST_SUM)
    clipped_away = tuple(
        task for task, number in enumerate(survey.by_task) if number.high == 0 and bool(flat[task].any())
    )
    cautions = (
        (Caution("fewer entries differ than clip cuts off: choose clip 0", clipped_away),) if clipped_away else ()
    )
    return Merged(merged.to(task_vectors.dtype).reshape(task_vectors.shape[1:]), cautions=cautions)


def _betas(flat: Float[Tensor, "tasks entries"], numbers: tuple[TaskNumbers, ...]) -> Float[Tensor, "tasks entries"]:
    """Return intra- times inter-balancing, in float64: products of small entries are tiny."""
    exact = flat.double()
    together = exact.sum(dim=0)
    betas = torch.empty_like(exact)
    for row, number, out in zip(exact, numbers, betas, strict=True):
        strength = torch.zeros_like(row)
        if number.high > number.low:
            strength = (row.abs().clamp(number.low, number.high) - number.low) / (number.high - number.low)
        torch.mul((len(flat) * strength.square()).exp(), (row * together).tanh(), out=out)
    return betas


def _scale(beta: Float[Tensor, " entries"], numbers: TaskNumbers) -> Float[Tensor, " entries"]:
    """Return the drop and rescale of one task."""
    span = numbers.best - numbers.threshold
    if span > 0:
        return (beta - numbers.threshold).clamp_min(0) / span
    return (beta == numbers.best).double() if numbers.best > 0 else torch.zeros_like(beta)


def _numbers(flat: Float[Tensor, "tasks entries"], options: PcbOptions) -> PcbNumbers:
    """Return the numbers of a model of one tensor."""
    numel = flat.shape[1]
    if not numel:
        return PcbNumbers((TaskNumbers(0.0, 0.0),) * len(flat))
    low, high = _quantile_ranks(numel, options.clip)
    magnitudes = flat.double().abs().sort(dim=1).values
    quantiles = tuple(TaskNumbers(float(row[low]), float(row[high])) for row in magnitudes)
    ordered = _betas(flat, quantiles).sort(dim=1).values
    place = _threshold_rank(numel, options.density)
    found = zip(quantiles, ordered, strict=True)
    return PcbNumbers(tuple(TaskNumbers(q.low, q.high, float(row[place]), float(row[-1])) for q, row in found))


def _two_places(tasks: int, first: int = 0, second: int = 0) -> tuple[Place, ...]:
    return tuple(Place(task, rank) for task in range(tasks) for rank in (first, second))


def _quantile_ranks(numel: int, clip: float) -> tuple[int, int]:
    """Return the 0-based places of the two quantiles: any clip > 0 clips the largest entry, as in the code."""
    # As the decimal number that was written: in binary 1 - 0.1 is less than 0.9.
    clipped = Fraction(str(float(clip))) * numel
    high = max(math.floor(numel - clipped - 1), 0)
    return min(math.floor(clipped), high), high


def _threshold_rank(numel: int, density: float) -> int:
    return min(math.floor(numel * (1 - Fraction(str(float(density))))), max(numel - 1, 0))
