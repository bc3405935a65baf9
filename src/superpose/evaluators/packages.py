"""Packages of extras: present, or named as missing with the command that installs them."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from superpose.errors import SuperposeError


def the_package(module: str, *, extra: str, what: str) -> Any:
    """Return a module of a package that an extra brings.

    Args:
        module: its name.
        extra: the extra of superpose.
        what: what needs it, for the error.

    Returns:
        The module.

    Raises:
        SuperposeError: it is not installed.
    """
    try:
        return import_module(module)
    except ImportError as error:
        missing = (error.name or module).partition(".")[0]
        mend = f"pip install 'superpose[{extra}]'"
        raise SuperposeError(f"{what} needs {missing}, which is not installed", mend=mend) from error
