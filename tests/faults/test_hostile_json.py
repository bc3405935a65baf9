"""JSON and tokenizers that are too deep, too large or no file: refused in little memory, or harmless."""

from __future__ import annotations

import os

import pytest

from faults.damage import MERGED, REFUSED, merged_or_refused, refused_by_the_command_line, small_family
from superpose.checkpoints.files import LARGEST_JSON

GROUP = "Hostile inputs"

JSON = {
    "a hundred thousand deep": b'{"a":' * 100_000,
    "as deep as Python reads": b'{"a":' * 900 + b"1" + b"}" * 900,
    "lists in fifty million bytes": b'{"a":[' + b"[]," * 16_000_000 + b"[]]}",
    "larger than any": None,
    "a pipe": b"|",
    "numbers without end": b'{"hidden_size": ' + b"9" * 100_000 + b"}",
    "half a character": b'{"model_type": "\\ud800"}',
    "not a number": b'{"hidden_size": NaN, "r": NaN, "lora_alpha": Infinity}',
}


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "adapter_config.json"])
@pytest.mark.parametrize("fault", JSON)
def test_json_that_is_a_trap_is_refused_or_harmless(tmp_path, tally, forks, fault, name):
    base, file = small_family(tmp_path)
    target = file.parent / name
    if fault == "larger than any":
        target.touch()
        os.truncate(target, LARGEST_JSON + 1)
    elif fault == "a pipe":
        os.mkfifo(target)
    else:
        target.write_bytes(JSON[fault])
    harmless = name == "config.json" and fault in ("half a character", "not a number")
    said = str(file.parent) if fault in ("half a character", "not a number") else str(target)
    with tally(GROUP, f"JSON: {fault}", name) as injection:
        if harmless:
            assert merged_or_refused(base, [file.parent], tmp_path / "out") == MERGED
            injection.outcome = MERGED
        else:
            injection.outcome = refused_by_the_command_line(
                forks, tmp_path, "plan", base, file.parent, names=[said], memory=500_000_000
            )


@pytest.mark.parametrize("config", ["half a character", "not a number"])
def test_an_odd_config_of_the_base_is_copied_as_it_is(tmp_path, tally, config):
    base, file = small_family(tmp_path)
    (base / "config.json").write_bytes(JSON[config])
    with tally(GROUP, f"JSON: {config}", "config.json of the base") as injection:
        injection.outcome = merged_or_refused(base, [file.parent], tmp_path / "out")
        assert injection.outcome == MERGED
        assert (tmp_path / "out" / "config.json").read_bytes() == JSON[config]


@pytest.mark.parametrize("fault", ["a hundred thousand deep", "as deep as Python reads"])
@pytest.mark.parametrize("use", ["overwritten", "verified", "rebuilt"])
def test_a_record_that_is_a_trap_is_refused(tmp_path, tally, forks, fault, use):
    base, file = small_family(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "run.json").write_bytes(JSON[fault])
    command = {
        "overwritten": ["merge", base, file.parent, "-o", tmp_path / "out", "--overwrite"],
        "verified": ["verify", tmp_path / "out"],
        "rebuilt": ["rebuild", tmp_path / "out", "--task", "a", "-o", tmp_path / "model"],
    }[use]
    with tally(GROUP, f"JSON: {fault}", f"run.json, {use}") as injection:
        injection.outcome = refused_by_the_command_line(forks, tmp_path, *command, names=[str(tmp_path / "out")])
        assert (tmp_path / "out" / "run.json").read_bytes() == JSON[fault]


def test_a_tokenizer_of_a_terabyte_is_not_copied(tmp_path, tally):
    base, file = small_family(tmp_path)
    with (base / "tokenizer.json").open("wb") as stream:
        stream.truncate(1 << 40)
    with tally(GROUP, "a tokenizer of a terabyte") as injection:
        injection.outcome = merged_or_refused(base, [file.parent], tmp_path / "out", [str(base / "tokenizer.json")])
        assert injection.outcome == REFUSED


def test_a_tokenizer_that_is_a_pipe_is_left_out(tmp_path, tally):
    base, file = small_family(tmp_path)
    os.mkfifo(base / "tokenizer.json")
    with tally(GROUP, "a tokenizer that is a pipe") as injection:
        injection.outcome = merged_or_refused(base, [file.parent], tmp_path / "out")
        assert injection.outcome == MERGED
        assert not (tmp_path / "out" / "tokenizer.json").exists()
