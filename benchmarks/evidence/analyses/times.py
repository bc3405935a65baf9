"""Seconds of one merge at published defaults, on all cores. Run it with nothing beside it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator

from grid import LEFT_OUT, Setting
from jobs import Bench
from rows import recipe_of, scratch_of

import superpose
from analyses.common import SEED, Chosen, Content, table
from superpose.demo.folders import scratch_folder

TITLE = "Time of a merge"
ROUNDS = 3


def find(bench: Bench, chosen: Chosen) -> Content:
    """Merge by every method that looks at weights alone; what others look at is computed before."""
    del chosen
    found = {}
    for method in superpose.list_methods():
        if method.name in LEFT_OUT or method.statistics or (method.learns and method.learns(method.options())):
            continue
        taken = []
        for _ in range(ROUNDS):
            with scratch_folder(scratch_of(bench.name, bench.out)) as scratch:
                started = time.perf_counter()
                superpose.merge(
                    recipe_of(bench.suite, Setting(method.name), SEED, bench.suite.tasks), scratch / "merged"
                )
                taken.append(time.perf_counter() - started)
        found[method.name] = statistics.median(taken)
    return found


def lines(name: str, found: Content) -> Iterator[str]:
    """Yield the lines of the page."""
    del name
    yield (
        f"Seconds of one merge at published defaults, median of {ROUNDS}, on all cores. Left out: `slerp`, which merges"
        " two, and methods that look at data.\n"
    )
    ordered = sorted(found.items(), key=lambda pair: pair[1])
    yield from table(["method", "s"], [[method, f"{seconds:.1f}"] for method, seconds in ordered])
