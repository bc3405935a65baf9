"""A ridge, fewer features, densities counted over the whole model: one change each to a setting of STF."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from bootstrap import difference
from grid import Setting
from jobs import Bench, Job

from analyses.common import SEED, Chosen, Content, described, interval, table

TITLE = "Ridge, fewer features, density over the model"
RIDGES = (1e-3, 1e-2, 1e-1, 1.0)
SHARES = (0.5, 0.2, 0.1, 0.05)
"""Of min(out, in) features, that are kept."""


def find(bench: Bench, chosen: Chosen) -> Content:
    """Score changes to the chosen setting, and, where something is trimmed, to the published defaults."""
    changes: list[dict[str, Any]] = [
        {},
        *({"ridge": one} for one in RIDGES),
        *({"feature_share": one} for one in SHARES),
    ]
    whole: list[dict[str, Any]] = [{}, {"density_scope": "model"}]
    found = []
    tried = [("the chosen", chosen["stf"].options, changes), ("the defaults", {}, whole)]
    if bench.name == "lora":  # adapters are not trimmed by default
        del tried[1]
    for to, options, some in tried:
        rows = bench.rows([Job(Setting("stf", {**options, **change}), SEED, "test") for change in some])
        found += [
            {"to": to, "change": change, **described(row),
             "difference": asdict(difference([row.answers], [rows[0].answers]))}
            for change, row in zip(some, rows, strict=True)
        ]  # fmt: skip
    return found


def numbers(found: Content) -> dict[str, str]:
    """Return what the summary can name: `chosen_ridge_0_1` is what that changes in the chosen setting."""
    return {
        f"{one['to'].removeprefix('the ')}_{option}_{value}".replace(".", "_"): interval(one["difference"])
        for one in found
        for option, value in one["change"].items()
    }


def lines(name: str, found: Content) -> Iterator[str]:
    """Yield the lines of the page."""
    few = " An adapter has eight features, fewer than the smallest share of a matrix's here." if name == "lora" else ""
    yield f"One change each to a setting of STF; the difference is to that setting, with a 95% interval.{few}\n"
    yield from table(
        ["to", "change", "mean", "difference"],
        [
            [one["to"], ", ".join(f"{option} {value}" for option, value in one["change"].items()) or "none",
             f"{one['mean']:.3f}", interval(one["difference"]) if one["change"] else ""]
            for one in found
        ],
    )  # fmt: skip
