"""Top-1 accuracy on the eight tasks by superpose's `classify`, with CLIP's text side as a fixed head.

python -m recipes.clip_vit.evaluate --size b32 MODEL [MODEL ...]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from recipes.clip_vit.fetch import DATA
from recipes.clip_vit.tasks import BASES, TASKS
from recipes.scores import evaluated, measure


def accuracy(model: str, name: str, *, data: Path, heads: Path, batch_size: int, device: str) -> dict[str, float]:
    """Return a model's accuracy on a task, in percent."""
    task = {
        "data": data / name / "rows.jsonl", "image": "image", "label": "label",
        "head": heads / f"{name}.safetensors", "pooling": "pooler", "batch_size": batch_size,
    }  # fmt: skip
    return {name: 100 * evaluated(model, "classify", data=task, device=device)["accuracy"]}


def main(arguments: Sequence[str] | None = None) -> list[dict[str, float]]:
    """Read the command line, measure, and print the table's rows."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", nargs="+", help="folder of a vision encoder, with its preprocessor_config.json")
    parser.add_argument("--size", choices=BASES, required=True)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--models", type=Path, default=Path("models"))
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--results", type=Path, default=Path("results/clip_vit.jsonl"))
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--device", default="auto")
    asked = parser.parse_args(arguments)
    heads = asked.models / f"clip_vit_{asked.size}" / "heads"
    score = partial(accuracy, data=asked.data, heads=heads, batch_size=asked.batch_size, device=asked.device)
    return measure(asked.model, asked.tasks, score, asked.results)


if __name__ == "__main__":
    main()
