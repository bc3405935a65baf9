"""What is tried of each method: its published defaults, and eight settings more to choose from on validation data.

Factors of methods that add task vectors up are given as `c / T` for T tasks, so that one grid fits every benchmark.
Methods without a setting that data could choose are run as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Options = Mapping[str, Any]
SIZE = 8
"""Settings in each grid."""
SUMS = (1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0)
"""Times 1 / T: factors on sums of task vectors."""
MEANS = (0.6, 0.8, 1.0, 1.3, 1.6, 2.0, 2.5, 3.0)
"""Factors on means, elected values and merged matrices."""


@dataclass(frozen=True)
class Setting:
    """A method with options.

    Args:
        method: its name in superpose.
        options: as its function takes them.
        statistics: what is computed of each task's data first: "", "fisher" or "gram".
        data: whether the method learns from each task's data.
    """

    method: str
    options: Options = field(default_factory=dict)
    statistics: str = ""
    data: bool = False

    @property
    def text(self) -> str:
        """The setting in one line."""
        said = ", ".join(f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"
                         for name, value in sorted(self.options.items()))  # fmt: skip
        return f"{self.method} ({said})" if said else self.method


@dataclass(frozen=True)
class Variant:
    """A row of the table to be.

    Args:
        name: of the row.
        default: the method as published.
        grid: what is tried on validation data beside the default; empty where there is nothing to choose.
    """

    name: str
    default: Setting
    grid: tuple[Setting, ...]

    @property
    def tried(self) -> tuple[Setting, ...]:
        """All settings to choose from."""
        return (*self.grid, self.default) if self.grid else ()

    @property
    def looks_at_data(self) -> bool:
        """Whether it is given examples of the tasks."""
        return self.default.data or bool(self.default.statistics)


def variants(tasks: int, known: Sequence[str], *, data: bool, kernels: bool = False) -> list[Variant]:
    """Return the rows of a table.

    Args:
        tasks: number of fine-tunes.
        known: names of all methods.
        data: whether those that look at data are among them.
        kernels: whether the models have convolutions: methods that average those as published then have a row more,
            in which they are matrices.

    Returns:
        One for each method, in the order of their names; those that look at data last.
    """
    found = []
    for name in known:
        if name in LEFT_OUT or name in STATISTICS or name in LEARNING:
            continue
        grid = tuple(Setting(name, options) for options in _GRIDS[name](tasks)) if name in _GRIDS else ()
        found.append(Variant(name, Setting(name), grid))
        if kernels and name in SPECTRAL:
            more = {"convolutions": "matrix"}
            grid = tuple(Setting(name, {**setting.options, **more}) for setting in grid)
            found.append(Variant(f"{name}, kernels as matrices", Setting(name, more), grid))
    if data:
        for name, statistics in STATISTICS.items():
            grid = tuple(Setting(name, options, statistics) for options in _GRIDS[name](tasks))
            found.append(Variant(name, Setting(name, {}, statistics), grid))
        for name, settings in LEARNING.items():
            default, *grid = (Setting(name.removesuffix(" learned"), options, data=True) for options in settings)
            found.append(Variant(name, default, tuple(grid)))
    wrong = [one.name for one in found if one.grid and len(one.grid) != SIZE and one.name not in LEARNING]
    if wrong:
        raise ValueError(f"{', '.join(wrong)}: another number of settings than {SIZE}")
    return found


def crossed(first: str, values: Sequence[Any], second: str, others: Sequence[Any], **fixed: Any) -> list[Options]:
    """Return options with every value of one beside every value of another."""
    return [{first: one, second: other, **fixed} for one in values for other in others]


def scaled(factors: Sequence[float], **fixed: Any) -> list[Options]:
    """Return options that differ in their scaling factor."""
    return [{"scaling_factor": factor, **fixed} for factor in factors]


def _sums(tasks: int, choice: Sequence[float] = SUMS) -> list[float]:
    return [round(factor / tasks, 4) for factor in choice]


def _trimmed(tasks: int) -> list[Options]:
    # What is trimmed to a fifth has less to add up, and takes larger factors; so the papers', 0.5 to 0.8 for 3 to 8.
    few = crossed("density", [0.2], "scaling_factor", _sums(tasks, (3.0, 4.5, 6.4, 8.0)))
    return few + crossed("density", [1.0], "scaling_factor", _sums(tasks, (1.5, 2.0, 3.0, 4.0)))


_GRIDS = {
    "task_arithmetic": lambda tasks: scaled(_sums(tasks)),
    "trimmed_task_arithmetic": _trimmed,
    # What is solved for overlaps less, and takes larger factors than a sum.
    "stf": lambda tasks: [
        *crossed("density", [0.2], "scaling_factor", _sums(tasks, (3.0, 4.5, 6.4, 8.0))),
        *crossed("density", [1.0], "scaling_factor", _sums(tasks, (2.0, 3.0, 4.0, 6.0))),
    ],
    "ties": lambda _: crossed("density", [0.1, 0.2], "scaling_factor", [0.7, 1.0, 1.5, 2.0]),
    "dare": lambda tasks: crossed("density", [0.5, 0.8], "scaling_factor", _sums(tasks, (1.5, 2.0, 3.0, 4.0))),
    "dare_ties": lambda _: crossed("density", [0.5, 0.8], "scaling_factor", [0.7, 1.0, 1.5, 2.0]),
    "della": lambda _: crossed("density", [0.5, 0.7], "scaling_factor", [0.7, 1.1, 1.5, 2.0]),
    "breadcrumbs": lambda tasks: [
        *scaled(_sums(tasks, (2.0, 3.2, 4.5, 6.0)), density=0.2, remove_top=0.1),
        *scaled(_sums(tasks, (1.5, 2.0, 3.0, 4.0)), density=0.8, remove_top=0.01),
    ],
    "pcb": lambda _: crossed("density", [0.1, 0.2], "scaling_factor", [0.5, 0.8, 1.2, 1.6]),
    "metagpt": lambda _: [
        {"density": 1.0},
        *crossed("density", [0.2, 0.55], "process", ["trim", "ties", "dare"]),
        {"density": 0.55, "process": "trim", "density_scope": "tensor"},
    ],
    "consensus": lambda tasks: crossed("threshold", [0.2, 0.4], "scaling_factor", _sums(tasks, (1.5, 2.4, 3.2, 4.5))),
    "localize_and_stitch": lambda _: [{"density": share} for share in (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 0.9)],
    "pem": lambda _: scaled((0.6, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0)),
    "tsv": lambda _: scaled(MEANS),
    "iso_c": lambda _: scaled(MEANS),
    "iso_share": lambda _: crossed("background", [0.1, 0.3], "scaling_factor", [0.7, 0.85, 1.0, 1.2]),
    "iso_cts": lambda _: crossed("common_fraction", [0.6, 0.8], "scaling_factor", [1.0, 2.0, 3.0, 4.0]),
    "knots": lambda _: crossed("density", [0.2, 1.0], "scaling_factor", [0.6, 1.0, 1.5, 2.0]),
    "fisher": lambda _: crossed("normalise", [True, False], "floor", [1e-6, 1e-4, 1e-3, 1e-2]),
    "regmean": lambda _: crossed("alpha", [0.1, 0.5, 0.9, 1.0], "ridge", [1e-6, 1e-2]),
}
SPECTRAL = ("tsv", "iso_c", "iso_cts")
"""Methods that decompose 2-D tensors alone, as published."""
STATISTICS = {"fisher": "fisher", "regmean": "gram"}
"""Methods that take statistics of each task's data."""
LEARNING: Mapping[str, Sequence[Options]] = {
    "adamerging": [{"steps": 40, "learning_rate": 0.01}],
    "localize_and_stitch learned": [{"masks": "learned", "epochs": 5, "learning_rate": 1e9}],
    "lorahub": [{"evaluations": 20}],
}
"""Methods that learn from each task's data, in fewer and longer steps than by default: they take minutes as it is."""
LEFT_OUT = {"slerp": "merges two models"}
"""Methods that these benchmarks do not merge by, and why."""
