"""Names of folders and files that are made, as seen from any folder."""

from __future__ import annotations

from pathlib import Path

from superpose.errors import SuperposeError


def absolute(place: str | Path) -> Path:
    """Return a path with a last part that can be extended, which "." and "out/.." do not have.

    Args:
        place: as the user wrote it.

    Returns:
        The path; where a link points to, in its place.

    Raises:
        SuperposeError: a link leads in a circle, or ~NAME is nobody's home.
    """
    try:
        return Path(place).expanduser().resolve()
    except (OSError, RuntimeError) as error:
        what = f"no usable name: {getattr(error, 'strerror', None) or error}"
        raise SuperposeError(what, where=str(place), mend="choose another name") from error
