"""The folder of an output: `OUT.partial` while a merge is under way, `OUT` when it is complete."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import socket
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import IO

from superpose.checkpoints.stamps import file_digest
from superpose.checkpoints.writer import FULL, Layout, disk_problem
from superpose.errors import SuperposeError
from superpose.planning.adapters import WIDE_FILE
from superpose.records import RECORD_FILE, RunRecord, is_output

JOURNAL_FILE = "journal.jsonl"
NO_LOCKS = {getattr(errno, name) for name in ("ENOLCK", "ENOSYS", "EOPNOTSUPP", "ENOTSUP") if hasattr(errno, name)}


def make_partial(folder: Path) -> None:
    """Make the folder of a merge under way, or take up the one that an earlier run left.

    Args:
        folder: `OUT.partial`.

    Raises:
        SuperposeError: something else is there, or it cannot be made.
    """
    try:
        ours = (folder / JOURNAL_FILE).exists() or is_output(folder)
        if folder.exists() and any(folder.iterdir()) and not ours:
            raise SuperposeError(
                "this folder is in the way, and no merge of superpose made it",
                where=str(folder),
                mend="move it, or choose another name for the output",
            )
        folder.mkdir(parents=True, exist_ok=True)
        _take_back(folder)
        (folder / JOURNAL_FILE).touch()
        # Before anything else is there: weights whose journal was lost with the power would be in the way.
        sync(folder)
        sync(folder.absolute().parent)
    except OSError as error:
        raise _not_made(error, folder) from error


def _not_made(error: OSError, folder: Path) -> SuperposeError:
    problem = disk_problem(error, folder) if error.errno in FULL else None
    if problem is not None:
        return problem
    what = f"the output cannot be made: {error.strerror}"
    if error.errno in NO_LOCKS:
        what = f"the output cannot be made: its file system has no locks ({error.strerror})"
    return SuperposeError(what, where=str(folder), mend="choose another place")


def remove_strangers(folder: Path, layout: Layout, keep: Iterable[str] = ()) -> None:
    """Remove what an earlier, different merge left in its folder, but for files and folders of these names."""
    files = {PurePosixPath(file.name) for file in layout.all_files} | {PurePosixPath(JOURNAL_FILE)}
    _remove_others(folder, PurePosixPath(), files | {PurePosixPath(name) for name in keep})


def _remove_others(folder: Path, place: PurePosixPath, known: Iterable[PurePosixPath]) -> None:
    holders = {parent for file in known for parent in file.parents}
    for entry in folder.iterdir():
        name, is_folder = place / entry.name, entry.is_dir() and not entry.is_symlink()
        if name in known:
            continue
        if name in holders and is_folder:
            _remove_others(entry, name, known)
        else:
            shutil.rmtree(entry) if is_folder else entry.unlink()


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a merge's folder for this process alone; the lock goes with the process, however it ends.

    The lock lies beside the folder, not in it: it is held until the folder has its final name.

    Args:
        folder: `OUT.partial`.

    Yields:
        None: while the lock is held.

    Raises:
        SuperposeError: another merge works on it, the place cannot be written to, or no longer can.
    """
    path = folder.with_name(folder.name + ".lock")
    try:
        _make_folders(path.parent)
        stream = _acquire(path)
    except BlockingIOError as error:
        raise SuperposeError(
            f"another merge is writing this output{_holder(path)}",
            where=str(folder),
            mend="wait for it, or choose another name for the output",
        ) from error
    except OSError as error:
        raise _not_made(error, folder) from error
    with stream:
        try:
            yield
        except OSError as error:
            problem = disk_problem(error, folder)
            if problem is None:
                raise
            raise problem from error
        finally:
            path.unlink(missing_ok=True)


def _make_folders(folder: Path) -> None:
    """Make a folder and those that hold it, so that they outlast a power cut."""
    if not folder.is_dir():
        _make_folders(folder.absolute().parent)
        folder.mkdir(exist_ok=True)
        sync(folder.absolute().parent)


def _acquire(path: Path) -> IO[str]:
    """Return the open lock file, locked, and sure to be the one that others see under its name."""
    while True:
        stream = path.open("a", encoding="utf-8")  # not emptied: it may tell of the one who holds it
        try:
            import fcntl

            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.fstat(stream.fileno()).st_ino == path.stat().st_ino:
                _say_who(stream)
                return stream
            stream.close()  # its holder removed it in this moment
        except ImportError:  # Windows has no flock: two merges into one output are not noticed there
            return stream
        except OSError:
            stream.close()
            raise


def _say_who(stream: IO[str]) -> None:
    """Write into a lock file who holds it, for those who find it locked."""
    since = time.strftime("%Y-%m-%d %H:%M:%S%z")
    told = json.dumps({"process": os.getpid(), "host": socket.gethostname(), "since": since}) + "\n"
    with contextlib.suppress(OSError):  # on a full disk others are told less; that it is full will show
        os.ftruncate(stream.fileno(), 0)
        os.write(stream.fileno(), told.encode())


