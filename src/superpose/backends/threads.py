"""Several items at a time in threads of this process: torch and NumPy leave the interpreter free while they compute."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

import torch

from superpose.maths.side_by_side import Crew


class Backend:
    """A pool of threads with one arithmetic thread each: over tensors, and inside one where workers would be idle."""

    in_process = True

    def __init__(self, workers: int | None, budget: int) -> None:
        self.workers = workers or available_cores()
        self.budget = budget

    def map(
        self, function: Callable[[Any], Any], items: Sequence[Any], memory: Sequence[int]
    ) -> Generator[tuple[int, Any], None, None]:
        """Yield (index, result) as results come; no more is begun once one has failed or the caller stops."""
        threads = torch.get_num_threads()
        waiting = list(range(len(items)))
        running: dict[Future, int] = {}
        pool = ThreadPoolExecutor(self.workers, "superpose", initializer=torch.set_num_threads, initargs=(1,))
        crew = Crew(self.workers)

        def work(item: Any) -> Any:
            with crew.at_work():
                return function(item)

        try:
            while waiting or running:
                used = sum(memory[index] for index in running.values())
                for index in list(waiting):
                    if len(running) == self.workers:
                        break
                    if not running or used + memory[index] <= self.budget:
                        running[pool.submit(work, items[index])] = index
                        waiting.remove(index)
                        used += memory[index]
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    yield running.pop(future), future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            crew.close()
            torch.set_num_threads(threads)

    def facts(self) -> Mapping[str, Any]:
        """Return how many items there were at a time."""
        return {"workers": self.workers}

    def close(self) -> None:
        """Do nothing: it keeps nothing."""


def available_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
