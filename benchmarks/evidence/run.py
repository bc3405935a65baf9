"""One benchmark from the first download to its results: fine-tunes, searches on validation data, numbers on test data.

    python benchmarks/evidence/run.py text --out FOLDER [--seeds 0 1 2] [--methods NAME ...] [--workers 2]
    python benchmarks/evidence/run.py text --out FOLDER --quick        two methods, one seed: to try it

FOLDER, outside the repository, keeps downloads, fine-tunes and every row; interrupted, the same command goes on. In the
end the rows of the table are in docs/evidence/NAME.json, from which `page.py` makes docs/evidence.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))  # measuring.py is one folder up

import torch
from grid import SIZE, Setting, variants
from measuring import machine
from rows import Evaluated, Row, clean_up
from suite import Part, Suite

import superpose

ROOT = Path(__file__).parent.parent.parent
Job = tuple[Setting | str, int, Part]


@cache
def suite_of(name: str, out: Path) -> Suite:
    """Return a benchmark's suite by its name."""
    if name == "text":
        from text import TextSuite

        return TextSuite(out)
    if name == "vision":
        from vision import VisionSuite

        return VisionSuite(out)
    from lora import LoraSuite

    return LoraSuite(out)


def main() -> None:
    """Read the command line and run a benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("benchmark", choices=["text", "vision", "lora"])
    parser.add_argument("--out", type=Path, required=True, help="folder, outside the repository, that keeps everything")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the fine-tunes")
    parser.add_argument("--methods", nargs="+", help="some methods only; the results then hold no others")
    parser.add_argument("--workers", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--quick", action="store_true", help="average and task arithmetic of one seed")
    asked = parser.parse_args()
    seeds = [0] if asked.quick else asked.seeds
    methods = ["average", "task_arithmetic"] if asked.quick else asked.methods
    # Results of some seeds or methods alone are not for the page.
    is_whole = not asked.quick and not asked.methods and asked.seeds == parser.get_default("seeds")
    run(asked.benchmark, asked.out.absolute(), seeds, methods, asked.workers, publish=is_whole)


def run(
    name: str, out: Path, seeds: Sequence[int], methods: Sequence[str] | None, workers: int, *, publish: bool
) -> None:
    """Run a benchmark.

    Args:
        name: of the benchmark.
        out: folder that keeps everything.
        seeds: of the fine-tunes.
        methods: some methods only; None for all.
        workers: processes.
        publish: whether the results go into docs/evidence.
    """
    started, suite = time.time(), suite_of(name, out)
    known = [method.name for method in superpose.list_methods()]
    rows = [
        one
        for one in variants(len(suite.tasks), known, data=name == "text", kernels=name == "vision")
        if methods is None or one.name in methods
    ]
    with ProcessPoolExecutor(workers, get_context("spawn"), initializer=_begin) as pool:
        _each(pool.submit(_tune, name, out, seed, task) for seed in seeds for task in suite.tasks)
        originals: list[Job] = [(one, seed, "test") for seed in seeds for one in ("pretrained", "fine-tuned")]
        _rows(pool, name, out, originals)
        best: dict[tuple[str, int], Setting] = {}
        for group in (False, True):  # those that look at data take longest, and come last
            some = [one for one in rows if one.looks_at_data == group]
            _rows(pool, name, out, ((one.default, seed, "test") for one in some for seed in seeds))
            _rows(
                pool, name, out, ((tried, seed, "validation") for seed in seeds for one in some for tried in one.grid)
            )
            best |= {(one.name, seed): _best(name, out, one.grid, seed) for one in some if one.grid for seed in seeds}
            _rows(pool, name, out, ((best[one.name, seed], seed, "test") for one in some if one.grid for seed in seeds))

    def kept(*job: Any) -> dict[str, Any]:
        return asdict(_row(name, out, job))

    clean_up(out)
    found = {
        "benchmark": name, "machine": machine(), "command": f"python benchmarks/evidence/run.py {name} --out FOLDER",
        "mark": suite.mark, "seeds": list(seeds), "tasks": list(suite.tasks), "grid_size": SIZE,
        "minutes_of_this_call": round((time.time() - started) / 60, 1),
        "originals": [kept(*job) for job in originals],
        "methods": [
            {
                "name": one.name,
                "default": [kept(one.default, seed, "test") for seed in seeds],
                "chosen": [kept(best[one.name, seed], seed, "test") for seed in seeds if one.grid],
                "validation": {
                    tried.text: [_row(name, out, (tried, seed, "validation")).mean for seed in seeds]
                    for tried in one.grid
                },
            }
            for one in rows
        ],
    }  # fmt: skip
    file = ROOT / "docs" / "evidence" / f"{name}.json" if publish else out / f"{name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(file)


def _best(name: str, out: Path, grid: Sequence[Setting], seed: int) -> Setting:
    """Return the setting with the highest mean on validation data; of equals the first in the grid."""
    return max(grid, key=lambda setting: _row(name, out, (setting, seed, "validation")).mean)


def _begin() -> None:
    torch.set_num_threads(1)


def _tune(name: str, out: Path, seed: int, task: str) -> None:
    suite_of(name, out).finetune(task, seed)


def _one(name: str, out: Path, job: Job) -> None:
    _row(name, out, job)


def _row(name: str, out: Path, job: Job) -> Row:
    return Evaluated(suite_of(name, out), out / "rows").row(*job)


def _rows(pool: ProcessPoolExecutor, name: str, out: Path, jobs: Iterable[Job]) -> None:
    _each(pool.submit(_one, name, out, job) for job in jobs)


def _each(futures: Iterable[Any]) -> None:
    for future in as_completed(list(futures)):
        future.result()


if __name__ == "__main__":
    main()
