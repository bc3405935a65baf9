"""Exact selection by magnitude over a model that is never in memory, in read-only passes.

A non-negative float orders like its bit pattern, so a threshold is a pattern, found by counting. A sample shows about
where it is: the next pass counts how many entries lie above a few patterns there, or, where many patterns lie close
together, how often each occurs. That is one reading at the speed of comparisons. Where the sample was wrong, the next
passes count by leading bits first, whatever the distribution; the threshold is exact in every case. Where entries
equal to the threshold have to be shared out in plan order, they are counted by tensor, in the same pass or in one more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from superpose.kinds import Kind
from superpose.maths import tallies
from superpose.maths.low_rank import LowRank
from superpose.maths.randomness import Generator
from superpose.maths.samples import LARGEST_SAMPLE, Sample, take_sample
from superpose.maths.sparsify import KEEP_ALL, KEEP_NONE, Cut, Cuts, count_kept, find_cuts
from superpose.maths.tallies import Tally

# Bins of a table: those of float32 fit a core's own cache, those of float64 end a search in three passes.
_BINS = {torch.float32: 1 << 18, torch.float64: 1 << 21}
_INTEGERS = {torch.float32: np.int32, torch.float64: np.int64}
_INFINITY = {torch.float32: 0x7F800000, torch.float64: 0x7FF0000000000000}
"""The pattern above those of all numbers."""
_PASSES = {torch.float32: 5, torch.float64: 4}
"""A sample (of float32), as many tables as the widest interval takes, one for a wrong guess, one for ties."""
_PIECE = 1 << 18
"""Entries counted at a time: what is made of them stays in the caches."""
_PIVOTS = 3
_LIKELY = 0.8
"""Where so many patterns make up that share of what is near the threshold, entries are compared with those alone."""


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
        factors: the task matrices as low-rank updates, for a method that does not want them written out.
        statistics: (start, stop) -> the entries start..stop of each model's statistics, where there are some.
    """

    tasks: int
    numel: int
    size: int
    read: Callable[[int, int], Float[Tensor, "tasks entries"]]
    weights: tuple[float, ...] | None = None
    shape: tuple[int, ...] = ()
    kind: Kind | None = None
    generator: Generator | None = None
    factors: tuple[LowRank, ...] | None = None
    statistics: Callable[[int, int], Float[Tensor, "tasks entries"]] | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of what is read; known of a tensor without entries too."""
        return self.read(0, 0).dtype

    @property
    def device(self) -> torch.device:
        """Device of what is read."""
        return self.read(0, 0).device

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


Counts = tuple[tuple[int, ...], ...]
"""For each task, how many entries reach each of its edges."""


@dataclass
class PassValue:
    """What one pass found in a tensor, or the sum of several.

    Args:
        numel: entries seen.
        sample: some of them, in the pass that takes a sample.
        at_least: how many entries reach the edges.
        table: counts of the patterns in each task's interval.
        by_tensor: (name, at_least) of each tensor, in the order of the plan.
    """

    numel: int
    sample: Sample | None = None
    at_least: Counts = ()
    table: Tally | None = None
    by_tensor: tuple[tuple[str, Counts], ...] = ()

    def __iadd__(self, other: PassValue) -> PassValue:
        self.numel += other.numel
        if self.sample is not None and other.sample is not None:
            self.sample += other.sample
        if self.table is not None and other.table is not None:
            self.at_least = tuple(
                tuple(map(sum, zip(*rows, strict=True))) for rows in zip(self.at_least, other.at_least, strict=True)
            )
            self.table += other.table
        self.by_tensor += other.by_tensor
        return self


@dataclass(frozen=True)
class TaskSearch:
    """How far the search for one task's threshold has come.

    Args:
        kept: entries to keep; all are when negative.
        edges: patterns, ascending: the next pass counts the entries that reach each.
        low: where the interval begins whose patterns the next pass counts in a table.
        high: where it ends; no table is made when it is empty.
        threshold: the pattern looked for, when the search is over.
        ties: tensor name -> entries equal to the threshold to keep; None when all of them are.
    """

    kept: int
    edges: tuple[int, ...] = ()
    low: int = 0
    high: int = 0
    threshold: int | None = None
    ties: dict[str, int] | None = None

    @property
    def is_over(self) -> bool:
        """Whether there is nothing left to count."""
        return self.kept < 0 or self.threshold is not None


@dataclass(frozen=True)
class SearchState:
    """The thresholds of all tasks, as far as they are known."""

    dtype: torch.dtype
    by_task: tuple[TaskSearch, ...]


def search_is_over(state: SearchState | None) -> bool:
    """Return whether no pass needs to read anything more."""
    return state is not None and all(search.is_over for search in state.by_task)


class MagnitudeSurvey:
    """Finds, exactly and in constant memory, where to cut each task's entries by magnitude.

    Reads from a method's options `density` and, where there is one, `density_scope`: "model" finds one threshold per
    task over all tensors, "tensor" one per task and tensor.
    """

    def memory(self, tasks: int, entries: int, dtype: torch.dtype) -> int:
        """Return the bytes that one tensor's value takes at most."""
        # A sample is put together from its pieces, and each row once more in order.
        sample = dtype.itemsize * max(3 * min(entries, LARGEST_SAMPLE), min(entries, _PIECE))
        return tasks * (tallies.row_bytes(entries, _BINS[dtype]) + sample)

    def passes(self, options, dtype: torch.dtype) -> int:
        """Return the most passes over the model: none for scope "tensor" or when nothing is cut."""
        if options.density_scope == "tensor" or options.density in (0, 1):
            return 0
        return _PASSES[dtype]

    def reads(self, options, dtype: torch.dtype) -> int:
        """Return how often the model is read as a rule: passes that are not needed read nothing, a sample little."""
        usual = 1 if _takes_sample(dtype) else _PASSES[dtype] - 1
        return min(usual, self.passes(options, dtype))

    def measure(self, step: int, name: str, chunks, state: SearchState | None, options) -> PassValue:
        """Return what pass `step` finds in one tensor."""
        if state is None and _takes_sample(chunks.dtype):
            return PassValue(chunks.numel, take_sample(chunks, 32 if options.density_scope == "tensor" else 256))
        if search_is_over(state):
            return PassValue(chunks.numel)
        searches = state.by_task if state else (_everything(0, chunks.dtype),) * chunks.tasks
        at_least, table = _count(chunks, searches)
        return PassValue(chunks.numel, None, at_least, table, ((name, at_least),))

    def finish(self, step: int, total: PassValue, state: SearchState | None, options, dtype) -> SearchState:
        """Return the search after pass `step`."""
        if state is None:
            kept = count_kept(options.density, total.numel)
            start = _everything(-1 if kept >= total.numel else kept, dtype)
            if total.sample is not None:
                share = kept / max(total.numel, 1)
                return SearchState(dtype, tuple(_guess(start, row, share) for row in total.sample.rows()))
            assert total.table is not None, "a pass takes a sample or counts"
            state = SearchState(dtype, (start,) * total.table.rows)
        return SearchState(
            dtype, tuple(_narrow(task, search, total, dtype) for task, search in enumerate(state.by_task))
        )

    def for_tensor(self, name: str, chunks, state: SearchState | None, options) -> Cuts:
        """Return the cuts of one tensor's task vectors."""
        if options.density == 1:
            return Cuts((KEEP_ALL,) * chunks.tasks)
        if options.density == 0 or chunks.numel == 0:
            return Cuts((KEEP_NONE,) * chunks.tasks)
        if state is None and chunks.numel <= _PIECE:
            return find_cuts(chunks.read(0, chunks.numel), options.density)
        if state is None:
            state = self._search_tensor(name, chunks, options)
        return _cuts(name, chunks, state)

    def _search_tensor(self, name: str, chunks, options) -> SearchState:
        """Run the passes over one tensor alone."""
        dtype, state = chunks.dtype, None
        for step in range(_PASSES[dtype]):
            value = self.measure(step, name, chunks, state, options)
            state = self.finish(step, value, state, options, dtype)
        assert state is not None, "float32 and float64 take passes"
        return state


