"""What the demo found, and the same as the cells of a table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Row:
    """How one model, or one fine-tune per task, does on the held-out examples.

    Args:
        name: `pretrained` for the base with the heads of the fine-tunes, `fine-tuned` for each fine-tune on
            its own task, or a method's name for what it merged, again with the heads of the fine-tunes.
        accuracy: fraction of the held-out examples answered rightly, by task.
        merge_seconds: how long the merge took; None where nothing was merged.
        note: what is different about this row, in words.
    """

    name: str
    accuracy: Mapping[str, float]
    merge_seconds: float | None = None
    note: str = ""

    @property
    def mean(self) -> float:
        """The mean over tasks, each task counting the same."""
        return sum(self.accuracy.values()) / len(self.accuracy)


@dataclass(frozen=True)
class DemoResult:
    """The table, and where the merged model lies.

    Args:
        rows: the pretrained model, the fine-tuned ones, then every method that ran.
        left_out: what each method that did not run would have needed.
        held_out: number of held-out examples, by task.
        merged: folder of the merged model that was kept.
        merged_by: the method that made it.
        seconds: wall seconds by phase: `fetch`, `fine-tune`, `statistics`, `merge` (with learning), `score`.
    """

    rows: tuple[Row, ...]
    left_out: Mapping[str, frozenset[str]]
    held_out: Mapping[str, int]
    merged: Path
    merged_by: str
    seconds: Mapping[str, float]

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks, in the order of the columns."""
        return tuple(self.held_out)

    @property
    def loading_lines(self) -> tuple[str, ...]:
        """The lines of Python that load the merged model and its tokenizer."""
        return (
            "from transformers import AutoModel, AutoTokenizer",
            f"model = AutoModel.from_pretrained({str(self.merged)!r})",
            f"tokenizer = AutoTokenizer.from_pretrained({str(self.merged)!r})",
        )


def table_rows(result: DemoResult) -> list[list[str]]:
    """Return the table's cells, the header first: name, one column for each task, mean."""
    header = ["", *result.tasks, "mean"]
    body = [
        [row.name, *(f"{row.accuracy[task]:.3f}" for task in result.tasks), f"{row.mean:.3f}"] for row in result.rows
    ]
    return [header, *body]
