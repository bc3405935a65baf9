"""What a process does to its own surroundings when its fault comes: another program's doing, in its place."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def fill(ballast: str, left: int) -> None:
    """Fill a disk but for some bytes."""
    file = os.open(ballast, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    free = os.fstatvfs(file).f_bavail * os.fstatvfs(file).f_frsize
    os.posix_fallocate(file, 0, max(free - left, 1))
    os.close(file)


def remove(path: str) -> None:
    """Remove a file or a folder."""
    shutil.rmtree(path) if Path(path).is_dir() else Path(path).unlink()


def occupy(folder: str) -> None:
    """Make a folder with somebody else's file in it."""
    Path(folder).mkdir()
    (Path(folder) / "thesis.txt").write_text("five years")