def _takes_sample(dtype: torch.dtype) -> bool:
    # The patterns of float64 lie so close that a guess saves none of the tables.
    return dtype == torch.float32


def _everything(kept: int, dtype: torch.dtype) -> TaskSearch:
    """Return a search that has not begun: the next pass counts all patterns."""
    return TaskSearch(kept, high=_INFINITY[dtype])


def _guess(search: TaskSearch, row: np.ndarray, share: float) -> TaskSearch:
    """Return where to look for the threshold, by a sample's magnitudes."""
    if search.is_over:
        return search
    size = len(row)
    # Six standard deviations of a sample drawn entry by entry; neighbours are alike, hence what is added.
    margin = 6 * math.sqrt(size * share * (1 - share)) + size / 400
    first = math.floor(size - size * share - margin)
    last = math.ceil(size - size * share + margin)
    if first < 0 or last >= size:
        return search
    ordered = np.partition(row, (first, last))
    near, counts = np.unique(ordered[first : last + 1].view(np.int32), return_counts=True)
    # Differences of rounded weights take few values: most likely the threshold is one of the commonest near it.
    commonest = np.argsort(-counts, kind="stable")[:_PIVOTS]
    likely = np.flatnonzero(np.cumsum(counts[commonest]) >= _LIKELY * counts.sum())
    if likely.size:
        pivots = near[commonest[: likely[0] + 1]].tolist()
        return replace(search, edges=tuple(sorted({edge for pivot in pivots for edge in (pivot, pivot + 1)})), high=0)
    low, high = int(near[0]), int(near[-1]) + 1
    return replace(search, edges=(low, high), low=low, high=high)


