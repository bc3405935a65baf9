"""Independent pieces of one computation side by side, where workers have nothing else to do.

Each piece runs with one arithmetic thread, as it would alone, and results come in the order of the pieces: who did
what is not in a single byte. A library's own threads would be: with more of them, sums round in another order.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

Piece = TypeVar("Piece")
Result = TypeVar("Result")

_mine = threading.local()


class Crew:
    """So many workers; who has no work of its own helps one that has pieces to give away.

    Args:
        workers: number of threads that compute at the same time.
    """

    def __init__(self, workers: int) -> None:
        self._idle, self._lock = workers, threading.Lock()
        self._helpers = ThreadPoolExecutor(
            workers, "superpose-help", initializer=torch.set_num_threads, initargs=(1,)
        )  # its threads begin when they are first needed

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Count the calling thread as busy, and let it give pieces away."""
        with self._lock:
            self._idle -= 1
        _mine.crew = self
        try:
            yield
        finally:
            _mine.crew = None
            with self._lock:
                self._idle += 1

    def help_with(self, function: Callable[[], Any], most: int) -> list[Future]:
        """Have idle workers call a function, at most so many of them."""
        with self._lock:
            count = max(0, min(self._idle, most))
            self._idle -= count
        return [self._helpers.submit(self._then_idle, function) for _ in range(count)]

    @property
    def is_crowded(self) -> bool:
        """Whether more are at work than there are workers: one that helped has got work of its own since."""
        return self._idle < 0

    def close(self) -> None:
        """Let the helpers' threads end."""
        self._helpers.shutdown()

    def _then_idle(self, function: Callable[[], Any]) -> None:
        try:
            function()
        finally:
            with self._lock:
                self._idle += 1


@contextmanager
def alone() -> Iterator[None]:
    """Give no pieces away for as long as this lasts."""
    crew, _mine.crew = getattr(_mine, "crew", None), None
    try:
        yield
    finally:
        _mine.crew = crew


def side_by_side(function: Callable[[Piece], Result], pieces: Sequence[Piece], *, most: int) -> list[Result]:
    """Return function(piece) for every piece, in their order.

    Args:
        function: safe to call from several threads at once.
        pieces: of one computation, which do not depend on each other.
        most: pieces at a time: memory is planned for so many.

    Returns:
        The results.
    """
    results: list[Any] = [None] * len(pieces)
    numbers = itertools.count()  # whoever is free takes the next

    failed = threading.Event()
    crew: Crew | None = getattr(_mine, "crew", None)

    def help_out() -> None:
        while crew is not None and not crew.is_crowded and not failed.is_set():
            if not take_one():
                return

    def take_one() -> bool:
        number = next(numbers)
        if number >= len(pieces):
            return False
        try:
            results[number] = function(pieces[number])
        except BaseException:
            failed.set()
            raise
        return True

    helping = crew.help_with(help_out, min(most, len(pieces)) - 1) if crew is not None else []
    try:
        while not failed.is_set() and take_one():
            pass
    finally:
        wait(helping)
    for helper in helping:
        helper.result()
    return results
