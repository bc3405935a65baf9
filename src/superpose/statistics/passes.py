"""Passes of data through a model, a group of tensors at a time that fits into memory; resumed where they stopped.

`FILE.partial/` holds the file under way at full size, what is finished of it, and, every so often, the sums of the
group under way. A group's tensors are written when its pass is through; the file gets its name at the end.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from superpose.checkpoints.writer import StreamWriter, lay_out_file
from superpose.inference import Batch
from superpose.output_folder import sync

AddBatch = Callable[[Batch], None]
FILE, PROGRESS, SUMS = "statistics.safetensors", "progress.json", "sums.safetensors"
SECONDS_BETWEEN_SAVES = 60.0


class Statistic(Protocol):
    """What is added up over a model's data: `superpose.statistics.fisher.Fisher`, for one."""

    kind: str
    width: int
    """Bytes that an entry of the sums takes at most while a pass goes on."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of each tensor of the result, by name."""
        ...

    def sums(self, names: tuple[str, ...], device: torch.device) -> dict[str, Tensor]:
        """Return zeros to add to, for some of the tensors."""
        ...

    def adding(self, sums: Mapping[str, Tensor], first: Batch) -> AbstractContextManager[AddBatch]:
        """Return what yields a function that adds a batch to the sums."""
        ...

    def mean(self, name: str, sums: Mapping[str, Tensor], examples: int) -> Tensor:
        """Return a tensor of the result, in float32."""
        ...


@dataclass(frozen=True)
class Advance:
    """How far the passes have come.

    Args:
        group: number of the group under way, from 1.
        groups: of all.
        done: batches of it that are done.
        total: batches of every group.
    """

    group: int
    groups: int
    done: int
    total: int


def group_tensors(statistic: Statistic, memory: int) -> list[tuple[str, ...]]:
    """Return the tensors in groups whose sums fit into memory, in the model's order; a larger tensor is a group."""
    groups: list[list[str]] = [[]]
    room = memory
    for name, shape in statistic.shapes().items():
        size = statistic.width * prod(shape)
        if groups[-1] and size > room:
            groups.append([])
            room = memory
        groups[-1].append(name)
        room -= size
    return [tuple(group) for group in groups]


def run_passes(
    statistic: Statistic,
    batches: Sequence[Batch],
    groups: Sequence[tuple[str, ...]],
    folder: Path,
    metadata: Mapping[str, Any],
    device: torch.device,
    report: Callable[[Advance], None],
) -> Path:
    """Pass all batches through the model once for every group, and write the result.

    Args:
        statistic: what is added up.
        batches: of the data.
        groups: of tensors.
        folder: `FILE.partial`, there already.
        metadata: of the file; another one means another result, and what is there of that is thrown away.
        device: where it is done.
        report: called as the passes go on.

    Returns:
        The finished file, still in the folder.
    """
    shapes = statistic.shapes()
    layout = lay_out_file(FILE, [(name, "F32", shapes[name]) for name in shapes], {"superpose": json.dumps(metadata)})
    key = hashlib.sha256(json.dumps([metadata, groups], sort_keys=True).encode()).hexdigest()
    progress = _Progress(folder, key)
    examples = sum(len(batch) for batch in batches)
    with contextlib.closing(StreamWriter(folder, layout)) as writer:
        for number, group in enumerate(groups, 1):
            if progress.is_finished(number, group, writer):
                continue
            sums = statistic.sums(group, device)
            start = progress.resume(number, sums)
            with statistic.adding(sums, batches[0].to(device)) as add:
                saved = time.monotonic()
                for place in range(start, len(batches)):
                    report(Advance(number, len(groups), place, len(batches)))
                    add(batches[place].to(device))
                    if time.monotonic() - saved > SECONDS_BETWEEN_SAVES:
                        progress.save(number, place + 1, sums)
                        saved = time.monotonic()
            for name in group:
                writer.write(name, 0, statistic.mean(name, sums, examples))
            writer.sync()
            progress.finish(number, {name: writer.digest(name) for name in group})
        report(Advance(len(groups), len(groups), len(batches), len(batches)))
    return folder / FILE


def publish_file(file: Path, target: Path) -> None:
    """Give a finished file its name, and remove the folder that it was made in."""
    target.parent.mkdir(parents=True, exist_ok=True)
    sync(file)
    file.replace(target)
    sync(target.absolute().parent)
    shutil.rmtree(file.parent)


class _Progress:
    """What is finished, in a file that is replaced as a whole; nothing, if it is of another result."""

    def __init__(self, folder: Path, key: str) -> None:
        self._folder, self._key = folder, key
        self._groups: dict[str, dict[str, str]] = {}
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):  # none, torn, or not ours
            content = json.loads((folder / PROGRESS).read_text(encoding="utf-8"))
            if content["key"] == key:
                self._groups = {str(group): dict(digests) for group, digests in content["groups"].items()}

    def is_finished(self, number: int, group: Sequence[str], writer: StreamWriter) -> bool:
        """Whether a group's tensors are in the file, to the byte."""
        digests = self._groups.get(str(number), {})
        return set(digests) == set(group) and all(writer.digest(name) == digests[name] for name in group)

    def finish(self, number: int, digests: Mapping[str, str]) -> None:
        """Note that a group is finished."""
        self._groups[str(number)] = dict(digests)
        text = json.dumps({"key": self._key, "groups": self._groups})
        _replace(self._folder / PROGRESS, lambda file: _write_text(file, text))

    def save(self, number: int, done: int, sums: Mapping[str, Tensor]) -> None:
        """Keep the sums of a group under way."""
        told = {"key": self._key, "group": str(number), "done": str(done)}
        tensors = {name: tensor.cpu() for name, tensor in sums.items()}
        _replace(self._folder / SUMS, lambda file: save_file(tensors, file, told))

    def resume(self, number: int, sums: Mapping[str, Tensor]) -> int:
        """Put back what was kept of a group, and return how many batches are in it."""
        file = self._folder / SUMS
        if not file.is_file():
            return 0
        try:
            with safe_open(str(file), framework="pt") as opened:
                told = opened.metadata() or {}
            if told.get("key") != self._key or told.get("group") != str(number):
                return 0
            kept = load_file(file)
            done = int(told["done"])
        except (SafetensorError, OSError, ValueError, KeyError):  # torn by a crash: the group is begun again
            return 0
        if set(kept) != set(sums):
            return 0
        for name, tensor in sums.items():
            tensor.copy_(kept[name])
        return done


def _write_text(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8")


def _replace(file: Path, write: Callable[[Path], None]) -> None:
    """Write a file so that its name always stands for a complete one."""
    scratch = file.with_name(file.name + ".new")
    write(scratch)
    sync(scratch)  # the name must not outlast the content when the power goes
    scratch.replace(file)
