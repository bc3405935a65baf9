"""Checkpoints as users name them: files, folders, shards, hub ids; everything that is wrong with one is named."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from families import base_tensors, save, superpose
from safetensors.torch import save_file

from superpose.checkpoints.files import LARGEST_JSON, formats
from superpose.checkpoints.folder import open_checkpoint
from superpose.checkpoints.stamps import stamp
from superpose.errors import SuperposeError

MAIN, OTHER = "0123456789abcdef0123456789abcdef01234567", "f" * 40
INDEX = "model.safetensors.index.json"


def write_shards(folder, shards, *, weight_map=None, index=INDEX):
    """Write files of tensors and an index: of all of them, or the one given."""
    folder.mkdir(exist_ok=True)
    for file, tensors in shards.items():
        if file.endswith(".safetensors"):
            save_file(tensors, folder / file, {"format": "pt"})
        else:
            torch.save(tensors, folder / file)
    if weight_map is None:
        weight_map = {name: file for file, tensors in shards.items() for name in tensors}
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def two_shards(folder, **options):
    return write_shards(
        folder, {"one.safetensors": {"a": torch.zeros(2)}, "two.safetensors": {"b": torch.ones(3)}}, **options
    )


def problem_of(folder):
    """Return the one problem of a checkpoint that can be opened all the same."""
    (problem,) = open_checkpoint(str(folder)).problems
    assert problem.where
    assert problem.mend
    return problem


def refusal(location):
    with pytest.raises(SuperposeError) as caught:
        open_checkpoint(str(location), where="base")
    assert caught.value.where
    assert caught.value.mend
    return caught.value


# What a user can name.


def test_formats_are_found_by_existing():
    assert {".safetensors", ".bin", ".pt", ".pth"} <= set(formats())


def test_a_weight_file_alone(tmp_path):
    folder = save(tmp_path / "model", base_tensors())
    (folder / "config.json").write_text('{"model_type": "llama"}')
    found = open_checkpoint(str(folder / "model.safetensors"))
    assert found.tensors.keys() == base_tensors().keys()
    assert (found.folder, found.revision, dict(found.config), found.problems) == (None, "", {}, ())
    assert found.files == [folder / "model.safetensors"]


def test_a_folder_with_one_file_and_a_config(tmp_path):
    folder = save(tmp_path / "model", base_tensors())
    (folder / "config.json").write_text('{"model_type": "llama"}')
    found = open_checkpoint(str(folder))
    assert found.name == str(folder)
    assert found.folder == folder
    assert found.config == {"model_type": "llama"}
    assert found.problems == ()
    assert found.tensors.keys() == base_tensors().keys()


@pytest.mark.parametrize("file", ["weights.safetensors", "weights.pt", "weights.pth", "other.bin"])
def test_the_only_weight_file_of_a_folder_may_have_any_name(tmp_path, file):
    tensors = {"a": torch.zeros(2)}
    save_file(tensors, tmp_path / file) if file.endswith(".safetensors") else torch.save(tensors, tmp_path / file)
    torch.save({"rate": 1.0}, tmp_path / "training_args.bin")  # what a trainer leaves there
    assert open_checkpoint(str(tmp_path)).files == [tmp_path / file]


@pytest.mark.parametrize(
    ("files", "index"),
    [
        (("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"), INDEX),
        (("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"), "pytorch_model.bin.index.json"),
    ],
    ids=["safetensors", "bin"],
)
def test_shards_with_an_index(tmp_path, files, index):
    shards = {files[0]: {"a": torch.zeros(2), "b": torch.zeros(3, 4)}, files[1]: {"c": torch.zeros(5)}}
    found = open_checkpoint(str(write_shards(tmp_path, shards, index=index)))
    assert found.problems == ()
    assert {name: (header.file.name, header.shape) for name, header in found.tensors.items()} == {
        "a": (files[0], (2,)),
        "b": (files[0], (3, 4)),
        "c": (files[1], (5,)),
    }
    assert found.files == [tmp_path / file for file in files]


def test_tied_weights_of_a_torch_file_are_aliases(tmp_path):
    shared = torch.zeros(4, 2)
    torch.save({"embed.weight": shared, "lm_head.weight": shared}, tmp_path / "pytorch_model.bin")
    found = open_checkpoint(str(tmp_path))
    assert list(found.tensors) == ["embed.weight"]
    assert found.aliases == {"lm_head.weight": "embed.weight"}


@pytest.mark.parametrize("index", [None, "pytorch_model.bin.index.json"], ids=["one file", "shards"])
def test_safetensors_are_preferred_to_pickles(tmp_path, index):
    """A converted repository often holds both; of the pickles a download brings the index alone."""
    save_file({"a": torch.zeros(2)}, tmp_path / "model.safetensors")
    if index is None:
        torch.save({"a": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    else:
        write_shards(tmp_path, {}, weight_map={"a": "pytorch_model-00001-of-00001.bin"}, index=index)
    found = open_checkpoint(str(tmp_path))
    assert found.problems == ()
    assert found.files == [tmp_path / "model.safetensors"]


def test_paths_may_begin_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    save(tmp_path / "model", {"a": torch.zeros(2)})
    assert list(open_checkpoint("~/model").tensors) == ["a"]


def test_a_local_folder_goes_before_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org").mkdir()
    save(tmp_path / "org" / "name", {"a": torch.zeros(2)})
    assert open_checkpoint("org/name").folder == Path("org/name")


# Nothing there.


def test_a_path_that_does_not_exist_names_the_nearest(tmp_path):
    for name in ("finetune-math", "base", "recipe.yaml"):
        (tmp_path / name).mkdir()
    problem = refusal(tmp_path / "finetune-maths")
    assert problem.what == f"'{tmp_path / 'finetune-maths'}' does not exist"
    assert problem.where == "base"
    assert "nearest match is 'finetune-math'" in problem.mend


def test_a_relative_path_that_looks_like_a_hub_id_names_the_nearest_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "tuned").mkdir(parents=True)
    assert "tuned" in refusal("models/tunde").mend


def test_a_crowded_folder_is_not_listed_whole(tmp_path):
    for number in range(500):
        (tmp_path / f"checkpoint-{number}").touch()
    problem = refusal(tmp_path / "chekpoint-250")
    assert "checkpoint-250" in problem.mend
    assert len(problem.mend) < 1000


def test_a_path_in_a_folder_that_does_not_exist(tmp_path):
    assert "does not exist" in refusal(tmp_path / "no" / "such" / "model").what


@pytest.mark.parametrize("location", ["x" * 5000, "a\0b"], ids=["too long", "null byte"])
def test_what_can_be_no_name_is_refused(location):
    assert refusal(location)


def test_a_folder_without_weights_says_what_was_looked_for(tmp_path):
    (tmp_path / "README.md").write_text("weights follow")
    problem = refusal(tmp_path)
    assert "model.safetensors" in problem.what
    assert "pytorch_model.bin" in problem.what
    assert problem.where == str(tmp_path)


def test_a_folder_with_several_files_and_no_index_lists_them(tmp_path):
    for name in ("unet.safetensors", "vae.safetensors"):
        save_file({"a": torch.zeros(2)}, tmp_path / name)
    assert "unet.safetensors, vae.safetensors" in refusal(tmp_path).mend


def test_an_adapter_folder_is_named_as_such(tmp_path):
    save_file({"base_model.model.q_proj.lora_A.weight": torch.zeros(2, 4)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2}')
    assert "adapter" in refusal(tmp_path).mend


def test_a_file_of_another_format_is_named(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    problem = problem_of(tmp_path / "model.gguf")
    assert "'.gguf' is no format of weights" in problem.what
    assert ".safetensors" in problem.mend


# Indexes.


@pytest.mark.parametrize(
    "place",
    [
        "../outside.safetensors",
        "{outside}",
        "shards/one.safetensors",
        "./one.safetensors",
        "..",
        ".",
        ".hidden.safetensors",
        "",
        "..\\outside.safetensors",
        "one.safetensors\n",
        "one.safetensors\0",
        7,
        None,
        ["one.safetensors"],
    ],
    ids=ascii,
)
def test_an_index_that_leads_out_of_its_folder_is_refused(tmp_path, place):
    save_file({"b": torch.full((3,), 7.0)}, tmp_path / "outside.safetensors")
    folder = tmp_path / "model"
    (folder / "shards").mkdir(parents=True)
    shutil.copy(tmp_path / "outside.safetensors", folder / "shards" / "one.safetensors")
    place = place.format(outside=tmp_path / "outside.safetensors") if isinstance(place, str) else place
    two_shards(folder, weight_map={"a": "one.safetensors", "b": place})
    found = open_checkpoint(str(folder))
    (problem,) = found.problems
    assert "tensor b" in problem.what
    assert str(folder / INDEX) in problem.where
    assert set(found.tensors) == {"a"}
    assert found.files == [folder / "one.safetensors"]


def test_shards_may_be_links_as_in_the_hubs_cache(tmp_path):
    blobs, folder = tmp_path / "blobs", tmp_path / "snapshot"
    two_shards(folder)
    blobs.mkdir()
    for name in ("one.safetensors", "two.safetensors", INDEX):
        (folder / name).rename(blobs / f"digest-of-{name}")
        (folder / name).symlink_to(f"../blobs/digest-of-{name}")
    found = open_checkpoint(str(folder))
    assert found.problems == ()
    assert set(found.tensors) == {"a", "b"}
    assert all(header.file.parent == folder for header in found.tensors.values())


def test_a_link_that_leads_nowhere_is_a_missing_shard(tmp_path):
    two_shards(tmp_path)
    (tmp_path / "two.safetensors").unlink()
    (tmp_path / "two.safetensors").symlink_to("nowhere")
    assert "two.safetensors is missing" in problem_of(tmp_path).what


def test_a_missing_shard_names_its_tensors(tmp_path):
    shards = {"one.safetensors": {"a": torch.zeros(2)}, "two.safetensors": {"b": torch.zeros(2), "c": torch.zeros(2)}}
    write_shards(tmp_path, shards)
    (tmp_path / "two.safetensors").unlink()
    problem = problem_of(tmp_path)
    assert problem.what == "shard two.safetensors is missing"
    assert problem.where == f"{tmp_path / INDEX}, tensor b and 1 more"
    assert set(open_checkpoint(str(tmp_path)).tensors) == {"a"}


def test_all_missing_shards_are_named(tmp_path):
    two_shards(tmp_path)
    for name in ("one.safetensors", "two.safetensors"):
        (tmp_path / name).unlink()
    assert len(open_checkpoint(str(tmp_path)).problems) == 2


def test_a_tensor_that_the_index_promises_and_no_shard_has_is_named(tmp_path):
    two_shards(tmp_path, weight_map={"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"})
    problem = problem_of(tmp_path)
    assert "promises tensor c" in problem.what
    assert problem.where == str(tmp_path / "two.safetensors")


def test_a_tensor_in_two_files_names_both(tmp_path):
    shards = {"one.safetensors": {"a": torch.zeros(2)}, "two.safetensors": {"a": torch.ones(2), "b": torch.ones(3)}}
    write_shards(tmp_path, shards, weight_map={"a": "one.safetensors", "b": "two.safetensors"})
    problem = problem_of(tmp_path)
    assert problem.what == "tensor a is in two files"
    assert str(tmp_path / "one.safetensors") in problem.where
    assert str(tmp_path / "two.safetensors") in problem.where


def test_shards_of_a_strange_format_are_named(tmp_path):
    two_shards(tmp_path, weight_map={"a": "one.safetensors", "b": "config.json"})
    (tmp_path / "config.json").write_text("{}")
    assert "'.json' is no format of weights" in problem_of(tmp_path).what


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no JSON",
        b"\xff\xfe",
        b"[]",
        b"null",
        b"{}",
        b'{"weight_map": {}}',
        b'{"weight_map": ["one.safetensors"]}',
        b'{"weight_map": null}',
        b"[" * 200_000,
    ],
    ids=lambda content: repr(content)[:30],
)
def test_a_broken_index_is_named(tmp_path, content):
    two_shards(tmp_path)
    (tmp_path / INDEX).write_bytes(content)
    assert str(tmp_path / INDEX) in refusal(tmp_path).where


def test_an_index_larger_than_any_index_is_not_read(tmp_path):
    two_shards(tmp_path)
    os.truncate(tmp_path / INDEX, LARGEST_JSON + 1)
    assert "larger than" in refusal(tmp_path).what


# Other files.


@pytest.mark.parametrize(
    "content",
    [b"", b"{'model_type': 'llama'}", b"\xff", b'{"a": 1', b"[" * 200_000, b"[]", b"null", b'"llama"'],
    ids=lambda content: repr(content)[:30],
)
def test_a_broken_config_is_named(tmp_path, content):
    folder = save(tmp_path / "model", base_tensors())
    (folder / "config.json").write_bytes(content)
    assert problem_of(folder).where == str(folder / "config.json")
    assert open_checkpoint(str(folder)).tensors.keys() == base_tensors().keys()


def test_a_broken_file_is_named_and_the_others_are_listed(tmp_path):
    two_shards(tmp_path)
    content = (tmp_path / "two.safetensors").read_bytes()
    (tmp_path / "two.safetensors").write_bytes(content[:20])
    assert problem_of(tmp_path).where == str(tmp_path / "two.safetensors")
    assert set(open_checkpoint(str(tmp_path)).tensors) == {"a"}


def test_an_unreadable_file_is_named(tmp_path):
    folder = save(tmp_path / "model", {"a": torch.zeros(2)})
    (folder / "model.safetensors").chmod(0)
    if os.access(folder / "model.safetensors", os.R_OK):
        pytest.skip("root reads every file")
    assert problem_of(folder).what == f"cannot be read: {os.strerror(13)}"


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_folder_in_place_of_a_file_is_named(tmp_path, name):
    (tmp_path / name).mkdir()
    problem = problem_of(tmp_path)
    assert "cannot be read" in problem.what
    assert str(tmp_path / name) in problem.where


# The hub's cache, without the hub.


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache as huggingface_hub keeps it: two commits of one repository; main, a branch and a pull request."""
    from huggingface_hub import constants

    root = tmp_path / "hub"
    repository = root / "models--org--tiny"
    for commit, value, references in ((MAIN, 1.0, ["main"]), (OTHER, 2.0, ["dev", "refs/pr/1"])):
        (repository / "blobs").mkdir(parents=True, exist_ok=True)
        save_file({"a": torch.full((2,), value)}, repository / "blobs" / commit, {"format": "pt"})
        snapshot = repository / "snapshots" / commit
        snapshot.mkdir(parents=True)
        (snapshot / "model.safetensors").symlink_to(f"../../blobs/{commit}")
        (snapshot / "config.json").write_text(json.dumps({"commit": commit}))
        for reference in references:
            (repository / "refs" / reference).parent.mkdir(parents=True, exist_ok=True)
            (repository / "refs" / reference).write_text(commit)
    # Both are read when huggingface_hub is imported.
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(root))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return root


