"""The weakest or the strongest features of every task left out (Figures 5a and 5b)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from grid import Setting
from jobs import Bench, Job

from analyses.common import SEED, Chosen, Content, figure, table

TITLE = "Weakest and strongest features"
SHARES = (0.05, 0.2, 0.4, 0.6, 0.8, 0.9, 0.95)
"""Of the features, that are removed."""
ENDS = {"remove_smallest": "the weakest", "remove_largest": "the strongest"}


def find(bench: Bench, chosen: Chosen) -> Content:
    """Score STF at its chosen setting without some of its features."""
    removed = [(end, share) for end in ENDS for share in SHARES]
    settings = [Setting("stf", {**chosen["stf"].options, end: share}) for end, share in removed]
    none, *rows = bench.rows([Job(one, SEED, "test") for one in (chosen["stf"], *settings)])
    return {"none": none.mean, "removed": [
        {"end": end, "share": share, "mean": row.mean} for (end, share), row in zip(removed, rows, strict=True)
    ]}  # fmt: skip


def numbers(found: Content) -> dict[str, str]:
    """Return what the summary can name: the means without some features, by their share in percent."""
    return {"none": f"{found['none']:.3f}"} | {
        f"{one['end'].removeprefix('remove_')}_{one['share']:.0%}".rstrip("%"): f"{one['mean']:.3f}"
        for one in found["removed"]
    }  # fmt: skip


def lines(name: str, found: Content) -> Iterator[str]:
    """Yield the lines of the page."""
    yield f"Features left out of every task matrix, by count (Figures 5a, 5b); with all of them {found['none']:.3f}.\n"
    yield figure(name, "removed_features", "accuracy by share of removed features")
    shares = sorted({one["share"] for one in found["removed"]})
    at = {(one["end"], one["share"]): one["mean"] for one in found["removed"]}
    yield from table(
        ["removed", *(f"{share:.0%}" for share in shares)],
        [[said, *(f"{at[end, share]:.3f}" for share in shares)] for end, said in ENDS.items()],
    )


def draw(found: Content, figure: Any) -> None:
    """Draw accuracy by share of removed features."""
    axes = figure.subplots()
    for end, said in ENDS.items():
        points = [(one["share"], one["mean"]) for one in found["removed"] if one["end"] == end]
        axes.plot(*zip((0, found["none"]), *points, strict=True), "o-", label=f"{said} removed", markersize=4)
    axes.set_xlabel("share of each task's features")
    axes.set_ylabel("mean accuracy")
    axes.legend(frameon=False)
