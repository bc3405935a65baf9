"""safetensors files: what headers say, what is wrong with damaged and hostile ones, and reading without copies."""

from __future__ import annotations

import json
import os
import tracemalloc
from dataclasses import replace

import pytest
import torch
from families import base_tensors, generator, load, save, tuned_tensors
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

import superpose
from superpose import list_methods
from superpose.checkpoints.headers import DTYPE_NAMES, TORCH_DTYPES, TensorHeader
from superpose.checkpoints.safetensors import FORMAT, LONGEST_HEADER

METHODS = [method.name for method in list_methods() if not method.needs]


def sound_tensors():
    """Return one tensor of every dtype, and of every shape that is easily forgotten."""
    bits = torch.randint(0, 2, (4, 3), generator=generator("bits"))
    tensors = {f"dtype.{name}": bits.to(dtype) for name, dtype in TORCH_DTYPES.items()}
    tensors |= {
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0),
        "empty.matrix": torch.zeros(3, 0, 2, dtype=torch.bfloat16),
        "layers.0.weight": torch.randn(5, 7, generator=generator("weight")),
        "Gewicht ü 重み": torch.arange(3),
    }
    return tensors


def entry(dtype="F32", shape=(1,), offsets=(0, 4)):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def write(folder, header, data=b"", *, length=None):
    """Write a file with this header (text or what is to become JSON), whatever it says."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file = folder / "model.safetensors"
    file.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return file


def problem_of(file):
    """Return the one problem of a file, which must name the file."""
    (problem,) = FORMAT.headers(file).problems
    assert str(file) in problem.where
    assert problem.what
    assert problem.mend
    assert "\n" not in problem.what
    return problem


def as_bytes(tensor):
    """Return a tensor's bytes: not every dtype can be compared."""
    return tensor.reshape(-1).view(torch.uint8)


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    file = tmp_path_factory.mktemp("sound") / "model.safetensors"
    save_file(sound_tensors(), file, {"format": "pt"})
    return file


# Sound files.


def test_headers_agree_with_the_safetensors_library(sound):
    found = FORMAT.headers(sound)
    assert found.problems == ()
    assert dict(found.aliases) == {}
    with safe_open(sound, framework="pt") as file:
        assert set(found.tensors) == set(file.keys())
        for name in file.keys():  # noqa: SIM118 - an open file is no mapping
            tensor = file.get_tensor(name)
            expected = TensorHeader(name, file.get_slice(name).get_dtype(), tuple(tensor.shape), sound)
            offset = found.tensors[name].offset
            assert found.tensors[name] == replace(expected, offset=offset)
            assert sound.read_bytes()[offset : offset + tensor.nbytes] == as_bytes(tensor).numpy().tobytes()
            assert found.tensors[name].numel == tensor.numel()
            assert found.tensors[name].nbytes == tensor.nbytes


def test_every_dtype_has_the_name_that_the_library_writes(sound):
    headers = FORMAT.headers(sound).tensors
    assert {headers[f"dtype.{name}"].dtype for name in TORCH_DTYPES} == set(TORCH_DTYPES)
    assert {DTYPE_NAMES[dtype]: dtype for dtype in TORCH_DTYPES.values()} == TORCH_DTYPES


def test_only_numbers_with_a_point_are_merged(sound):
    headers = FORMAT.headers(sound).tensors
    merged = {name for name in TORCH_DTYPES if headers[f"dtype.{name}"].is_float}
    assert merged == {"F64", "F32", "F16", "BF16"}


def test_a_file_without_tensors_is_sound(tmp_path):
    file = tmp_path / "model.safetensors"
    save_file({}, file)
    assert FORMAT.headers(file).tensors == {}
    assert FORMAT.headers(file).problems == ()


def test_headers_read_no_tensor(sound, monkeypatch):
    monkeypatch.setattr("superpose.checkpoints.safetensors.SafetensorsReader.read", None)
    assert len(FORMAT.headers(sound).tensors) == len(sound_tensors())


