"""Models of real names and shapes in files of full size and no content: what a plan reads is there, and no weight."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path

import torch

SIZES = {"F32": 4, "F16": 2, "BF16": 2}
Shapes = Mapping[str, tuple[int, ...]]


def shapes_of(architecture: type, config: object) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of a model that is never allocated, tied copies left out."""
    with torch.device("meta"):
        model = architecture(config)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def write_sparse(file: Path, shapes: Shapes, dtype: str = "F32") -> None:
    """Write a safetensors file whose tensors are a hole: it has its size, and takes no room."""
    header, place = {}, 0
    for name, shape in shapes.items():
        size = SIZES[dtype] * prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [place, place + size]}
        place += size
    told = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    told += b" " * (-len(told) % 8)
    with file.open("wb") as stream:
        stream.write(len(told).to_bytes(8, "little") + told)
        stream.truncate(8 + len(told) + place)


def write_model(folder: Path, shapes: Shapes, config: object, *, dtype: str = "F32", shards: int = 1) -> Path:
    """Write a model's folder: its config, and its weights in one file or several with an index."""
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    if shards == 1:
        write_sparse(folder / "model.safetensors", shapes, dtype)
        return folder
    weight_map = {}
    for number, part in enumerate(_parts(shapes, shards), 1):
        file = f"model-{number:05d}-of-{shards:05d}.safetensors"
        write_sparse(folder / file, part, dtype)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def _parts(shapes: Shapes, count: int) -> Iterable[Shapes]:
    names = list(shapes)
    step = -(-len(names) // count)
    return ({name: shapes[name] for name in names[start : start + step]} for start in range(0, len(names), step))


def room_taken(folder: Path) -> int:
    """Return the bytes that a folder's files take on the disk."""
    return sum(file.stat().st_blocks * 512 for file in folder.rglob("*") if file.is_file())
