"""The input files of a merge, watched: each has to stay what the plan saw, until the last tensor is merged.

A file is told by its size, its times and a sample of its content. The times are looked at after every item
and cost a system call; the sample is taken when the plan is made, and where times alone differ.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from superpose.backends import Backend
from superpose.checkpoints.adapted import files_of
from superpose.checkpoints.stamps import FileStamp, stamp
from superpose.errors import SuperposeError
from superpose.planning import WorkItem, sources_of

MEND = "let it be while a merge reads it, and run the same command again: what was made of the old file is made anew"


class Watch:
    """The planned state of a merge's input files.

    Args:
        stamps: what each file was when the plan was made.
    """

    def __init__(self, stamps: Mapping[Path, FileStamp]) -> None:
        self._stamps = stamps

    def check(self, files: Iterable[Path]) -> None:
        """Check that files are what they were, by size and times.

        Args:
            files: some of those that are watched; others are not looked at.

        Raises:
            SuperposeError: one is gone, or was changed.
        """
        for file in files:
            planned = self._stamps.get(file)
            if planned is None:
                continue
            try:
                status = file.stat()
            except OSError as error:
                what, mend = (
                    "the file is gone since the merge began",
                    "put the file back and run the same command again",
                )
                raise SuperposeError(what, where=str(file), mend=f"{mend}: finished tensors are kept") from error
            if planned.size != status.st_size or planned.modified != status.st_mtime_ns:
                told = (
                    f"{planned.size} bytes then, {status.st_size} now" if planned.size != status.st_size else "its date"
                )
                raise SuperposeError(
                    f"the file has changed since the plan was made ({told})", where=str(file), mend=MEND
                )
            # Another time of change alone comes of a new link or of new rights; what it holds then has to tell.
            moved = (planned.changed, planned.inode) != (status.st_ctime_ns, status.st_ino)
            if moved and stamp(file).sample != planned.sample:
                what = "the file has changed since the plan was made (its content)"
                raise SuperposeError(what, where=str(file), mend=MEND)

    def check_all(self) -> None:
        """Check every file, as `check` does."""
        self.check(self._stamps)

    @contextmanager
    def over(self, *items: WorkItem) -> Iterator[None]:
        """Check items' inputs after they were worked on; what goes wrong with a changed file is the change.

        Args:
            *items: what is worked on.

        Yields:
            None: while it is.

        Raises:
            SuperposeError: an input was changed.
        """
        files = {file for item in items for header in sources_of(item) for file in files_of(header)}
        try:
            yield
        except Exception:
            self.check(files)
            raise
        self.check(files)


def watched(backend: Backend, watch: Watch) -> Backend:
    """Return the backend with an item's inputs checked after each call; by this process, wherever the call ran."""
    return _Watched(backend, watch)


@dataclass(frozen=True)
class _Watched:
    backend: Backend
    watch: Watch

    @property
    def in_process(self) -> bool:
        return self.backend.in_process

    @property
    def workers(self) -> int:
        return self.backend.workers

    def facts(self) -> Mapping[str, Any]:
        return self.backend.facts()

    def close(self) -> None:
        self.backend.close()

    def map(
        self, function: Callable[[Any], Any], items: Sequence[Any], memory: Sequence[int]
    ) -> Generator[tuple[int, Any], None, None]:
        if self.in_process:
            yield from self.backend.map(_Guarded(function, self.watch), items, memory)
            return
        for index, result in self.backend.map(function, items, memory):
            with self.watch.over(items[index]):
                pass
            yield index, result


@dataclass(frozen=True)
class _Guarded:
    function: Callable[[WorkItem], Any]
    watch: Watch

    def __call__(self, item: WorkItem) -> Any:
        with self.watch.over(item):
            return self.function(item)
