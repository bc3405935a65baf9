"""The folder of an output: `OUT.partial` while a merge is under way, `OUT` when it is complete."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

from superpose.checkpoints.writer import Layout
from superpose.errors import SuperposeError
from superpose.records import is_output

JOURNAL_FILE = "journal.jsonl"


def make_partial(folder: Path) -> None:
    """Make the folder of a merge under way, or take up the one that an earlier run left.

    Args:
        folder: `OUT.partial`.

    Raises:
        SuperposeError: something else is there, or it cannot be made.
    """
    ours = (folder / JOURNAL_FILE).exists() or is_output(folder)
    if folder.exists() and any(folder.iterdir()) and not ours:
        raise SuperposeError(
            "this folder is in the way, and no merge of superpose made it",
            where=str(folder),
            mend="move it, or choose another name for the output",
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / JOURNAL_FILE).touch()
    except OSError as error:
        raise SuperposeError(
            f"the output cannot be made: {error.strerror}", where=str(folder), mend="choose another place"
        ) from error


def remove_strangers(folder: Path, layout: Layout, keep: Iterable[str] = ()) -> None:
    """Remove what an earlier, different merge left in its folder, but for files of these names."""
    known = {Path(file.name).parts[0] for file in layout.all_files} | {JOURNAL_FILE, *keep}
    for entry in folder.iterdir():
        if entry.name not in known:
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a merge's folder for this process alone; the lock goes with the process, however it ends.

    The lock lies beside the folder, not in it: it is held until the folder has its final name.

    Args:
        folder: `OUT.partial`.

    Yields:
        None: while the lock is held.

    Raises:
        SuperposeError: another merge works on it, or the place cannot be written to.
    """
    path = folder.with_name(folder.name + ".lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        stream = _acquire(path)
    except BlockingIOError as error:
        raise SuperposeError(
            "another merge is writing this output",
            where=str(folder),
            mend="wait for it, or choose another name for the output",
        ) from error
    except OSError as error:
        raise SuperposeError(
            f"the output cannot be made: {error.strerror}", where=str(folder), mend="choose another place"
        ) from error
    with stream:
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _acquire(path: Path) -> IO[str]:
    """Return the open lock file, locked, and sure to be the one that others see under its name."""
    while True:
        stream = path.open("w")
        try:
            import fcntl

            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.fstat(stream.fileno()).st_ino == path.stat().st_ino:
                return stream
            stream.close()  # its holder removed it in this moment
        except ImportError:  # Windows has no flock: two merges into one output are not noticed there
            return stream
        except OSError:
            stream.close()
            raise


def settle_replaced(output: Path) -> None:
    """Finish what a run left that was killed while it replaced an output."""
    replaced = _replaced(output)
    if not is_output(replaced):
        return
    if output.exists():
        shutil.rmtree(replaced)
    else:
        replaced.rename(output)


def publish(partial_folder: Path, output: Path) -> None:
    """Give the finished folder its name; what had the name before goes away after."""
    for file in partial_folder.iterdir():
        _sync(file)
    # Killed from here on, the record still says whose folder it is (see `make_partial`).
    (partial_folder / JOURNAL_FILE).unlink()
    _sync(partial_folder)
    if output.is_dir() and not any(output.iterdir()):
        output.rmdir()
    elif output.exists():
        output.rename(_replaced(output))
    partial_folder.rename(output)
    _sync(output.absolute().parent)
    settle_replaced(output)


def _replaced(output: Path) -> Path:
    # A name that nobody gives an output: what lies there is moved back or deleted.
    return output.with_name(f".{output.name}.superpose-replaced")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