@pytest.mark.parametrize(
    ("location", "commit"),
    [
        ("org/tiny", MAIN),
        ("org/tiny@main", MAIN),
        ("org/tiny@dev", OTHER),
        ("org/tiny@refs/pr/1", OTHER),
        (f"org/tiny@{MAIN}", MAIN),
        (f"org/tiny@{OTHER}", OTHER),
    ],
)
def test_a_hub_id_is_found_in_the_cache(cache, location, commit):
    found = open_checkpoint(location)
    assert found.name == location
    assert found.revision == commit
    assert found.folder == cache / "models--org--tiny" / "snapshots" / commit
    assert found.config == {"commit": commit}
    assert set(found.tensors) == {"a"}
    assert found.problems == ()


@pytest.mark.parametrize(
    "location",
    ["org/tiny@nosuch", f"org/tiny@{'a' * 40}", f"org/tiny@{MAIN[:7]}", "org/none", "org/none@main", "org/..", "-o/-n"],
)
def test_what_the_cache_does_not_have_is_named(cache, location):
    problem = refusal(location)
    assert location in problem.where
    assert "not to be had from the hub" in problem.what
    assert "revision" in problem.mend
    assert "\n" not in problem.what


def test_a_repository_of_pickles_is_found_too(cache):
    snapshot = cache / "models--org--tiny" / "snapshots" / MAIN
    (snapshot / "model.safetensors").unlink()
    torch.save({"b": torch.zeros(2)}, snapshot / "pytorch_model.bin")
    assert set(open_checkpoint("org/tiny").tensors) == {"b"}