def _count(chunks: TensorChunks, searches: Sequence[TaskSearch]) -> tuple[Counts, Tally]:
    """Count what the searches ask for, in one tensor."""
    at_least = [[0] * len(search.edges) for search in searches]
    table = Tally(chunks.tasks, _BINS[chunks.dtype])
    waiting: list[list[np.ndarray]] = [[] for _ in searches]
    pieces = replace(chunks, size=min(chunks.size, _PIECE))
    # Used again for every row: fresh memory costs a page fault for every thousand entries, more than counting them.
    magnitudes = torch.empty(min(pieces.size, chunks.numel), dtype=chunks.dtype, device=chunks.device)
    reached = np.empty(len(magnitudes), bool)
    for _, chunk in pieces:
        for task, search in enumerate(searches):
            if search.is_over:
                continue
            row = torch.abs(chunk[task], out=magnitudes[: chunk.shape[1]])
            bits = row.numpy(force=True).view(_INTEGERS[chunk.dtype])
            for place, edge in enumerate(search.edges):
                reaches = np.greater_equal(bits, bits.dtype.type(edge), out=reached[: len(bits)])
                at_least[task][place] += int(np.count_nonzero(reaches))
            if search.low < search.high:
                waiting[task].append(_digits(bits, search, table.bins))
                if sum(map(len, waiting[task])) >= _PIECE:
                    table.count(task, np.concatenate(waiting[task]))
                    waiting[task].clear()
    for task, digits in enumerate(waiting):
        if digits:
            table.count(task, np.concatenate(digits))
    return tuple(map(tuple, at_least)), table


def _digits(bits: np.ndarray, search: TaskSearch, bins: int) -> np.ndarray:
    """Return the bins of the patterns that lie in the search's interval."""
    # A pattern below the interval is a negative number here, which without a sign is larger than any width.
    digits = bits - bits.dtype.type(search.low)
    unsigned = digits.view(f"u{digits.itemsize}")
    inside = unsigned < unsigned.dtype.type(search.high - search.low)
    return digits[inside] >> digits.dtype.type(_shift(search, bins))


