"""One computation in a process of its own, so that its time and memory are nobody else's; growth.py runs it.

    python benchmarks/alone.py stf --tasks T --size N                        random task matrices, in memory
    python benchmarks/alone.py survey --method METHOD --models BASE TUNED...   the passes before a merge, one by one

Prints as JSON: wall and CPU seconds of the computation, and the process's RssAnon in MiB before its inputs were made.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from measuring import MIB, anonymous_memory

import superpose
from superpose.allocator import keep_freed_memory
from superpose.backends import make_backend
from superpose.kinds import Kind
from superpose.methods.stf import StfOptions, stf
from superpose.parts import Context
from superpose.run import survey_all

RANK = 16
LONG_ENOUGH = 1.0
"""Seconds in which samples of memory do not miss the peak."""


def task_matrices(tasks: int, size: int) -> torch.Tensor:
    """Return one square matrix per task, half of it noise and half of rank 16."""
    draw = torch.Generator().manual_seed(size * 100 + tasks)
    matrices = torch.randn((tasks, size, size), generator=draw)
    for matrix in matrices:
        left = torch.randn((size, RANK), generator=draw)
        right = torch.randn((RANK, size), generator=draw)
        matrix.addmm_(left, right, alpha=RANK**-0.5)
    return matrices.mul_(1e-3 * 0.5**0.5)


def time_of(compute: Callable[[], object], memory_before: float, at_least: float = 0.0) -> None:
    """Run a computation, again and again for so many seconds, and print what it takes once."""
    wall, cpu, times = time.perf_counter(), time.process_time(), 0
    while not times or time.perf_counter() - wall < at_least:
        compute()
        times += 1
    taken = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    print(json.dumps({key: seconds / times for key, seconds in taken.items()} | {"memory_before": memory_before}))


def merge_matrices(tasks: int, size: int) -> None:
    """Merge random task matrices by STF, with its defaults."""
    options = StfOptions()
    stf(task_matrices(2, 32), options, kind=Kind.LINEAR)  # loads what is loaded at first use
    before = anonymous_memory(os.getpid()) / MIB
    matrices = task_matrices(tasks, size)
    time_of(lambda: stf(matrices, options, kind=Kind.LINEAR), before, LONG_ENOUGH)


def survey(method: str, models: list[Path]) -> None:
    """Survey a model as a merge by the command line does, one tensor after the other."""
    keep_freed_memory()
    base, *tuned = map(str, models)
    plan = superpose.plan({"base": base, "models": [{"path": path} for path in tuned], "method": method})
    context = Context(plan.recipe.task_names, plan.weights, torch.device("cpu"), measure=False)
    before = anonymous_memory(os.getpid()) / MIB
    backend = make_backend("serial", None, 0)
    time_of(lambda: survey_all(plan.items, plan.items, backend, context, lambda _: None), before)


def main() -> None:
    """Read the command line and run one computation."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=("stf", "survey"))
    parser.add_argument("--tasks", type=int, default=2)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--method", default="ties")
    parser.add_argument("--models", nargs="+", type=Path, default=[])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.what == "stf":
        merge_matrices(arguments.tasks, arguments.size)
    else:
        survey(arguments.method, arguments.models)


if __name__ == "__main__":
    main()
