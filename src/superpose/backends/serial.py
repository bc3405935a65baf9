"""One item after the other, in the caller's own thread."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

import torch


class Backend:
    """The backend without concurrency: the reference that others must agree with, byte for byte."""

    in_process = True

    def __init__(self, workers: int | None, budget: int) -> None:
        del workers, budget
        self.workers = 1

    def map(
        self, function: Callable[[Any], Any], items: Sequence[Any], memory: Sequence[int]
    ) -> Generator[tuple[int, Any], None, None]:
        """Yield (index, result) in order."""
        del memory
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # with more, sums round in another order: bytes would depend on the machine
        try:
            for index, item in enumerate(items):
                yield index, function(item)
        finally:
            torch.set_num_threads(threads)

    def facts(self) -> Mapping[str, Any]:
        """Return how many items there were at a time."""
        return {"workers": self.workers}

    def close(self) -> None:
        """Do nothing: it keeps nothing."""
