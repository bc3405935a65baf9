"""Files that are broken: every one ends in an error that names it, or in the right result; never in a crash."""

from __future__ import annotations

import json
import random
import shutil
import time
import zipfile

import pytest
import torch
from families import base_tensors, load, save, tuned_tensors
from safetensors.torch import load_file, save_file

import superpose as library
from faults.damage import (
    MERGED,
    REFUSED,
    assert_says,
    bits,
    flip,
    header_of,
    merged_or_refused,
    refused_by_the_command_line,
    repacked,
    small_base,
    small_family,
    with_bytes,
    with_header,
    with_pickle,
    write_header,
)
from faults.tally import rounds
from superpose import SuperposeError
from superpose.checkpoints.compare import align
from superpose.checkpoints.folder import Checkpoint
from superpose.checkpoints.headers import LONGEST_NAME, MOST_TENSORS, TensorHeader
from superpose.checkpoints.torch_pickle import FORMAT
from superpose.kinds import Kind

GROUP = "Broken inputs"
BOTH = (".safetensors", ".bin")
NAME = "layers.0.mlp.up_proj.weight"


def shard(name, start, stop, *, dtype="F32", shape=None):
    return {name: {"dtype": dtype, "shape": shape or [(stop - start) // 4], "data_offsets": [start, stop]}}


# What the file is.

SORTS = {
    "no bytes": (b"", "the file is empty"),
    "zeros": (bytes(4096), "zeros where its header should be"),
    "git-lfs pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4d7a" * 16 + b"\nsize 4976698672\n",
        "a git-lfs pointer",
    ),
    "login page": (b"<!DOCTYPE html>\n<html><body>Please log in</body></html>" + b" " * 4096, "a web page"),
    "page of an old server": (b"\n  <HTML><HEAD><TITLE>404</TITLE>", "a web page"),
    "PNG": (b"\x89PNG\r\n\x1a\n" + bytes(64), "an image (PNG)"),
    "GGUF": (b"GGUF\3\0\0\0" + bytes(64), "a GGUF file"),
    "gzip": (b"\x1f\x8b\x08\0" + bytes(64), "packed by gzip"),
    "error in JSON": (b'{"error": "Repository not found"}', ""),
    "text": (b"Entry not found", ""),
}


@pytest.mark.parametrize("suffix", BOTH)
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
    file.write_bytes(SORTS["git-lfs pointer"][0])
    with tally(GROUP, "git-lfs pointer", "command line") as injection:
        injection.outcome = refused_by_the_command_line(
            forks,
            tmp_path,
            "merge",
            base,
            file.parent,
            "-o",
            tmp_path / "out",
            names=["a git-lfs pointer, not the file itself", str(file), "git lfs pull"],
        )


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "adapter_config.json"])
def test_a_pointer_in_place_of_json_is_named_too(tmp_path, tally, name):
    base, file = small_family(tmp_path)
    (file.parent / name).write_bytes(SORTS["git-lfs pointer"][0])
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
@pytest.mark.parametrize("suffix", BOTH)
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


@pytest.mark.parametrize("suffix", BOTH)
def test_the_command_line_names_a_file_that_is_cut_off(tmp_path, tally, forks, suffix):
    base, file = small_family(tmp_path, suffix)
    file.write_bytes(file.read_bytes()[:-1000])
    with tally(GROUP, "cut off", f"command line, {suffix}") as injection:
        injection.outcome = refused_by_the_command_line(
            forks, tmp_path, "merge", base, file.parent, "-o", tmp_path / "out", names=[str(file)]
        )


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


@pytest.mark.parametrize("suffix", BOTH)
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


# Headers that say what is not so.


def twice(header):
    return json.dumps(header)[:-1].encode() + b", " + json.dumps({NAME: header[NAME]})[1:].encode()


def swap(header):
    header[NAME]["data_offsets"], header["lm_head.weight"]["data_offsets"] = (
        header["lm_head.weight"]["data_offsets"],
        header[NAME]["data_offsets"],
    )