# Truncated files.


@given(share=st.floats(0, 1, exclude_max=True))
@settings(deadline=None, max_examples=200)
def test_a_file_cut_at_any_byte_is_named(sound, tmp_path_factory, share):
    whole = sound.read_bytes()
    cut = int(share * len(whole))
    file = tmp_path_factory.mktemp("cut") / "model.safetensors"
    file.write_bytes(whole[:cut])
    found = FORMAT.headers(file)
    (problem,) = found.problems
    assert str(file) in problem.where
    assert "incomplete" in problem.mend
    begin = 8 + int.from_bytes(whole[:8], "little")
    if cut < begin:
        assert found.tensors == {}
        return
    assert problem.what == f"truncated: {len(whole) - cut} of {len(whole) - begin} bytes of tensors are missing"
    assert {name: header.shape for name, header in found.tensors.items()} == {
        name: tuple(tensor.shape) for name, tensor in sound_tensors().items()
    }


def test_truncated_file_names_a_tensor_that_is_cut_and_counts_the_others(tmp_path):
    header = {name: entry(offsets=(start, start + 4)) for name, start in (("c", 0), ("b", 4), ("a", 8))}
    assert problem_of(write(tmp_path, header, b"0" * 11)).where.endswith("model.safetensors, tensor a")
    assert problem_of(write(tmp_path, header, b"0" * 3)).where.endswith("model.safetensors, tensor a and 2 more")


def test_shortest_files_are_named(tmp_path):
    for size in range(9):
        file = tmp_path / f"{size}.safetensors"
        file.write_bytes(b"\0" * size)
        assert problem_of(file)


# Hostile headers.


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 2**31, LONGEST_HEADER + 1, 3])
def test_a_header_longer_than_the_file_allocates_nothing(tmp_path, length):
    file = write(tmp_path, b"{}", length=length)
    tracemalloc.start()
    try:
        problem = problem_of(file)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()
    assert "header" in problem.what


def test_a_header_as_long_as_a_huge_file_allocates_nothing(tmp_path):
    file = write(tmp_path, b"{}", length=LONGEST_HEADER + 1)
    os.truncate(file, 2**33)  # sparse: it takes no room
    tracemalloc.start()
    try:
        assert "header" in problem_of(file).what
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"no JSON",
        b"{",
        b'{"a": }',
        b"null",
        b"7",
        b'"text"',
        b'{"\xff": 1}',
        [entry()],
        [1, 2, 3],
        b"[" * 200_000,
        b'{"a":' * 200_000,
        b'{"a": {"dtype": "F32", "shape": [' + b"9" * 5000 + b'], "data_offsets": [0, 4]}}',
    ],
    ids=lambda header: repr(header)[:20],
)
def test_a_header_that_is_no_table_of_tensors_is_a_problem(tmp_path, header):
    file = write(tmp_path, header, b"0000")
    assert "header" in problem_of(file).what
    assert FORMAT.headers(file).tensors == {}


WRONG_ENTRIES = {
    "unknown dtype": entry(dtype="F13"),
    "dtype of no text": entry(dtype=["F32"]),
    "no dtype": {"shape": [1], "data_offsets": [0, 4]},
    "no shape": {"dtype": "F32", "data_offsets": [0, 4]},
    "no offsets": {"dtype": "F32", "shape": [1]},
    "negative size": entry(shape=[-1]),
    "negative sizes": entry(shape=[-1, -1]),
    "float size": entry(shape=[1.0]),
    "bool size": entry(shape=[True]),
    "null size": entry(shape=[None]),
    "text size": entry(shape=["1"]),
    "nested size": entry(shape=[[1]]),
    "shape of no list": entry(shape=1),
    "shape of text": entry(shape=""),
    "shape of a mapping": entry(shape={}),
    "negative offsets": entry(offsets=[-4, 0]),
    "float offsets": entry(offsets=[0.0, 4.0]),
    "bool offsets": entry(dtype="U8", offsets=[False, True]),
    "one offset": entry(offsets=[4]),
    "three offsets": entry(offsets=[0, 4, 8]),
    "offsets of no list": entry(offsets=4),
    "offsets of null": entry(offsets=None),
    "offsets backwards": entry(offsets=[4, 0]),
    "too many bytes": entry(offsets=[0, 8]),
    "too few bytes": entry(shape=[2]),
    "shape larger than memory": entry(shape=[2**40, 2**40]),
    "no mapping": [1],
    "null": None,
    "text": "F32",
}


