"""safetensors written as a stream: the layout is fixed first, then tensors arrive in any order, from any thread.

A file is its header, known from names, dtypes and shapes alone, and room for the data at known offsets. Nothing holds
a shard, and a restart finds every finished tensor in its place.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from superpose.checkpoints.headers import TORCH_DTYPES
from superpose.errors import SuperposeError

FULL = (errno.ENOSPC, errno.EDQUOT)
"""Errors of a disk, or of a user's share of it, that has no room left."""


@dataclass(frozen=True)
class Slot:
    """Where a tensor's bytes lie: file name, first byte, number of bytes."""

    file: str
    offset: int
    nbytes: int


@dataclass(frozen=True)
class OutputFile:
    """One file of the output: its name, the bytes it begins with, and its full size."""

    name: str
    header: bytes
    size: int


@dataclass(frozen=True)
class Layout:
    """Where every tensor of the output goes.

    Args:
        files: those of the model.
        slots: place of every tensor, also of those beside the model.
        beside: files that are not the model's own.
    """

    files: tuple[OutputFile, ...]
    slots: Mapping[str, Slot]
    beside: tuple[OutputFile, ...] = ()

    @property
    def all_files(self) -> tuple[OutputFile, ...]:
        """The model's files and those beside it."""
        return self.files + self.beside

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors together."""
        names = {file.name for file in self.files}
        return sum(slot.nbytes for slot in self.slots.values() if slot.file in names)

    @property
    def file_bytes(self) -> int:
        """Bytes of all files together."""
        return sum(file.size for file in self.all_files)

    def index(self) -> str | None:
        """Return the text of the index file, None for a single file."""
        if len(self.files) <= 1:
            return None
        names = {file.name for file in self.files}
        weight_map = {name: slot.file for name, slot in sorted(self.slots.items()) if slot.file in names}
        content = {"metadata": {"total_size": self.tensor_bytes}, "weight_map": weight_map}
        return json.dumps(content, indent=2) + "\n"


def lay_out(tensors: Iterable[tuple[str, str, tuple[int, ...]]], shard_size: int) -> Layout:
    """Decide where tensors go, from names, dtypes and shapes alone.

    Args:
        tensors: (name, dtype name, shape) of each; their order does not matter.
        shard_size: most bytes of tensors in a file; a larger tensor gets a file of its own.

    Returns:
        The layout: tensors in natural order of their names over the shards.
    """
    shards: list[list[tuple[str, str, tuple[int, ...], int]]] = [[]]
    room = shard_size
    for name, dtype, shape in sorted(tensors, key=lambda tensor: _natural(tensor[0])):
        nbytes = TORCH_DTYPES[dtype].itemsize
        for size in shape:
            nbytes *= size
        if shards[-1] and nbytes > room:
            shards.append([])
            room = shard_size
        shards[-1].append((name, dtype, shape, nbytes))
        room -= nbytes
    files, slots = [], {}
    for number, shard in enumerate(shards, 1):
        single = len(shards) == 1
        file = "model.safetensors" if single else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        header, offsets, size = _header(shard)
        files.append(OutputFile(file, header, size))
        slots.update({name: Slot(file, offsets[name], nbytes) for name, _, _, nbytes in shard})
    return Layout(tuple(files), slots)


def lay_out_beside(layout: Layout, file: str, tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> Layout:
    """Return the layout with one more file, of tensors that are not the model's own.

    Args:
        layout: of the model.
        file: its path in the output's folder.
        tensors: (name, dtype name, shape) of each; none makes no file.

    Returns:
        The layout.
    """
    sized = [(name, dtype, shape, TORCH_DTYPES[dtype].itemsize * prod(shape)) for name, dtype, shape in tensors]
    if not sized:
        return layout
    header, offsets, size = _header(sized)
    slots = {name: Slot(file, offsets[name], nbytes) for name, _, _, nbytes in sized}
    return Layout(layout.files, {**layout.slots, **slots}, (*layout.beside, OutputFile(file, header, size)))


def lay_out_file(file: str, tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]) -> Layout:
    """Return the layout of a single file of a name of its own.

    Args:
        file: its path in the output's folder.
        tensors: (name, dtype name, shape) of each.
        metadata: texts that its header holds.

    Returns:
        The layout.
    """
    sized = [(name, dtype, shape, TORCH_DTYPES[dtype].itemsize * prod(shape)) for name, dtype, shape in tensors]
    header, offsets, size = _header(sized, metadata)
    slots = {name: Slot(file, offsets[name], nbytes) for name, _, _, nbytes in sized}
    return Layout((OutputFile(file, header, size),), slots)


class StreamWriter:
    """Writes tensors at their places in files of full size; any thread may write any part at any time.

    Args:
        folder: where the files are made, or, after an interruption, are already.
        layout: what goes where.

    Raises:
        SuperposeError: the disk is full.
    """

    def __init__(self, folder: Path, layout: Layout) -> None:
        self.folder, self._layout = folder, layout
        self._descriptors: dict[str, int] = {}
        try:
            for file in layout.all_files:
                (folder / file.name).parent.mkdir(exist_ok=True)
                self._descriptors[file.name] = _open_full_size(folder / file.name, file)
        except OSError as error:
            self.close()
            raise disk_problem(error, folder) or error from error
        except BaseException:
            self.close()
            raise

    def write(self, name: str, start: int, tensor: Tensor) -> memoryview:
        """Write a piece of a tensor at its place.

        Args:
            name: the tensor.
            start: where in the tensor's bytes the piece begins.
            tensor: the piece, in the output's dtype.

        Returns:
            The bytes written.
        """
        data = as_bytes(tensor)
        self.write_bytes(name, start, data)
        return data

    def write_bytes(self, name: str, start: int, data: memoryview) -> None:
        """Write bytes of a tensor at their place, which is `start` bytes after the tensor's first."""
        slot = self._layout.slots[name]
        if start < 0 or start + len(data) > slot.nbytes:
            raise AssertionError(f"{name}: bytes {start} to {start + len(data)} of {slot.nbytes}")
        descriptor, place, left = self._descriptor(slot.file), slot.offset + start, data
        while left:
            try:
                written = os.pwrite(descriptor, left, place)
            except OSError as error:
                raise disk_problem(error, slot.file) or error from error
            place, left = place + written, left[written:]

    def digest(self, name: str) -> str:
        """Return the sha256 of the bytes that lie at a tensor's place."""
        slot, digest = self._layout.slots[name], hashlib.sha256()
        place, end = slot.offset, slot.offset + slot.nbytes
        while place < end:
            piece = os.pread(self._descriptors[slot.file], min(1 << 22, end - place), place)
            if not piece:
                break
            digest.update(piece)
            place += len(piece)
        return digest.hexdigest()

    def sync(self) -> None:
        """Bring everything written to the disk."""
        for file, descriptor in self._descriptors.items():
            try:
                os.fsync(descriptor)
            except OSError as error:
                raise disk_problem(error, file) or error from error

    def close(self) -> None:
        """Close the files."""
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def _descriptor(self, file: str) -> int:
        return self._descriptors[file]


