"""Indexes and shards that are broken, or lead out of their folder: an error that names the checkpoint."""

from __future__ import annotations

import json

import pytest
import torch
from families import save, tuned_tensors
from safetensors.torch import load_file, save_file

from faults.damage import NAME, REFUSED, merge_refused, merged_or_refused, small_base

GROUP = "Broken inputs"


def change_map(change):
    def changed(folder):
        index = folder / "model.safetensors.index.json"
        content = json.loads(index.read_text())
        change(content["weight_map"])
        index.write_text(json.dumps(content))

    return changed


def everywhere(place):
    return change_map(lambda weight_map: weight_map.update(dict.fromkeys(weight_map, place)))


def copy_shard(folder):
    first, second = sorted(folder.glob("*.safetensors"))[:2]
    tensors = {**load_file(second), NAME: torch.zeros(24, 8)}
    save_file(tensors, second)
    assert NAME in load_file(first) or NAME in load_file(sorted(folder.glob("*.safetensors"))[2])


SHARDS = {
    "a shard is missing": lambda folder: min(folder.glob("*.safetensors")).unlink(),
    "all shards are missing": lambda folder: [file.unlink() for file in folder.glob("*.safetensors")],
    "files outside: ../": everywhere("../outside.safetensors"),
    "files outside: absolute": everywhere("/etc/passwd"),
    "files outside: of the system": everywhere("../../../../../../etc/passwd"),
    "files outside: in a folder": everywhere("sub/one.safetensors"),
    "a hidden file": everywhere(".hidden.safetensors"),
    "a name with a zero byte": everywhere("one.safetensors\0.bin"),
    "a name that is a number": everywhere(7),
    "a tensor in two shards": copy_shard,
    "a tensor that no shard has": change_map(lambda m: m.update({"extra.weight": next(iter(m.values()))})),
    "the index is empty": lambda folder: (folder / "model.safetensors.index.json").write_text(""),
    "the index is a list": lambda folder: (folder / "model.safetensors.index.json").write_text("[]"),
    "the index lies a thousand deep": lambda folder: (folder / "model.safetensors.index.json").write_text(
        '{"weight_map": ' + '{"a":' * 990 + "1" + "}" * 991
    ),
}


@pytest.mark.parametrize("fault", SHARDS)
def test_a_broken_index_or_shard_is_named(tmp_path, tally, fault):
    base = save(tmp_path / "base", small_base(), shards=3)
    tuned = save(tmp_path / "tuned", tuned_tensors(small_base(), 1), shards=3)
    (tuned / "sub").mkdir()
    for place in (tmp_path / "outside.safetensors", tuned / "sub" / "one.safetensors"):
        save_file(small_base(), place)  # what is led to is there, and would do
    SHARDS[fault](tuned)
    with tally(GROUP, f"index: {fault}") as injection:
        injection.outcome = merged_or_refused(base, [tuned], tmp_path / "out", [str(tuned)])
        assert injection.outcome == REFUSED


def test_the_command_line_refuses_an_index_that_leads_out_of_its_folder(tmp_path, tally, forks):
    base = save(tmp_path / "base", small_base(), shards=3)
    everywhere("/etc/passwd")(base)
    with tally(GROUP, "index: files outside: absolute", "command line") as injection:
        injection.outcome = merge_refused(forks, tmp_path, base, base, names=["do not use this checkpoint"])