def _holder(path: Path) -> str:
    """Return who holds a lock, in words; nothing where that is not known."""
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        process, host, since = int(told["process"]), str(told["host"]), str(told["since"])
        # A new holder has the lock for a moment before it has its own name there.
        if host == socket.gethostname() and not _is_alive(process):
            return ""
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return ""
    return f": process {process} on {host}, since {since}"


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True


def settle_replaced(output: Path) -> None:
    """Finish what a run left that was killed while it replaced an output."""
    shutil.rmtree(_removed(output), ignore_errors=True)  # a deletion that was cut short
    replaced = _replaced(output)
    if not is_output(replaced):
        return
    if is_output(output):
        # Renamed first: cut short, it is no whole output any more, and must not pass for one.
        replaced.rename(_removed(output))
        sync(output.absolute().parent)
        shutil.rmtree(_removed(output), ignore_errors=True)
    elif not output.exists() or (output.is_dir() and not any(output.iterdir())):
        replaced.rename(output)


def write_record(folder: Path, layout: Layout, record: RunRecord) -> RunRecord:
    """Write the record of a merge, the last of its files.

    Args:
        folder: of the merge under way; everything else is in it.
        layout: of its weights, whose tensors have digests of their own.
        record: the record.

    Returns:
        The record as written: with the digests of all other files.
    """
    apart = {file.name for file in layout.all_files} | {RECORD_FILE, JOURNAL_FILE}
    files = {file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*")) if file.is_file()}
    record = replace(record, files={name: file_digest(file) for name, file in files.items() if name not in apart})
    (folder / RECORD_FILE).write_text(record.to_json(), encoding="utf-8", errors="backslashreplace")
    return record


def publish(partial_folder: Path, output: Path) -> None:
    """Give the finished folder its name; what had the name before goes away after.

    Args:
        partial_folder: `OUT.partial`, complete.
        output: its final name.

    Raises:
        SuperposeError: something else has taken the name in the meantime, or it cannot be given.
    """
    _sync_all(partial_folder)
    _set_aside(partial_folder)
    try:
        _replace(partial_folder, output)
    except OSError as error:
        _take_back(partial_folder)
        mend = "make room for that name, and run the same command again: finished tensors are kept"
        what = f"the output cannot be given its name: {error.strerror}"
        raise SuperposeError(what, where=str(output), mend=mend) from error
    sync(output.absolute().parent)
    shutil.rmtree(_aside(partial_folder), ignore_errors=True)  # what cannot be removed now goes next time
    settle_replaced(output)


def _replace(partial_folder: Path, output: Path) -> None:
    """Give a folder its name, and put what had it out of the way; back, should it fail."""
    if output.is_dir() and not any(output.iterdir()):
        output.rmdir()
    if not output.exists():
        partial_folder.rename(output)
        return
    if not is_output(output):
        raise FileExistsError(errno.EEXIST, "something else has it", str(output))
    output.rename(_replaced(output))
    try:
        partial_folder.rename(output)
    except BaseException:
        _replaced(output).rename(output)
        raise


def _replaced(output: Path) -> Path:
    # A name that nobody gives an output: what lies there is moved back or deleted.
    return output.with_name(f".{output.name}.superpose-replaced")


def _removed(output: Path) -> Path:
    return output.with_name(f".{output.name}.superpose-removed")


def _aside(partial_folder: Path) -> Path:
    return partial_folder.with_name(f"{partial_folder.name}.aside")


def _set_aside(partial_folder: Path) -> None:
    """Move what a restart needs, and the output does not have, out of a complete folder.

    Whose folder it is then says its record (see `make_partial`).
    """
    aside = _aside(partial_folder)
    for name in (JOURNAL_FILE, WIDE_FILE):
        for file in sorted(partial_folder.rglob(name)):
            place = aside / file.relative_to(partial_folder)
            place.parent.mkdir(parents=True, exist_ok=True)
            file.replace(place)
    _sync_all(aside)
    sync(aside.absolute().parent)
    _sync_all(partial_folder)


def _take_back(partial_folder: Path) -> None:
    """Put back what was set aside, if the folder that it belongs to did not get its name."""
    aside = _aside(partial_folder)
    if is_output(partial_folder):
        for file in sorted(path for path in aside.rglob("*") if path.is_file()):
            file.replace(partial_folder / file.relative_to(aside))
    shutil.rmtree(aside, ignore_errors=True)


def _sync_all(top: Path) -> None:
    for folder, _, files in os.walk(top):
        for file in files:
            sync(Path(folder) / file)
        sync(Path(folder))


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
