"""Weight files that are something else, are cut off or have a bit flipped: named, or merged rightly."""

from __future__ import annotations

import random
import shutil
import zipfile

import pytest
import torch
from families import load, tuned_tensors

from faults.damage import (
    MERGED,
    NAME,
    POINTER,
    REFUSED,
    SUFFIXES,
    bits,
    flip,
    merge_refused,
    merged_or_refused,
    small_base,
    small_family,
)
from faults.tally import rounds

GROUP = "Broken inputs"

# What the file is.

SORTS = {
    "no bytes": (b"", "the file is empty"),
    "zeros": (bytes(4096), "zeros where its header should be"),
    "git-lfs pointer": (POINTER, "a git-lfs pointer"),
    "login page": (b"<!DOCTYPE html>\n<html><body>Please log in</body></html>" + b" " * 4096, "a web page"),
    "page of an old server": (b"\n  <HTML><HEAD><TITLE>404</TITLE>", "a web page"),
    "PNG": (b"\x89PNG\r\n\x1a\n" + bytes(64), "an image (PNG)"),
    "GGUF": (b"GGUF\3\0\0\0" + bytes(64), "a GGUF file"),
    "gzip": (b"\x1f\x8b\x08\0" + bytes(64), "packed by gzip"),
    "error in JSON": (b'{"error": "Repository not found"}', ""),
    "text": (b"Entry not found", ""),
}


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("sort", SORTS)
def test_a_file_that_is_something_else_is_named_as_what_it_is(tmp_path, tally, sort, suffix):
    content, said = SORTS[sort]
    base, file = small_family(tmp_path, suffix)
    file.write_bytes(content)
    with tally(GROUP, f"another sort of file: {sort}", suffix) as injection:
        injection.outcome = merged_or_refused(base, [file.parent], tmp_path / "out", [str(file), said])
        assert injection.outcome == REFUSED


def test_a_git_lfs_pointer_is_told_how_to_be_fetched(tmp_path, tally, forks):
    base, file = small_family(tmp_path)
    file.write_bytes(POINTER)
    with tally(GROUP, "git-lfs pointer", "command line") as injection:
        wanted = ["a git-lfs pointer, not the file itself", str(file), "git lfs pull"]
        injection.outcome = merge_refused(forks, tmp_path, base, file.parent, names=wanted)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "adapter_config.json"])
def test_a_pointer_in_place_of_json_is_named_too(tmp_path, tally, name):
    base, file = small_family(tmp_path)
    (file.parent / name).write_bytes(POINTER)
    with tally(GROUP, "git-lfs pointer", name) as injection:
        wanted = [str(file.parent / name), "git lfs pull"]
        injection.outcome = merged_or_refused(base, [file.parent], tmp_path / "out", wanted)
        assert injection.outcome == REFUSED


def test_a_file_of_torch_save_under_the_other_name_is_told_its_own(tmp_path, tally):
    base, file = small_family(tmp_path, ".bin")
    file = file.rename(file.with_name("model.safetensors"))
    with tally(GROUP, "another sort of file: zip", ".safetensors") as injection:
        injection.outcome = merged_or_refused(base, [file.parent], tmp_path / "out", ["name it .bin"])
        assert injection.outcome == REFUSED


# Cut off.


