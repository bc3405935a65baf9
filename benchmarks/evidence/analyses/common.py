"""What analyses share: settings, tables, and results that are kept."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from grid import SPECTRAL, Setting
from jobs import suite_of
from rows import Evaluated, Row

from superpose.own_code import code_digest

SEED = 0
"""Of the fine-tunes that are analysed, where it is not said otherwise."""
SEEDS = (0, 1, 2)
"""Of all fine-tunes."""
SUMS = (0.8, 1.6, 2.4, 4.0, 6.4, 9.6)
"""Times 1 / T: factors on sums of T task vectors, of STF and its control."""
MEANS = (0.5, 0.8, 1.2, 1.6, 2.0, 2.5)
"""Factors on elected values, of TIES and PCB, and on flat spectra."""
Chosen = Mapping[str, Setting]
"""The setting that validation data chose, by the name of the row."""
Content = Any
"""What an analysis found, as JSON keeps it."""


def without_factor(setting: Setting) -> dict[str, Any]:
    """Return a setting's options but for the scaling factor."""
    return {name: value for name, value in setting.options.items() if name != "scaling_factor"}


def with_kernels(chosen: Chosen, name: str) -> str:
    """Return the row in which a spectral method decomposes kernels, or its only one where models have none."""
    assert name in SPECTRAL, "others have no such row"
    wide = f"{name}, kernels as matrices"
    return wide if wide in chosen else name


def described(row: Row) -> dict[str, Any]:
    """Return what is published of a row."""
    return {"name": row.name, "mean": row.mean, "accuracy": row.accuracy}


def kept(name: str, out: Path, what: str, setting: Setting | str, make: Callable[[], Any]) -> Any:
    """Return what this code found of a setting's merge, found now if it is not there.

    Args:
        name: of the benchmark.
        out: folder that keeps everything.
        what: is found.
        setting: of the merge.
        make: finds it, as JSON can keep it.
    """
    key = f"{code_digest()} {what} {Evaluated(suite_of(name, out), out / 'rows').mark(setting, SEED, '')}"
    file = out / "rows" / f"{name}-analyses" / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".partial")
        partial.write_text(json.dumps({"what": what, "setting": str(setting), "found": make()}), encoding="utf-8")
        partial.replace(file)
    return json.loads(file.read_text(encoding="utf-8"))["found"]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yield the lines of a table: the first column is text, the others are numbers."""
    yield f"| {' | '.join(head)} |"
    yield f"|---|{'---:|' * (len(head) - 1)}"
    for row in rows:
        yield f"| {' | '.join(row)} |"
    yield ""


def interval(difference: Mapping[str, float]) -> str:
    """Return a difference with its 95% interval."""
    return f"{difference['value']:+.3f} ({difference['low']:+.3f} to {difference['high']:+.3f})"


def figure(name: str, analysis: str, about: str) -> str:
    """Return the line of a figure."""
    return f"![{about}](evidence/{name}-{analysis}.svg)\n"
