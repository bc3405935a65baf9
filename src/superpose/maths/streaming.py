"""Exact selection by magnitude over a model that is never in memory: a radix search in read-only passes.

A non-negative float orders like its bit pattern. The first pass counts entries by the leading bits of their magnitude,
which shows the bin that holds the threshold; each later pass counts, inside that bin, by the next bits. Memory is set
by the number of bins. The last pass keeps its counts per tensor, sparse, so that equal magnitudes are kept in plan
order: float32 takes two passes, float64 three.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from superpose.kinds import Kind
from superpose.maths.randomness import Generator
from superpose.maths.sparsify import KEEP_ALL, KEEP_NONE, Cut, Cuts, count_kept
from superpose.maths.tallies import Tally

# Widths of the digits, leading first, of the magnitude's bit pattern (the sign bit is dropped).
# The first table of float32 fits a core's own cache; the last is small enough to be kept per tensor.
_DIGITS = {torch.float32: (18, 13), torch.float64: (21, 21, 21)}
_BITS = {torch.float32: torch.int32, torch.float64: torch.int64}


@dataclass(frozen=True)
class TensorChunks:
    """The stacked task vectors of one tensor, read in pieces of the flattened tensor.

    Args:
        tasks: number of task vectors.
        numel: entries of the tensor.
        size: entries of a piece.
        read: (start, stop) -> the task vectors' entries start..stop.
        weights: the recipe's weight of each model.
        shape: of the tensor; flat when not given.
        kind: what the tensor is in its network.
        generator: the tensor's random numbers.
    """

    tasks: int
    numel: int
    size: int
    read: Callable[[int, int], Float[Tensor, "tasks entries"]]
    weights: tuple[float, ...] | None = None
    shape: tuple[int, ...] = ()
    kind: Kind | None = None
    generator: Generator | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of what is read; known of a tensor without entries too."""
        return self.read(0, 0).dtype

    def whole(self) -> Float[Tensor, "tasks *shape"]:
        """Return the whole stack, in the tensor's shape."""
        return self.read(0, self.numel).reshape(self.tasks, *self.shape)

    def __iter__(self) -> Iterator[tuple[int, Float[Tensor, "tasks entries"]]]:
        for start in range(0, self.numel, self.size):
            yield start, self.read(start, min(start + self.size, self.numel))


@dataclass(frozen=True)
class Trim:
    """What `MagnitudeSurvey` reads of a method's options.

    Args:
        density: fraction of the entries kept.
        density_scope: "model" or "tensor".
    """

    density: float
    density_scope: str


Sparse = tuple[np.ndarray, np.ndarray]
"""Values of a digit that occur, ascending, and how often."""


@dataclass
class PassValue:
    """One tensor's counts of a digit, or the sum of several.

    Args:
        numel: entries seen.
        counts: a row for each task.
        by_tensor: (name, sparse counts per task) of each tensor, in the order of the plan; for the last digit alone.
    """

    numel: int
    counts: Tally
    by_tensor: tuple[tuple[str, tuple[Sparse, ...]], ...]

    def __iadd__(self, other: PassValue) -> PassValue:
        self.numel += other.numel
        self.counts += other.counts
        self.by_tensor += other.by_tensor
        return self


@dataclass(frozen=True)
class TaskSearch:
    """How far the search for one task's threshold has come.

    Args:
        kept: entries still to be kept among those with this prefix; all are when negative.
        prefix: the leading bits of the threshold found so far.
        ties: after the last pass, tensor name -> entries equal to the threshold to keep (all or none if not named).
    """

    kept: int
    prefix: int
    ties: dict[str, int]


@dataclass(frozen=True)
class SearchState:
    """The thresholds of all tasks, as far as they are known."""

    dtype: torch.dtype
    by_task: tuple[TaskSearch, ...]


