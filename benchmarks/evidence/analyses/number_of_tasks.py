"""Two tasks to all: the best factor of each number, and what is left of each task (Figures 3b and v1's 1b)."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from grid import Setting
from jobs import Bench, Job

from analyses.common import MEANS, SEED, SUMS, Chosen, Content, figure, table, with_kernels, without_factor

TITLE = "Number of tasks"
COUNTS = (2, 3, 4, 6)
"""Beside that of all tasks."""
SUMMED = ("stf", "task_arithmetic")
"""Methods whose factor acts on a sum over tasks."""


@dataclass(frozen=True)
class Cell:
    """A method on some tasks.

    Args:
        merged: names of the tasks.
        method: name of its row.
        tried: settings to choose from.
    """

    merged: tuple[str, ...]
    method: str
    tried: tuple[Setting, ...]


def find(bench: Bench, chosen: Chosen) -> Content:
    """Choose each method's factor for each set of tasks on the few validation examples, and score it on the test part.

    Sets of tasks are runs of neighbours in the benchmark's order, from its beginning and from its middle. Other options
    are those chosen for all tasks.
    """
    cells, found = list(_cells(list(bench.suite.tasks), chosen)), []
    jobs = [[Job(one, SEED, "few", cell.merged, cell.merged) for one in cell.tried] for cell in cells]
    few = iter(bench.rows([job for some in jobs for job in some]))
    means = [{row.name: row.mean for row in islice(few, len(some))} for some in jobs]
    best = [max(cell.tried, key=lambda one, of=of: of[one.text]) for cell, of in zip(cells, means, strict=True)]
    rows = bench.rows([Job(one, SEED, "test", cell.merged, cell.merged) for cell, one in zip(cells, best, strict=True)])
    (alone,) = bench.rows([Job("fine-tuned", SEED, "test")])
    for cell, setting, of, row in zip(cells, best, means, rows, strict=True):
        share = statistics.mean(row.accuracy[task] / alone.accuracy[task] for task in cell.merged)
        found.append({"tasks": len(cell.merged), "merged": cell.merged, "method": cell.method, "normalised": share,
                      "mean": row.mean, "factor": setting.options.get("scaling_factor"), "tried": of})  # fmt: skip
    return found


def _cells(names: list[str], chosen: Chosen) -> Iterator[Cell]:
    methods = ("stf", "task_arithmetic", "ties", *(with_kernels(chosen, name) for name in ("tsv", "iso_c")))
    for count in [*(count for count in COUNTS if count < len(names)), len(names)]:
        for begin in (0, len(names) // 2) if count < len(names) else (0,):
            merged = tuple((names + names)[begin : begin + count])
            for name in methods:
                factors = [round(one / count, 4) for one in SUMS] if name in SUMMED else MEANS
                options, method = without_factor(chosen[name]), chosen[name].method
                tried = tuple(Setting(method, {**options, "scaling_factor": factor}) for factor in factors)
                yield Cell(merged, name, tried)
            yield Cell(merged, "iso_share", (Setting("iso_share"),))


def by_count(found: Content, value: str) -> dict[str, dict[int, float]]:
    """Return a value of every method by number of tasks, averaged over the sets of tasks."""
    gathered: dict[str, dict[int, list[float]]] = {}
    for one in found:
        if one[value] is not None:
            gathered.setdefault(one["method"], {}).setdefault(one["tasks"], []).append(one[value])
    return {method: {count: statistics.mean(some) for count, some in counts.items()}
            for method, counts in gathered.items()}  # fmt: skip


def numbers(found: Content) -> dict[str, str]:
    """Return what the summary can name: STF's best factor by the number of tasks."""
    return {f"factor_{count}": f"{factor:.2g}" for count, factor in by_count(found, "factor")["stf"].items()}


def lines(name: str, found: Content) -> Iterator[str]:
    """Yield the lines of the page."""
    yield (
        "Accuracy as a share of the fine-tuned models' own, each method with the best of six factors for each set of"
        " tasks, chosen on 100 validation examples a task (`iso_share`: as it is), other options as for all tasks; mean"
        " of two sets of neighbouring tasks, but for the last number (Figures 3b and v1's 1b). The papers found STF's"
        " best factor to fall with the number of tasks.\n"
    )
    yield figure(name, "number_of_tasks", "normalised accuracy and best factor by number of tasks")
    shares, factors = by_count(found, "normalised"), by_count(found, "factor")
    counts = sorted(shares["stf"])
    rows = [[method, *(f"{at[count]:.3f}" for count in counts)] for method, at in shares.items()]
    rows.append(["best factor of STF", *(f"{factors['stf'][count]:.2g}" for count in counts)])
    yield from table(["tasks", *map(str, counts)], rows)


def draw(found: Content, figure: Any) -> None:
    """Draw what is left of each task, and the best factors, by number of tasks."""
    left, right = figure.subplots(1, 2)
    figure.set_size_inches(9, 3.4)
    for axes, value in ((left, "normalised"), (right, "factor")):
        for method, at in by_count(found, value).items():
            thick = 2.2 if method in ("stf", "iso_share") else 1
            axes.plot(
                sorted(at), [at[count] for count in sorted(at)], "o-", markersize=3, label=method, linewidth=thick
            )
        axes.set_xlabel("tasks merged")
        axes.legend(frameon=False, fontsize=7)
    left.set_ylabel("share of the fine-tuned models' accuracy")
    right.set_ylabel("best factor")
