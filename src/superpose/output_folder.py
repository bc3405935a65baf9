"""The folder of an output: `OUT.partial` while a merge is under way, `OUT` when it is complete."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from superpose.checkpoints.writer import Layout
from superpose.errors import SuperposeError
from superpose.records import RECORD_FILE

JOURNAL_FILE = "journal.jsonl"
LOCK_FILE = "lock"


def make_partial(folder: Path) -> None:
    """Make the folder of a merge under way, or take up the one that an earlier run left.

    Args:
        folder: `OUT.partial`.

    Raises:
        SuperposeError: something else is there, or it cannot be made.
    """
    ours = (folder / LOCK_FILE).exists() or (folder / RECORD_FILE).exists()
    if folder.exists() and any(folder.iterdir()) and not ours:
        raise SuperposeError(
            "this folder is in the way, and no merge of superpose made it",
            where=str(folder),
            mend="move it, or choose another name for the output",
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SuperposeError(
            f"the output cannot be made: {error.strerror}", where=str(folder), mend="choose another place"
        ) from error


def remove_strangers(folder: Path, layout: Layout) -> None:
    """Remove what an earlier, different merge left in its folder."""
    known = {file.name for file in layout.files} | {LOCK_FILE, JOURNAL_FILE}
    for entry in folder.iterdir():
        if entry.name not in known:
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a merge's folder for this process alone; the lock goes with the process, however it ends.

    Args:
        folder: `OUT.partial`.

    Yields:
        None: while the lock is held.

    Raises:
        SuperposeError: another merge works on it.
    """
    path = folder / LOCK_FILE
    with path.open("w") as stream:
        try:
            import fcntl

            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:  # Windows has no flock: two merges into one output are not noticed there
            pass
        except OSError as error:
            raise SuperposeError(
                "another merge is writing this output",
                where=str(folder),
                mend="wait for it, or choose another name for the output",
            ) from error
        yield


def publish(partial_folder: Path, output: Path) -> None:
    """Give the finished folder its name; what had the name before goes away after."""
    for file in partial_folder.iterdir():
        _sync(file)
    # Killed from here on, the record still says whose folder it is (see `make_partial`).
    (partial_folder / JOURNAL_FILE).unlink(missing_ok=True)
    (partial_folder / LOCK_FILE).unlink()
    _sync(partial_folder)
    replaced = output.with_name(f"{output.name}.replaced-{os.getpid()}")
    if output.is_dir() and not any(output.iterdir()):
        output.rmdir()
    elif output.exists():
        output.rename(replaced)
    partial_folder.rename(output)
    _sync(output.absolute().parent)
    if replaced.is_dir():
        shutil.rmtree(replaced)
    else:
        replaced.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