HEADERS = {
    "overlapping offsets": with_header(lambda h: h[NAME].update(data_offsets=[0, 768])),
    "offsets past the end": with_header(lambda h: h[NAME].update(data_offsets=[10**6, 10**6 + 768])),
    "offsets beyond any file": with_header(lambda h: h[NAME].update(data_offsets=[2**62, 2**62 + 768])),
    "offsets that are not aligned": with_header(
        lambda h: h[NAME].update(data_offsets=[o + 1 for o in h[NAME]["data_offsets"]])
    ),
    "offsets of two tensors swapped": with_header(swap),
    "shape beyond memory": with_header(lambda h: h[NAME].update(shape=[2**40, 2**20])),
    "shape below zero": with_header(lambda h: h[NAME].update(shape=[-24, -8])),
    "unknown dtype": with_header(lambda h: h[NAME].update(dtype="F24")),
    "dtype of other width": with_header(lambda h: h[NAME].update(dtype="F64")),
    "integers in place of numbers": with_header(lambda h: h[NAME].update(dtype="I32")),
    "name that is no text": with_header(lambda h: h.update({"\ud800": h.pop(NAME)})),
    "name without end": with_header(lambda h: h.update({"norm" * LONGEST_NAME: h.pop(NAME)})),
    "a tensor less": with_header(lambda h: h.pop(NAME)),
    "a tensor twice": lambda file: write_header(file, twice(header_of(file)[0]), header_of(file)[1]) and None,
    "no UTF-8": with_bytes(lambda content: content.replace(b"up_proj", b"up_\xffroj")),
    "length of 2^60": with_bytes(lambda content: (2**60).to_bytes(8, "little") + content[8:]),
    "length of 2^64 - 1": with_bytes(lambda content: b"\xff" * 8 + content[8:]),
    "length of 0": with_bytes(lambda content: bytes(8) + content[8:]),
    "length of the file": with_bytes(lambda content: (len(content) - 8).to_bytes(8, "little") + content[8:]),
    "bytes behind the last tensor": with_bytes(lambda content: content + bytes(5)),
    "bytes before the file": with_bytes(lambda content: b"\xef\xbb\xbf" + content),
    "line ends of another system": with_bytes(lambda content: content.replace(b"\n", b"\r\n") + b"\r\n"),
}


@pytest.mark.parametrize("role", ["base", "fine-tune"])
@pytest.mark.parametrize("fault", HEADERS)
def test_a_header_that_says_what_is_not_so_is_refused(tmp_path, tally, fault, role):
    base, tuned = small_family(tmp_path)
    file = base / "model.safetensors" if role == "base" else tuned
    HEADERS[fault](file)
    with tally(GROUP, f"header: {fault}", role) as injection:
        injection.outcome = merged_or_refused(base, [tuned.parent], tmp_path / "out", [str(file.parent)])
        assert injection.outcome == REFUSED


def test_the_command_line_refuses_overlapping_offsets(tmp_path, tally, forks):
    base, file = small_family(tmp_path)
    HEADERS["overlapping offsets"](file)
    with tally(GROUP, "header: overlapping offsets", "command line") as injection:
        injection.outcome = refused_by_the_command_line(
            forks, tmp_path, "merge", base, file.parent, "-o", tmp_path / "out", names=[str(file)]
        )


ABSURD = {
    "length of 2^60": lambda file: HEADERS["length of 2^60"](file),
    "a shape of 2^62 bytes": with_header(
        lambda h: h.update(shard("huge", 0, 2**62, shape=[2**60])),
    ),
    "lists in a hundred million bytes": lambda file: write_header(
        file, b'{"a": [' + b"[]," * 33_000_000 + b"[]]}", b""
    ),
    "short texts in a hundred million bytes": lambda file: write_header(
        file, b'{"a": [' + b'"ab",' * 19_000_000 + b'""]}', b""
    ),
}


@pytest.mark.parametrize("fault", ABSURD)
def test_an_absurd_header_takes_no_memory(tmp_path, tally, forks, fault):
    """With 400 MB more than the program itself has, it ends in an error, and not for want of memory."""
    base, file = small_family(tmp_path)
    ABSURD[fault](file)
    with tally(GROUP, f"absurd header: {fault}", "command line") as injection:
        injection.outcome = refused_by_the_command_line(
            forks, tmp_path, "merge", base, file.parent, "-o", tmp_path / "out", names=[str(file)], memory=400_000_000
        )


def test_a_million_tensors_are_refused_in_seconds(tmp_path, tally, forks):
    base, file = small_family(tmp_path)
    entries = ",".join(
        f'"layers.{number}.w":{{"dtype":"F32","shape":[1],"data_offsets":[{4 * number},{4 * number + 4}]}}'
        for number in range(1_000_000)
    )
    write_header(file, b"{" + entries.encode() + b"}", bytes(4_000_000))
    assert 60_000_000 < file.stat().st_size < 100_000_000
    with tally(GROUP, "a million tensors", "command line") as injection:
        begun = time.monotonic()
        names = [str(file), f"more than {MOST_TENSORS}"]
        injection.outcome = refused_by_the_command_line(
            forks, tmp_path, "plan", base, file.parent, names=names, memory=1_200_000_000
        )
        assert time.monotonic() - begun < 60


