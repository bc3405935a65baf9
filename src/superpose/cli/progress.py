"""Progress on stderr: a bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from superpose.run import Progress

SECONDS_BETWEEN_LINES = 10.0


@contextlib.contextmanager
def progress(quiet: bool) -> Iterator[Callable[[Progress], None]]:
    """Yield a function that shows how far a merge has come."""
    if quiet:
        yield lambda _: None
    elif sys.stderr.isatty():
        with _bar() as show:
            yield show
    else:
        yield _lines()


@contextlib.contextmanager
def _bar() -> Iterator[Callable[[Progress], None]]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Task,
        TaskID,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )
    from rich.progress import Progress as RichProgress
    from rich.text import Text

    class Sizes(DownloadColumn):
        def render(self, task: Task) -> Text:
            return Text("") if task.description == "learn" else super().render(task)

    class Rates(TransferSpeedColumn):
        def render(self, task: Task) -> Text:
            return Text("") if task.description == "learn" else super().render(task)

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[done]}"),
        Sizes(binary_units=True),
        Rates(),
        TimeRemainingColumn(),
    )
    with RichProgress(*columns, console=Console(stderr=True), transient=True) as bar:
        tasks: dict[str, TaskID] = {}

        def show(state: Progress) -> None:
            if state.phase not in tasks:
                tasks[state.phase] = bar.add_task(state.phase, total=state.bytes_total, done="")
            done = f"{state.done}/{state.total} {'steps' if state.phase == 'learn' else 'tensors'}"
            bar.update(tasks[state.phase], completed=state.bytes_done, done=done)

        yield show


def _lines() -> Callable[[Progress], None]:
    last = {"time": time.monotonic()}

    def show(state: Progress) -> None:
        now = time.monotonic()
        if now - last["time"] < SECONDS_BETWEEN_LINES:
            return
        last["time"] = now
        if state.phase == "learn":
            print(f"learn: {state.done}/{state.total} steps", file=sys.stderr, flush=True)
            return
        share = state.bytes_done / max(state.bytes_total, 1)
        print(f"{state.phase}: {state.done}/{state.total} tensors, {share:.0%}", file=sys.stderr, flush=True)

    return show


def bytes_done(verb: str, quiet: bool) -> Callable[[int, int], None]:
    """Return a function that shows how many bytes of all are done: one line in a terminal, lines elsewhere."""
    last = {"time": time.monotonic()}
    live = sys.stderr.isatty()

    def show(done: int, total: int) -> None:
        now = time.monotonic()
        if quiet or (now - last["time"] < (0.2 if live else SECONDS_BETWEEN_LINES) and not (live and done == total)):
            return
        last["time"] = now
        text = f"{verb}: {done / max(total, 1):.0%} of {total / 2**30:.2f} GiB"
        end = "\n" if not live or done == total else ""
        print(f"\r{text}" if live else text, end=end, file=sys.stderr, flush=True)

    return show