def _shift(search: TaskSearch, bins: int) -> int:
    """Return how many trailing bits of a pattern the table leaves out."""
    return max(0, (search.high - search.low - 1).bit_length() - (bins.bit_length() - 1))


def _narrow(task: int, search: TaskSearch, total: PassValue, dtype: torch.dtype) -> TaskSearch:
    """Return the search after a pass: over, or in a narrower interval."""
    if search.is_over:
        return search
    assert total.table is not None, "a search that is not over is counted for"
    patterns = [0, *search.edges, _INFINITY[dtype]]
    reached = [total.numel, *total.at_least[task], 0]
    place = max(place for place, count in enumerate(reached[:-1]) if count >= search.kept)
    low, high, inside, above = *patterns[place : place + 2], reached[place] - reached[place + 1], reached[place + 1]
    if (low, high) == (search.low, search.high):
        counts, shift = total.table.row(task), _shift(search, total.table.bins)
        from_top = np.cumsum(counts[::-1])
        bins_above = int(np.searchsorted(from_top, search.kept - above))
        digit = len(counts) - 1 - bins_above
        above, inside = above + int(from_top[bins_above] - counts[digit]), int(counts[digit])
        low, high = low + (digit << shift), min(low + ((digit + 1) << shift), high)
    if high - low > 1:
        return TaskSearch(search.kept, tuple(edge for edge in (low, high) if edge in _inner(dtype)), low, high)
    if inside == search.kept - above or low == 0:  # zeros are zero kept or not
        return TaskSearch(search.kept, threshold=low)
    if place == 0 or patterns[place : place + 2] != [low, high]:
        return TaskSearch(search.kept, edges=(low, high))
    ties = _share_out(search.kept - above, [(name, found[task]) for name, found in total.by_tensor], place - 1)
    return TaskSearch(search.kept, threshold=low, ties=ties)


def _inner(dtype: torch.dtype) -> range:
    """Return the patterns that some entries may not reach and others may."""
    return range(1, _INFINITY[dtype])


def _share_out(wanted: int, by_tensor: Sequence[tuple[str, Sequence[int]]], place: int) -> dict[str, int]:
    """Return how many ties each tensor keeps, the first in the plan first; those that keep all are not in it."""
    shares: dict[str, int] = {}
    for name, reached in by_tensor:
        found = reached[place] - (reached[place + 1] if place + 1 < len(reached) else 0)
        if found > wanted:
            shares[name] = wanted
        wanted -= min(found, wanted)
    return shares


def _cuts(name: str, chunks: TensorChunks, state: SearchState) -> Cuts:
    """Return the cuts of one tensor: the thresholds, and the places of the last ties that are kept."""
    cuts, wanted = [], {}
    for task, search in enumerate(state.by_task):
        if search.threshold is None:
            cuts.append(KEEP_ALL)
            continue
        bits = np.array(search.threshold, _INTEGERS[state.dtype])
        threshold = float(bits.view(f"f{bits.itemsize}"))
        ties = (search.ties or {}).get(name, chunks.numel)
        cuts.append(Cut(threshold, ties if threshold else 0))
        if threshold and 0 < ties < chunks.numel:
            wanted[task] = ties
    if not wanted:
        return Cuts(tuple(cuts))
    for start, chunk in chunks:
        for task, ties in list(wanted.items()):
            places = np.flatnonzero(np.abs(chunk[task].numpy(force=True)) == cuts[task].threshold)
            if len(places) < ties:
                wanted[task] = ties - len(places)
            else:
                cuts[task] = replace(cuts[task], tie_stop=start + int(places[ties - 1]) + 1)
                del wanted[task]
        if not wanted:
            return Cuts(tuple(cuts))
    raise AssertionError(f"{name}: the tensor changed between two passes")
