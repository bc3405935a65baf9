"""A sample of a model's magnitudes: short runs of entries all over it, as many as memory is set aside for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from superpose.maths.streaming import TensorChunks

LARGEST_SAMPLE = 1 << 20
"""Entries kept for each task; of larger samples, every second one."""
_RUN = 1024
"""Entries read at a time: a run for each would take as long as reading everything."""
_GOLDEN = 0.6180339887498949


class Sample:
    """Magnitudes of some entries, the same places for each task.

    Args:
        pieces: arrays (tasks, entries).
        one_of: one of so many entries is in it.
    """

    def __init__(self, pieces: list[np.ndarray], one_of: int) -> None:
        self._pieces, self._one_of = pieces, one_of

    def __iadd__(self, other: Sample) -> Sample:
        one_of = max(self._one_of, other._one_of)
        self._pieces = self._thinned(one_of) + other._thinned(one_of)
        self._one_of = one_of
        while sum(piece.shape[1] for piece in self._pieces) > LARGEST_SAMPLE:
            whole = np.concatenate(self._pieces, axis=1)  # in one piece: halving many odd ones would favour some
            self._pieces, self._one_of = [whole[:, ::2].copy()], 2 * self._one_of
        return self

    def rows(self) -> np.ndarray:
        """Return the magnitudes, a row for each task."""
        return np.concatenate(self._pieces, axis=1)

    def _thinned(self, one_of: int) -> list[np.ndarray]:
        step = one_of // self._one_of
        return self._pieces if step == 1 else [piece[:, ::step].copy() for piece in self._pieces]


def take_sample(chunks: TensorChunks, one_of: int) -> Sample:
    """Return one of so many entries of a tensor, a power of two, in runs; of a very large tensor one of more.

    Where in its window a run lies goes by the golden ratio: even, and in step with no length of rows.
    """
    while chunks.numel > one_of * LARGEST_SAMPLE:
        one_of *= 2
    pieces, window = [], _RUN * one_of
    for number, first in enumerate(range(0, chunks.numel, window)):
        size = min(window, chunks.numel - first)
        length = -(-size // one_of)
        start = first + int((size - length) * (number * _GOLDEN % 1))
        pieces.append(chunks.read(start, start + length).abs().numpy(force=True))
    none = np.zeros((chunks.tasks, 0), np.float32)
    return Sample([np.concatenate([none, *pieces], axis=1)], one_of)
