"""A power cut: what a disk may hold of what was written, when no more is known than what was synced.

Pessimistic: every page of a file that was written since the file was synced is as it was, as it is, or zero, each by
chance; so is every name that was made, removed or changed since its folder was synced. A file system that orders its
journal does better than that. What stays is that renaming within a folder is one step, and that no folder with
something in it is removed or written over.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

PAGE = 4096
CUT = 77
"""The exit code of a process whose power was cut."""

Place = tuple[int, str]
"""A folder, and a name in it."""


class Power:
    """Watches a folder, and cuts the power at an event.

    Args:
        root: the folder; what is there is on the disk.
        event: number of the event, of all kinds, before which the power goes.
        seed: of what comes through.
    """

    def __init__(self, root: Path, event: int, seed: str) -> None:
        self._root, self._event, self._random = root, event, random.Random(seed)
        self._number = 0
        self._ids: dict[int, int] = {}  # by inode, whose numbers are given again to other files
        self._following = 0
        self._folders: set[int] = set()
        self._entries: dict[Place, int] = {}
        self._content: dict[int, bytes] = {}
        self._steps: list[dict[Place, int | None]] = []
        self._look()
        self._durable, self._synced = dict(self._entries), dict(self._content)
        self._steps.clear()

    def watch(self, watch: Callable[[Path, Callable[[str, Callable[[], Any]], None]], None]) -> None:
        """Begin to watch, by a function that calls another at every event."""
        watch(self._root, self._met)
        told = os.fsync

        def fsync(descriptor: int) -> None:
            told(descriptor)
            self._look()
            self._note_synced(os.fstat(descriptor).st_ino)

        os.fsync = fsync

    def cut(self) -> None:
        """Write what the disk holds now beside the root, as `after`, and end the process."""
        self._look()
        share = self._random.choice((0.1, 0.5, 0.9, 1.0))
        entries = dict(self._durable)
        for step in self._steps:
            if self._random.random() < share and self._is_possible(step, entries):
                for place, number in step.items():
                    _put(entries, place, number)
        self._write(self._ids[self._root.stat().st_ino], self._root.with_name("after"), entries, share)
        os._exit(CUT)

    def _met(self, _event: str, _half: Callable[[], Any]) -> None:
        self._look()
        self._number += 1
        if self._number == self._event:
            self.cut()

    def _note_synced(self, inode: int) -> None:
        number = self._ids.get(inode)
        if number is None:  # of no file below the root
            return
        if number not in self._folders:
            self._synced[number] = self._content[number]
            return
        for step in self._steps:
            for place in [place for place in step if place[0] == number]:
                _put(self._durable, place, step.pop(place))
        self._steps = [step for step in self._steps if step]

    def _look(self) -> None:
        """See what has changed since the last look, and note it as steps."""
        found: dict[Place, int] = {}
        seen: set[int] = set()
        self._see(self._root, found, seen)
        self._ids = {inode: number for inode, number in self._ids.items() if inode in seen}
        changed = {
            place: found.get(place)
            for place in sorted({*found, *self._entries})
            if found.get(place) != self._entries.get(place)
        }
        moved = {number for number in changed.values() if number in set(self._entries.values())}
        together: dict[Place, int | None] = {}
        for place, number in changed.items():
            if number in moved or self._entries.get(place) in moved:
                together[place] = number
            else:
                self._steps.append({place: number})
        if together:
            self._steps.append(together)
        self._entries = found

    def _see(self, folder: Path, found: dict[Place, int], seen: set[int]) -> int:
        own = self._number_of(folder.stat().st_ino, seen)
        self._folders.add(own)
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            if entry.is_dir(follow_symlinks=False):
                found[own, entry.name] = self._see(Path(entry.path), found, seen)
            else:
                number = self._number_of(entry.inode(), seen)
                self._content[number] = Path(entry.path).read_bytes()
                found[own, entry.name] = number
        return own

    def _number_of(self, inode: int, seen: set[int]) -> int:
        seen.add(inode)
        if inode not in self._ids:
            self._following += 1
            self._ids[inode] = self._following
        return self._ids[inode]

    def _is_possible(self, step: dict[Place, int | None], entries: dict[Place, int]) -> bool:
        for place, number in step.items():
            there = entries.get(place)
            moved = there in step.values()
            if there is not None and there != number and not moved and any(folder == there for folder, _ in entries):
                return False
        return True

    def _write(self, folder: int, target: Path, entries: dict[Place, int], share: float) -> None:
        target.mkdir()
        for (holder, name), number in sorted(entries.items()):
            if holder != folder:
                continue
            if number in self._folders:
                self._write(number, target / name, entries, share)
            else:
                (target / name).write_bytes(self._left_of(number, share))

    def _left_of(self, number: int, share: float) -> bytes:
        """Return what a file holds after the cut."""
        old, new = self._synced.get(number, b""), self._content[number]
        size = len(new) if self._random.random() < share else len(old)
        pages = []
        for start in range(0, size, PAGE):
            length = min(PAGE, size - start)
            before, now = old[start : start + length], new[start : start + length]
            if before == now or self._random.random() < share:
                chosen = now
            else:
                chosen = self._random.choice((before, bytes(length)))
            pages.append(chosen.ljust(length, b"\0"))
        return b"".join(pages)


def _put(entries: dict[Place, int], place: Place, number: int | None) -> None:
    if number is None:
        entries.pop(place, None)
    else:
        entries[place] = number
