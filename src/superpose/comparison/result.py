"""What a comparison found: the tasks, the pairs of them, and both for each group of layers."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from statistics import fmean, median

from superpose.comparison.measure import Spectra, Sums, TensorComparison


@dataclass(frozen=True)
class Task:
    """One fine-tune against the base.

    Args:
        name: of the task.
        norm: Frobenius norm of the task vector.
        lost_in_bfloat16: fraction of entries that do not differ from the base once both are stored in bfloat16.
        unchanged: fraction of entries that do not differ from it as they are.
        largest: largest magnitude of an entry of the task vector.
        effective_rank: mean over task matrices of the effective rank as a fraction of min(out, in); None where no
            matrix was decomposed.
    """

    name: str
    norm: float
    lost_in_bfloat16: float
    unchanged: float
    largest: float
    effective_rank: float | None

    @property
    def rounded_away(self) -> float:
        """Fraction of the entries that differ from the base which bfloat16 makes equal to it."""
        changed = 1 - self.unchanged
        return (self.lost_in_bfloat16 - self.unchanged) / changed if changed > 0 else 0.0


@dataclass(frozen=True)
class Pair:
    """Two fine-tunes against each other.

    Args:
        first: name of a task.
        second: name of another.
        cosine: of their task vectors; 0 where one is zero.
        sign_conflicts: of the entries in which both differ from the base, the fraction that go opposite ways.
        left_overlap: mean squared cosine between the leading left singular directions, mean over matrices; 0 to 1.
        right_overlap: the same for right directions.
        left_chance: what random directions would have.
        right_chance: the same for right directions.
    """

    first: str
    second: str
    cosine: float
    sign_conflicts: float
    left_overlap: float | None
    right_overlap: float | None
    left_chance: float | None
    right_chance: float | None


@dataclass(frozen=True)
class Group:
    """Tensors of one name but for the number of their layer.

    Args:
        name: with * for numbers.
        kind: what they are in their network.
        tensors: how many.
        entries: of all of them.
        tasks: each fine-tune in them.
        pairs: each pair in them.
        condition: median over the matrices of the expected condition number of STF's system; None without matrices.
        worst_condition: the largest.
    """

    name: str
    kind: str
    tensors: int
    entries: int
    tasks: tuple[Task, ...]
    pairs: tuple[Pair, ...]
    condition: float | None
    worst_condition: float | None


@dataclass(frozen=True)
class Comparison:
    """Fine-tunes compared before they are merged.

    Args:
        base: the base, as it was named.
        whole: all tensors together.
        groups: the same by layer group.
        left_out: tensors that are not merged, and not compared.
        notes: what was assumed, in words.
        suggestions: what the numbers suggest.
    """

    base: str
    whole: Group
    groups: tuple[Group, ...]
    left_out: int
    notes: tuple[str, ...]
    suggestions: tuple[str, ...] = ()


def group_name(name: str) -> str:
    """Return a tensor's name with * for the numbers of layers."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def group_tensors(tensors: Sequence[TensorComparison], names: Sequence[str]) -> tuple[Group, tuple[Group, ...]]:
    """Return all tensors as one group, and by layer group, in the order of names."""
    by_name: dict[tuple[str, str], list[TensorComparison]] = defaultdict(list)
    for tensor in tensors:
        by_name[group_name(tensor.item.name), str(tensor.item.kind)].append(tensor)
    groups = tuple(_group(name, kind, members, names) for (name, kind), members in by_name.items())
    return _group("all", "all", tensors, names), groups


def _group(name: str, kind: str, tensors: Sequence[TensorComparison], names: Sequence[str]) -> Group:
    sums = reduce(add, (tensor.sums for tensor in tensors))
    spectra = [found for tensor in tensors for found in tensor.spectra]
    conditions = [found.condition for found in spectra]
    pairs = [(i, j) for i in range(len(names)) for j in range(i + 1, len(names))]
    return Group(
        name,
        kind,
        len(tensors),
        sums.entries,
        tuple(_task(i, sums, spectra, names) for i in range(len(names))),
        tuple(_pair(i, j, sums, spectra, names) for i, j in pairs),
        median(conditions) if conditions else None,
        max(conditions, default=None),
    )


def _task(index: int, sums: Sums, spectra: Sequence[Spectra], names: Sequence[str]) -> Task:
    return Task(
        names[index],
        math.sqrt(float(sums.products[index, index])),
        float(sums.lost[index]) / max(sums.entries, 1),
        1 - float(sums.shared[index, index]) / max(sums.entries, 1),
        float(sums.largest[index]),
        fmean(found.effective_ranks[index] / found.size for found in spectra) if spectra else None,
    )


def _pair(first: int, second: int, sums: Sums, spectra: Sequence[Spectra], names: Sequence[str]) -> Pair:
    norms = math.sqrt(float(sums.products[first, first])) * math.sqrt(float(sums.products[second, second]))
    shared = float(sums.shared[first, second])
    key = first, second
    return Pair(
        names[first],
        names[second],
        float(sums.products[first, second]) / norms if norms else 0.0,
        float(sums.opposed[first, second]) / shared if shared else 0.0,
        fmean(found.left[key][0] for found in spectra) if spectra else None,
        fmean(found.right[key][0] for found in spectra) if spectra else None,
        fmean(found.left[key][1] for found in spectra) if spectra else None,
        fmean(found.right[key][1] for found in spectra) if spectra else None,
    )