def test_tensors_beyond_the_most_are_counted_over_all_shards(tmp_path, tally, monkeypatch):
    monkeypatch.setattr("superpose.checkpoints.folder.MOST_TENSORS", 5)
    base = save(tmp_path / "base", small_base(), shards=3)
    tuned = save(tmp_path / "tuned", tuned_tensors(small_base(), 1))
    with tally(GROUP, "too many tensors", "shards") as injection:
        injection.outcome = merged_or_refused(base, [tuned], tmp_path / "out", [str(base)])
        assert injection.outcome == REFUSED


def test_comparing_names_takes_time_in_proportion(tmp_path):
    """A model of experts has a hundred thousand tensors; their square would be minutes."""
    headers = {
        f"layers.{number}.w": TensorHeader(f"layers.{number}.w", "F32", (1,), tmp_path) for number in range(20_000)
    }
    models = [Checkpoint(name, tmp_path, "", headers, {}, {}, ()) for name in ("base", "tuned")]
    begun = time.process_time()
    found = align(*models, dict.fromkeys(headers, Kind.LINEAR), tied={}, dropped=lambda _: False)
    assert len(found.sources) == 20_000
    assert time.process_time() - begun < 5


# Values that are rare but right.


def rare_tensors():
    draw = torch.Generator().manual_seed(7)
    whole = torch.arange(12).reshape(3, 4)
    return {
        "denormals.weight": torch.full((3, 4), 1e-42) * torch.randint(1, 9, (3, 4), generator=draw),
        "double.weight": torch.randn(3, 4, generator=draw, dtype=torch.float64),
        "half.weight": torch.randn(3, 4, generator=draw).half(),
        "brain.weight": torch.randn(3, 4, generator=draw).bfloat16(),
        "eighth.weight": torch.randn(3, 4, generator=draw).to(torch.float8_e4m3fn),
        "eighth.wide.weight": torch.randn(3, 4, generator=draw).to(torch.float8_e5m2),
        "whole.weight": whole,
        "bytes.weight": whole.to(torch.uint8),
        "truth.weight": whole > 4,
        "empty.weight": torch.zeros(0, 4),
        "empty.bias": torch.zeros(0),
        "scalar": torch.tensor(2.5),
        "one.row.weight": torch.randn(1, 5, generator=draw),
        "one.column.weight": torch.randn(5, 1, generator=draw),
        "kernel.weight": torch.randn(2, 3, 3, 3, generator=draw),
    }


@pytest.mark.parametrize("suffix", BOTH)
def test_rare_dtypes_shapes_and_values_come_out_right(tmp_path, tally, suffix):
    """A mean of two is exact to a rounding; what is no number with a point is the base's."""
    base, tuned = rare_tensors(), rare_tensors()
    for name, tensor in tuned.items():
        if tensor.dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            tuned[name] = tensor + (tensor * 0.5).to(tensor.dtype)
    folders = []
    for role, tensors in (("base", base), ("tuned", tuned), ("again", base)):
        (tmp_path / role).mkdir()
        if suffix == ".bin":
            torch.save(tensors, tmp_path / role / "pytorch_model.bin")
        else:
            save_file(tensors, tmp_path / role / "model.safetensors")
        folders.append(tmp_path / role)
    assert merged_or_refused(folders[0], folders[1:], tmp_path / "out") == MERGED
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == base.keys()
    for name, tensor in base.items():
        with tally(GROUP, f"rare: {name}", suffix) as injection:
            assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
            if tensor.dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
                expected = (tuned[name].double() + tensor.double()) / 2
                eps = torch.finfo(tensor.dtype if tensor.dtype is not torch.float64 else torch.float64).eps
                assert torch.allclose(found[name].double(), expected, rtol=2 * eps, atol=2e-45), name
            else:
                assert bits(found[name]) == bits(tensor)
            injection.outcome = MERGED


# Indexes and shards.


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
        injection.outcome = refused_by_the_command_line(
            forks, tmp_path, "merge", base, base, "-o", tmp_path / "out", names=["do not use this checkpoint"]
        )


