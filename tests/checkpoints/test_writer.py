"""The layout of the output, and writing into it in any order: standard files come out, whoever wrote what first."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import resource
import subprocess
from pathlib import Path

import pytest
import torch
from families import generator
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from superpose.checkpoints.headers import TORCH_DTYPES
from superpose.checkpoints.safetensors import FORMAT
from superpose.checkpoints.writer import StreamWriter, lay_out
from superpose.errors import SuperposeError

LAYERS = [(f"layers.{number}.weight", "F32", (8,)) for number in range(12)]

shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)
# No half surrogates: they are no text. `__metadata__` is the format's own.
names = st.text(st.characters(exclude_categories=["Cs"]), max_size=8).filter(lambda name: name != "__metadata__")
tensor_names = st.from_regex(r"[a-c](\.[0-9]{1,3}){0,2}(\.[a-z])?", fullmatch=True) | names
declared = st.dictionaries(tensor_names, st.tuples(st.sampled_from(sorted(TORCH_DTYPES)), shapes), max_size=8).map(
    lambda tensors: [(name, dtype, shape) for name, (dtype, shape) in tensors.items()]
)


def values(tensors):
    """Return a tensor of random bits for each declaration."""
    made = {}
    for name, dtype, shape in tensors:
        small = torch.randint(0, 2, shape, generator=generator(name, dtype, shape))
        made[name] = small.to(TORCH_DTYPES[dtype])
    return made


def write_all(folder, tensors, shard_size):
    """Write all tensors in the order given; return them and the layout."""
    layout, made = lay_out(tensors, shard_size), values(tensors)
    writer = StreamWriter(folder, layout)
    for name, tensor in made.items():
        writer.write(name, 0, tensor)
    writer.sync()
    writer.close()
    return made, layout


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def assert_same(actual, expected):
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    assert torch.equal(actual.reshape(-1).view(torch.uint8), expected.reshape(-1).view(torch.uint8))


# What comes out.


@given(tensors=declared, shard_size=st.integers(1, 200), data=st.data())
@settings(deadline=None, max_examples=80)
def test_pieces_written_in_any_order_load_as_standard_files(tmp_path_factory, tensors, shard_size, data):
    folder = tmp_path_factory.mktemp("out")
    layout, made = lay_out(tensors, shard_size), values(tensors)
    pieces = []
    for name, tensor in made.items():
        size = data.draw(st.integers(1, max(1, tensor.numel())))
        start = 0
        for piece in tensor.reshape(-1).split(size) if tensor.numel() else ():
            pieces.append((name, start, piece))
            start += piece.nbytes
    writer = StreamWriter(folder, layout)
    for name, start, piece in data.draw(st.permutations(pieces)):
        assert len(writer.write(name, start, piece)) == piece.nbytes
    for name, tensor in made.items():
        content = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        assert writer.digest(name) == hashlib.sha256(content).hexdigest()
    writer.close()
    assert sorted(contents(folder)) == [file.name for file in layout.files]
    found = {}
    for file in layout.files:
        assert (folder / file.name).stat().st_size == file.size
        headers = FORMAT.headers(folder / file.name)
        assert headers.problems == ()
        tensors_of_file = load_file(folder / file.name)
        assert tensors_of_file.keys() == headers.tensors.keys()
        assert not tensors_of_file.keys() & found.keys()
        found |= tensors_of_file
    assert found.keys() == made.keys()
    for name, tensor in made.items():
        assert_same(found[name], tensor)


@given(tensors=declared, shard_size=st.integers(1, 200), data=st.data())
@settings(deadline=None, max_examples=100)
def test_layout_depends_on_no_order(tensors, shard_size, data):
    assert lay_out(data.draw(st.permutations(tensors)), shard_size) == lay_out(tensors, shard_size)


@given(tensors=declared, shard_size=st.integers(1, 200))
@settings(deadline=None, max_examples=100)
def test_layout_keeps_its_promises(tensors, shard_size):
    layout = lay_out(tensors, shard_size)
    sizes = {name: tensor.nbytes for name, tensor in values(tensors).items()}
    assert {name: slot.nbytes for name, slot in layout.slots.items()} == sizes
    assert layout.tensor_bytes == sum(sizes.values())
    assert layout.file_bytes == sum(file.size for file in layout.files)
    for name, dtype, _ in tensors:
        assert layout.slots[name].offset % TORCH_DTYPES[dtype].itemsize == 0
    for file in layout.files:
        inside = sorted((slot.offset, slot.nbytes) for slot in layout.slots.values() if slot.file == file.name)
        end = len(file.header)
        for offset, nbytes in inside:
            assert offset == end
            end += nbytes
        assert end == file.size
        large = [nbytes for _, nbytes in inside if nbytes > shard_size]
        assert end - len(file.header) <= shard_size or len(inside) == len(large) == 1


@pytest.mark.parametrize(
    "name", ["²", "layers.².weight", "x1", "layers.٣.weight", "1" * 5000], ids=lambda name: ascii(name)[:12]
)
def test_names_with_numbers_of_any_sort_have_a_place(tmp_path, name):
    made, layout = write_all(tmp_path, [(name, "F32", (2,))], 100)
    assert_same(load_file(tmp_path / layout.files[0].name)[name], made[name])


def test_names_that_differ_in_leading_zeros_have_one_order():
    tensors = [(f"layers.{number}.weight", "F32", (2,)) for number in ("1", "01", "001")]
    assert lay_out(tensors, 8) == lay_out(tensors[::-1], 8)


def test_a_model_without_tensors_is_a_sound_file(tmp_path):
    write_all(tmp_path, [], 100)
    assert load_file(tmp_path / "model.safetensors") == {}


def test_files_say_that_they_are_for_torch(tmp_path):
    write_all(tmp_path, LAYERS, 10**6)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}  # transformers refuses files without it


# Shards.


def test_layers_are_in_natural_order_over_the_shards():
    layout = lay_out(LAYERS, 4 * 32)
    assert [file.name for file in layout.files] == [
        "model-00001-of-00003.safetensors",
        "model-00002-of-00003.safetensors",
        "model-00003-of-00003.safetensors",
    ]
    for number in range(12):
        assert layout.slots[f"layers.{number}.weight"].file == layout.files[number // 4].name


def test_a_tensor_larger_than_a_shard_gets_a_file_of_its_own():
    tensors = [("a", "F32", (2,)), ("b", "F32", (100,)), ("c", "F32", (2,)), ("d", "F32", (2,))]
    layout = lay_out(tensors, 16)
    files = [layout.slots[name].file for name in "abcd"]
    assert len(layout.files) == 3
    assert len(set(files[:3])) == 3
    assert files[2] == files[3]


def test_a_shard_is_filled_to_the_last_byte():
    assert len(lay_out(LAYERS, 6 * 32).files) == 2
    assert len(lay_out(LAYERS, 6 * 32 - 1).files) == 3


@given(tensors=declared, shard_size=st.integers(1, 60))
@settings(deadline=None, max_examples=100)
def test_index_covers_all_tensors(tensors, shard_size):
    layout = lay_out(tensors, shard_size)
    if len(layout.files) == 1:
        assert layout.files[0].name == "model.safetensors"
        assert layout.index() is None
        return
    index = json.loads(layout.index())
    assert index["weight_map"] == {name: slot.file for name, slot in layout.slots.items()}
    assert index["metadata"] == {"total_size": layout.tensor_bytes}
    assert set(index["weight_map"].values()) == {file.name for file in layout.files}


# Writing.


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)], ids=oct)
def test_file_modes_follow_the_umask(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        write_all(tmp_path, LAYERS, 100)
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in tmp_path.iterdir()} == {mode}


def test_tensors_need_not_be_contiguous_nor_without_gradient(tmp_path):
    tensor = torch.arange(6.0).reshape(2, 3)
    layout = lay_out([("a", "F32", (3, 2)), ("b", "F32", (2, 3)), ("c", "F32", ())], 10**6)
    writer = StreamWriter(tmp_path, layout)
    writer.write("a", 0, tensor.T)
    writer.write("b", 0, torch.nn.Parameter(tensor))
    writer.write("c", 0, torch.tensor(3.5))
    writer.close()
    found = load_file(tmp_path / "model.safetensors")
    assert torch.equal(found["a"], tensor.T)
    assert torch.equal(found["b"], tensor)
    assert torch.equal(found["c"], torch.tensor(3.5))


def test_reopening_keeps_what_is_there(tmp_path):
    made, layout = write_all(tmp_path, LAYERS, 100)
    before = contents(tmp_path)
    writer = StreamWriter(tmp_path, layout)
    assert contents(tmp_path) == before
    for name, tensor in made.items():
        assert writer.digest(name) == hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
    writer.close()


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-1],
        lambda content: content + b"0",
        lambda content: b"",
        lambda content: content[:20] + b"?" + content[21:],
        lambda content: b"\xff" * len(content),
    ],
    ids=["too short", "too long", "empty", "another header", "no safetensors"],
)
def test_a_file_of_another_size_or_header_is_made_anew(tmp_path, damage):
    _, layout = write_all(tmp_path, LAYERS, 100)
    before = contents(tmp_path)
    broken = layout.files[1]
    (tmp_path / broken.name).write_bytes(damage(before[broken.name]))
    StreamWriter(tmp_path, layout).close()
    after = contents(tmp_path)
    assert after.pop(broken.name) == broken.header + bytes(broken.size - len(broken.header))
    del before[broken.name]
    assert after == before


@pytest.mark.parametrize("start", [4, 32, 2**40, -4])
def test_writing_beside_a_tensors_place_is_refused(tmp_path, start):
    made, layout = write_all(tmp_path, LAYERS, 10**6)
    before = contents(tmp_path)
    writer = StreamWriter(tmp_path, layout)
    with pytest.raises(AssertionError, match=r"layers\.3\.weight"):
        writer.write("layers.3.weight", start, made["layers.3.weight"])
    writer.close()
    assert contents(tmp_path) == before


def test_a_tensor_of_another_name_is_refused(tmp_path):
    writer = StreamWriter(tmp_path, lay_out(LAYERS, 10**6))
    with pytest.raises(KeyError):
        writer.write("layers.99.weight", 0, torch.zeros(8))
    writer.close()


# Full disks.


def open_files():
    return sorted(Path("/proc/self/fd").iterdir())


def assert_names_the_file(caught, file):
    assert "the disk is full" in caught.value.what
    assert file in caught.value.where
    assert "free some space" in caught.value.mend


def test_a_full_disk_is_said_before_anything_is_computed(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("only root can mount a small disk")
    try:
        layout = lay_out([("a", "F32", (2**14,)), ("b", "F32", (2**18,))], 2**16)
        before = open_files()
        with pytest.raises(SuperposeError) as caught:
            StreamWriter(disk, layout)
        assert_names_the_file(caught, "model-00002-of-00002.safetensors")
        assert open_files() == before
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_file_larger_than_allowed_is_named(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, hard))
    try:
        with pytest.raises(SuperposeError) as caught:
            StreamWriter(tmp_path, lay_out([("a", "F32", (2**18,))], 10**9))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "no file may become as large" in caught.value.what
    assert "model.safetensors" in caught.value.where
    assert "--shard-size" in caught.value.mend


def test_a_disk_that_fills_up_while_writing_is_named(tmp_path, monkeypatch):
    writer = StreamWriter(tmp_path, lay_out(LAYERS, 10**6))

    def no_room(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", no_room)
    with pytest.raises(SuperposeError) as caught:
        writer.write("layers.0.weight", 0, torch.zeros(8))
    assert_names_the_file(caught, "model.safetensors")
    writer.close()


def test_short_writes_are_gone_on_with(tmp_path, monkeypatch):
    layout = lay_out(LAYERS, 10**6)
    writer, pwrite = StreamWriter(tmp_path, layout), os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda descriptor, data, place: pwrite(descriptor, data[:5], place))
    writer.write("layers.0.weight", 0, torch.arange(8.0))
    writer.close()
    assert torch.equal(load_file(tmp_path / "model.safetensors")["layers.0.weight"], torch.arange(8.0))


def test_a_system_without_reservation_still_makes_files_of_full_size(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "posix_fallocate")
    made, layout = write_all(tmp_path, LAYERS, 100)
    for file in layout.files:
        assert (tmp_path / file.name).stat().st_size == file.size
        for name, tensor in load_file(tmp_path / file.name).items():
            assert torch.equal(tensor, made[name])
