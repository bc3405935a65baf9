"""Tensors read from files: as views of them, or as an adapter makes them."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import torch
from torch import Tensor

from superpose.checkpoints.adapted import AdaptedTensor, FactorPair
from superpose.checkpoints.files import formats
from superpose.checkpoints.headers import TORCH_DTYPES, Reader, TensorHeader, TensorInMemory
from superpose.errors import SuperposeError
from superpose.maths.low_rank import LowRank, total, zero
from superpose.planning import WorkItem


def read_ahead(item: WorkItem) -> None:
    """Let the system fetch an item's inputs from the disk while something else is computed.

    They go where files are kept in memory anyway, and are given up first when memory is short: it costs no budget.
    """
    if not hasattr(os, "posix_fadvise"):
        return
    found = [header for header in (item.base, *item.tuned) if header is not None]
    parts = [part for whole in found for part in (whole.parts if isinstance(whole, AdaptedTensor) else [whole])]
    for header in parts:
        if header.offset is None or not header.nbytes:  # of length 0 means to the end
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
    """Return a tensor as a view of its file (or as it is, if it is in memory): never written to.

    A tensor with an adapter applied is new memory, in float32 (float64 if it was that).

    Args:
        header: the tensor; an adapted one names what it is added to.

    Returns:
        The tensor.

    Raises:
        SuperposeError: its file is gone.
    """
    if isinstance(header, TensorInMemory):
        return header.tensor
    if isinstance(header, AdaptedTensor):
        assert header.onto is not None, f"{header.name}: an update alone is no tensor"
        tensor = read_tensor(header.onto)
        wide = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
        update = read_update(header, wide, wide.dtype, wide.device).dense
        return wide if update is None else wide + update.reshape(wide.shape)
    try:
        status = header.file.stat()
    except FileNotFoundError as error:
        mend = "put the file back and run the same command again: finished tensors are kept"
        raise SuperposeError("the file is gone since the merge began", where=str(header.file), mend=mend) from error
    tensor = _reader(header.file, status.st_size, status.st_mtime_ns).read(header.name)
    if tuple(tensor.shape) != header.shape or tensor.dtype != TORCH_DTYPES[header.dtype]:
        what, mend = "the tensor is another since the merge began", "run the same command again"
        raise SuperposeError(what, where=f"{header.file}, tensor {header.name}", mend=mend)
    return tensor


@lru_cache(maxsize=1024)
def _reader(file: Path, size: int, changed: int) -> Reader:
    """Open a file once; again if it was written anew."""
    del size, changed
    return formats()[file.suffix].open(file)


@dataclass(frozen=True)
class Update:
    """What an adapter adds to a tensor.

    Args:
        shape: of the tensor.
        low_rank: the update as a matrix, (rows, all the rest); None where it is not known so.
        entries: the update's entries, flattened, where it is not known as a low-rank matrix; None for zero.
    """

    shape: tuple[int, ...]
    low_rank: LowRank | None
    entries: Tensor | None

    @cached_property
    def dense(self) -> Tensor | None:
        """The update's entries, flattened; None for zero."""
        if self.low_rank is None:
            return self.entries
        return self.low_rank.matrix().reshape(-1) if self.low_rank.rank else None

    def split(self, axis: int, sizes: Sequence[int]) -> list[Update]:
        """Return the blocks that it splits into along an axis of the tensor."""
        shapes = [(*self.shape[:axis], size, *self.shape[axis + 1 :]) for size in sizes]
        if self.low_rank is not None:
            # A block in which an adapter's map has no part is spared its rank.
            blocks = [_without_zeros(block) for block in self.low_rank.split(axis, sizes)]
            return [Update(shape, block, None) for shape, block in zip(shapes, blocks, strict=True)]
        if self.entries is None:
            return [Update(shape, None, None) for shape in shapes]
        blocks = self.entries.reshape(self.shape).split(list(sizes), dim=axis)
        return [Update(shape, None, b.reshape(-1)) for shape, b in zip(shapes, blocks, strict=True)]


def read_update(header: AdaptedTensor, base: Tensor, dtype: torch.dtype, device: torch.device) -> Update:
    """Return what an adapter adds to a tensor.

    Args:
        header: the adapted tensor.
        base: the tensor that it is added to; read for DoRA alone.
        dtype: of the arithmetic.
        device: where it is done.

    Returns:
        The update.
    """
    low_rank = None
    if len(header.shape) > 1:
        flat = header.shape[0], math.prod(header.shape[1:])
        pairs = [_read_pair(pair, flat, dtype, device) for pair in header.pairs]
        low_rank = total(pairs) if pairs else zero(flat, torch.empty(0, dtype=dtype, device=device))
    if header.magnitude is not None and low_rank is not None:
        turned = header.pairs[0].transposed
        return Update(header.shape, None, _by_magnitude(base, low_rank, read_tensor(header.magnitude), turned))
    if header.addend is not None:
        added = read_tensor(header.addend).to(device, dtype).reshape(-1) * header.addend_scale
        return Update(header.shape, None, added)
    return Update(header.shape, low_rank, None)


def _read_pair(pair: FactorPair, flat: tuple[int, int], dtype: torch.dtype, device: torch.device) -> LowRank:
    """Return one update as a matrix of the weight as stored; half of the scale goes to each factor."""
    root = math.sqrt(abs(pair.scale))
    down, up = (read_tensor(part).to(device, dtype).flatten(1) for part in (pair.down, pair.up))
    down = down[slice(*pair.down_rows)] * root
    up = up[slice(*pair.up_rows)] * math.copysign(root, pair.scale)
    out = flat[1] if pair.transposed else flat[0]
    if len(up) < out:
        whole = up.new_zeros(out, up.shape[1])
        whole[pair.place : pair.place + len(up)] = up
        up = whole
    found = LowRank(up, down)
    return found.T if pair.transposed else found


def _by_magnitude(base: Tensor, update: LowRank, magnitude: Tensor, transposed: bool) -> Tensor:
    """Return DoRA's update, flattened: rows out of the updated weight scaled to the magnitudes, less the weight.

    Liu et al. 2024, arXiv:2402.09353, equation 5.
    """
    weight = base.to(update.left.device, torch.float64)
    tuned = weight + update.left.double() @ update.right.double()
    norms = torch.linalg.vector_norm(tuned, dim=0 if transposed else 1, keepdim=True)
    scale = magnitude.to(norms).reshape(norms.shape) / norms
    return (tuned * scale - weight).to(update.left.dtype).reshape(-1)


def _without_zeros(block: LowRank) -> LowRank:
    kept = (block.left != 0).any(dim=0) & (block.right != 0).any(dim=1)
    return block if bool(kept.all()) else LowRank(block.left[:, kept], block.right[kept])
