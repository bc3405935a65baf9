"""What can be checked before anything is computed: device, backend, output, room on the disk."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from superpose.backends import backend_names
from superpose.checkpoints.folder import Checkpoint
from superpose.checkpoints.writer import Layout
from superpose.errors import SuperposeError, nearest
from superpose.planning.items import Settings


def check_output(
    base: Checkpoint, tuned: Sequence[Checkpoint], output: Path, *, overwrite: bool
) -> list[SuperposeError]:
    """Return what forbids an output of this name: it exists, or an input would be overwritten."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return []
    for checkpoint in (base, *tuned):
        place = (checkpoint.folder or checkpoint.files[0]).resolve() if checkpoint.tensors else None
        if place is not None and output.resolve() in (place, *place.parents):
            mend = "choose another name for the output"
            return [SuperposeError(f"the output would overwrite {checkpoint.name}", where=str(output), mend=mend)]
    if overwrite:
        return []
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
    if settings.backend in backend_names():
        return []
    mend = nearest(settings.backend, backend_names())
    return [SuperposeError(f"no backend is named '{settings.backend}'", where="--backend", mend=mend)]
