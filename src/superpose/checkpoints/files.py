"""Files of weights and of settings: formats by suffix, headers, JSON, and texts by which files are told apart."""

from __future__ import annotations

import json
from functools import cache
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

import superpose.checkpoints
from superpose.checkpoints.first_bytes import told_by_first_bytes
from superpose.checkpoints.headers import FileHeaders, Format
from superpose.errors import SuperposeError, nearest

LARGEST_JSON = 50_000_000
"""Bytes; more than any config or index has."""
MOST_PARTS, DEEPEST = 1_000_000, 100
"""Lists and mappings in a JSON file, and how deep they lie in each other; a config has some hundreds, in a few levels.
What reads them after us goes down by calls within calls."""


@cache
def formats() -> dict[str, Format]:
    """Return the formats of weight files by suffix: those of all modules here that define `FORMAT`."""
    found: dict[str, Format] = {}
    for module in iter_modules(superpose.checkpoints.__path__):
        format_ = getattr(import_module(f"superpose.checkpoints.{module.name}"), "FORMAT", None)
        if format_ is not None:
            found.update(dict.fromkeys(format_.suffixes, format_))
    return found


def read_json(file: Path) -> Any:
    """Return the content of a JSON file.

    Args:
        file: the file.

    Returns:
        What it holds.

    Raises:
        SuperposeError: it is no JSON, or too large to be what it should be.
    """
    try:
        if not file.is_file():
            raise ValueError("it is no file")
        with file.open("rb") as stream:
            # A number of bytes is set aside before they are read.
            content = stream.read(min(file.stat().st_size, LARGEST_JSON) + 1)
        if len(content) > LARGEST_JSON:
            raise ValueError(f"larger than {LARGEST_JSON} bytes")
        if content.count(b"[") + content.count(b"{") > MOST_PARTS:
            raise ValueError(f"more than {MOST_PARTS} lists and mappings")
        found = json.loads(content.decode("utf-8"))
        if _is_deep(found):
            raise ValueError(f"lists and mappings lie more than {DEEPEST} deep in each other")
        return found
    except (ValueError, RecursionError, OSError) as error:
        told = told_by_first_bytes(file) if file.is_file() else None
        raise told or SuperposeError(
            f"no readable JSON: {error}", where=str(file), mend="fetch or save the file again"
        ) from error


def _is_deep(content: Any) -> bool:
    """Whether lists and mappings lie deeper in each other than any that we know of."""
    level = [content]
    for _ in range(DEEPEST):
        parts = [part for part in level if isinstance(part, (dict, list))]
        level = [inner for part in parts for inner in (part.values() if isinstance(part, dict) else part)]
        if not level:
            return False
    return True


def is_file(path: Path) -> bool:
    """Whether a file of that name is there; not so for a name that no file can have."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def headers_of(file: Path) -> FileHeaders:
    """Return what a weight file declares, and what is wrong with it; reads no tensor data."""
    known = formats()
    if not file.is_file():  # a pipe or a device would be waited for
        problem = SuperposeError(
            "cannot be read: it is no file", where=str(file), mend="give a file or folder of weights"
        )
        return FileHeaders({}, {}, (problem,))
    if file.suffix not in known:
        problem = SuperposeError(
            f"'{file.suffix}' is no format of weights", where=str(file), mend=nearest(file.suffix, known)
        )
        return FileHeaders({}, {}, (problem,))
    try:
        found = known[file.suffix].headers(file)
        if found.problems and not found.tensors and (told := told_by_first_bytes(file)) is not None:
            return FileHeaders({}, {}, (told,))
        return found
    except OSError as error:
        what = f"cannot be read: {error.strerror or error}"
        return FileHeaders({}, {}, (SuperposeError(what, where=str(file), mend="check the file and its rights"),))