class MagnitudeSurvey:
    """Finds, exactly and in constant memory, where to cut each task's entries by magnitude.

    Reads from a method's options `density` and, where there is one, `density_scope`: "model" finds one threshold per
    task over all tensors, "tensor" one per task and tensor.
    """

    def memory(self, tasks: int, dtype: torch.dtype) -> int:
        """Return the bytes of the counts that one tensor's value takes at most."""
        return tasks * 8 * max(1 << width for width in _DIGITS[dtype])

    def passes(self, options, dtype: torch.dtype) -> int:
        """Return the number of passes over the model: none for scope "tensor" or when nothing is cut."""
        if options.density_scope == "tensor" or options.density in (0, 1):
            return 0
        return len(_DIGITS[dtype])

    def measure(self, step: int, name: str, chunks, state: SearchState | None, options) -> PassValue:
        """Return one tensor's counts of digit number `step`."""
        widths = _DIGITS[chunks.dtype]
        counts = Tally(chunks.tasks, 1 << widths[step])
        for _, chunk in chunks:
            for task, row in enumerate(chunk):
                _count(row, step, state.by_task[task] if state else None, counts, task)
        last = step == len(widths) - 1
        occurring = tuple(counts.occurring(task) for task in range(chunks.tasks)) if last else ()
        return PassValue(chunks.numel, counts, ((name, occurring),) if last else ())

    def finish(self, step: int, total: PassValue, state: SearchState | None, options, dtype) -> SearchState:
        """Return the search after pass `step`: one more digit of every threshold."""
        if state is None:
            kept = count_kept(options.density, total.numel)
            start = TaskSearch(-1 if kept >= total.numel else kept, 0, {})
            state = SearchState(dtype, (start,) * total.counts.rows)
        width = _DIGITS[dtype][step]
        tensors = dict(total.by_tensor)
        searches = tuple(
            _narrow(search, total.counts.row(task), width, {name: value[task] for name, value in tensors.items()})
            for task, search in enumerate(state.by_task)
        )
        return SearchState(dtype, searches)

    def for_tensor(self, name: str, chunks, state: SearchState | None, options) -> Cuts:
        """Return the cuts of one tensor's task vectors."""
        if options.density == 1:
            return Cuts((KEEP_ALL,) * chunks.tasks)
        if options.density == 0:
            return Cuts((KEEP_NONE,) * chunks.tasks)
        if chunks.numel == 0:
            return Cuts((KEEP_NONE,) * chunks.tasks)
        if state is None:
            state = self._search_tensor(name, chunks, options)
        return Cuts(tuple(_cut(task, search, name, chunks, state.dtype) for task, search in enumerate(state.by_task)))

    def _search_tensor(self, name: str, chunks, options) -> SearchState:
        """Run the passes over one tensor alone."""
        dtype, state = chunks.dtype, None
        for step in range(len(_DIGITS[dtype])):
            value = self.measure(step, name, chunks, state, options)
            state = self.finish(step, value, state, options, dtype)
        assert state is not None, "float32 and float64 have digits"
        return state


def _count(row: Float[Tensor, " entries"], step: int, search: TaskSearch | None, counts: Tally, task: int) -> None:
    """Count the values of one digit, of the entries whose leading bits are those found so far."""
    if search is not None and search.kept < 0:
        return
    widths = _DIGITS[row.dtype]
    remaining = sum(widths[step + 1 :])
    bits = row.abs().view(_BITS[row.dtype])
    if search is not None and step > 0:
        bits = bits[(bits >> (remaining + widths[step])) == search.prefix]
        digits = (bits >> remaining) & ((1 << widths[step]) - 1)
    else:
        digits = bits >> remaining
    counts.count(task, digits.numpy(force=True))


def _count_of(counts: Sparse, digit: int) -> int:
    place = int(np.searchsorted(counts[0], digit))
    found = place < len(counts[0]) and counts[0][place] == digit
    return int(counts[1][place]) if found else 0


def _narrow(search: TaskSearch, counts: np.ndarray, width: int, by_tensor: dict[str, Sparse]) -> TaskSearch:
    """Return the search with one more digit of the threshold; with the ties shared out when it is the last."""
    if search.kept < 0:
        return search
    from_top = np.cumsum(counts[::-1])
    place = int(np.searchsorted(from_top, search.kept))
    digit = len(counts) - 1 - place
    kept = search.kept - (int(from_top[place - 1]) if place else 0)
    ties, left = {}, kept
    for name, tensor_counts in by_tensor.items():
        ties[name] = min(left, _count_of(tensor_counts, digit))
        left -= ties[name]
    return TaskSearch(kept, (search.prefix << width) | digit, ties)


def _cut(task: int, search: TaskSearch, name: str, chunks, dtype: torch.dtype) -> Cut:
    """Return the cut of one task: the threshold, and the place of the last tie that is kept."""
    if search.kept < 0:
        return KEEP_ALL
    bits = np.array(search.prefix, np.int32 if dtype == torch.float32 else np.int64)
    threshold = float(bits.view(np.float32 if dtype == torch.float32 else np.float64))
    wanted = search.ties[name]
    if wanted == 0 or threshold == 0.0:
        return Cut(threshold, 0)
    for start, chunk in chunks:
        places = (chunk[task].abs() == threshold).nonzero().squeeze(1)
        if len(places) >= wanted:
            return Cut(threshold, start + int(places[wanted - 1]) + 1)
        wanted -= len(places)
    raise AssertionError(f"{name}: the tensor changed between two passes")
