"""The matrix of STF's system, G_ab = (u_a . u_b)(v_a . v_b), never written out where it need not be."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import torch
from jaxtyping import Float
from torch import Tensor

from superpose.maths.side_by_side import side_by_side
from superpose.maths.svd import Features

MOST_BLOCK_BYTES = 2**30
"""Blocks that take more are not kept: each product with a vector goes through the features again."""
MOST_BESIDE = 4
"""Blocks that are formed at the same time: each takes as much again while it is."""


class FeatureGram:
    """Inner products of all tasks' features u_a v_a^T.

    Within a task features are orthonormal: its block is the identity and is not formed. Of the two blocks between a
    pair of tasks, one the transpose of the other, one is formed. That is half of the products and half of the memory
    that the whole matrix takes.

    Args:
        tasks: each task's features, all of one outer shape.
    """

    def __init__(self, tasks: Sequence[Features]) -> None:
        self._tasks = [task for task in tasks if task.count]
        counts = [task.count for task in self._tasks]
        self.size, self.dtype = sum(counts), tasks[0].s.dtype
        stops = torch.tensor(counts, dtype=torch.int64).cumsum(0).tolist()
        self._places = [slice(stop - count, stop) for stop, count in zip(stops, counts, strict=True)]
        self.keeps_blocks = block_bytes(counts, self.dtype) <= MOST_BLOCK_BYTES
        self._blocks = self._all_blocks() if self.keeps_blocks else []

    def times(self, vectors: Float[Tensor, "size columns"]) -> Float[Tensor, "size columns"]:
        """Return the matrix times each column."""
        if not self.keeps_blocks:
            return torch.stack([self._times_by_features(column) for column in vectors.T], dim=1)
        return self._times_by_blocks(vectors)

    def dense(self) -> Float[Tensor, "size size"]:
        """Return the matrix written out."""
        matrix = torch.eye(self.size, dtype=self.dtype, device=self._tasks[0].s.device if self._tasks else None)
        for rows, columns, block in self._blocks or self._all_blocks():
            matrix[rows, columns] = block
            matrix[columns, rows] = block.T
        return matrix

    def _all_blocks(self) -> list[tuple[slice, slice, Tensor]]:
        placed = list(zip(self._tasks, self._places, strict=True))

        def block(pair: tuple[tuple[Features, slice], tuple[Features, slice]]) -> tuple[slice, slice, Tensor]:
            (first, rows), (second, columns) = pair
            return rows, columns, (first.u.T @ second.u).mul_(first.vh @ second.vh.T)

        return side_by_side(block, list(combinations(placed, 2)), most=MOST_BESIDE)

    def _times_by_blocks(self, vectors: Float[Tensor, "size columns"]) -> Float[Tensor, "size columns"]:
        each = list(vectors.T.contiguous())
        # What is beside the identity is small: added up by itself it keeps digits that it would lose to the identity's.
        beside = [torch.zeros_like(vector) for vector in each]
        for rows, columns, block in self._blocks:  # each of them from memory once, whatever the number of vectors
            for vector, sums in zip(each, beside, strict=True):
                sums[rows].addmv_(block, vector[columns])
                sums[columns].addmv_(block.T, vector[rows])
        return torch.stack(beside, dim=1).add_(vectors)

    def _times_by_features(self, vector: Float[Tensor, " size"]) -> Float[Tensor, " size"]:
        """Put the features together with these factors, and ask each feature for its answer."""
        matrix = add_up(self._tasks, [vector[place] for place in self._places])
        answers = [((task.u.T @ matrix) * task.vh).sum(dim=1) for task in self._tasks]
        return torch.cat(answers)


def add_up(tasks: Sequence[Features], factors: Sequence[Float[Tensor, " _"]]) -> Float[Tensor, "out in_"]:
    """Return the sum of all tasks' features, each times its factor.

    Args:
        tasks: each task's features, all of one outer shape.
        factors: one for each feature, by task.

    Returns:
        The matrix sum_a factor_a u_a v_a^T.
    """
    matrix = tasks[0].u.new_zeros(tasks[0].u.shape[0], tasks[0].vh.shape[1])
    for task, factor in zip(tasks, factors, strict=True):
        matrix.addmm_(task.u * factor, task.vh)
    return matrix


def block_bytes(counts: Sequence[int], dtype: torch.dtype) -> int:
    """Return the bytes of one block for each pair of tasks with so many features."""
    return dtype.itemsize * (sum(counts) ** 2 - sum(count**2 for count in counts)) // 2
