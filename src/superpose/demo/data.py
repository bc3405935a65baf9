"""What methods that look at data are given in the demo: texts of each task, statistics, and how much may be learned."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from superpose.demo.encoder import LONGEST, EncodedTask
from superpose.demo.finetune import HEAD_FILE, FineTuned
from superpose.one_thread_each import in_threads
from superpose.registry import Method
from superpose.statistics import compute, prepare
from superpose.task_data import TaskData

SEEN = 256
"""Training examples of each task that such methods see."""
LEARNING: Mapping[str, Mapping[str, Any]] = {
    "adamerging": {"steps": 40, "learning_rate": 0.01},
    "localize_and_stitch": {"masks": "learned", "epochs": 5, "learning_rate": 1e9},
    "lorahub": {"evaluations": 20},
}
"""Fewer and longer steps than by default: the demo is to end in minutes."""


def write_texts(task: EncodedTask, folder: Path) -> None:
    """Write a task's texts as JSON Lines, those to learn from and the held-out ones.

    Args:
        task: the task.
        folder: where `NAME-train.jsonl` and `NAME-test.jsonl` go.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parts = {"train": (task.texts[0], task.train.labels), "test": (task.texts[1], task.held_out.labels)}
    for part, (texts, labels) in parts.items():
        rows = [{"text": text, "label": label} for text, label in zip(texts, labels, strict=True)]
        content = "".join(json.dumps(row) + "\n" for row in rows)
        file = folder / f"{task.name}-{part}.jsonl"
        scratch = file.with_name(f"{file.name}.new")
        scratch.write_text(content, encoding="utf-8")
        scratch.replace(file)


def seen_of(tuned: FineTuned, folder: Path) -> dict[str, Any]:
    """Return the training data of a fine-tune, as a recipe names it.

    Args:
        tuned: the fine-tune.
        folder: with the texts.

    Returns:
        The task's data.
    """
    return {
        "data": str(folder / f"{tuned.task.name}-train.jsonl"),
        "label": "label",
        "head": str(tuned.folder / HEAD_FILE),
        "examples": SEEN,
        "max_length": LONGEST,
    }


def statistics_of(kind: str, tuned: Sequence[FineTuned], texts: Path, folder: Path) -> list[Path]:
    """Return files of each fine-tune's statistics, computed now.

    Args:
        kind: "fisher" or "gram".
        tuned: the fine-tunes.
        texts: folder of their data.
        folder: where the files go.

    Returns:
        One per fine-tune.
    """

    def one(item: FineTuned, stop: threading.Event) -> Path:
        del stop
        request = prepare(kind, str(item.body), TaskData(**seen_of(item, texts)))
        return compute(request, folder / f"{item.task.name}-{kind}.safetensors")

    return in_threads(one, tuned)


def note_of(method: Method, variant: Mapping[str, Any]) -> str:
    """Return what a row's method was given beside the models."""
    if method.statistics is not None:
        return f"{method.statistics} statistics of {SEEN} training examples per task"
    said = ", ".join(f"{name} {value:g}" for name, value in variant.items() if not isinstance(value, str))
    return f"learned from {SEEN} training examples per task ({said})"