def test_the_command_line_reads_the_cache_that_the_environment_names(cache):
    done = superpose("inspect", "org/tiny@dev", "--json", HF_HOME=str(cache.parent), HF_HUB_CACHE=str(cache))
    content = json.loads(done.stdout)
    assert content["revision"] == OTHER
    assert [tensor["name"] for tensor in content["tensors"]] == ["a"]


# Fingerprints.


def change_first_byte(file):
    content = bytearray(file.read_bytes())
    content[0] ^= 1
    status = file.stat()
    file.write_bytes(content)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize(
    "change",
    [
        lambda file: file.write_bytes(file.read_bytes() + b"0"),
        lambda file: os.utime(file, ns=(0, file.stat().st_mtime_ns + 1)),
        lambda file: os.utime(file, ns=(0, 0)),
        change_first_byte,
    ],
    ids=["longer", "a nanosecond later", "older", "other bytes at the same time"],
)
def test_a_stamp_changes_when_the_file_does(tmp_path, change):
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"0" * 1000)
    before = stamp(file).text
    assert stamp(file).text == before
    change(file)
    assert stamp(file).text != before


def test_a_stamp_tells_files_apart_and_sees_through_links(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(b"0")
        os.utime(tmp_path / name, ns=(0, 0))
    (tmp_path / "link").symlink_to("a")
    assert stamp(tmp_path / "a").text != stamp(tmp_path / "b").text
    assert stamp(tmp_path / "a").text == stamp(tmp_path / "link").text
