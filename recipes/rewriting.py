"""Write a model's folder anew with some of its tensors changed or left out, one file of weights at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Change = Callable[[str, Tensor], Tensor | None]
"""A tensor by its name -> what is written in its place, None to leave it out."""


def rewrite(folder: Path, out: Path, change: Change, config: Mapping[str, Any]) -> Path:
    """Write a model anew as safetensors; what lies beside the weights is copied.

    Args:
        folder: the model, in safetensors or PyTorch files.
        out: where to; it must not be there.
        change: what becomes of each tensor.
        config: content of the new config.json.

    Returns:
        The new folder.
    """
    out.mkdir(parents=True)
    for file in folder.iterdir():
        if file.is_file() and file.suffix not in (".safetensors", ".bin") and "index" not in file.name:
            shutil.copyfile(file, out / file.name)
    (out / "config.json").write_text(json.dumps(config, indent=2))
    weight_map = {}
    for number, tensors in enumerate(_files(folder), 1):
        changed = {name: new for name, tensor in tensors.items() if (new := change(name, tensor)) is not None}
        if changed:
            file = f"model-{number:05d}.safetensors"
            save_file({name: tensor.contiguous() for name, tensor in changed.items()}, out / file, {"format": "pt"})
            weight_map |= dict.fromkeys(changed, file)
    if len(set(weight_map.values())) == 1:
        next(out.glob("model-*.safetensors")).rename(out / "model.safetensors")
    else:
        index = {"metadata": {}, "weight_map": weight_map}
        (out / "model.safetensors.index.json").write_text(json.dumps(index))
    return out


def _files(folder: Path) -> Iterator[dict[str, Tensor]]:
    """Return the tensors of each file of weights; no pickle is executed."""
    for file in sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin")):
        if file.suffix == ".bin":
            yield torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        else:
            yield load_file(file)
