"""Where things are kept that can be made again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return `$SUPERPOSE_CACHE`, else `superpose` under `$XDG_CACHE_HOME` or `~/.cache`."""
    if named := os.environ.get("SUPERPOSE_CACHE"):
        return Path(named).expanduser()
    caches = os.environ.get("XDG_CACHE_HOME")
    return (Path(caches) if caches else Path.home() / ".cache") / "superpose"
