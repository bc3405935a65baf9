"""Task matrices against fine-tuned ones (Figure 3a of the paper)."""

from __future__ import annotations

from collections.abc import Iterator

from grid import Setting
from jobs import Bench, Job

from analyses.common import SEED, Chosen, Content, described, table

TITLE = "Task matrices or fine-tuned matrices"


def find(bench: Bench, chosen: Chosen) -> Content:
    """Score STF at its defaults, at its chosen setting, and of fine-tuned matrices."""
    settings = [Setting("stf"), chosen["stf"], Setting("stf", {"matrices": "finetuned"})]
    return [described(row) for row in bench.rows([Job(one, SEED, "test") for one in settings])]


def numbers(found: Content) -> dict[str, str]:
    """Return what the summary can name: the means of both."""
    return {name: f"{one['mean']:.3f}" for name, one in zip(("default", "chosen", "finetuned"), found, strict=True)}


def lines(name: str, found: Content) -> Iterator[str]:
    """Yield the lines of the page."""
    del name
    yield "Decomposing the fine-tuned matrices instead of their differences from the base (Figure 3a of the paper).\n"
    tasks = list(found[0]["accuracy"])
    yield from table(
        ["setting", *tasks, "mean"],
        [[one["name"], *(f"{one['accuracy'][task]:.3f}" for task in tasks), f"{one['mean']:.3f}"] for one in found],
    )
