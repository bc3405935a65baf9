"""What can be checked before anything is computed: device, backend, output, room on the disk."""

from __future__ import annotations

import os
import re
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
    """Return what forbids an output of this name: it exists, an input would go, or no folder can have it."""
    mend = "choose another name for the output"
    if not output.name or len(os.fsencode(output.name)) > LONGEST_NAME:
        return [SuperposeError("the output has no usable name", where=str(output), mend=mend)]
    try:
        return _check_place(base, tuned, output, overwrite=overwrite)
    except OSError as error:  # no right to look there, or a path that is too long
        what = f"the output cannot be made: {error.strerror}"
        return [SuperposeError(what, where=str(error.filename or output), mend="choose another place")]


def _check_place(
    base: Checkpoint, tuned: Sequence[Checkpoint | Adapter], output: Path, *, overwrite: bool
) -> list[SuperposeError]:
    place, mend = output.resolve(), "choose another name for the output"
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
    if _is_mount_point(output):
        # It could not be replaced by the finished folder, which would be found out at the very end.
        mend = f"name a folder in it: {output / 'merged'}"
        return [SuperposeError("the output is a mount point, and cannot be replaced", where=str(output), mend=mend)]
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
    taken = _bytes_taken(output.with_name(output.name + PARTIAL))
    missing = layout.file_bytes - taken - shutil.disk_usage(place).free
    if missing <= 0:
        return []
    needed, left = _size(layout.file_bytes), _size(layout.file_bytes - missing)
    there = f" or taken by the run before ({_size(taken)})" if taken else ""
    what = f"not enough room: {needed} are needed, {left} are free{there}, {_size(missing)} are missing"
    return [SuperposeError(what, where=str(place), mend="free some space, or choose another place for the output")]


def _bytes_taken(partial: Path) -> int:
    """Return the room on the disk that an earlier run's folder takes: it is used again, or given back."""
    if not partial.is_dir():
        return 0
    # By blocks: a file of full size that the disk had no room for takes less than its size.
    return sum(512 * file.lstat().st_blocks for file in partial.rglob("*") if file.is_file())


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def _is_mount_point(folder: Path) -> bool:
    if os.path.ismount(folder):
        return True
    # What is mounted from the same file system shows in this list alone.
    mounts = Path("/proc/self/mountinfo")
    if not folder.is_dir() or not mounts.exists():
        return False
    lines = mounts.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    # Spaces and the like are written by their octal numbers: \040.
    found = {re.sub(r"\\(\d{3})", lambda code: chr(int(code[1], 8)), line.split(" ")[4]) for line in lines}
    return str(folder.resolve()) in found


def check_settings(settings: Settings) -> list[SuperposeError]:
    """Return what is wrong with the words of the settings."""
    if settings.checksums in ("sample", "full"):
        return []
    where = f"--checksums {settings.checksums}"
    return [SuperposeError("no way to mark the inputs", where=where, mend="choose sample or full")]


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