def test_weights_through_links_are_read_wherever_they_lie(tmp_path, tally):
    """People link weights into several folders; of what a link leads to, numbers of a sound weight file are read."""
    base, file = small_family(tmp_path)
    (tmp_path / "store").mkdir()
    file.rename(tmp_path / "store" / "weights-of-mine")
    file.symlink_to(tmp_path / "store" / "weights-of-mine")
    with tally(GROUP, "weights through a link") as injection:
        injection.outcome = merged_or_refused(base, [file.parent], tmp_path / "out")
        assert injection.outcome == MERGED


SECRET = "root:x:0:0:a secret of this machine"


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "model.safetensors.index.json"])
def test_a_link_to_a_file_of_the_system_shows_nothing_of_it(tmp_path, tally, name):
    base, file = small_family(tmp_path)
    (tmp_path / "passwd").write_text(SECRET)
    file.unlink()
    (file.parent / name).symlink_to(tmp_path / "passwd")
    with tally(GROUP, "a link to a file of the system", name) as injection:
        with pytest.raises(SuperposeError) as caught:
            library.merge({"base": str(base), "models": [str(file.parent)]}, tmp_path / "out")
        assert "secret" not in str(caught.value)
        assert not (tmp_path / "out").exists()
        injection.outcome = REFUSED


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt", "merges.txt"])
def test_nothing_is_copied_through_a_link_out_of_the_folder(tmp_path, tally, name):
    base, file = small_family(tmp_path)
    (tmp_path / "credentials").write_text(json.dumps({"token": SECRET}))
    (base / name).symlink_to(tmp_path / "credentials")
    with tally(GROUP, "a link to credentials", name) as injection:
        injection.outcome = merged_or_refused(base, [file.parent], tmp_path / "out")
        assert injection.outcome == (REFUSED if name == "config.json" else MERGED)
        for written in tmp_path.glob("out*/**/*"):
            assert written.is_dir() or SECRET.encode() not in written.read_bytes()


def test_the_hubs_links_are_followed(tmp_path, tally):
    base, file = small_family(tmp_path)
    repository = tmp_path / "hub" / "models--org--tiny"
    (repository / "blobs").mkdir(parents=True)
    (repository / "snapshots" / "abc").mkdir(parents=True)
    shutil.copy(base / "model.safetensors", repository / "blobs" / "1")
    (repository / "blobs" / "2").write_text(json.dumps({"hidden_size": 8}))
    snapshot = repository / "snapshots" / "abc"
    (snapshot / "model.safetensors").symlink_to("../../blobs/1")
    (snapshot / "config.json").symlink_to("../../blobs/2")
    with tally(GROUP, "links of the hub's cache") as injection:
        injection.outcome = merged_or_refused(snapshot, [file.parent], tmp_path / "out")
        assert injection.outcome == MERGED
        assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"hidden_size": 8}


# Pickles.

PICKLES = {
    "nothing": b"",
    "an instruction that is none": b"\x80\x02\xfe.",
    "a text that is cut off": b"\x80\x02X\xff\xff\xff\x7fab.",
    "a call of nothing": b"\x80\x02NNR.",
    "a list as a key": b"\x80\x02}]Ns.",
    "a number as a key": b"\x80\x02}K\x01Ns.",
    "nothing remembered": b"\x80\x02h\x05.",
    "noise": bytes(random.Random(5).randrange(256) for _ in range(200)),
}


@pytest.mark.parametrize("fault", PICKLES)
def test_a_broken_pickle_is_named(tmp_path, tally, fault):
    base, file = small_family(tmp_path, ".bin")
    with_pickle(file, PICKLES[fault])
    with tally(GROUP, f"pickle: {fault}", ".bin") as injection:
        injection.outcome = merged_or_refused(base, [file.parent], tmp_path / "out", [str(file)])
        assert injection.outcome == REFUSED


def test_a_pickle_that_points_at_no_entry_is_named(tmp_path, tally):
    base, file = small_family(tmp_path, ".bin")
    with zipfile.ZipFile(file) as archive:
        entries = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(file, "w") as target:
        for name, content in entries.items():
            if "/data/3" not in name:
                target.writestr(name, content)
    with tally(GROUP, "pickle: an entry is missing", ".bin") as injection:
        injection.outcome = merged_or_refused(base, [file.parent], tmp_path / "out", [str(file)])
        assert injection.outcome == REFUSED


