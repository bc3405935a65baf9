"""A tensor as an adapter makes it: the base's, or another model's, plus what low-rank factors add."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from superpose.checkpoints.headers import TensorHeader


@dataclass(frozen=True)
class FactorPair:
    """The update scale * up @ down of one adapter, on all rows of a map or on a block of them.

    Args:
        down: A, shape (rank, in) or (groups * rank, in); for convolutions (rank, in, *kernel).
        up: B, shape (out, rank); for convolutions (out, rank, 1, ...).
        scale: alpha / rank, or what the adapter says instead.
        transposed: whether the weight is stored in x out, so that the update is transposed.
        down_rows: which rows of `down` take part, first and one past the last.
        up_rows: which rows of `up` do.
        place: first row of the map that they act on.
        looked_up: whether the module looks rows up, an embedding, which PEFT names and loads otherwise.
    """

    down: TensorHeader
    up: TensorHeader
    scale: float
    transposed: bool
    down_rows: tuple[int, int]
    up_rows: tuple[int, int]
    place: int = 0
    looked_up: bool = False

    @property
    def rank(self) -> int:
        """Rank of the update."""
        return self.down_rows[1] - self.down_rows[0]

    def reaches(self, axis: int, start: int, stop: int) -> bool:
        """Whether the update touches what lies from start to stop along an axis of the stored weight."""
        if axis != int(self.transposed):
            return True
        return self.place < stop and start < self.place + self.up_rows[1] - self.up_rows[0]


@dataclass(frozen=True)
class AdaptedTensor(TensorHeader):
    """A tensor with an adapter applied to it; `file` is the adapter's, `shape` the weight's as stored.

    Without pairs and addend it is the tensor itself: an adapter leaves alone what it does not mention.

    Args:
        onto: the tensor that is adapted; None for that of the merge's base.
        pairs: low-rank updates that are added.
        addend: what is added as it is, times `addend_scale` (the bias of an adapter's second factor).
        addend_scale: factor on it.
        magnitude: DoRA's magnitudes, to which each row is scaled after the update; None for LoRA.
    """

    onto: TensorHeader | None = None
    pairs: tuple[FactorPair, ...] = ()
    addend: TensorHeader | None = None
    addend_scale: float = 1.0
    magnitude: TensorHeader | None = None

    @property
    def parts(self) -> Sequence[TensorHeader]:
        """What it is read from."""
        found = [self.onto, self.addend, self.magnitude]
        found += [part for pair in self.pairs for part in (pair.down, pair.up)]
        return [part for part in found if part is not None]

    @property
    def is_update(self) -> bool:
        """Whether it is known as a low-rank update of the base alone."""
        return self.onto is None and self.addend is None and self.magnitude is None

    @property
    def rank(self) -> int:
        """Rank of the update at most."""
        return sum(pair.rank for pair in self.pairs)

    @property
    def nbytes(self) -> int:
        """Bytes that are read for it."""
        return sum(part.nbytes for part in self.parts)


def files_of(header: TensorHeader | None) -> list[Path]:
    """Return the files that a tensor is read from."""
    if isinstance(header, AdaptedTensor):
        return [file for part in header.parts for file in files_of(part)]
    return [] if header is None else [header.file]


def identity(header: TensorHeader | None, prints: dict[Path, str]) -> Any:
    """Return what a tensor's value depends on, as JSON can hold it.

    Args:
        header: the tensor.
        prints: a fingerprint of every file.

    Returns:
        Fingerprint and name; for an adapted tensor those of its parts with all numbers.
    """
    if header is None:
        return None
    if not isinstance(header, AdaptedTensor):
        return [prints[header.file], header.name]
    pairs = [
        [identity(pair.down, prints), identity(pair.up, prints), pair.scale, pair.transposed, pair.down_rows,
         pair.up_rows, pair.place]
        for pair in header.pairs
    ]  # fmt: skip
    rest = [identity(part, prints) for part in (header.onto, header.addend, header.magnitude)]
    return ["adapted", pairs, rest, header.addend_scale]
