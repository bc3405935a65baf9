"""What can be checked before anything is computed: device, backend, output, room on the disk."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import torch

from superpose.backends import make_backend
from superpose.checkpoints.folder import Checkpoint
from superpose.checkpoints.lora import Adapter
from superpose.checkpoints.writer import Layout
from superpose.errors import SuperposeError
from superpose.kinds import Kind
from superpose.planning.items import Settings
from superpose.recipe import Rule
from superpose.records import is_output

PARTIAL = ".partial"
LONGEST_NAME = 230
"""Bytes of a file name, less what is added to it while a merge runs."""


def check_output(
    base: Checkpoint, tuned: Sequence[Checkpoint | Adapter], output: Path, *, overwrite: bool
) -> list[SuperposeError]:
    """Return what forbids an output of this name: it exists, or an input would be overwritten."""
    place, mend = output.resolve(), "choose another name for the output"
    if not output.name or len(os.fsencode(output.name)) > LONGEST_NAME:
        return [SuperposeError("the output has no usable name", where=str(output), mend=mend)]
    if output.name.endswith(PARTIAL):
        what = f"names that end in {PARTIAL} are those of merges under way"
        return [SuperposeError(what, where=str(output), mend=mend)]
    for checkpoint in (base, *tuned):
        inputs = [file.resolve() for file in checkpoint.files]
        inputs += [checkpoint.folder.resolve()] if checkpoint.folder else []
        inside = checkpoint.folder is not None and checkpoint.folder.resolve() in place.parents
        if inside or any(place in (known, *known.parents) for known in inputs):
            what = f"the output would lie in or replace {checkpoint.name}"
            return [SuperposeError(what, where=str(output), mend=mend)]
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return []
    if overwrite and is_output(output):
        return []
    if overwrite:
        what, mend = (
            "what is there is no output of superpose, and is not overwritten",
            "move it, or choose another name",
        )
        return [SuperposeError(what, where=str(output), mend=mend)]
    return [SuperposeError("the output exists already", where=str(output), mend="choose another name, or --overwrite")]


def check_device(settings: Settings) -> list[SuperposeError]:
    """Return what is wrong with the device asked for."""
    if settings.device in ("cpu", "auto"):
        return []
    try:
        device = torch.device(settings.device)
    except RuntimeError:
        known = "cpu, cuda, cuda:N, auto"
        return [SuperposeError(f"'{settings.device}' is no device", where="--device", mend=f"choose one of {known}")]
    if device.type not in ("cpu", "cuda"):
        what, mend = f"'{settings.device}' is not supported", "choose one of cpu, cuda, cuda:N, auto"
        return [SuperposeError(what, where="--device", mend=mend)]
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        what = f"no such GPU: {torch.cuda.device_count()} are there"
        return [SuperposeError(what, where=f"--device {settings.device}", mend="use --device cpu, or auto")]
    return []


def check_room(layout: Layout, output: Path | None) -> list[SuperposeError]:
    """Return a problem if the disk has no room for the output."""
    if output is None:
        return []
    place = output.absolute().parent
    while not place.exists():
        place = place.parent
    partial = output.with_name(output.name + ".partial")
    there = sum(f.stat().st_size for f in partial.glob("*.safetensors")) if partial.is_dir() else 0
    free = shutil.disk_usage(place).free + there
    if free >= layout.file_bytes:
        return []
    needed, left = layout.file_bytes / 2**30, free / 2**30
    what = f"not enough room: {needed:.2f} GiB are needed, {left:.2f} GiB are free"
    return [SuperposeError(what, where=str(place), mend="free some space, or choose another place for the output")]


def check_backend(settings: Settings) -> list[SuperposeError]:
    """Return what is wrong with the backend asked for."""
    try:
        make_backend(settings.backend, settings.workers, settings.memory, settings.ray_address)
    except SuperposeError as problem:
        return [problem]
    return []


def check_rules(rules: Sequence[Rule], kinds: Mapping[str, tuple[Kind, str]]) -> list[SuperposeError]:
    """Return the rules that would drop what the base has, given the kinds of its tensors."""
    return [
        SuperposeError(
            f"a rule drops {name}, which the base has",
            where=f"rule {{{rule}}}",
            mend="drop is for tensors that only fine-tunes have; keep: base takes the base's",
        )
        for rule in rules
        if rule.drop
        for name in sorted(name for name, (kind, _) in kinds.items() if rule.applies(name, kind))[:1]
    ]


def unused_rules(rules: Sequence[Rule], checkpoints: Sequence[Checkpoint | Adapter]) -> list[str]:
    """Return a note for each rule whose pattern matches no tensor of any checkpoint."""
    names = {name for checkpoint in checkpoints for name in checkpoint.tensors}
    return [
        f"rule {{{rule}}} matches no tensor"
        for rule in rules
        if rule.match and not any(fnmatchcase(name, rule.match) for name in names)
    ]
