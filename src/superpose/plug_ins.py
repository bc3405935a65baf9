"""Merge methods from elsewhere: Python files that the user names, and installed packages that offer some.

    SUPERPOSE_METHODS=my_methods           a folder (all of its .py files), or a file; several as in PATH
    [project.entry-points."superpose.methods"]
    mine = "my_package.my_method"          in the pyproject.toml of a package: the module is imported

Files that are named are run: name only what you trust.
"""

from __future__ import annotations

import hashlib
import os
import sys
import traceback
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

from superpose.errors import SuperposeError, nearest

VARIABLE = "SUPERPOSE_METHODS"
GROUP = "superpose.methods"


def load_plug_ins() -> None:
    """Import every plug-in.

    Raises:
        SuperposeError: one does not exist or cannot be imported.
    """
    for named in filter(None, os.environ.get(VARIABLE, "").split(os.pathsep)):
        for file in _files(Path(named).expanduser()):
            _import(lambda file=file: _run(file), str(file))
    for offered in sorted(entry_points(group=GROUP), key=lambda entry: entry.name):
        _import(lambda offered=offered: import_module(offered.module), f"entry point {offered.name} of {GROUP}")


def plug_in_digest(module: str) -> str:
    """Return a digest of a module's source where it is a plug-in, "" for superpose's own."""
    return "" if module.partition(".")[0] == "superpose" else _digest(module)


@cache
def _digest(module: str) -> str:
    file = getattr(sys.modules.get(module), "__file__", None)
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16] if file else "unknown"


def _files(place: Path) -> list[Path]:
    if place.is_dir():
        return sorted(file for file in place.glob("*.py") if not file.name.startswith("_"))
    if place.is_file() and place.suffix == ".py":
        return [place]
    known = [entry.name for entry in place.parent.iterdir()] if place.parent.is_dir() else []
    raise SuperposeError(
        "there is no folder or Python file of that name", where=f"{VARIABLE}={place}", mend=nearest(place.name, known)
    )


def _run(file: Path) -> None:
    # A name of its own: two folders may hold files of one name.
    name = f"superpose_plug_in_{file.stem}_{hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:8]}"
    spec = spec_from_file_location(name, file)
    assert spec is not None, "a .py file has a loader"
    assert spec.loader is not None, "a .py file has a loader"
    module = module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and type hints look their module up
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise


def _import(run: Callable[[], object], where: str) -> None:
    try:
        run()
    except Exception as error:  # it is anybody's code; the text says what happened and where
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if frame.filename == where]
        line = getattr(error, "lineno", None) or (own[-1].lineno if own else None)
        place = f"{where}, line {line}" if line else where
        what = f"a plug-in cannot be loaded: {type(error).__name__}: {error}"
        raise SuperposeError(what, where=place, mend=f"mend it, or take it out of {VARIABLE}") from error
