"""What every learner is given, and what it returns."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from superpose.inference import IGNORED, Batch, Example, LiveModel, Rows, TaskData, batches
from superpose.learning.task_models import load_for
from superpose.output_folder import sync
from superpose.parts import Context
from superpose.planning import Plan, WorkItem

Tell = Callable[[int, int], None]
RunSurveys = Callable[[Sequence[WorkItem], Context], Mapping[Any, Any]]


@dataclass(frozen=True)
class Task:
    """The data of one task, read.

    Args:
        name: of the task.
        data: where it comes from.
        location: of the model that answers it.
        examples: as the model reads them.
        rows: provenance of the rows.
    """

    name: str
    data: TaskData
    location: str
    examples: Sequence[Example]
    rows: Rows

    def batches(self) -> list[Batch]:
        """Return the examples in batches, in an order that depends on them alone."""
        return batches(self.examples, self.data.batch_size)


@dataclass(frozen=True)
class Learned:
    """What was learned.

    Args:
        tensors: by the tensor's name, or `EVERY_TENSOR`: coefficients (tasks,) or packed masks (tasks, bytes).
        facts: for the record.
    """

    tensors: Mapping[str, Tensor]
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Setting:
    """What a learner works with.

    Args:
        plan: the merge.
        items: the plan's items that are merged by the method.
        context: of the merge.
        tasks: their data, in the recipe's order; of one new task for LoraHub.
        surveys: (items, context) -> what the survey of their method ends with.
        state: where a learner keeps what it has, to go on after an interruption.
        tell: called with steps done and steps to do.
    """

    plan: Plan
    items: tuple[WorkItem, ...]
    context: Context
    tasks: tuple[Task, ...]
    surveys: RunSurveys
    state: State
    tell: Tell

    @property
    def device(self) -> torch.device:
        """Where the arithmetic is done."""
        return self.context.device

    def load(self, task: Task) -> LiveModel:
        """Return a task's model in memory."""
        return load_for(task.location, task.data, self.device)

    def workers(self, copies: int) -> int:
        """Return how many models can be worked on at a time, each with so many copies of its weights beside it."""
        size = 4 * copies * sum(item.numel for item in self.items)
        asked = self.plan.settings.workers or os.cpu_count() or 1
        return max(1, min(asked, self.plan.settings.memory // max(size, 1)))


class State:
    """Tensors and facts of a learner under way, in files that are replaced as a whole.

    Args:
        folder: for the files.
        key: of what is learned; files of another are not read.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self._folder, self._key = folder, key

    def save(self, name: str, tensors: Mapping[str, Tensor], facts: Any) -> None:
        """Keep something under a name."""
        self._folder.mkdir(exist_ok=True)
        scratch = self._folder / f"{name}.new"
        told = {"key": self._key, "facts": json.dumps(facts)}
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, scratch, told)
        sync(scratch)  # the name must not outlast the content when the power goes
        scratch.replace(self._folder / f"{name}.safetensors")

    def load(self, name: str) -> tuple[dict[str, Tensor], Any] | None:
        """Return what was kept under a name; None where there is nothing, or it is of something else."""
        file = self._folder / f"{name}.safetensors"
        try:
            with safe_open(str(file), framework="pt") as opened:
                told = opened.metadata() or {}
            return (load_file(file), json.loads(told["facts"])) if told["key"] == self._key else None
        except (SafetensorError, OSError, ValueError, KeyError):  # none, or torn by a crash: begun again
            return None


def losses(live: LiveModel, batch: Batch) -> Tensor:
    """Return each example's loss: cross entropy, for a language model its mean over the tokens asked for.

    Args:
        live: the model.
        batch: with its answers.

    Returns:
        Shape (examples,).
    """
    assert batch.targets is not None, "no answers"
    log_probabilities = live.scores(batch).log_softmax(dim=-1)
    asked = batch.targets != IGNORED
    chosen = log_probabilities.gather(-1, batch.targets.clamp_min(0)[..., None])[..., 0]
    return -torch.where(asked, chosen, 0.0).sum(dim=1) / asked.sum(dim=1).clamp_min(1)
