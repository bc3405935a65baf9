"""Errors that tell a user what is wrong, where, and how to mend it.

SuperposeError            one problem: three lines on the terminal, exit code 2
└── Problems              several of them, found together and shown together
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

MOST_LISTED = 40
"""Names that a message lists; the rest is counted."""


class SuperposeError(Exception):
    """One problem with what the user gave.

    Args:
        what: what is wrong, in one line.
        where: the file, tensor, option or line it was found at.
        mend: what the user can do about it.
    """

    def __init__(self, what: str, *, where: str = "", mend: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.mend = mend

    def __str__(self) -> str:
        # Names in files are anybody's: none of them makes a line of its own, or tells a terminal what to do.
        lines = [printable(self.what)]
        if self.where:
            lines.append(f"where: {printable(self.where)}")
        if self.mend:
            lines.append(f"mend: {printable(self.mend)}")
        return "\n".join(lines)

    def __reduce__(self) -> tuple:
        return _rebuild, (self.what, self.where, self.mend)


def _rebuild(what: str, where: str, mend: str) -> SuperposeError:
    return SuperposeError(what, where=where, mend=mend)


class Problems(SuperposeError):
    """Several problems that were found together.

    Args:
        problems: the problems, in the order to show them.
    """

    def __init__(self, problems: Sequence[SuperposeError]) -> None:
        self.problems = tuple(problems)
        super().__init__(f"{len(self.problems)} problems")

    def __str__(self) -> str:
        return "\n\n".join(str(problem) for problem in self.problems)

    def __reduce__(self) -> tuple:
        return Problems, (self.problems,)


def printable(text: str) -> str:
    """Return a text with what would act on a terminal, or be invisible in it, written out: line breaks as \\n."""
    if text.isprintable():
        return text
    return "".join(sign if sign.isprintable() else _written_out(sign) for sign in text)


def _written_out(sign: str) -> str:
    return sign.encode("unicode_escape").decode("ascii")


def raise_all(problems: Sequence[SuperposeError]) -> None:
    """Raise the problems together; return when there are none.

    Args:
        problems: what was found.

    Raises:
        SuperposeError: the problem, if there is one.
        Problems: if there are several.
    """
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise Problems(problems)


def nearest(name: str, known: Iterable[str]) -> str:
    """Return "nearest match is 'x'; known: ..." for a name that is not in `known`."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1)
    more = f" and {len(known) - MOST_LISTED} more" if len(known) > MOST_LISTED else ""
    listing = f"known: {', '.join(known[:MOST_LISTED])}{more}" if known else "none is known"
    return f"nearest match is '{close[0]}'; {listing}" if close else listing
