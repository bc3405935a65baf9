"""One row of a table per model: what was measured, and the average that the papers print."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import superpose

DIGITS = 2
Score = Callable[[str, str], Mapping[str, float]]
"""Model and column -> numbers by name, as the table has them."""


def measure(
    models: Sequence[str], columns: Sequence[str], score: Score, results: Path, *, average: bool = True
) -> list[dict[str, float]]:
    """Measure models column by column, print a row for each, and keep what was found after every column.

    Args:
        models: folders, or MODEL+ADAPTER.
        columns: the tasks.
        score: what measures one model on one task.
        results: JSON Lines file that a line is added to for each model and task.
        average: whether the row ends with the mean of its numbers.

    Returns:
        For each model its numbers.
    """
    results.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    for model in models:
        row: dict[str, float] = {}
        for column in columns:
            try:
                found = score(model, column)
            except superpose.SuperposeError as error:
                sys.exit(f"{column}: {error}")
            row |= found
            with results.open("a") as stream:
                stream.write(json.dumps({"model": model, "task": column, **found}) + "\n")
        rows.append(row)
        shown = {**row, "average": sum(row.values()) / len(row)} if average else row
        if not rows[1:]:
            print(f"| model | {' | '.join(shown)} |")
        print(f"| {model} | {' | '.join(f'{value:.{DIGITS}f}' for value in shown.values())} |", flush=True)
    return rows


def evaluated(model: str, evaluator: str, **settings: Any) -> dict[str, float]:
    """Return what an evaluator of superpose measures, its numbers by name."""
    return dict(superpose.evaluate(model, evaluator, **settings).metrics)
