"""transformers: present or named as missing, and quiet."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

from superpose.errors import SuperposeError


def the_library(what: str) -> Any:
    """Return transformers.

    Args:
        what: what needs it, for the error.

    Returns:
        The package.

    Raises:
        SuperposeError: it is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        mend = "pip install 'superpose[transformers]'"
        raise SuperposeError(f"{what} needs transformers, which is not installed", mend=mend) from error
    return transformers


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Keep the library's bars and hints about models that are loaded off the user's terminal."""
    import transformers

    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
