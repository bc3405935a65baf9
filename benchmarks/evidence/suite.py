"""What a benchmark of merged models offers, whatever its models and tasks are, and what is kept of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from grid import Setting
from torch import Tensor

Part = Literal["validation", "few", "test"]
"""Held-out examples on which hyperparameters are chosen, the first of these for wide sweeps, and those of the final
numbers."""
FEW = 100
"""Of each task's validation examples, for sweeps of many settings."""


def source_of(part: str) -> tuple[str, int | None]:
    """Return which of a task's examples a part is taken from, and how many of them: None for all."""
    return ("validation", FEW) if part == "few" else (part, None)


@dataclass(frozen=True)
class Answers:
    """Whether each example of a task was answered rightly, in the examples' order."""

    right: Sequence[bool]

    @property
    def accuracy(self) -> float:
        """Fraction of right answers."""
        return sum(self.right) / len(self.right)

    def packed(self) -> str:
        """Return the answers as a number of hexadecimal digits, the first example leading, with their count."""
        bits = "".join("1" if right else "0" for right in self.right)
        return f"{len(bits)}:{int('1' + bits, 2):x}"

    @classmethod
    def unpacked(cls, text: str) -> Answers:
        """Return the answers from their packed form."""
        count, digits = text.split(":")
        bits = bin(int(digits, 16))[3:]
        if len(bits) != int(count):
            raise ValueError(f"{len(bits)} answers, where {count} were kept")
        return cls([bit == "1" for bit in bits])


class Suite(Protocol):
    """A base model, fine-tunes of it by task and seed, and the tasks' held-out examples."""

    @property
    def name(self) -> str:
        """Name of the benchmark."""
        ...

    @property
    def mark(self) -> str:
        """What decides every number beside the merge: examples, training, versions of models and data."""
        ...

    @property
    def rules(self) -> Sequence[Mapping[str, Any]]:
        """Rules of every recipe, for tensors that the suite's models keep to themselves."""
        ...

    @property
    def base(self) -> Path:
        """Folder of the base model, made or fetched if need be."""
        ...

    @property
    def tasks(self) -> Sequence[str]:
        """Names of the tasks."""
        ...

    @property
    def sizes(self) -> Mapping[str, Sequence[int]]:
        """Numbers of training, validation and test examples of each task."""
        ...

    def finetune(self, task: str, seed: int) -> Path:
        """Return the folder of a fine-tune, made if it is not there."""
        ...

    def tuned(self, seed: int) -> list[Path]:
        """Return folders of the fine-tunes of a seed, in the tasks' order; made if they are not there."""
        ...

    def answers(self, model: Path, tasks: Sequence[str], seed: int, part: Part) -> dict[str, Answers]:
        """Return which examples a model answers rightly, by task, with what the task keeps for itself (its head).

        Args:
            model: its folder.
            tasks: names of the tasks.
            seed: of the fine-tunes that heads are from.
            part: of the examples.
        """
        ...

    def features(self, model: Path, task: str, part: Literal["train", "test"], count: int) -> tuple[Tensor, Tensor]:
        """Return what a model makes of a task's first examples before any head, and their classes.

        Args:
            model: its folder.
            task: name of the task; of those held out too.
            part: of the examples.
            count: of examples, at most.

        Returns:
            Features, shape (examples, width), and classes, shape (examples,).
        """
        ...

    @property
    def held_out(self) -> Sequence[str]:
        """Names of tasks that no model is fine-tuned on; `features` knows them."""
        ...

    def data(self, setting: Setting, task: str, seed: int) -> dict[str, Any]:
        """Return what a recipe's model says of its task's data, for settings that look at some; {} for others."""
        ...