@pytest.mark.parametrize("wrong", WRONG_ENTRIES.values(), ids=WRONG_ENTRIES.keys())
def test_a_tensor_declared_wrongly_is_named(tmp_path, wrong):
    file = write(tmp_path, {"sound": entry(offsets=[4, 8]), "layers.0.weight": wrong}, b"00000000")
    problem = problem_of(file)
    assert "layers.0.weight" in str(problem)
    assert "sound" not in problem.what


@pytest.mark.parametrize(
    ("offsets", "named"),
    [
        ({"a": (4, 8)}, "a"),
        ({"a": (0, 4), "b": (8, 12)}, "b"),
        ({"a": (0, 4), "b": (2, 6)}, "b"),
        ({"a": (0, 4), "b": (0, 4)}, "b"),
        ({"b": (0, 4), "a": (2, 6), "c": (6, 10)}, "a"),
    ],
    ids=["gap before", "gap", "overlap", "same place", "overlap in other order"],
)
def test_gaps_and_overlaps_name_the_tensor(tmp_path, offsets, named):
    header = {name: entry(offsets=place) for name, place in offsets.items()}
    problem = problem_of(write(tmp_path, header, b"0" * 12))
    assert problem.where.endswith(f"tensor {named}")
    assert FORMAT.headers(tmp_path / "model.safetensors").tensors.keys() == offsets.keys()


def test_an_empty_tensor_between_others_is_no_overlap_but_inside_one_it_is(tmp_path):
    header = {"a": entry(offsets=[0, 4]), "empty": entry(shape=[0], offsets=[4, 4]), "b": entry(offsets=[4, 8])}
    assert FORMAT.headers(write(tmp_path, header, b"0" * 8)).problems == ()
    header["empty"]["data_offsets"] = [2, 2]
    assert "empty" in problem_of(write(tmp_path, header, b"0" * 8)).where


def test_a_name_that_occurs_twice_is_named(tmp_path):
    text = b'{"twin": %s, "twin": %s}' % ((json.dumps(entry()).encode(),) * 2)
    assert "twin" in str(problem_of(write(tmp_path, text, b"0000")))


def test_trailing_bytes_are_counted(tmp_path):
    assert problem_of(write(tmp_path, {"a": entry()}, b"0" * 7)).what == "3 bytes too many"


UNREADABLE = {
    "metadata that is no text": ({"__metadata__": {"epoch": 3}, "a": entry()}, b"0000"),
    "metadata that is no mapping": ({"__metadata__": [], "a": entry()}, b"0000"),
    "more than an address": ({"a": entry(shape=[0, 2**70], offsets=[0, 0])}, b""),
    "entries beyond counting": ({"a": entry(shape=[2**40, 2**40, 0], offsets=[0, 0])}, b""),
    "dimension beyond torch": ({"a": entry(shape=[0, 2**63], offsets=[0, 0])}, b""),
    "UTF-16": (json.dumps({"a": entry()}).encode("utf-16"), b"0000"),
    "byte order mark": (json.dumps({"a": entry()}).encode("utf-8-sig"), b"0000"),
    "half a character": ({"\ud800": entry()}, b"0000"),
    "not a number": (b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], "more": NaN}}', b"0000"),
}


