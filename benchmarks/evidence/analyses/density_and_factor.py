"""How STF, its control, TIES and PCB react to density and scaling factor (Figures 3c and 3d), on validation data.

The best of each on test data beside them: that is a wider search than the tables', and as wide for each of the four.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from bootstrap import difference
from grid import Setting
from jobs import Bench, Job

from analyses.common import MEANS, SEED, SEEDS, SUMS, Chosen, Content, figure, interval, table

TITLE = "Density and scaling factor"
DENSITIES = (0.05, 0.1, 0.2, 0.5, 1.0)


def find(bench: Bench, chosen: Chosen) -> Content:
    """Score every density with every factor, and each method's best of them with the fine-tunes of all seeds."""
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
    found = [{"method": one.method, **one.options, "mean": row.mean} for one, row in zip(settings, rows, strict=True)]
    best = {method: max(_of(found, method), key=lambda one: one["mean"]) for method in swept}
    bench.finetune(SEEDS)
    jobs = [
        Job(Setting(method, {"density": one["density"], "scaling_factor": one["scaling_factor"]}), seed, "test")
        for method, one in best.items()
        for seed in SEEDS
    ]
    tested = bench.rows(jobs)
    by_method = {one: [row for row in tested if row.setting["method"] == one] for one in swept}
    for method, one in best.items():
        solved, mine = by_method["stf"], by_method[method]
        one["test"] = statistics.mean(row.mean for row in mine)
        one["stf_less_it"] = asdict(difference([row.answers for row in solved], [row.answers for row in mine]))
    return found


def _of(found: Content, method: str) -> Content:
    return [one for one in found if one["method"] == method]


def numbers(found: Content) -> dict[str, str]:
    """Return what the summary can name: each method's best on test data, and STF's best less it."""
    best = [one for one in found if "test" in one]
    return {f"{one['method']}_test": f"{one['test']:.3f}" for one in best} | {
        f"stf_less_{one['method']}": interval(one["stf_less_it"]) for one in best if one["method"] != "stf"
    }


def lines(name: str, found: Content) -> Iterator[str]:
    """Yield the lines of the page."""
    yield (
        "Means on validation data, 100 examples a task, show the shape (Figures 3c and 3d). Factors of STF and its"
        " control act on sums, those of TIES and PCB on elected values. Numbers of test data, where there are some,"
        " are of each method's best of these thirty settings, with the fine-tunes of three seeds.\n"
    )
    yield figure(name, "density_and_factor", "accuracy by density and scaling factor")
    rows = []
    for method in dict.fromkeys(one["method"] for one in found):
        mine = _of(found, method)
        best, worst = (extreme(mine, key=lambda one: one["mean"]) for extreme in (max, min))
        tested = [f"{best['test']:.3f}", interval(best["stf_less_it"])] if "test" in best else ["", ""]
        tested[1] = "" if method == "stf" else tested[1]
        rows.append([method, f"{best['density']:g}", f"{best['scaling_factor']:g}", f"{best['mean']:.3f}",
                     f"{worst['mean']:.3f} to {best['mean']:.3f}", *tested])  # fmt: skip
    head = ["method", "best density", "best factor", "mean", "range over all settings", "test", "STF less it, test"]
    yield from table(head, rows)


def draw(found: Content, figure: Any) -> None:
    """Draw a panel for each method, a line for each density."""
    from plots import plt

    methods = list(dict.fromkeys(one["method"] for one in found))
    panels = figure.subplots(1, len(methods), sharey=True)
    figure.set_size_inches(2.6 * len(methods), 3)
    for axes, method in zip(panels, methods, strict=True):
        mine = _of(found, method)
        for number, density in enumerate(dict.fromkeys(one["density"] for one in mine)):
            points = [(one["scaling_factor"], one["mean"]) for one in mine if one["density"] == density]
            shade = plt.colormaps["viridis"](number / len(DENSITIES))
            axes.plot(*zip(*points, strict=True), "o-", color=shade, markersize=3, label=f"{density:g}")
        axes.set_title(method, fontsize=9)
        axes.set_xlabel("scaling factor")
    panels[0].set_ylabel("mean accuracy, validation")
    panels[0].legend(title="density", frameon=False, fontsize=7)
