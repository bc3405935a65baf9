"""Figures of the analyses, as SVG and PNG."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from analysis_page import by_count
from plots import FAINT, LINE, figure_file, plt

SHOWN = ("stf", "trimmed_task_arithmetic", "task_arithmetic", "ties", "pcb", "tsv", "iso_c", "iso_share")
"""Methods of which every layer is shown; all are in the scatter beside it."""


def draw(folder: Path, name: str, analyses: Mapping[str, Any]) -> None:
    """Write the figures of a benchmark's analyses.

    Args:
        folder: of the figures.
        name: of the benchmark.
        analyses: by name, as `analyses.py` writes them.
    """
    for analysis, make in FIGURES.items():
        if analysis in analyses:
            with figure_file(folder / f"{name}-{analysis}") as figure:
                make(analyses[analysis]["found"], figure)


def _removed(found: Any, figure: Any) -> None:
    axes = figure.subplots()
    for end, said in (("remove_smallest", "weakest removed"), ("remove_largest", "strongest removed")):
        points = [(one["share"], one["mean"]) for one in found["removed"] if one["end"] == end]
        axes.plot(*zip((0, found["none"]), *points, strict=True), "o-", label=said, markersize=4)
    axes.set_xlabel("share of each task's features")
    axes.set_ylabel("mean accuracy")
    axes.legend(frameon=False)


def _sweeps(found: Any, figure: Any) -> None:
    methods = list(dict.fromkeys(one["method"] for one in found))
    panels = figure.subplots(1, len(methods), sharey=True)
    figure.set_size_inches(2.6 * len(methods), 3)
    for axes, method in zip(panels, methods, strict=True):
        mine = [one for one in found if one["method"] == method]
        for number, density in enumerate(dict.fromkeys(one["density"] for one in mine)):
            points = [(one["scaling_factor"], one["mean"]) for one in mine if one["density"] == density]
            shade = plt.colormaps["viridis"](number / 4.5)
            axes.plot(*zip(*points, strict=True), "o-", color=shade, markersize=3, label=f"{density:g}")
        axes.set_title(method, fontsize=9)
        axes.set_xlabel("scaling factor")
    panels[0].set_ylabel("mean accuracy, validation")
    panels[0].legend(title="density", frameon=False, fontsize=7)


def _counts(found: Any, figure: Any) -> None:
    left, right = figure.subplots(1, 2)
    figure.set_size_inches(9, 3.4)
    for method, at in by_count(found, "normalised").items():
        bold = {"linewidth": 2.2} if method in ("stf", "iso_share") else {"linewidth": 1}
        left.plot(sorted(at), [at[count] for count in sorted(at)], "o-", markersize=3, label=method, **bold)
    left.set_xlabel("tasks merged")
    left.set_ylabel("share of the fine-tuned models' accuracy")
    left.legend(frameon=False, fontsize=7)
    for method, at in by_count(found, "factor").items():
        right.plot(sorted(at), [at[count] for count in sorted(at)], "o-", markersize=3, label=method)
    right.set_xlabel("tasks merged")
    right.set_ylabel("best factor")
    right.legend(frameon=False, fontsize=7)


def _layers(found: Any, figure: Any) -> None:
    left, right = figure.subplots(1, 2, width_ratios=[2, 1])
    figure.set_size_inches(10, 3.6)
    for method, one in found["methods"].items():
        layers, short = list(one["layers"].values()), method.partition(",")[0]
        if short in SHOWN:
            thick = 1.8 if short in ("stf", "iso_share") else 0.9
            left.plot([1000 * layer["at_factor_1"] for layer in layers], label=short, linewidth=thick)
        answered = statistics.mean(layer["answered"] for layer in layers)
        right.plot([answered], [one["mean"]], "o", color=LINE if short in SHOWN else FAINT, markersize=4)
        right.annotate(short, (answered, one["mean"]), fontsize=5)
    left.set_xlabel("matrix, in the order of the record")
    left.set_ylabel("mean |⟨s u, M v - s u⟩| x 1000, factor 1")
    left.set_yscale("log")
    left.legend(frameon=False, fontsize=6)
    right.set_xlabel("strength of features answered, as merged")
    right.set_ylabel("mean accuracy")


FIGURES: Mapping[str, Callable[[Any, Any], None]] = {
    "removed_features": _removed,
    "density_and_factor": _sweeps,
    "number_of_tasks": _counts,
    "preservation": _layers,
}
"""What draws each analysis that has a figure."""