def test_an_entry_shorter_than_its_tensor_is_named(tmp_path, tally):
    base, file = small_family(tmp_path, ".bin")
    repacked(file, lambda name, content: content[: len(content) // 2] if "/data/" in name else content)
    with tally(GROUP, "pickle: entries too short", ".bin") as injection:
        injection.outcome = merged_or_refused(base, [file.parent], tmp_path / "out", [str(file)])
        assert injection.outcome == REFUSED


def test_a_file_with_more_entries_than_a_plain_zip_holds_is_read(tmp_path):
    file = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.arange(3.0)}, file)
    with zipfile.ZipFile(file, "a") as archive:
        for number in range(66_000):
            archive.writestr(f"pytorch_model/.more/{number}", b"")
    assert b"PK\6\7" in file.read_bytes()
    found = FORMAT.headers(file)
    assert found.problems == ()
    assert torch.equal(FORMAT.open(file).read("a"), torch.arange(3.0))


def test_a_file_without_checksums_is_read(tmp_path, tally):
    config = pytest.importorskip("torch.utils.serialization.config")
    config.save.compute_crc32 = False
    try:
        base, file = small_family(tmp_path, ".bin")
    finally:
        config.save.compute_crc32 = True
    with tally(GROUP, "no checksums", ".bin") as injection:
        injection.outcome = merged_or_refused(base, [file.parent], tmp_path / "out")
        assert injection.outcome == MERGED


# Adapters.


def adapter(folder, **config):
    folder.mkdir()
    place = f"base_model.model.{NAME.removesuffix('.weight')}"
    draw = torch.Generator().manual_seed(3)
    tensors = {
        f"{place}.lora_A.weight": torch.randn(2, 8, generator=draw),
        f"{place}.lora_B.weight": torch.randn(24, 2, generator=draw),
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": "base", **config})
    )
    return folder


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
        injection.outcome = refused_by_the_command_line(
            forks, tmp_path, "merge", base, folder, "-o", tmp_path / "out", names=["r and lora_alpha"]
        )


# Statistics and what was learned.


def fisher(file, told=None, change=lambda tensors: tensors):
    tensors = {name: torch.rand(tensor.shape) + 0.1 for name, tensor in small_base().items()}
    metadata = {"statistics": "fisher", "data": {}, "examples": 1} if told is None else told
    text = metadata if isinstance(metadata, str) else json.dumps(metadata)
    save_file(change(tensors), file, {"superpose": text})
    return file


STATISTICS = {
    "of another kind": {"told": {"statistics": "gram"}},
    "says nothing": {"told": "{}"},
    "says no JSON": {"told": "fisher"},
    "says a list": {"told": "[1]"},
    "says lists without end": {"told": "[" * 100_000},
    "shares what is not there": {"told": {"statistics": "fisher", "same": {NAME: "nowhere"}}},
    "shares a list": {"told": {"statistics": "fisher", "same": [NAME]}},
    "no tensor": {"change": lambda tensors: {}},
    "a tensor less": {"change": lambda tensors: {k: v for k, v in tensors.items() if k != NAME}},
    "a tensor of another shape": {"change": lambda tensors: {**tensors, NAME: torch.ones(8, 24)}},
    "float64": {"change": lambda tensors: {name: value.double() for name, value in tensors.items()}},
}


@pytest.mark.parametrize("fault", STATISTICS)
def test_broken_statistics_are_named(tmp_path, tally, fault):
    base, file = small_family(tmp_path)
    made = fisher(tmp_path / "made.safetensors", **STATISTICS[fault])
    with tally(GROUP, f"statistics: {fault}") as injection:
        models = [{"path": str(file.parent), "statistics": str(made)}]
        injection.outcome = refused_with(tmp_path, base, models, "fisher", ["made.safetensors"])


@pytest.mark.parametrize("fault", ["cut off", "empty", "git-lfs pointer", "a folder", "nothing"])
def test_statistics_that_are_no_file_of_theirs_are_named(tmp_path, tally, fault):
    base, file = small_family(tmp_path)
    made = fisher(tmp_path / "made.safetensors")
    content = {
        "cut off": made.read_bytes()[:-3], "empty": b"", "git-lfs pointer": SORTS["git-lfs pointer"][0],
    }.get(fault)  # fmt: skip
    made.unlink()
    if content is not None:
        made.write_bytes(content)
    elif fault == "a folder":
        made.mkdir()
    with tally(GROUP, f"statistics: {fault}") as injection:
        models = [{"path": str(file.parent), "statistics": str(made)}]
        injection.outcome = refused_with(tmp_path, base, models, "fisher", ["made.safetensors"])