class GuestWriter(StreamWriter):
    """Writes into files that a `StreamWriter` of another process holds; opens what is written to, and makes nothing.

    Args:
        folder: where the files are.
        layout: what goes where.
    """

    def __init__(self, folder: Path, layout: Layout) -> None:
        self.folder, self._layout = folder, layout
        self._descriptors: dict[str, int] = {}

    def _descriptor(self, file: str) -> int:
        # Not for reading too: over NFS a page would be fetched, and written back with a neighbour's old bytes in it.
        if file not in self._descriptors:
            self._descriptors[file] = os.open(self.folder / file, os.O_WRONLY)
        return self._descriptors[file]


def as_bytes(tensor: Tensor) -> memoryview:
    """Return a tensor's bytes, in little endian and row order, without copying where it is contiguous."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    if not flat.numel():
        return memoryview(bytearray())
    return flat.view(torch.uint8).numpy().data.cast("B")


def _header(
    shard: list[tuple[str, str, tuple[int, ...], int]], metadata: Mapping[str, str] | None = None
) -> tuple[bytes, dict[str, int], int]:
    """Return a file's header, each tensor's first byte, and the file's size."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    # Wide dtypes first, so that every tensor is aligned to its own size, as readers expect.
    ordered = sorted(shard, key=lambda tensor: (-TORCH_DTYPES[tensor[1]].itemsize, tensor[0]))
    end, starts = 0, {}
    for name, dtype, shape, nbytes in ordered:
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + nbytes]}
        starts[name] = end
        end += nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return header, {name: len(header) + start for name, start in starts.items()}, len(header) + end


def _open_full_size(path: Path, file: OutputFile) -> int:
    """Open a file, and give it its header and size if it does not have them."""
    # Mode 0666 less the umask, like any file: a server under another user has to read it.
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        sound = os.fstat(descriptor).st_size == file.size
        if not sound or os.pread(descriptor, len(file.header), 0) != file.header:
            os.ftruncate(descriptor, 0)
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(descriptor, 0, file.size)  # a full disk shows now, not after hours
            else:
                os.ftruncate(descriptor, file.size)
            os.pwrite(descriptor, file.header, 0)
    except OSError as error:
        os.close(descriptor)
        raise disk_problem(error, path.name) or error from error
    return descriptor


def disk_problem(error: OSError, place: str | Path) -> SuperposeError | None:
    """Return what an error says of the disk that is written to, in words; None if it says nothing of it.

    Args:
        error: what a system call raised.
        place: file or folder that was written; the error's own file is named if it has one.

    Returns:
        The problem.
    """
    # A copy names what is copied first, and then what is written.
    file = error.filename2 or error.filename
    where, again = str(file or place), "run the same command again: finished tensors are kept"
    if error.errno in FULL:
        return SuperposeError(f"the disk is full: {error.strerror}", where=where, mend=f"free some space and {again}")
    if error.errno == errno.EFBIG:
        what = f"no file may become as large as this one: {error.strerror}"
        mend = f"raise the limit (ulimit -f), or write smaller files with --shard-size, and {again}"
        return SuperposeError(what, where=where, mend=mend)
    if error.errno == errno.EIO:
        what = f"the disk fails: {error.strerror}"
        return SuperposeError(what, where=where, mend=f"choose another disk, or mend this one and {again}")
    ours = file is not None and str(file).startswith(str(place))
    if ours and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        what = f"the output cannot be written: {error.strerror}"
        return SuperposeError(what, where=where, mend=f"give yourself the right to write there, and {again}")
    return None


def _natural(name: str) -> tuple[list[tuple[int, int, str]], str]:
    """Order by numbers as numbers: layers.2 before layers.10."""
    pieces = re.split(r"([0-9]+)", name)
    # A number is compared by its digits, the longer being the larger: names can hold more than an int takes.
    digits = [piece.lstrip("0") for piece in pieces]
    keys = [
        (0, len(digits[place]), digits[place]) if place % 2 else (1, 0, piece) for place, piece in enumerate(pieces)
    ]
    return keys, name
