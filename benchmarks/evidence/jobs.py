"""Rows made by several processes side by side; what differs in its scaling factor alone is solved once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from grid import Setting
from rows import Evaluated, Row, clean_up, scratch_of
from suite import Part, Suite

from superpose.demo.folders import scratch_folder

NAMES = ("text", "vision", "lora")
"""Of the benchmarks."""


@dataclass(frozen=True)
class Job:
    """A row to be made: see `Evaluated.row`."""

    setting: Setting | str
    seed: int
    part: Part
    merged: tuple[str, ...] = ()
    scored: tuple[str, ...] = ()

    @property
    def solved_with(self) -> str:
        """The same for jobs whose merges share what is costly."""
        if isinstance(self.setting, str):
            return repr(self)
        options = sorted((name, value) for name, value in self.setting.options.items() if name != "scaling_factor")
        return repr((self.setting.method, options, self.setting.data, self.setting.statistics, self.seed, self.merged))


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


class Bench:
    """A benchmark, its folder, and the processes that work on it.

    Args:
        name: of the benchmark.
        out: folder that keeps everything.
        pool: of processes.
    """

    def __init__(self, name: str, out: Path, pool: ProcessPoolExecutor) -> None:
        self.name, self.out, self.pool = name, out, pool
        self.suite = suite_of(name, out)
        self.seconds: dict[str, float] = {}  # of merging and scoring, by row that was asked for

    def finetune(self, seeds: Iterable[int]) -> None:
        """Make the fine-tunes that are not there."""
        _ = self.suite.base  # once, not in every process
        self.each(_tune, [(self.name, self.out, seed, task) for seed in seeds for task in self.suite.tasks])

    def rows(self, jobs: Sequence[Job]) -> list[Row]:
        """Return the rows of jobs, in their order; made if they are not there."""
        # Statistics of a task serve many settings, and are made by one process.
        looking = {(one.setting.statistics, one.seed): one.setting for one in jobs
                   if isinstance(one.setting, Setting) and one.setting.statistics}  # fmt: skip
        self.each(_look, [(self.name, self.out, setting, task, seed) for (_, seed), setting in looking.items()
                          for task in self.suite.tasks])  # fmt: skip
        together: dict[str, list[Job]] = {}
        for job in {repr(job): job for job in jobs}.values():
            together.setdefault(job.solved_with, []).append(job)
        # The longest first, so that no process waits long for the last.
        groups = sorted(together.values(), key=len, reverse=True)
        self.each(_make, [(self.name, self.out, tuple(group)) for group in groups])
        found = [row(self.name, self.out, job) for job in jobs]
        self.seconds |= {
            repr(job): one.merge_seconds + one.scored_seconds for job, one in zip(jobs, found, strict=True)
        }
        return found

    def each(self, function: Any, arguments: Iterable[tuple[Any, ...]]) -> list[Any]:
        """Call a function with each of several arguments; return what it returns, in their order."""
        futures = [self.pool.submit(function, *one) for one in arguments]
        for future in as_completed(futures):
            future.result()
        return [future.result() for future in futures]


@contextmanager
def working_on(name: str, out: Path, workers: int) -> Iterator[Bench]:
    """Yield a benchmark with its processes, of one thread each; one call at a time for a benchmark and folder."""
    clean_up(name, out)
    with ProcessPoolExecutor(workers, get_context("spawn"), initializer=_begin) as pool:
        yield Bench(name, out, pool)


def row(name: str, out: Path, job: Job, solutions: Path | None = None) -> Row:
    """Return a job's row, made now if it is not there."""
    merged, scored = list(job.merged), list(job.scored)
    return Evaluated(suite_of(name, out), out / "rows").row(
        job.setting, job.seed, job.part, merged, scored, cache=solutions
    )


def _begin() -> None:
    torch.set_num_threads(1)


def _tune(name: str, out: Path, seed: int, task: str) -> None:
    suite_of(name, out).finetune(task, seed)


def _look(name: str, out: Path, setting: Setting, task: str, seed: int) -> None:
    suite_of(name, out).data(setting, task, seed)


def _make(name: str, out: Path, group: Sequence[Job]) -> None:
    if len(group) == 1:
        row(name, out, group[0])
        return
    with scratch_folder(scratch_of(name, out)) as solutions:
        for job in group:
            row(name, out, job, solutions)
