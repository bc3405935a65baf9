"""How many held-out examples a model answers rightly."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from superpose.demo.encoder import Labelled, features, load_body
from superpose.demo.finetune import FineTuned
from superpose.one_thread_each import in_threads

BATCH = 32


def score_alone(tuned: Sequence[FineTuned]) -> dict[str, float]:
    """Return the accuracy of each fine-tuned model on its own task."""
    return _score(tuned, lambda one: load_body(one.body))


def score_apart(tuned: Sequence[FineTuned], folder_of: Callable[[FineTuned], Path]) -> dict[str, float]:
    """Return the accuracy of each task's own model folder on that task, with the head that was fine-tuned for it."""
    return _score(tuned, lambda one: load_body(folder_of(one)))


def score_shared(folder: Path, tuned: Sequence[FineTuned]) -> dict[str, float]:
    """Return the accuracy of one encoder on every task, with the head that was fine-tuned for the task.

    Args:
        folder: the encoder's model folder.
        tuned: the fine-tunes whose tasks and heads to take.

    Returns:
        Accuracy by task.
    """
    body = load_body(folder)
    return _score(tuned, lambda one: body)


@torch.inference_mode()
def accuracy(body: PreTrainedModel, head: nn.Linear, examples: Labelled) -> float:
    """Return the fraction of examples whose class gets the largest logit."""
    order = sorted(range(len(examples.labels)), key=lambda i: len(examples.token_ids[i]))
    right = 0
    for start in range(0, len(order), BATCH):
        batch = order[start : start + BATCH]
        answers = head(features(body, [examples.token_ids[i] for i in batch])).argmax(dim=1)
        right += int((answers == torch.tensor([examples.labels[i] for i in batch])).sum())
    return right / len(order)


def _score(tuned: Sequence[FineTuned], body_of: Callable[[FineTuned], PreTrainedModel]) -> dict[str, float]:
    def one(item: FineTuned, stop: threading.Event) -> float:
        return accuracy(body_of(item), item.head(), item.task.held_out)

    return {item.task.name: found for item, found in zip(tuned, in_threads(one, tuned), strict=True)}
