"""What one tensor tells about the fine-tunes: sums over its entries, and the spectra of its task matrices."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from operator import add

import torch
from jaxtyping import Float
from torch import Tensor

from superpose.backends import Backend
from superpose.maths.feature_gram import FeatureGram
from superpose.maths.matrices import acts_as_matrix, as_matrices
from superpose.maths.measures import effective_rank, subspace_overlap
from superpose.maths.svd import Features, thin_svd
from superpose.parts import Context, Part, parts_of
from superpose.planning import CHUNK, WorkItem

LEADING = 16
"""Directions of each task that count as leading, at most; of small matrices an eighth of the smaller side."""
SYSTEM = 64
"""Strongest features of each task in the system whose conditioning is measured."""


@dataclass(frozen=True)
class Sums:
    """Sums over the entries of one tensor, or of several; all float64.

    Args:
        entries: number of entries.
        products: inner products of the task vectors, shape (tasks, tasks).
        lost: entries of each task that are the base's once both are rounded to bfloat16, shape (tasks,).
        shared: entries at which both tasks of a pair differ from the base, shape (tasks, tasks).
        opposed: those of them at which the signs differ, shape (tasks, tasks).
        largest: largest magnitude of each task vector, shape (tasks,).
    """

    entries: int
    products: Float[Tensor, "tasks tasks"]
    lost: Float[Tensor, " tasks"]
    shared: Float[Tensor, "tasks tasks"]
    opposed: Float[Tensor, "tasks tasks"]
    largest: Float[Tensor, " tasks"]

    def __add__(self, other: Sums) -> Sums:
        return Sums(
            self.entries + other.entries,
            self.products + other.products,
            self.lost + other.lost,
            self.shared + other.shared,
            self.opposed + other.opposed,
            torch.maximum(self.largest, other.largest),
        )


@dataclass(frozen=True)
class Spectra:
    """The spectra of the task matrices of one map.

    Args:
        size: min(out, in).
        effective_ranks: of each task's matrix; 0 for a zero matrix.
        left: overlap of the leading left directions by pair (first, second), and what random ones would have.
        right: the same for right directions.
        condition: of STF's system over the strongest features of each task; the full system's is at least this.
    """

    size: int
    effective_ranks: tuple[float, ...]
    left: dict[tuple[int, int], tuple[float, float]]
    right: dict[tuple[int, int], tuple[float, float]]
    condition: float


@dataclass(frozen=True)
class TensorComparison:
    """One tensor's sums, and the spectra of each map in it."""

    item: WorkItem
    sums: Sums
    spectra: tuple[Spectra, ...]


def compare_items(
    items: Sequence[WorkItem],
    context: Context,
    backend: Backend,
    *,
    spectra: bool = True,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> list[TensorComparison]:
    """Compare the fine-tunes tensor by tensor, in one pass.

    Args:
        items: the tensors to merge, of a method that acts on task vectors.
        context: what all items share.
        backend: where it is done.
        spectra: whether task matrices are decomposed.
        report: called with the number of tensors done, and of all.

    Returns:
        One comparison per item, in their order.
    """
    work = partial(compare_item, context=context, spectra=spectra)
    found: dict[int, TensorComparison] = {}
    with contextlib.closing(backend.map(work, items, [item.memory for item in items])) as results:
        for index, comparison in results:
            found[index] = comparison
            report(len(found), len(items))
    return [found[index] for index in range(len(items))]


def compare_item(item: WorkItem, context: Context, spectra: bool) -> TensorComparison:
    """Compare the fine-tunes in one tensor."""
    sums, measured = [], []
    for part in parts_of(item, context):
        sums.append(_sums(part))
        shape = tuple(part.base.shape)
        if spectra and acts_as_matrix(item.kind, shape) and part.base.numel():
            stack = part.stacked(0, part.base.numel()).reshape(len(part.tuned), *shape)
            measured += [_spectra(matrices) for matrices in as_matrices(stack, item.kind)]
    return TensorComparison(item, reduce(add, sums), tuple(measured))


def _sums(part: Part) -> Sums:
    tasks = len(part.tuned)
    square = torch.zeros(tasks, tasks, dtype=torch.float64)
    total = Sums(0, square, torch.zeros(tasks).double(), square, square, torch.zeros(tasks).double())
    for start, chunk in part.chunks(CHUNK):
        stop = start + chunk.shape[1]
        exact, signs = chunk.double(), chunk.sign()
        stored = part.base.reshape(-1)[start:stop].bfloat16()
        lost = [
            (part.weights(task, row, start, stop).bfloat16() == stored).sum().item() for task, row in enumerate(chunk)
        ]
        present = signs.abs()
        shared, agreement = present @ present.T, signs @ signs.T  # whole numbers below 2^24: exact
        total += Sums(
            chunk.shape[1],
            (exact @ exact.T).cpu(),
            torch.tensor(lost, dtype=torch.float64),
            shared.double().cpu(),
            ((shared - agreement) / 2).double().cpu(),
            chunk.abs().amax(dim=1).double().cpu(),
        )
    return total


def _spectra(matrices: Float[Tensor, "tasks out in_"]) -> Spectra:
    tasks = [thin_svd(matrix) for matrix in matrices]
    out, in_ = matrices.shape[1:]
    leading = min(LEADING, max(1, min(out, in_) // 8))
    left, right = {}, {}
    for first in range(len(tasks)):
        for second in range(first + 1, len(tasks)):
            pair = tasks[first].take(0, leading), tasks[second].take(0, leading)
            most = max(pair[0].count, pair[1].count)
            left[first, second] = subspace_overlap(pair[0].u, pair[1].u), most / out
            right[first, second] = subspace_overlap(pair[0].vh.T, pair[1].vh.T), most / in_
    ranks = tuple(effective_rank(task.s) for task in tasks)
    return Spectra(min(out, in_), ranks, left, right, _condition(tasks))


def _condition(tasks: Sequence[Features]) -> float:
    strongest = [task.take(0, SYSTEM) for task in tasks if task.count]
    if len(strongest) < 2:
        return 1.0
    values = torch.linalg.eigvalsh(FeatureGram(strongest).dense().double())
    smallest = float(values[0].clamp_min(float(values[-1]) * torch.finfo(torch.float32).eps))
    return float(values[-1]) / smallest