@pytest.mark.parametrize(
    "told",
    [
        {"statistics": "fisher"},
        {"statistics": "fisher", "data": None, "examples": "many"},
        {"statistics": "fisher", "data": {"data": 7, "split": [1]}, "examples": {}},
        {"statistics": "fisher", "model": {"files": [{"name": 1}], "sha256": 3}, "data": {}, "examples": 1},
    ],
    ids=["nothing of its data", "no data", "odd data", "odd model"],
)
def test_statistics_of_other_programs_are_used_or_refused(tmp_path, tally, told):
    base, file = small_family(tmp_path)
    made = fisher(tmp_path / "made.safetensors", told)
    with tally(GROUP, "statistics: odd provenance") as injection:
        models = [{"path": str(file.parent), "statistics": str(made)}]
        recipe = {"base": str(base), "models": models, "method": "fisher"}
        try:
            library.merge(recipe, tmp_path / "out", backend="serial")
            injection.outcome = MERGED
        except SuperposeError as error:
            assert_says(str(error), ["made.safetensors"])
            injection.outcome = REFUSED


def refused_with(tmp_path, base, models, method, names, **more):
    with pytest.raises(SuperposeError) as caught:
        library.merge({"base": str(base), "models": models, "method": method, **more}, tmp_path / "out")
    assert_says(str(caught.value), names)
    assert not (tmp_path / "out").exists()
    return REFUSED


LEARNED = {
    "says nothing": "{}",
    "says no JSON": "adamerging",
    "says a list": "[]",
    "says lists without end": "[" * 100_000,
    "of another method": json.dumps({"learned": "lorahub", "task_names": ["tuned"]}),
    "of other models": json.dumps({"learned": "adamerging", "task_names": ["other"]}),
    "names that are numbers": json.dumps({"learned": "adamerging", "task_names": 7}),
}


@pytest.mark.parametrize("fault", [*LEARNED, "a row too many", "cut off"])
def test_what_was_learned_and_is_broken_is_named(tmp_path, tally, fault):
    base, file = small_family(tmp_path)
    sound = json.dumps({"learned": "adamerging", "task_names": ["tuned"]})
    made = tmp_path / "learned.safetensors"
    rows = 2 if fault == "a row too many" else 1
    save_file({"*": torch.ones(rows, dtype=torch.float64)}, made, {"superpose": LEARNED.get(fault, sound)})
    if fault == "cut off":
        made.write_bytes(made.read_bytes()[:-1])
    with tally(GROUP, f"learned: {fault}") as injection:
        injection.outcome = refused_with(
            tmp_path, base, [str(file.parent)], "adamerging", ["learned"], learned=str(made)
        )


def test_the_command_line_names_broken_statistics(tmp_path, tally, forks):
    base, file = small_family(tmp_path)
    made = fisher(tmp_path / "made.safetensors", "fisher")
    with tally(GROUP, "statistics: says no JSON", "command line") as injection:
        injection.outcome = refused_by_the_command_line(
            forks,
            tmp_path,
            "merge",
            base,
            file.parent,
            "-o",
            tmp_path / "out",
            "-m",
            "fisher",
            "--statistics",
            made,
            names=["was not written by superpose statistics"],
        )


@pytest.mark.parametrize("fault", ["cut off", "empty", "a list", "no mapping of tensors", "lists without end"])
def test_a_broken_set_of_task_models_is_named(tmp_path, tally, fault):
    folders = [save(tmp_path / "base", base_tensors(layers=1, width=8))]
    folders += [save(tmp_path / f"ft{number}", tuned_tensors(load(folders[0]), number)) for number in (1, 2)]
    library.merge(
        {"base": str(folders[0]), "models": [str(folder) for folder in folders[1:]], "method": "emr"},
        tmp_path / "set",
        backend="serial",
    )
    file = next((tmp_path / "set" / "tasks").glob("*.json"))
    text = file.read_text()
    broken = {
        "cut off": text[: len(text) // 2], "empty": "", "a list": "[]", "no mapping of tensors": "{}",
        "lists without end": "[" * 100_000,
    }  # fmt: skip
    file.write_text(broken[fault])
    with tally(GROUP, f"tasks.json: {fault}", "rebuild") as injection:
        with pytest.raises(SuperposeError) as caught:
            library.rebuild(tmp_path / "set", "ft1", tmp_path / "out")
        assert_says(str(caught.value), [str(tmp_path / "set")])
        assert not (tmp_path / "out").exists()
        injection.outcome = REFUSED
