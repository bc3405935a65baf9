"""Accuracy by rank classification, the mean over a task's templates, by superpose's `rank`.

python -m recipes.t5_base.evaluate MODEL [MODEL ...]               the seven tasks
python -m recipes.t5_base.evaluate --held-out MODEL [MODEL ...]    the six that no model was trained on
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from recipes.scores import evaluated, measure
from recipes.t5_base.finetune import LONGEST
from recipes.t5_base.prepare import DATA
from recipes.t5_base.tasks import HELD_OUT, MERGED, TASKS


def accuracy(model: str, name: str, *, data: Path, batch_size: int, device: str) -> dict[str, float]:
    """Return a model's mean accuracy over a task's templates, in percent."""
    task = {"data": data / name / "test.jsonl", "max_length": LONGEST, "batch_size": batch_size}
    templates = str(data / name / "templates.yaml")
    return {name: 100 * evaluated(model, "rank", data=task, templates=templates, device=device)["accuracy"]}


def main(arguments: Sequence[str] | None = None) -> list[dict[str, float]]:
    """Read the command line, measure, and print the table's rows."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", nargs="+")
    parser.add_argument("--held-out", action="store_true")
    parser.add_argument("--tasks", nargs="+", choices=TASKS)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--results", type=Path, default=Path("results/t5_base.jsonl"))
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--device", default="auto")
    asked = parser.parse_args(arguments)
    # Story Cloze has to be asked for: without its rows it is left out, and the average is over the others.
    known = [name for name in (HELD_OUT if asked.held_out else MERGED) if (asked.data / name / "test.jsonl").exists()]
    score = partial(accuracy, data=asked.data, batch_size=asked.batch_size, device=asked.device)
    return measure(asked.model, asked.tasks or known, score, asked.results)


if __name__ == "__main__":
    main()
