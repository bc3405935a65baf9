"""How STF, its control, TIES and PCB react to density and scaling factor (Figures 3c and 3d), on validation data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from grid import Setting
from jobs import Bench, Job

from analyses.common import MEANS, SEED, SUMS, Chosen, Content, figure, table

TITLE = "Density and scaling factor"
DENSITIES = (0.05, 0.1, 0.2, 0.5, 1.0)


def find(bench: Bench, chosen: Chosen) -> Content:
    """Score every density with every factor."""
    del chosen
    sums = [round(one / len(bench.suite.tasks), 4) for one in SUMS]
    swept: dict[str, Sequence[float]] = {
        "stf": sums, "trimmed_task_arithmetic": sums, "ties": MEANS, "pcb": MEANS
    }  # fmt: skip
    settings = [
        Setting(method, {"density": density, "scaling_factor": factor})
        for method, factors in swept.items()
        for density in DENSITIES
        for factor in factors
    ]
    rows = bench.rows([Job(one, SEED, "few") for one in settings])
    return [{"method": one.method, **one.options, "mean": row.mean} for one, row in zip(settings, rows, strict=True)]


def lines(name: str, found: Content) -> Iterator[str]:
    """Yield the lines of the page."""
    yield (
        "On validation data, 100 examples a task: to see a shape, not to rank (Figures 3c and 3d). Factors of STF and"
        " its control act on sums, those of TIES and PCB on elected values.\n"
    )
    yield figure(name, "density_and_factor", "accuracy by density and scaling factor")
    rows = []
    for method in dict.fromkeys(one["method"] for one in found):
        mine = [one for one in found if one["method"] == method]
        best, worst = (extreme(mine, key=lambda one: one["mean"]) for extreme in (max, min))
        rows.append([method, f"{best['density']:g}", f"{best['scaling_factor']:g}", f"{best['mean']:.3f}",
                     f"{worst['mean']:.3f} to {best['mean']:.3f}"])  # fmt: skip
    yield from table(["method", "best density", "best factor", "mean", "range over all settings"], rows)


def draw(found: Content, figure: Any) -> None:
    """Draw a panel for each method, a line for each density."""
    from plots import plt

    methods = list(dict.fromkeys(one["method"] for one in found))
    panels = figure.subplots(1, len(methods), sharey=True)
    figure.set_size_inches(2.6 * len(methods), 3)
    for axes, method in zip(panels, methods, strict=True):
        mine = [one for one in found if one["method"] == method]
        for number, density in enumerate(dict.fromkeys(one["density"] for one in mine)):
            points = [(one["scaling_factor"], one["mean"]) for one in mine if one["density"] == density]
            shade = plt.colormaps["viridis"](number / len(DENSITIES))
            axes.plot(*zip(*points, strict=True), "o-", color=shade, markersize=3, label=f"{density:g}")
        axes.set_title(method, fontsize=9)
        axes.set_xlabel("scaling factor")
    panels[0].set_ylabel("mean accuracy, validation")
    panels[0].legend(title="density", frameon=False, fontsize=7)
