"""Full fine-tunes of a text encoder on eight tasks, and what a merged encoder answers rightly with each task's head.

MiniLM (6 layers, 22.7 million weights), all weights fine-tuned with a linear head on the mean of the last hidden
states. Merged is the encoder; each task keeps the head that was trained with its own fine-tune.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from archives import fetch
from grid import Setting
from suite import Answers, Part, source_of
from text_tasks import HELD_OUT, TASKS, Examples, TextTask, load
from torch import Tensor

from superpose.demo.encoder import EncodedTask, Labelled, base_folder, features, load_body, load_tokenizer
from superpose.demo.finetune import HEAD_FILE, FineTuned, Training, finetune
from superpose.statistics import compute, prepare
from superpose.task_data import TaskData

TRAIN, VALIDATION, TEST = 3000, 300, 500
"""Examples of each task."""
LONGEST = 48
"""Tokens of a text that are read."""
BATCH = 32
SEEN = 256
"""Training examples of each task that methods which look at data see."""


@dataclass(frozen=True)
class TextSuite:
    """The benchmark of text tasks.

    Args:
        cache: folder of archives and fine-tunes.
    """

    cache: Path
    name: str = "text"

    @property
    def mark(self) -> str:
        """Numbers of examples, their length, and what fine-tunes."""
        how = {name: value for name, value in asdict(training(0)).items() if name != "seed"}
        return f"{TRAIN}/{VALIDATION}/{TEST} texts of {LONGEST} tokens, {how}"

    @property
    def rules(self) -> tuple[Mapping[str, Any], ...]:
        """No rules: heads are not in the encoder."""
        return ()

    @property
    def base(self) -> Path:
        """The encoder as it was published."""
        return base_folder(fetch("minilm", self.cache), self.cache / "models")

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks."""
        return tuple(task.name for task in TASKS)

    @property
    def sizes(self) -> dict[str, list[int]]:
        """Numbers of training, validation and test examples of each task."""
        loaded = {name: examples(self.cache, name) for name in self.tasks}
        return {name: [len(one.train), len(one.validation), len(one.test)] for name, one in loaded.items()}

    def finetune(self, task: str, seed: int) -> Path:
        """Return the folder of a fine-tuned encoder, made if it is not in the cache."""
        return self._finetuned(task, seed).body

    def tuned(self, seed: int) -> list[Path]:
        """Return the folders of a seed's fine-tunes, in the tasks' order."""
        return [self.finetune(name, seed) for name in self.tasks]

    def answers(self, model: Path, tasks: Sequence[str], seed: int, part: Part) -> dict[str, Answers]:
        """Return which examples an encoder answers rightly, with the heads of the tasks' fine-tunes."""
        body = load_body(model)
        return {
            task: right_answers(body, self._finetuned(task, seed), labelled(self.cache, task, part)) for task in tasks
        }

    @property
    def held_out(self) -> tuple[str, ...]:
        """Names of the tasks that no model is fine-tuned on."""
        return tuple(task.name for task in HELD_OUT)

    def features(self, model: Path, task: str, part: Literal["train", "test"], count: int) -> tuple[Tensor, Tensor]:
        """Return the mean hidden states of a task's first texts, and their classes."""
        found = labelled(self.cache, task, part)
        ids, labels = found.token_ids[:count], torch.tensor(found.labels[:count])
        body = load_body(model)
        rows = torch.empty(len(ids), body.config.hidden_size)
        with torch.no_grad():
            for batch in batches(ids):
                rows[batch] = features(body, [ids[i] for i in batch])
        return rows, labels

    def data(self, setting: Setting, task: str, seed: int) -> dict[str, Any]:
        """Return the training examples that a method which looks at data sees, and statistics of them."""
        if not (setting.data or setting.statistics):
            return {}
        seen = {
            "data": str(self._jsonl(task)), "label": "label", "examples": SEEN, "max_length": LONGEST,
            "head": str(self._finetuned(task, seed).folder / HEAD_FILE),
        }  # fmt: skip
        if not setting.statistics:
            return {"task": seen}
        file = self.cache / "statistics" / f"{self._finetuned(task, seed).folder.name}-{setting.statistics}.safetensors"
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            request = prepare(setting.statistics, str(self._finetuned(task, seed).body), TaskData(**seen))
            compute(request, file)
        return {"statistics": str(file)}

    def _jsonl(self, task: str) -> Path:
        file = self.cache / "texts" / f"{task}-{TRAIN}.jsonl"
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            rows = [{"text": text, "label": label} for text, label in examples(self.cache, task).train]
            scratch = file.with_suffix(f".{os.getpid()}")
            scratch.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
            scratch.replace(file)
        return file

    def _finetuned(self, name: str, seed: int) -> FineTuned:
        return _finetuned(self.cache, self.base, name, seed)


@cache
def _finetuned(cache_folder: Path, base: Path, name: str, seed: int) -> FineTuned:
    task = EncodedTask(
        name, examples(cache_folder, name).classes, labelled(cache_folder, name, "train"), Labelled([], []), ([], [])
    )
    return finetune(base, task, training(seed), cache_folder / "finetuned", threading.Event())


def training(seed: int) -> Training:
    """Return how a model is fine-tuned; the seed decides the order of the examples."""
    return Training(epochs=1, batch=32, learning_rate=1e-4, seed=seed)


def _task(name: str) -> TextTask:
    return next(task for task in (*TASKS, *HELD_OUT) if task.name == name)


@cache
def examples(cache_folder: Path, name: str) -> Examples:
    """Return the texts of a task."""
    return load(_task(name), cache_folder, train=TRAIN, validation=VALIDATION, test=TEST)


@cache
def labelled(cache_folder: Path, name: str, part: str) -> Labelled:
    """Return a part of a task's examples as tokens."""
    tokenizer = load_tokenizer(base_folder(fetch("minilm", cache_folder), cache_folder / "models"))
    source, count = source_of(part)
    texts, labels = zip(*getattr(examples(cache_folder, name), source)[:count], strict=True)
    return Labelled(tokenizer(list(texts), truncation=True, max_length=LONGEST)["input_ids"], labels)


@torch.inference_mode()
def right_answers(body: torch.nn.Module, tuned: FineTuned, part: Labelled) -> Answers:
    """Return, in the examples' order, whether the class with the largest logit is theirs."""
    head, found = tuned.head(), [False] * len(part.labels)
    for batch in batches(part.token_ids):
        said = head(features(body, [part.token_ids[i] for i in batch])).argmax(dim=1).tolist()  # type: ignore[arg-type]
        for index, answer in zip(batch, said, strict=True):
            found[index] = answer == part.labels[index]
    return Answers(found)


def batches(token_ids: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Yield indices of examples of similar length."""
    order = sorted(range(len(token_ids)), key=lambda index: len(token_ids[index]))
    for start in range(0, len(order), BATCH):
        yield order[start : start + BATCH]
