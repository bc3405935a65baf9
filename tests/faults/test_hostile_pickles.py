"""Pickles made to do harm: no code in them is run, and none takes memory or time without end."""

from __future__ import annotations

import os
import pickle
import struct
import time
from pathlib import Path

import pytest
import torch

from faults.damage import (
    BASE,
    MERGED,
    REFUSED,
    SOON,
    TUNED,
    adapter,
    merged_or_refused,
    refused_by_the_command_line,
    small_base,
    small_family,
    with_pickle,
)

GROUP = "Hostile inputs"

# Pickles that hold code.


class Runs:
    """An object whose pickle leaves a mark when it is loaded."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple:
        return os.system, (f"touch '{self.canary}'",)


class Evaluates(Runs):
    """The same by a function of Python itself."""

    def __reduce__(self) -> tuple:
        return eval, (f"open({str(self.canary)!r}, 'w').close()",)


class Opens(Runs):
    """The same by opening a file for writing."""

    def __reduce__(self) -> tuple:
        return os.open, (str(self.canary), os.O_WRONLY | os.O_CREAT)


CODE = {
    "a command": (Runs, "system"),
    "an expression": (Evaluates, "eval"),
    "a file opened": (Opens, "open"),
}


@pytest.mark.parametrize("place", ["in the file", "in the state dict", "below it", "beside it"])
@pytest.mark.parametrize("code", CODE)
def test_code_in_a_pickle_is_never_run_and_named(tmp_path, tally, code, place):
    canary = tmp_path / "canary"
    sort, name = CODE[code]
    base, file = small_family(tmp_path, ".bin")
    tensors, bad = torch.load(file), sort(canary)
    content = {
        "in the file": bad,
        "in the state dict": {**tensors, "extra": bad},
        "below it": {**tensors, "_metadata": {"deep": [{"er": bad}]}},
        "beside it": {"state_dict": tensors, "args": bad},
    }[place]
    torch.save(content, file)
    with tally(GROUP, f"code in a pickle: {code}", ".bin") as injection:
        injection.outcome = merged_or_refused(base, [file.parent], tmp_path / "out", [str(file), name])
        assert injection.outcome == REFUSED
        assert not canary.exists()
    torch.load(file, weights_only=False)
    assert canary.exists(), "the code does nothing: the test could not fail"


@pytest.mark.parametrize("name", ["pytorch_model.bin", "adapter_model.bin"])
def test_the_command_line_runs_no_code_either(tmp_path, tally, forks, name):
    canary = tmp_path / "canary"
    base, file = small_family(tmp_path, ".bin")
    folder = file.parent
    if name == "adapter_model.bin":
        folder = adapter(tmp_path / "adapter")
        (folder / "adapter_model.safetensors").unlink()
    torch.save({"a": torch.ones(2), "extra": Runs(canary)}, folder / name)
    for command in (["merge", base, folder, "-o", tmp_path / "out"], ["plan", base, folder], ["inspect", folder]):
        with tally(GROUP, f"code in a pickle: {name}", f"superpose {command[0]}") as injection:
            wanted = [str(folder / name), "refused", "system"]
            injection.outcome = refused_by_the_command_line(forks, tmp_path, *command, names=wanted)
            assert not canary.exists()


@pytest.mark.parametrize("name", ["training_args.bin", "optimizer.pt", "tokenizer.model", "vocab.txt", "rng_state.pth"])
def test_a_pickle_beside_the_weights_is_not_loaded(tmp_path, tally, name):
    canary = tmp_path / "canary"
    base, file = small_family(tmp_path)
    for folder in (base, file.parent):
        (folder / name).write_bytes(pickle.dumps(Runs(canary)))
    with tally(GROUP, "code in a pickle beside the weights", name) as injection:
        injection.outcome = merged_or_refused(base, [file.parent], tmp_path / "out")
        assert injection.outcome == MERGED
        assert not canary.exists()


def test_a_pickle_without_a_zip_is_not_loaded(tmp_path, tally):
    canary = tmp_path / "canary"
    base, file = small_family(tmp_path, ".bin")
    file.write_bytes(pickle.dumps(Runs(canary), protocol=2))
    with tally(GROUP, "code in a pickle: without a zip", ".bin") as injection:
        injection.outcome = merged_or_refused(base, [file.parent], tmp_path / "out", [str(file)])
        assert injection.outcome == REFUSED
        assert not canary.exists()


# Pickles that run for ever without running code.


def call(module: bytes, name: bytes, *arguments: bytes) -> bytes:
    return b"c" + module + b"\n" + name + b"\n(" + b"".join(arguments) + b"tR"


def number(value: int) -> bytes:
    content = value.to_bytes(8, "little", signed=True)
    return b"\x8a" + bytes([len(content)]) + content


def text(value: str) -> bytes:
    return b"X" + struct.pack("<L", len(value)) + value.encode()


def tower(start: bytes, levels: int) -> bytes:
    """Each level a pair of the one below, by its place in memory."""
    return start + b"q\0" + b"".join(b"h" + bytes([at]) + b"h" + bytes([at]) + b"\x86q" + bytes([at + 1])
                                     for at in range(levels))  # fmt: skip


TOWER = tower(b")", 60)
LIST = b"](" + b"".join(b"J" + struct.pack("<l", at) for at in range(200_000)) + b"eq\0"
TRAPS = {
    "pairs of pairs as a key": b"\x80\x02" + b"}" + TOWER + b"Ns.",
    "pairs of pairs in a set": b"\x80\x02]q\x64" + TOWER + b"a" + call(b"builtins", b"set", b"h\x64") + b".",
    "pairs of pairs, counted": b"\x80\x02]q\x64" + TOWER + b"a" + call(b"collections", b"Counter", b"h\x64") + b".",
    "pairs of pairs, a million levels": b"\x80\x02)" + b"q\0h\0\x86" * 1_000_000 + b".",
    "a terabyte of bytes": b"\x80\x02" + call(b"builtins", b"bytearray", number(2**40)) + b".",
    "a terabyte of bytes, by an old name": b"\x80\x02" + call(b"exceptions", b"bytearray", number(2**40)) + b".",
    "letters written out twice, forty times": b"\x80\x02" + text("a") + b"q\0"
    + b"".join(call(b"_codecs", b"encode", b"h\0", text("hex")) + b"q\0" for _ in range(40)) + b".",
    "a slow alphabet": b"\x80\x02" + call(b"_codecs", b"encode", text("ä" * 100_000), text("punycode")) + b".",
    "a list copied ten thousand times": b"\x80\x02" + LIST
    + b"".join(call(b"builtins", b"set", b"h\0") for _ in range(10_000)) + b".",
    "a shape of a list, ten thousand times": b"\x80\x02" + LIST
    + b"".join(call(b"torch", b"Size", b"h\0") for _ in range(10_000)) + b".",
    "six million lists": b"\x80\x02" + b"]" * 6_000_000 + b".",
    "a tensor of a terabyte": b"\x80\x02}" + text("a") + call(b"torch", b"FloatTensor", number(2**38)) + b"s.",
    "memory of a terabyte": b"\x80\x02}" + text("a") + call(b"torch.storage", b"UntypedStorage", number(2**40)) + b"s.",
    "lists a million deep": b"\x80\x02" + b"]" * 1_000_000 + b"a" * 999_999 + b".",
    "a list that holds itself": b"\x80\x02]q\0" + b"h\0a" * 100_000 + b".",
    "a number of a million digits": b"\x80\x02}" + b"\x8a\xff" + b"\x7f" * 255 + b"Ns.",
}  # fmt: skip


@pytest.mark.parametrize("fault", TRAPS)
def test_a_pickle_that_is_a_trap_is_refused_in_little_memory_and_time(tmp_path, tally, forks, fault):
    base, file = small_family(tmp_path, ".bin")
    with_pickle(file, TRAPS[fault])
    with tally(GROUP, f"pickle: {fault}", "command line") as injection:
        begun = time.monotonic()
        injection.outcome = refused_by_the_command_line(
            forks, tmp_path, "plan", base, file.parent, names=[str(file)], memory=1_000_000_000
        )
        assert time.monotonic() - begun < SOON


def test_tensors_that_declare_more_than_the_file_holds_are_refused(tmp_path, tally):
    """A hundred thousand views of one block are a hundred thousand times the disk."""
    base, file = small_family(tmp_path, ".bin")
    block = torch.zeros(1_000_000)
    torch.save({f"a{at}": block[at:] for at in range(100)}, file)
    with tally(GROUP, "many views of one block", ".bin") as injection:
        injection.outcome = merged_or_refused(base, [file.parent], tmp_path / "out", [str(file), "more than the file"])
        assert injection.outcome == REFUSED


@pytest.mark.parametrize("name", ["\ud800", "norm" * 1000, "a\0b"], ids=["half a character", "long", "zero byte"])
def test_odd_names_in_a_pickle_are_refused_or_merged(tmp_path, tally, name):
    tensors = {**small_base(), name: torch.ones(3)}
    for role in (BASE, TUNED):
        (tmp_path / role).mkdir()
        torch.save(tensors, tmp_path / role / "pytorch_model.bin")
    with tally(GROUP, "odd names", ".bin") as injection:
        injection.outcome = merged_or_refused(tmp_path / BASE, [tmp_path / TUNED], tmp_path / "out", ["tensor"])
        assert injection.outcome == (MERGED if name == "a\0b" else REFUSED)
