"""Files of weights and of settings: formats by suffix, headers, JSON, and texts by which files are told apart."""

from __future__ import annotations

import json
from functools import cache
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

import superpose.checkpoints
from superpose.checkpoints.headers import FileHeaders, Format
from superpose.errors import SuperposeError, nearest

LARGEST_JSON = 50_000_000
"""Bytes; more than any config or index has."""


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
            content = stream.read(LARGEST_JSON + 1)
        if len(content) > LARGEST_JSON:
            raise ValueError(f"larger than {LARGEST_JSON} bytes")
        return json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise SuperposeError(
            f"no readable JSON: {error}", where=str(file), mend="fetch or save the file again"
        ) from error


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
        return known[file.suffix].headers(file)
    except OSError as error:
        what = f"cannot be read: {error.strerror or error}"
        return FileHeaders({}, {}, (SuperposeError(what, where=str(file), mend="check the file and its rights"),))
