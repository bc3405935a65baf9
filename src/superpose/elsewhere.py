"""Work items on other machines: the inputs must be there too; the result is written in place, or sent back.

Whether another machine sees the output's folder is found out by a file of random name that the driver puts there: who
finds it writes into the same files. It goes away with the run, so that a worker that was given up, but still lives
somewhere, stops writing before the folder is anybody else's.
"""

from __future__ import annotations

import contextlib
import secrets
import socket
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from superpose.backends import Backend
from superpose.checkpoints.adapted import files_of
from superpose.checkpoints.stamps import content_sample
from superpose.checkpoints.writer import GuestWriter, Layout, StreamWriter, as_bytes
from superpose.errors import SuperposeError
from superpose.journal import Journal
from superpose.merge_tensor import merge_item
from superpose.parts import Context
from superpose.planning import WorkItem, sources_of
from superpose.records import TensorRecord

Piece = tuple[str, int, np.ndarray]
"""Tensor name, first byte within the tensor, bytes."""


@dataclass(frozen=True)
class MergeElsewhere:
    """Merges an item in another process.

    Args:
        surveys: (method name, options) -> what the survey ended with.
        context: what all items share.
        layout: where each tensor goes.
        folder: `OUT.partial`.
        sign: name of the file by which a machine knows that it sees the driver's folder.
    """

    surveys: Mapping[Any, Any]
    context: Context
    layout: Layout
    folder: Path
    sign: str = ""

    def __call__(self, item: WorkItem) -> tuple[TensorRecord, Sequence[Piece]]:
        """Return the item's record, and the bytes of its tensors unless they were written in place."""
        if not self._sees_folder():
            pieces: list[Piece] = []
            return merge_item(item, self.surveys, self.context, _keep_in(pieces)), pieces
        with contextlib.closing(GuestWriter(self.folder, self.layout)) as writer:

            def write(name: str, start: int, piece: Tensor) -> memoryview:
                if not self._sees_folder():
                    raise RuntimeError(f"the merge into {self.folder} has ended without {item.name}")
                return writer.write(name, start, piece)

            record = merge_item(item, self.surveys, self.context, write)
            writer.sync()  # the driver cannot: what is written may still be in this machine's memory
        return record, ()

    def _sees_folder(self) -> bool:
        return (self.folder / self.sign).exists()


def merge_elsewhere(
    items: Sequence[WorkItem], work: MergeElsewhere, backend: Backend, journal: Journal, writer: StreamWriter
) -> Generator[tuple[int, TensorRecord], None, None]:
    """Merge items in other processes; whatever the file system, the journal is written here alone.

    Args:
        items: what to merge.
        work: how; its sign is put up here.
        backend: where.
        journal: of what is finished.
        writer: of the output's files, for what is sent back.

    Yields:
        Index and record of each item, as they come.
    """
    writer.sync()  # headers and sizes, for who opens the files on another machine
    with _sign_in(work.folder) as sign:
        for index, (record, pieces) in backend.map(replace(work, sign=sign), items, [item.memory for item in items]):
            for name, start, data in pieces:
                writer.write_bytes(name, start, memoryview(data))
            journal.add(items[index], record)
            yield index, record


@contextlib.contextmanager
def _sign_in(folder: Path) -> Iterator[str]:
    """Put up a sign in a folder, a file of random name, and take it down at the end."""
    sign = folder / f"under-way-{secrets.token_hex(8)}"
    sign.touch()
    try:
        yield sign.name
    finally:
        sign.unlink(missing_ok=True)


def with_inputs_checked(backend: Backend, items: Sequence[WorkItem]) -> Backend:
    """Return the backend, one that checks on other machines that an item's inputs are the planned ones.

    Args:
        backend: where it is done.
        items: all that it will be given.

    Returns:
        The backend itself where it works in this process.
    """
    if backend.in_process:
        return backend
    files = {file for item in items for file in _files(item)}
    return _Checking(backend, {file: content_sample(file) for file in files})


class _Checking:
    """A backend before whose functions an item's inputs are checked."""

    in_process = False

    def __init__(self, backend: Backend, marks: Mapping[Path, str]) -> None:
        self._backend, self._marks = backend, marks
        self.facts, self.close = backend.facts, backend.close

    @property
    def workers(self) -> int:
        return self._backend.workers

    def map(
        self, function: Callable[[Any], Any], items: Sequence[Any], memory: Sequence[int]
    ) -> Generator[tuple[int, Any], None, None]:
        return self._backend.map(_Checked(function, self._marks), items, memory)


@dataclass(frozen=True)
class _Checked:
    """A function of items, and what marks the files they read."""

    function: Callable[[WorkItem], Any]
    marks: Mapping[Path, str]

    def __call__(self, item: WorkItem) -> Any:
        for file in _files(item):
            _check(file, self.marks[file])
        return self.function(item)


def _files(item: WorkItem) -> list[Path]:
    return sorted({file for header in sources_of(item) for file in files_of(header)})


@lru_cache(maxsize=4096)
def _check(file: Path, mark: str) -> None:
    """Check once that a file is here, and is the one that was planned with."""
    try:
        same = content_sample(file) == mark
    except OSError as error:
        what = f"an input cannot be read on a node: {error.strerror}"
    else:
        if same:
            return
        what = "an input is another file on a node"
    mend = "put the inputs on a file system that all nodes share, under the same path on each"
    raise SuperposeError(what, where=f"{file}, on node {socket.gethostname()}", mend=mend)


def _keep_in(pieces: list[Piece]) -> Callable[[str, int, Tensor], memoryview]:
    def write(name: str, start: int, piece: Tensor) -> memoryview:
        data = as_bytes(piece)
        # A copy: what is written may be memory that the next piece is computed in.
        pieces.append((name, start, np.frombuffer(data, np.uint8).copy()))
        return data

    return write
