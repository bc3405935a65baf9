"""A folder of results that are costly to compute, named by what they were computed from.

An entry's name is a digest of every byte that it depends on: the tensors, what was done with them, the versions of
superpose and torch, and the kind of device. So an entry never has to be told that it is out of date; it is just not
asked for any more, and goes when room is needed. Several runs may share a folder at the same time.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from superpose.errors import SuperposeError
from superpose.own_code import code_digest
from superpose.registry import Remembered

SUFFIX = ".entry"
ROOM_LEFT = 0.9
"""Down to this share of the limit a full folder is emptied."""
ABANDONED = 3600.0
"""Seconds after which an unfinished file belongs to a run that died."""
_DIGEST_BYTES = 32


class DecompositionCache:
    """Remembers tensors and numbers by what they were computed from.

    Args:
        folder: where entries are; made when it is not there.
        limit: bytes of all entries together; the least recently used go first.
        keep_steps: whether steps on the way to another remembered result are kept too.
    """

    def __init__(self, folder: Path, limit: int, *, keep_steps: bool = True) -> None:
        self.folder, self.limit, self.keep_steps = folder, limit, keep_steps
        self._lock = threading.Lock()
        self._problems: list[str] = []
        self._bytes: int | None = None  # of all entries; counted when room is first needed

    def __reduce__(self) -> tuple[Any, ...]:
        """Let another process open the folder anew."""
        return partial(DecompositionCache, keep_steps=self.keep_steps), (self.folder, self.limit)

    def remember(
        self, what: str, tensors: Sequence[Tensor], compute: Callable[[], Remembered], *, step: bool = False
    ) -> Remembered:
        """Return what `compute` returns, from the folder if it is there.

        Args:
            what: what is computed, with everything it depends on beside the tensors.
            tensors: what it is computed from.
            compute: pure, in the bytes of its result too.
            step: whether the result is a step on the way to another that is remembered.

        Returns:
            The result; its tensors are on the device of the first one given.
        """
        if step and not self.keep_steps:
            return compute()
        path = self.folder / f"{_digest(what, tensors)}{SUFFIX}"
        found = self._read(path)
        if found is None:
            found = compute()
            self._write(path, found)
            return found
        device = tensors[0].device
        return Remembered({name: tensor.to(device) for name, tensor in found.tensors.items()}, found.numbers)

    def problems(self) -> tuple[str, ...]:
        """Return what went wrong with the folder, and forget it."""
        with self._lock:
            problems, self._problems = tuple(dict.fromkeys(self._problems)), []
        return problems

    def _read(self, path: Path) -> Remembered | None:
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            self._note(f"{path.name} cannot be read ({error.strerror}) and is computed anew")
            return None
        digest, body = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
        if hashlib.sha256(body).digest() != digest:
            self._note(f"{path.name} is damaged and is computed anew")
            return None
        try:
            length = int.from_bytes(body[:8], "little")
            numbers, tensors = json.loads(body[8 : 8 + length]), load(body[8 + length :])
        except (ValueError, SafetensorError) as error:
            self._note(f"{path.name} cannot be read ({error}) and is computed anew")
            return None
        self._touch(path)
        return Remembered(tensors, numbers)

    def _write(self, path: Path, entry: Remembered) -> None:
        """Write an entry under another name and rename it: nobody ever sees a part of it."""
        numbers = json.dumps(entry.numbers).encode()
        tensors = save({name: tensor.cpu().contiguous() for name, tensor in entry.tensors.items()})
        body = len(numbers).to_bytes(8, "little") + numbers + tensors
        size = _DIGEST_BYTES + len(body)
        if size > self.limit:
            return
        try:
            self._make_room(size)
            with tempfile.NamedTemporaryFile(dir=self.folder, suffix=".tmp", delete=False) as file:
                try:
                    file.write(hashlib.sha256(body).digest())
                    file.write(body)
                    file.flush()
                    Path(file.name).replace(path)
                except BaseException:
                    Path(file.name).unlink(missing_ok=True)
                    raise
        except OSError as error:
            # A merge does not need its cache: it goes on, and says so in the end.
            self._note(f"{path.name} cannot be written: {error.strerror}")
            return
        with self._lock:
            self._bytes = (self._bytes or 0) + size

    def _make_room(self, size: int) -> None:
        with self._lock:
            if self._bytes is not None and self._bytes + size <= self.limit:
                return
            entries = sorted(self._entries())  # other runs write too: counted afresh
            total = sum(taken for _, taken, _ in entries)
            emptied = total + size <= self.limit
            for _, taken, path in entries:
                if emptied:
                    break
                path.unlink(missing_ok=True)
                total -= taken
                emptied = total + size <= ROOM_LEFT * self.limit
            self._bytes = total

    def _entries(self) -> list[tuple[float, int, Path]]:
        """Return time of last use, bytes and path of every entry; remove what dead runs have left."""
        found = []
        for path in self.folder.iterdir():
            try:
                status = path.stat()
            except FileNotFoundError:  # another run has removed it since it was listed
                continue
            if not path.is_file():
                continue
            if path.suffix == SUFFIX:
                found.append((status.st_mtime, status.st_size, path))
            elif path.suffix == ".tmp" and time.time() - status.st_mtime > ABANDONED:
                path.unlink(missing_ok=True)
        return found

    def _touch(self, path: Path) -> None:
        try:
            os.utime(path)
        except OSError as error:
            # Removed or read-only: then it is as old as it looks.
            self._note(f"{path.name} keeps its old date: {error.strerror}")

    def _note(self, problem: str) -> None:
        with self._lock:
            self._problems.append(f"cache {self.folder}: {problem}")


def open_cache(folder: Path, limit: int, *, keep_steps: bool = True) -> DecompositionCache:
    """Return the cache in a folder, which is made if it is not there.

    Args:
        folder: where entries are.
        limit: bytes of all entries together.
        keep_steps: whether steps on the way to another remembered result are kept too.

    Returns:
        The cache.

    Raises:
        SuperposeError: the folder cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        mend = "name a folder that can be written to"
        raise SuperposeError(str(error.strerror), where=f"--cache {folder}", mend=mend) from error
    return DecompositionCache(folder, limit, keep_steps=keep_steps)


def _digest(what: str, tensors: Sequence[Tensor]) -> str:
    digest = hashlib.sha256(f"{code_digest()}\0{torch.__version__}\0{what}".encode())
    for tensor in tensors:
        digest.update(f"\0{tensor.dtype} {tuple(tensor.shape)} {tensor.device.type}\0".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