@pytest.mark.parametrize(("header", "data"), UNREADABLE.values(), ids=UNREADABLE.keys())
def test_what_the_library_cannot_read_is_not_called_sound(tmp_path, header, data):
    file = write(tmp_path, header, data)
    with pytest.raises((SafetensorError, TypeError)), safe_open(file, framework="pt") as opened:
        opened.get_tensor("a")
    assert problem_of(file)


@given(data=st.data())
@settings(deadline=None, max_examples=300)
def test_what_is_called_sound_can_be_read(tmp_path_factory, data):
    """Change a byte of a header: either it is a problem, or every tensor listed can be read as it is listed."""
    tensors = {"a": torch.ones(2, 3), "b.weight": torch.zeros(0), "c": torch.ones(4, dtype=torch.int8)}
    file = tmp_path_factory.mktemp("changed") / "model.safetensors"
    save_file(tensors, file, {"format": "pt"})
    content = bytearray(file.read_bytes())
    end = 8 + int.from_bytes(content[:8], "little")
    for _ in range(data.draw(st.integers(1, 2))):
        content[data.draw(st.integers(0, end - 1))] = data.draw(
            st.integers(0, 255) | st.sampled_from(b'0123456789",[{}')
        )
    file.write_bytes(content)
    found = FORMAT.headers(file)
    assert all(str(file) in problem.where for problem in found.problems)
    if not found.problems:
        reader = FORMAT.open(file)
        for name, header in found.tensors.items():
            tensor = reader.read(name)
            assert (tuple(tensor.shape), tensor.dtype) == (header.shape, TORCH_DTYPES[header.dtype])


# Reading.


def test_tensors_are_read_as_the_library_reads_them(sound):
    reader, expected = FORMAT.open(sound), load(sound.parent)
    for name, tensor in sound_tensors().items():
        found = reader.read(name)
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
        assert found.is_contiguous()
        assert torch.equal(as_bytes(found), as_bytes(tensor))
        assert torch.equal(as_bytes(found), as_bytes(expected[name]))


def test_two_reads_share_memory(sound):
    """A tensor that is read is the mapped file itself: whoever writes to it changes what all others read."""
    reader = FORMAT.open(sound)
    first, second = reader.read("layers.0.weight"), reader.read("layers.0.weight")
    assert first.data_ptr() == second.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_a_merge_of_tensors_leaves_its_inputs_untouched(tmp_path, method, dtype):
    """In the dtype of the arithmetic nothing is cast, so that a method could reach the file itself."""
    base = base_tensors(dtype=dtype)
    folders = [save(tmp_path / "base", base)]
    folders += [save(tmp_path / f"tuned {i}", tuned_tensors(base, i)) for i in (1, 2, 3)]
    most = {found.name: found.models[1] for found in list_methods()}[method]
    folders = folders[: most + 1 if most else None]
    readers = [FORMAT.open(folder / "model.safetensors") for folder in folders]
    read = [{name: reader.read(name) for name in base} for reader in readers]
    superpose.merge_tensors(read[0], read[1:], method)
    for tensors, folder in zip(read, folders, strict=True):
        assert all(torch.equal(tensors[name], tensor) for name, tensor in load(folder).items())


@pytest.mark.parametrize("method", METHODS)
def test_a_merge_of_files_leaves_its_inputs_untouched(tmp_path, method):
    base = base_tensors()
    folders = [save(tmp_path / "base", base)]
    folders += [save(tmp_path / f"tuned {i}", tuned_tensors(base, i), shards=i) for i in (1, 2)]
    files = [file for folder in folders for file in sorted(folder.iterdir())]
    before = {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in files}
    recipe = {"base": str(folders[0]), "models": [str(folder) for folder in folders[1:]], "method": method}
    superpose.merge(recipe, tmp_path / "out", backend="serial", measure=True)
    assert {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in files} == before
    assert [file for folder in folders for file in sorted(folder.iterdir())] == files
    assert (tmp_path / "out" / "model.safetensors").exists()
