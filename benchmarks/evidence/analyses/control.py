"""STF against the sum of the same trimmed task vectors, at the same density and factor: what solving is worth."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict

from bootstrap import difference
from grid import Setting
from jobs import Bench, Job
from rows import Row

from analyses.common import SEEDS, Chosen, Content, interval, table

TITLE = "STF against its control"
PUBLISHED = {
    "STF's published defaults": {"density": 0.2, "scaling_factor": 0.8},
    "STF's published, for adapters": {"density": 0.3, "scaling_factor": 0.5},
}
"""Of the papers; superpose itself trims no adapters where nothing is said, which would make them full rank."""


def find(bench: Bench, chosen: Chosen) -> Content:
    """Score both at several settings, with the fine-tunes of all seeds."""
    settings = {
        **{said: options for said, options in PUBLISHED.items() if "adapters" not in said or bench.name == "lora"},
        "STF's chosen": dict(chosen["stf"].options),
        "the control's chosen": dict(chosen["trimmed_task_arithmetic"].options),
    }
    bench.finetune(SEEDS)
    found = []
    for said, options in settings.items():
        both = ("stf", "trimmed_task_arithmetic")
        rows = bench.rows([Job(Setting(name, options), seed, "test") for name in both for seed in SEEDS])
        solved, summed = rows[: len(SEEDS)], rows[len(SEEDS) :]
        compared = difference([row.answers for row in solved], [row.answers for row in summed])
        found.append({"at": said, **options, "stf": _accuracies(solved), "control": _accuracies(summed),
                      "difference": asdict(compared)})  # fmt: skip
    return found


def _accuracies(rows: Sequence[Row]) -> dict[str, float]:
    return {task: statistics.mean(row.accuracy[task] for row in rows) for task in rows[0].accuracy}


def numbers(found: Content) -> dict[str, str]:
    """Return what the summary can name: STF less its control at each setting, and its own mean there."""
    words = {one["at"]: one["at"].replace("'s", "").replace(",", "").replace(" ", "_") for one in found}
    return {words[one["at"]]: interval(one["difference"]) for one in found} | {
        f"{words[one['at']]}_mean": f"{statistics.mean(one['stf'].values()):.3f}" for one in found
    }


def lines(name: str, found: Content) -> Iterator[str]:
    """Yield the lines of the page."""
    del name
    yield (
        "The same trimmed task vectors at the same density and factor, once solved for (STF), once added up (its"
        " control, `trimmed_task_arithmetic`): all that differs is the linear system. Means of three seeds; paired"
        " bootstrap over test examples.\n"
    )
    tasks = list(found[0]["stf"])
    yield from table(
        ["at", "density", "factor", "STF", "control", "STF less control", *tasks],
        [
            [one["at"], f"{one['density']:g}", f"{one['scaling_factor']:g}",
             *(f"{statistics.mean(one[which].values()):.3f}" for which in ("stf", "control")),
             interval(one["difference"]), *(f"{one['stf'][task] - one['control'][task]:+.3f}" for task in tasks)]
            for one in found
        ],
    )  # fmt: skip
