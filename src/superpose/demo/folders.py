"""Folders that are either complete or not there."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

PARTIAL_PREFIX = "partial-"


@contextlib.contextmanager
def scratch_folder(parent: Path) -> Iterator[Path]:
    """Yield a new folder in `parent` that is gone afterwards, whatever happens."""
    parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=PARTIAL_PREFIX, dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def complete_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder to fill, which becomes `target` when the block ends without an error.

    The name `target` thus only ever stands for a complete folder. When another process finished the same one
    in the meantime, its copy stays: folders are named by what made them, so both are alike.
    """
    with scratch_folder(target.parent) as scratch:
        filled = scratch / target.name
        filled.mkdir()
        yield filled
        try:
            filled.rename(target)
        except OSError:
            if not target.is_dir():
                raise
