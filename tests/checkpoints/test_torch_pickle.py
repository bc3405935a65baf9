"""Files of torch.save: tensors and their aliases are found, nothing in them is executed, damage is named."""

from __future__ import annotations

import argparse
import os
import zipfile
from pathlib import Path

import pytest
import torch
from families import generator
from hypothesis import given, settings
from hypothesis import strategies as st

from superpose.checkpoints.headers import TORCH_DTYPES
from superpose.checkpoints.torch_pickle import FORMAT

MATRIX = torch.randn(2, 3, generator=generator("matrix"))


class RunsCommand:
    """An object whose pickle runs a command when it is loaded."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple:
        return os.system, (self.command,)


def saved(folder, content, **options):
    file = folder / "pytorch_model.bin"
    torch.save(content, file, **options)
    return file


def problem_of(file):
    """Return the one problem of a file of which nothing is listed; it must name the file."""
    found = FORMAT.headers(file)
    assert found.tensors == {}
    (problem,) = found.problems
    assert str(file) in problem.where
    assert problem.mend
    assert "\n" not in problem.what
    return problem


def with_pickle(folder, pickled):
    """Return a file of torch.save whose pickle is replaced by other bytes."""
    sound, file = saved(folder, {"a": MATRIX}), folder / "damaged.bin"
    with zipfile.ZipFile(sound) as source, zipfile.ZipFile(file, "w") as target:
        for entry in source.infolist():
            is_pickle = entry.filename.endswith("data.pkl")
            target.writestr(entry.filename, pickled if is_pickle else source.read(entry))
    return file


# What is in a file.


def test_a_state_dict_is_listed_and_read(tmp_path):
    tensors = {
        "layers.0.weight": MATRIX,
        "scalar": torch.tensor(2.0),
        "empty": torch.zeros(0, 3),
        "Gewicht ü": MATRIX + 1,
    }
    file = saved(tmp_path, tensors)
    found = FORMAT.headers(file)
    assert found.problems == ()
    assert found.aliases == {}
    assert {name: (header.dtype, header.shape, header.file) for name, header in found.tensors.items()} == {
        name: ("F32", tuple(tensor.shape), file) for name, tensor in tensors.items()
    }
    reader = FORMAT.open(file)
    assert all(torch.equal(reader.read(name), tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth"])
def test_every_suffix_of_torch_is_known(suffix):
    assert suffix in FORMAT.suffixes


@pytest.mark.parametrize("dtype", TORCH_DTYPES, ids=str)
def test_dtypes_have_their_names(tmp_path, dtype):
    tensor = torch.randint(0, 2, (3, 2), generator=generator(dtype)).to(TORCH_DTYPES[dtype])
    file = saved(tmp_path, {"a": tensor})
    header = FORMAT.headers(file).tensors["a"]
    assert header.dtype == dtype
    assert header.nbytes == tensor.nbytes
    found = FORMAT.open(file).read("a")
    assert found.dtype == tensor.dtype
    assert torch.equal(found.view(torch.uint8), tensor.view(torch.uint8))


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model"])
def test_a_state_dict_inside_a_training_checkpoint_is_found(tmp_path, key):
    file = saved(tmp_path, {key: {"a": MATRIX}, "epoch": 3, "loss": torch.tensor(0.5)})
    found = FORMAT.headers(file)
    assert list(found.tensors) == ["a"]
    assert found.problems == ()
    assert torch.equal(FORMAT.open(file).read("a"), MATRIX)


def test_parameters_are_read_as_tensors(tmp_path):
    found = FORMAT.open(saved(tmp_path, {"a": torch.nn.Parameter(MATRIX)})).read("a")
    assert not found.requires_grad
    assert torch.equal(found, MATRIX)


def test_tensors_that_are_not_contiguous_are_read_in_order(tmp_path):
    tensors = {"turned": MATRIX.T, "stepped": torch.arange(10.0)[::3], "repeated": torch.ones(1).expand(2, 4)}
    file = saved(tmp_path, tensors)
    reader = FORMAT.open(file)
    for name, tensor in tensors.items():
        assert FORMAT.headers(file).tensors[name].shape == tuple(tensor.shape)
        assert reader.read(name).is_contiguous()
        assert torch.equal(reader.read(name), tensor)


# Aliases.


def test_names_of_the_same_memory_are_aliases(tmp_path):
    content = {"embed.weight": MATRIX, "lm_head.weight": MATRIX, "third": MATRIX.reshape(2, 3)}
    found = FORMAT.headers(saved(tmp_path, content))
    assert list(found.tensors) == ["embed.weight"]
    assert found.aliases == {"lm_head.weight": "embed.weight", "third": "embed.weight"}


def test_views_of_the_same_memory_that_differ_are_no_aliases(tmp_path):
    block = torch.arange(12.0).reshape(4, 3)
    content = {"all": block, "turned": block.T, "top": block[:2], "bottom": block[2:], "flat": block.reshape(-1)}
    file = saved(tmp_path, content)
    found = FORMAT.headers(file)
    assert found.tensors.keys() == content.keys()
    assert found.aliases == {}
    reader = FORMAT.open(file)
    assert all(torch.equal(reader.read(name), tensor) for name, tensor in content.items())


def test_empty_tensors_are_no_aliases_of_each_other(tmp_path):
    found = FORMAT.headers(saved(tmp_path, {"a": torch.zeros(0), "b": torch.zeros(0), "c": torch.zeros(0, 2)}))
    assert found.tensors.keys() == {"a", "b", "c"}
    assert found.aliases == {}


# What cannot be merged.


@pytest.mark.parametrize("dtype", [torch.complex128, torch.float8_e4m3fnuz, torch.float8_e8m0fnu], ids=str)
def test_dtypes_that_safetensors_lacks_are_named_and_the_others_listed(tmp_path, dtype):
    file = saved(tmp_path, {"strange": torch.zeros(2, dtype=dtype), "a": MATRIX})
    found = FORMAT.headers(file)
    assert list(found.tensors) == ["a"]
    (problem,) = found.problems
    assert "tensor strange" in problem.what
    assert str(dtype) in problem.what
    assert str(file) in problem.where


@pytest.mark.parametrize(
    "make",
    [lambda: MATRIX.to_sparse(), lambda: torch.empty(2, 3, device="meta")],
    ids=["sparse", "without data"],
)
def test_tensors_that_are_no_plain_memory_are_named_and_the_others_listed(tmp_path, make):
    file = saved(tmp_path, {"strange": make(), "a": MATRIX})
    found = FORMAT.headers(file)
    assert list(found.tensors) == ["a"]
    (problem,) = found.problems
    assert "strange" in problem.what
    assert str(file) in problem.where


def test_a_name_that_safetensors_keeps_for_itself_is_named(tmp_path):
    (problem,) = FORMAT.headers(saved(tmp_path, {"__metadata__": MATRIX, "a": MATRIX + 1})).problems
    assert "__metadata__" in problem.what


@pytest.mark.parametrize(
    "content",
    [MATRIX, [MATRIX], {}, {"net": {"a": MATRIX}}, {"state_dict": {"epoch": 3}}, None],
    ids=["one tensor", "list", "empty", "unknown key", "no tensors inside", "nothing"],
)
def test_a_file_without_a_state_dict_is_a_problem(tmp_path, content):
    assert "tensors" in problem_of(saved(tmp_path, content)).what


# What is never executed.


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old format"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_pickle_that_runs_a_command_is_refused_and_does_not_run(tmp_path, zipped):
    marker = tmp_path / "marker"
    content = {"a": MATRIX, "extra": RunsCommand(f"touch '{marker}'")}
    problem = problem_of(saved(tmp_path, content, _use_new_zipfile_serialization=zipped))
    assert not marker.exists()
    assert not zipped or f"{os.system.__module__}.system" in problem.what
    assert "weights_only" not in str(problem)  # torch's own text advises to switch the protection off


def test_the_command_would_have_run(tmp_path):
    """The two tests around this one would pass for a file that does nothing."""
    marker = tmp_path / "marker"
    file = saved(tmp_path, {"extra": RunsCommand(f"touch '{marker}'")})
    torch.load(file, weights_only=False)
    assert marker.exists()


def test_opening_executes_nothing_either(tmp_path):
    marker = tmp_path / "marker"
    file = saved(tmp_path, {"a": MATRIX, "extra": RunsCommand(f"touch '{marker}'")})
    with pytest.raises(Exception, match="refused"):
        FORMAT.open(file)
    assert not marker.exists()


def test_objects_that_are_no_tensors_are_refused_by_name(tmp_path):
    content = {"a": MATRIX, "args": argparse.Namespace(rate=1e-4), "path": Path("data")}
    problem = problem_of(saved(tmp_path, content))
    assert "argparse.Namespace" in problem.what
    assert "pathlib" in problem.what
    assert "safetensors" in problem.mend


# Damage.


@given(share=st.floats(0, 1, exclude_max=True))
@settings(deadline=None, max_examples=60)
def test_a_file_cut_at_any_byte_is_named(tmp_path_factory, share):
    folder = tmp_path_factory.mktemp("cut")
    file = saved(folder, {"a": MATRIX, "b": torch.zeros(100)})
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    assert "cannot be read" in problem_of(file).what


def test_the_format_before_pytorch_1_6_is_named_with_a_mend(tmp_path):
    problem = problem_of(saved(tmp_path, {"a": MATRIX}, _use_new_zipfile_serialization=False))
    assert "saved anew" in problem.mend


PICKLES = {
    "nothing": b"",
    "empty stack": b".",
    "no such instruction": b"\x80\x02\xfe.",
    "cut number": b"\x80\x02X\x05",
    "cut text": b"\x80\x02X\xff\xff\xff\x7fab.",
    "no text": b"\x80\x02X\x01\x00\x00\x00\xff.",
    "nothing remembered": b"\x80\x02h\x05.",
    "list as a key": b"\x80\x02}]Ns.",
    "append to none": b"\x80\x02NNa.",
    "call of none": b"\x80\x02NNR.",
    "storage of no form": b"\x80\x02NQ.",
    "tensor of nothing": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.",
    "mapping of a number": b"\x80\x02ccollections\nOrderedDict\nK\x01\x85R.",
}


@pytest.mark.parametrize("pickled", PICKLES.values(), ids=PICKLES.keys())
def test_a_damaged_pickle_is_named(tmp_path, pickled):
    problem = problem_of(with_pickle(tmp_path, pickled))
    assert "weights_only" not in str(problem)


@given(data=st.data())
@settings(deadline=None, max_examples=60)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_changed_pickle_never_ends_in_a_traceback(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("changed")
    with zipfile.ZipFile(saved(folder, {"a": MATRIX, "b": torch.zeros(4, dtype=torch.bfloat16)})) as sound:
        pickled = bytearray(sound.read("pytorch_model/data.pkl"))
    pickled[data.draw(st.integers(0, len(pickled) - 1))] = data.draw(st.integers(0, 255))
    file = with_pickle(folder, bytes(pickled))
    found = FORMAT.headers(file)
    assert all(str(file) in problem.where for problem in found.problems)
    assert found.problems or found.tensors
    if not found.problems:
        reader = FORMAT.open(file)
        for name, header in found.tensors.items():
            assert tuple(reader.read(name).shape) == header.shape


@pytest.mark.parametrize("content", [b"", b"PK", b"PK\x03\x04", b"no zip at all", bytes(1000)], ids=ascii)
def test_files_of_another_sort_are_named(tmp_path, content):
    file = tmp_path / "pytorch_model.bin"
    file.write_bytes(content)
    assert "cannot be read" in problem_of(file).what


def test_a_zip_of_something_else_is_named(tmp_path):
    file = tmp_path / "pytorch_model.bin"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("holiday.jpg", b"0")
    assert "cannot be read" in problem_of(file).what