@pytest.mark.parametrize("role", ["base", "fine-tune"])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_cut_off_anywhere_is_named(tmp_path, tally, suffix, role):
    base, tuned = small_family(tmp_path, suffix)
    if suffix == ".bin":
        torch.save(small_base(), base / "pytorch_model.bin")
        (base / "model.safetensors").unlink()
    file = next(base.glob("*model*")) if role == "base" else tuned
    whole = file.read_bytes()
    begin = 8 + int.from_bytes(whole[:8], "little") if suffix == ".safetensors" else len(whole) // 2
    places = {0, 1, 7, 8, 9, begin // 2, begin - 1, begin, begin + 1, len(whole) - 100, len(whole) - 1}
    draw = random.Random(f"{suffix} {role}")
    places |= {draw.randrange(len(whole)) for _ in range(rounds(8))}
    for cut in sorted(places):
        file.write_bytes(whole[:cut])
        with tally(GROUP, "cut off", suffix) as injection:
            injection.outcome = merged_or_refused(base, [tuned.parent], tmp_path / "out", [str(file)])
            assert injection.outcome == REFUSED, cut


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_the_command_line_names_a_file_that_is_cut_off(tmp_path, tally, forks, suffix):
    base, file = small_family(tmp_path, suffix)
    file.write_bytes(file.read_bytes()[:-1000])
    with tally(GROUP, "cut off", f"command line, {suffix}") as injection:
        injection.outcome = merge_refused(forks, tmp_path, base, file.parent, names=[str(file)])


# Bits the other way round.


def test_a_bit_flipped_in_a_header_is_found_or_changes_nothing(tmp_path, tally):
    base, file = small_family(tmp_path)
    assert merged_or_refused(base, [file.parent], tmp_path / "sound") == MERGED
    sound, whole = load(tmp_path / "sound"), file.read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")
    draw = random.Random("header")
    for number in range(rounds(40)):
        file.write_bytes(flip(whole, draw, 0, end))
        with tally(GROUP, "bit flipped in the header", ".safetensors") as injection:
            injection.outcome = merged_or_refused(base, [file.parent], tmp_path / f"{number}", [str(file.parent)])
            if injection.outcome == MERGED:
                injection.outcome = "changed nothing"
                found = load(tmp_path / f"{number}")
                assert {name: bits(tensor) for name, tensor in found.items()} == {
                    name: bits(tensor) for name, tensor in sound.items()
                }
                shutil.rmtree(tmp_path / f"{number}")


def test_a_bit_flipped_in_the_pickle_or_the_zip_is_found_or_changes_nothing(tmp_path, tally):
    """The pickle is guarded by the zip's checksum, which PyTorch does not look at."""
    base, file = small_family(tmp_path, ".bin")
    assert merged_or_refused(base, [file.parent], tmp_path / "sound") == MERGED
    sound, whole = load(tmp_path / "sound"), file.read_bytes()
    with zipfile.ZipFile(file) as archive:
        pickled = next(info for info in archive.infolist() if info.filename.endswith("data.pkl"))
        directory = archive.start_dir
    draw = random.Random("zip")
    for number in range(rounds(30)):
        where, start, stop = (
            ("pickle", pickled.header_offset, pickled.header_offset + 60 + pickled.file_size),
            ("table of contents", directory, len(whole)),
        )[number % 2]
        file.write_bytes(flip(whole, draw, start, stop))
        with tally(GROUP, f"bit flipped in the {where}", ".bin") as injection:
            injection.outcome = merged_or_refused(base, [file.parent], tmp_path / f"{number}", [str(file.parent)])
            if injection.outcome == MERGED:
                injection.outcome = "changed nothing"
                found = load(tmp_path / f"{number}")
                assert all(torch.equal(found[name], tensor) for name, tensor in sound.items())
                shutil.rmtree(tmp_path / f"{number}")


def test_a_bit_that_makes_one_tensor_another_is_found(tmp_path, tally):
    """Entry 1 becomes entry 0 by one bit: both are there, of one size, and PyTorch reads the same numbers twice."""
    for role in ("base", "tuned"):
        (tmp_path / role).mkdir()
        torch.save({"a.weight": torch.zeros(3, 3), "b.weight": torch.ones(3, 3)}, tmp_path / role / "pytorch_model.bin")
    file = tmp_path / "tuned" / "pytorch_model.bin"
    content = file.read_bytes()
    entry = b"X\x01\x00\x00\x001"
    assert content.count(entry) == 1
    file.write_bytes(content.replace(entry, entry[:-1] + b"0"))
    assert torch.equal(torch.load(file)["b.weight"], torch.zeros(3, 3))
    with tally(GROUP, "bit flipped in the pickle: another tensor", ".bin") as injection:
        wanted = [str(file), "checksum"]
        injection.outcome = merged_or_refused(tmp_path / "base", [tmp_path / "tuned"], tmp_path / "out", wanted)
        assert injection.outcome == REFUSED


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_bit_flipped_in_the_data_changes_one_number_and_nothing_else(tmp_path, tally, suffix):
    """No format that we read has a checksum of its numbers: what is not NaN cannot be told from a sound file."""
    base, file = small_family(tmp_path, suffix)
    whole = file.read_bytes()
    assert merged_or_refused(base, [file.parent], tmp_path / "sound") == MERGED
    sound = load(tmp_path / "sound")
    values = small_base()[NAME].add(0)
    tuned = tuned_tensors(small_base(), 1)[NAME]
    begin = whole.index(bits(tuned)[:64])
    draw = random.Random(f"data {suffix}")
    for number in range(rounds(10)):
        file.write_bytes(flip(whole, draw, begin, begin + values.nbytes))
        with tally(GROUP, "bit flipped in the data", suffix) as injection:
            said = merged_or_refused(base, [file.parent], tmp_path / f"{number}", [NAME])
            injection.outcome = "a number that is none, " + REFUSED if said == REFUSED else "one number differs"
            if said == MERGED:
                found = load(tmp_path / f"{number}")
                differs = {name: int((found[name] != tensor).sum()) for name, tensor in sound.items()}
                assert differs.pop(NAME) <= 1
                assert not any(differs.values())
                shutil.rmtree(tmp_path / f"{number}")
