"""The inputs of one work item: the maps that a tensor holds, read in pieces from the files of all models."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from superpose.checkpoints.files import formats
from superpose.checkpoints.headers import Reader, TensorHeader, TensorInMemory
from superpose.errors import SuperposeError
from superpose.maths.finite import is_finite
from superpose.maths.randomness import Generator
from superpose.maths.streaming import TensorChunks
from superpose.planning import WorkItem
from superpose.registry import Cache, find_method


@dataclass(frozen=True)
class Context:
    """What all items of a merge share.

    Args:
        task_names: one per tuned model.
        weights: one per tuned model.
        device: where the arithmetic is done.
        measure: whether to measure how well each task's features survive.
        seed: of random numbers.
        cache: of what is costly to compute, if one is kept.
        split_tensors: whether idle workers take part in another's tensor.
    """

    task_names: tuple[str, ...]
    weights: tuple[float, ...]
    device: torch.device
    measure: bool
    seed: int = 0
    cache: Cache | None = None
    split_tensors: bool = True


@dataclass(frozen=True)
class Part:
    """One map of a tensor (the whole of it, or one of a fused projection), as contiguous views of the files."""

    item: WorkItem
    context: Context
    name: str
    base: Tensor
    tuned: tuple[Tensor, ...]

    def chunks(self, size: int, inputs: tuple[Tensor, Tensor] | None = None) -> TensorChunks:
        """Return the part's task vectors (or weights, if its method acts on them), in pieces.

        Args:
            size: entries of a piece.
            inputs: the whole of what `read` returns, where it is there anyway: pieces are then views of it.

        Returns:
            The chunks.
        """
        read = self.stacked if inputs is None else lambda start, stop: inputs[0][:, start:stop]
        return TensorChunks(
            len(self.tuned), self.base.numel(), size, read, self.context.weights,
            tuple(self.base.shape), self.item.kind, self.generator,
        )  # fmt: skip

    @property
    def generator(self) -> Generator:
        """The part's random numbers."""
        return Generator(self.context.seed, self.name, self.context.task_names)

    def read(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Return entries start..stop of the flattened task vectors (or weights), stacked, and of the base.

        Args:
            start: first entry.
            stop: one past the last entry.

        Returns:
            New memory in the dtype of the arithmetic: shape (tasks, entries), and shape (entries,).

        Raises:
            SuperposeError: an input holds NaN or infinity.
        """
        # New memory, never a view of a file: what is done to it cannot reach the inputs.
        shape = (1 + len(self.tuned), stop - start)
        pieces = torch.empty(shape, dtype=self.item.compute, device=self.context.device)
        for row, tensor in zip(pieces, (self.base, *self.tuned), strict=True):
            row.copy_(tensor.reshape(-1)[start:stop])
        base, stacked = pieces[0], pieces[1:]
        arguments = pieces
        if find_method(self.item.method).acts_on == "task_vectors":
            stacked -= base
            arguments = stacked  # where the base is not finite, no difference from it is
        if not is_finite(arguments):
            raise self._not_finite(start, stop)
        return stacked, base

    def stacked(self, start: int, stop: int) -> Tensor:
        """Return entries start..stop of the flattened task vectors (or weights), in new memory: see `read`."""
        return self.read(start, stop)[0]

    def _not_finite(self, start: int, stop: int) -> SuperposeError:
        """Return an error that names the input with NaN or infinity in it."""
        for header, tensor in zip((self.item.base, *self.item.tuned), (self.base, *self.tuned), strict=True):
            bad = int((~torch.isfinite(tensor.reshape(-1)[start:stop])).sum())
            if bad and header is not None:
                return SuperposeError(
                    f"{bad} entries are NaN or infinite",
                    where=f"{header.file}, tensor {header.name}",
                    mend="use a checkpoint without them, or keep the base's tensor by a rule",
                )
        return SuperposeError(
            "a difference of finite weights is infinite",
            where=f"{self.item.base.file}, tensor {self.item.name}",
            mend="the models differ by more than float32 can hold; check that they belong together",
        )


def parts_of(item: WorkItem, context: Context) -> Iterator[Part]:
    """Yield the maps that a tensor holds: itself, or each of a fused projection."""
    tensors = [read_tensor(header) for header in (item.base, *item.tuned) if header is not None]
    if item.parts is None:
        yield Part(item, context, item.name, tensors[0], tuple(tensors[1:]))
        return
    axis, sizes = item.parts
    blocks = [tensor.split(list(sizes), dim=axis) for tensor in tensors]
    for number, (base, *tuned) in enumerate(zip(*blocks, strict=True)):
        name = f"{item.name}#{number}"
        yield Part(item, context, name, base.contiguous(), tuple(tensor.contiguous() for tensor in tuned))


def read_ahead(item: WorkItem) -> None:
    """Let the system fetch an item's inputs from the disk while something else is computed.

    They go where files are kept in memory anyway, and are given up first when memory is short: it costs no budget.
    """
    if not hasattr(os, "posix_fadvise"):
        return
    for header in (item.base, *item.tuned):
        if header is None or header.offset is None or not header.nbytes:  # of length 0 means to the end
            continue
        try:
            descriptor = os.open(header.file, os.O_RDONLY)
        except FileNotFoundError:
            return  # the item's own turn will tell
        try:
            os.posix_fadvise(descriptor, header.offset, header.nbytes, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(descriptor)


def close_readers() -> None:
    """Close all input files that were kept open."""
    _reader.cache_clear()


def read_tensor(header: TensorHeader) -> Tensor:
    """Return a tensor as a view of its file (or as it is, if it is in memory): never written to."""
    if isinstance(header, TensorInMemory):
        return header.tensor
    try:
        status = header.file.stat()
    except FileNotFoundError as error:
        mend = "put the file back and run the same command again: finished tensors are kept"
        raise SuperposeError("the file is gone since the merge began", where=str(header.file), mend=mend) from error
    return _reader(header.file, status.st_size, status.st_mtime_ns).read(header.name)


@lru_cache(maxsize=1024)
def _reader(file: Path, size: int, changed: int) -> Reader:
    """Open a file once; again if it was written anew."""
    del size, changed
    return formats()[file.suffix].open(file)
