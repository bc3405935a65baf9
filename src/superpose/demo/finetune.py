"""Full fine-tuning of the encoder with a linear head, kept under a name that tells what made it."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import safetensors.torch
import torch
import transformers
from torch import nn

from superpose.demo.encoder import EncodedTask, Labelled, fast_bfloat16, features, load_body, load_tokenizer
from superpose.demo.folders import complete_folder

HEAD_FILE = "head.safetensors"
GROUPED = 16
"""Batches that are cut from one run of examples sorted by length, so that little is padded."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """How a model is fine-tuned: AdamW, a short warm-up, then linearly to zero."""

    epochs: int = 1
    batch: int = 16
    learning_rate: float = 3e-4
    head_factor: float = 10.0
    """The head starts at zero and learns this much faster than the encoder."""
    warm_up: float = 0.1
    weight_decay: float = 0.01
    largest_gradient: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class FineTuned:
    """A fine-tune in the cache: the encoder as a model folder, the head beside it.

    Args:
        task: what it was fine-tuned on.
        folder: where it lies.
        is_new: whether it was made just now.
    """

    task: EncodedTask
    folder: Path
    is_new: bool

    @property
    def body(self) -> Path:
        """The encoder's folder, with the same tensors as the base's."""
        return self.folder / "body"

    def head(self) -> nn.Linear:
        """Read the head."""
        tensors = safetensors.torch.load_file(self.folder / HEAD_FILE)
        classes, width = tensors["weight"].shape
        head = nn.Linear(width, classes)
        head.load_state_dict(tensors)
        return head


def finetune(base: Path, task: EncodedTask, training: Training, cache: Path, stop: threading.Event) -> FineTuned:
    """Fine-tune a model, or find it in the cache.

    Args:
        base: model folder to start from.
        task: what to learn.
        training: how.
        cache: folder that holds the fine-tunes.
        stop: once set, training is given up and nothing is kept.

    Returns:
        Where the fine-tune lies.
    """
    folder = cache / f"{task.name}-{fingerprint(base, task, training)}"
    if folder.is_dir():
        return FineTuned(task, folder, is_new=False)
    body = load_body(base)
    head = train(body, task, training, stop)
    with complete_folder(folder) as filled:
        body.save_pretrained(filled / "body")
        load_tokenizer(base).save_pretrained(filled / "body")
        safetensors.torch.save_file(head.state_dict(), filled / HEAD_FILE, {"classes": json.dumps(task.classes)})
    return FineTuned(task, folder, is_new=True)


def fingerprint(base: Path, task: EncodedTask, training: Training) -> str:
    """Return a digest of all that decides the weights: base, examples, training, software, arithmetic."""
    made_of = {
        "base": hashlib.sha256((base / "model.safetensors").read_bytes()).hexdigest(),
        "classes": task.classes,
        "train": [list(map(list, task.train.token_ids)), list(task.train.labels)],
        "training": asdict(training),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "bfloat16": fast_bfloat16(),
    }
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:12]


def train(
    body: transformers.PreTrainedModel, task: EncodedTask, training: Training, stop: threading.Event
) -> nn.Linear:
    """Change the encoder in place and return the head.

    The encoder stays in evaluation mode: without dropout nothing draws from torch's global generator, so that
    models fine-tuned side by side do not disturb each other.
    """
    head = nn.Linear(body.config.hidden_size, len(task.classes))
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    rates = {"lr": training.learning_rate}
    head_rates = {"lr": training.learning_rate * training.head_factor}
    optimizer = torch.optim.AdamW(
        [{"params": body.parameters(), **rates}, {"params": head.parameters(), **head_rates}],
        weight_decay=training.weight_decay,
        fused=True,
    )
    batches = [batch for epoch in range(training.epochs) for batch in shuffled(task.train, training, epoch)]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, len(batches), training))
    for batch in batches:
        if stop.is_set():
            raise KeyboardInterrupt
        logits = head(features(body, batch.token_ids))
        loss = nn.functional.cross_entropy(logits, torch.tensor(batch.labels))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(body.parameters(), training.largest_gradient)
        optimizer.step()
        schedule.step()
    return head


def shuffled(examples: Labelled, training: Training, epoch: int) -> Iterator[Labelled]:
    """Yield all examples once, in batches of similar length and random order."""
    generator = torch.Generator().manual_seed(training.seed + epoch)
    order = torch.randperm(len(examples.labels), generator=generator).tolist()
    batches = []
    for start in range(0, len(order), GROUPED * training.batch):
        group = sorted(order[start : start + GROUPED * training.batch], key=lambda i: len(examples.token_ids[i]))
        batches += [group[i : i + training.batch] for i in range(0, len(group), training.batch)]
    for index in torch.randperm(len(batches), generator=generator).tolist():
        yield Labelled([examples.token_ids[i] for i in batches[index]], [examples.labels[i] for i in batches[index]])


def _rate(step: int, steps: int, training: Training) -> float:
    return min(1.0, (step + 1) / (training.warm_up * steps)) * (1 - step / steps)
