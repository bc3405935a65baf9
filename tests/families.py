"""Small families of checkpoints, made in the test: one base and fine-tunes of it."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


def generator(*key: object) -> torch.Generator:
    """Return a generator that depends on the key alone, not on what was drawn before."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def base_tensors(layers: int = 2, width: int = 16, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Return the tensors of a small decoder, of every kind but convolutions."""
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (40, width), "norm.weight": (width,)}
    for layer in range(layers):
        shapes |= {
            f"layers.{layer}.self_attn.q_proj.weight": (width, width),
            f"layers.{layer}.mlp.up_proj.weight": (3 * width, width),
            f"layers.{layer}.mlp.up_proj.bias": (3 * width,),
            f"layers.{layer}.input_layernorm.weight": (width,),
        }
    shapes |= {"lm_head.weight": (40, width), "logit_scale": ()}
    return {name: torch.randn(shape, generator=generator("base", name)).to(dtype) for name, shape in shapes.items()}


def tuned_tensors(base: Mapping[str, Tensor], seed: int, size: float = 0.05) -> dict[str, Tensor]:
    """Return the base with noise on every tensor."""
    return {
        name: (tensor.float() + size * torch.randn(tensor.shape, generator=generator(seed, name))).to(tensor.dtype)
        for name, tensor in base.items()
    }


def save(folder: Path, tensors: Mapping[str, Tensor], *, shards: int = 1, reverse: bool = False) -> Path:
    """Write a checkpoint folder: one file, or shards with an index; in either order of tensors."""
    folder.mkdir(parents=True)
    names = sorted(tensors, reverse=reverse)
    if shards == 1:
        save_file({name: tensors[name] for name in names}, folder / "model.safetensors", {"format": "pt"})
        return folder
    weight_map = {}
    for number in range(shards):
        part = names[number::shards]
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    content = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))
    return folder


def make_family(root: Path, tasks: int = 3, **options) -> list[Path]:
    """Write a base and its fine-tunes; return their folders, the base first."""
    base = base_tensors(**options)
    folders = [save(root / "base", base)]
    return folders + [save(root / f"ft{i}", tuned_tensors(base, i)) for i in range(1, tasks + 1)]


def load(folder: Path) -> dict[str, Tensor]:
    """Return all tensors of a folder."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def superpose(*arguments: object, check: bool = True, **environment: str) -> subprocess.CompletedProcess:
    """Run the command line in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "superpose", *map(str, arguments)],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "200", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert not check or done.returncode == 0, done.stderr
    return done


def weights(folder: Path) -> dict[str, bytes]:
    """Return the bytes of a folder's weight files, by name."""
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*.safetensors"))}
