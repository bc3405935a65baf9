"""Inputs to begin fuzzing with: made here, so that no file of bytes lies in the repository."""

from __future__ import annotations

import io
import json

import torch
import yaml
from safetensors.torch import save

FOUND: dict[str, list[bytes]] = {
    "safetensors": [],
    "index": [b'{"weight_map": {"a.weight": "' + b"x" * 300 + b'.safetensors"}}'],  # an OSError: the name is too long
    "recipe": [
        b"base: b\nmodels: [t]\nseed: !!float\n",  # an IndexError of the YAML library
        b"base: b\nmodels: [t]\nseed: !!bool maybe\n",  # and a KeyError
        b'base: b\nmodels: ["\\ud800"]\n',  # half a character, which became question marks
    ],
    "adapter": [],
    "pickle": [],
}
"""What fuzzing has found and was mended: all of it is tried again in every run of the tests."""


def safetensors() -> list[bytes]:
    """Return small files of several dtypes and shapes."""
    whole = {"a.weight": torch.zeros(2, 3), "b.bias": torch.zeros(3, dtype=torch.float16), "c": torch.tensor(1)}
    rest = {"d.weight": torch.zeros(4, dtype=torch.bfloat16), "e": torch.zeros(0, 2)}
    return [save(whole, {"format": "pt"}), save(rest), save({})]


def index() -> list[bytes]:
    """Return indexes of the two shards."""
    first, second = (f"model-0000{number}-of-00002.safetensors" for number in (1, 2))
    weight_map = {"a.weight": first, "b.bias": first, "c": first, "d.weight": second, "e": second}
    escape = {**weight_map, "a.weight": "../model.safetensors", "c": "/etc/passwd"}
    return [json.dumps({"metadata": {"total_size": 9}, "weight_map": names}).encode() for names in (weight_map, escape)]


def recipe() -> list[bytes]:
    """Return recipes with every section."""
    full = {
        "base": "org/base@main",
        "models": ["a", {"path": "b", "weight": 0.5, "name": "two", "statistics": "f.safetensors"},
                   {"path": "c", "task": {"data": "rows.jsonl", "text": "text", "label": "label"}}],
        "method": "dare_ties",
        "options": {"density": 0.5, "scaling_factor": 1e-3},
        "rules": [{"match": "*.bias", "keep": "base"}, {"match": "lm_head.[a-z]*", "kind": "head"},
                  {"kind": "norm", "method": "average"}, {"match": "x?", "drop": True}],
        "dtype": "bfloat16",
        "seed": 7,
        "output": {"form": "both", "rank": 4, "shard_size": "5GB", "rest": "drop"},
    }  # fmt: skip
    small = b"base: b\nmodels: [&a t, *a]\nmethod: ties\noptions: {density: !!float 1, k: 0x10, on: off}\n"
    return [json.dumps(full).encode(), yaml.safe_dump(full).encode(), small]


def adapter() -> list[bytes]:
    """Return configs of adapters that fit the weights beside them."""
    plain = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": "org/base"}
    full = {**plain, "rank_pattern": {"up": 2, "layers.\\d+": 2}, "alpha_pattern": {"up": 8}, "use_rslora": True,
            "target_modules": ["up"], "fan_in_fan_out": False, "use_dora": False, "bias": "none",
            "init_lora_weights": "gaussian", "enable_lora": [True, False]}  # fmt: skip
    return [json.dumps(plain).encode(), json.dumps(full).encode()]


def adapter_weights() -> bytes:
    """Return the weights beside an adapter's config."""
    place = "base_model.model.layers.0.up"
    return save({f"{place}.lora_A.weight": torch.zeros(2, 3), f"{place}.lora_B.weight": torch.zeros(4, 2)})


def pickle() -> list[bytes]:
    """Return small files of torch.save."""
    shared = torch.zeros(2, 3)
    contents = (
        {"a": shared, "b": shared, "c": shared.T, "d": torch.zeros(0)},
        {"state_dict": {"a": torch.nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))}, "epoch": 3},
        {"a": torch.zeros(2).to(torch.float8_e4m3fn), "b": torch.zeros(2, dtype=torch.int64)},
    )
    found = []
    for content in contents:
        stream = io.BytesIO()
        torch.save(content, stream)
        found.append(stream.getvalue())
    return found


SEEDS = {"safetensors": safetensors, "index": index, "recipe": recipe, "adapter": adapter, "pickle": pickle}
