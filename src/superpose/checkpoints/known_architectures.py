"""What transformers said about a config once, kept on disk: asking it again would import it, which takes seconds.

An answer is used only for the same config, by the same versions of transformers, torch and the code that asks. It lies
in the user's cache folder, a file for each; `SUPERPOSE_NO_CACHE=1` neither reads nor writes any.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from superpose.cache_folder import cache_folder


def place_of(config: Mapping[str, Any], tensors: int | None, code: Path) -> Path | None:
    """Return the file that an answer is kept in, None where none is kept.

    Args:
        config: content of config.json.
        tensors: how many the checkpoint has, if known.
        code: the source file that asks.

    Returns:
        The file, which may not exist.
    """
    if os.environ.get("SUPERPOSE_NO_CACHE"):
        return None
    try:
        versions = [version("transformers"), version("torch")]
    except PackageNotFoundError:
        return None
    if any("dev" in found for found in versions):  # the code of such a version changes under its name
        return None
    asked = [versions, hashlib.sha256(code.read_bytes()).hexdigest(), tensors, config]
    key = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
    return cache_folder() / "architectures" / f"{key[:32]}.json"


def recall(place: Path | None) -> Any:
    """Return what was kept in a place, None where nothing readable was."""
    if place is None:
        return None
    try:
        return json.loads(place.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def keep(place: Path | None, answer: Mapping[str, Any]) -> None:
    """Keep an answer, whole or not at all."""
    if place is None:
        return
    unfinished = place.with_suffix(f".{os.getpid()}")
    with contextlib.suppress(OSError):  # no room, or a folder of someone else's: it is asked again next time
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            unfinished.write_text(json.dumps(answer), encoding="utf-8")
            unfinished.replace(place)
        finally:
            unfinished.unlink(missing_ok=True)
