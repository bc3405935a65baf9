"""Adapters with a broken config or broken factors: every one ends in an error that names it."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from faults.damage import MERGED, REFUSED, adapter, merge_refused, merged_or_refused, small_family, with_bytes

GROUP = "Broken inputs"


def change_factors(change):
    def changed(folder):
        file = folder / "adapter_model.safetensors"
        save_file(change(load_file(file)), file)

    return changed


def set_config(**values):
    def changed(folder):
        file = folder / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **values}))

    return changed


ADAPTERS = {
    "config empty": lambda folder: (folder / "adapter_config.json").write_bytes(b""),
    "config a list": lambda folder: (folder / "adapter_config.json").write_text("[]"),
    "config cut off": lambda folder: (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r"'),
    "config of numbers without end": lambda folder: (folder / "adapter_config.json").write_text(
        '{"r": ' + "9" * 5000 + "}"
    ),
    "config is a folder": lambda folder: (
        (folder / "adapter_config.json").unlink(),
        (folder / "adapter_config.json").mkdir(),
    ),
    "rank of text": set_config(r="two"),
    "rank of nothing": set_config(r=None),
    "rank of another": set_config(r=3),
    "rank below zero": set_config(r=-2),
    "alpha of infinity": set_config(lora_alpha=float("inf")),
    "alpha no number": set_config(lora_alpha=float("nan")),
    "type of a list": set_config(peft_type=["LORA"]),
    "pattern that is none": set_config(rank_pattern={"(": 2}),
    "pattern a list": set_config(rank_pattern=[1]),
    "pattern of text": set_config(alpha_pattern="up_proj"),
    "bounds on layers of text": set_config(layer_replication="yes"),
    "no weights": lambda folder: (folder / "adapter_model.safetensors").unlink(),
    "weights empty": lambda folder: (folder / "adapter_model.safetensors").write_bytes(b""),
    "weights cut off": lambda folder: with_bytes(lambda content: content[:-7])(folder / "adapter_model.safetensors"),
    "a factor is missing": change_factors(lambda tensors: dict(list(tensors.items())[:1])),
    "factors swapped": change_factors(lambda tensors: dict(zip(tensors, list(tensors.values())[::-1], strict=True))),
    "factors of no dimension": change_factors(lambda tensors: dict.fromkeys(tensors, torch.tensor(1.0)) and {
        name: torch.tensor(float(number)) for number, name in enumerate(tensors)
    }),
    "factors of rank 0": change_factors(
        lambda tensors: {name: torch.zeros((0, 8) if "lora_A" in name else (24, 0)) for name in tensors}
    ),
    "factors of integers": change_factors(lambda tensors: {name: value.int() for name, value in tensors.items()}),
    "factors of float8": change_factors(
        lambda tensors: {name: value.to(torch.float8_e4m3fn) for name, value in tensors.items()}
    ),
    "factors of another base": change_factors(
        lambda tensors: {name: torch.ones(2, 9) if "lora_A" in name else value for name, value in tensors.items()}
    ),
    "factors of other modules": change_factors(
        lambda tensors: {name.replace("up_proj", "down_proj"): value for name, value in tensors.items()}
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", ADAPTERS)
def test_a_broken_adapter_is_named(tmp_path, tally, fault):
    base, _ = small_family(tmp_path)
    folder = adapter(tmp_path / "adapter")
    ADAPTERS[fault](folder)
    with tally(GROUP, f"adapter: {fault}") as injection:
        injection.outcome = merged_or_refused(base, [folder], tmp_path / "out", [str(folder)], method="task_arithmetic")
        assert injection.outcome == REFUSED


def test_a_sound_adapter_is_merged(tmp_path):
    """The test above would pass if every adapter were refused."""
    base, _ = small_family(tmp_path)
    folder = adapter(tmp_path / "adapter")
    assert merged_or_refused(base, [folder], tmp_path / "out", method="task_arithmetic") == MERGED


def test_the_command_line_names_a_broken_adapter(tmp_path, tally, forks):
    base, _ = small_family(tmp_path)
    folder = adapter(tmp_path / "adapter", r="two")
    with tally(GROUP, "adapter: rank of text", "command line") as injection:
        injection.outcome = merge_refused(forks, tmp_path, base, folder, names=["r and lora_alpha"])
