"""`superpose verify`: what is whole is called sound, and every kind of damage is named."""

import json
import shutil

import pytest
from families import load, make_family, save, superpose, tuned_tensors
from safetensors.torch import save_file

import superpose as library
from superpose import SuperposeError

FORMS = {
    "stf": {"method": "stf"},
    "ties over the model": {"method": "ties", "options": {"density_scope": "model"}},
    "shards": {"method": "average", "output": {"shard_size": 4000}},
    "random numbers": {"method": "dare", "seed": 7},
    "a set": {"method": "emr"},
    "adapter": {"method": "task_arithmetic", "output": {"form": "adapter", "rank": 3}},
    "adapter by energy": {"method": "task_arithmetic", "output": {"form": "adapter", "energy": 0.9}},
    "both": {"method": "task_arithmetic", "output": {"form": "both", "energy": 0.9, "per_layer_rank": True}},
    "rules": {"method": "stf", "rules": [{"kind": "norm", "keep": "base"}, {"match": "*mlp*", "method": "average"}]},
}


def recipe(folders, **more):
    return {"base": str(folders[0]), "models": [str(folder) for folder in folders[1:]], **more}


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.replace(" ", "_"))
def test_every_form_of_output_is_sound_and_comes_out_again(tmp_path, form):
    folders = make_family(tmp_path)
    record = library.merge(recipe(folders, **FORMS[form]), tmp_path / "out", backend="serial")
    found = library.verify(tmp_path / "out", recompute=100)
    assert found.problems == ()
    assert found.is_sound
    assert found.recomputed == tuple(sorted(tensor.name for tensor in record.tensors))
    files = [file for file in (tmp_path / "out").rglob("*") if file.is_file()]
    assert found.tensors == sum(len(load_all(file)) for file in files if file.suffix == ".safetensors")
    assert found.inputs == 4
    beside = [file for file in files if file.suffix != ".safetensors" and file.name != "run.json"]
    assert found.files >= len(beside) > 0


def load_all(file):
    from safetensors.torch import load_file

    return load_file(file)


@pytest.fixture
def merged(tmp_path):
    folders = make_family(tmp_path)
    library.merge(recipe(folders, method="stf", output={"shard_size": 4000}), tmp_path / "out")
    return folders, tmp_path / "out"


def only_problem(out, **options):
    (problem,) = library.verify(out, **options).problems
    return problem


@pytest.mark.parametrize("place", [0, 1000, -1])
def test_a_flipped_bit_names_the_tensor(merged, place):
    _, out = merged
    file = sorted(out.glob("*.safetensors"))[0]
    content = bytearray(file.read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    content[header + place if place >= 0 else place] ^= 4
    file.write_bytes(content)
    problem = only_problem(out)
    assert "bytes are not those" in problem.what
    assert str(file) in problem.where


def test_a_truncated_a_missing_and_a_strange_shard_are_named(merged):
    _, out = merged
    first, second, *_ = sorted(out.glob("*.safetensors"))
    first.write_bytes(first.read_bytes()[:-1])
    assert any("truncated" in problem.what for problem in library.verify(out).problems)
    second.unlink()
    assert any("is missing" in problem.what for problem in library.verify(out).problems)


def test_a_stale_shard_is_named(merged):
    folders, out = merged
    shutil.copy(folders[1] / "model.safetensors", out / "model-00009-of-00009.safetensors")
    assert "did not write" in only_problem(out).what


def test_files_beside_the_weights_are_checked(merged):
    _, out = merged
    (out / "README.md").write_text("another card")
    assert "README.md" in only_problem(out).where
    (out / "README.md").unlink()
    assert "missing" in only_problem(out).what


def test_a_tensor_too_many_and_one_too_few(merged):
    _, out = merged
    file = sorted(out.glob("*.safetensors"))[0]
    tensors = load_all(file)
    name = sorted(tensors)[0]
    tensors["stranger"] = tensors.pop(name)
    save_file(tensors, file)
    said = {problem.what for problem in library.verify(out).problems}
    assert "a tensor that the record does not have" in said
    assert "a tensor is missing" in said


def test_changed_and_vanished_inputs_are_told_apart(merged):
    folders, out = merged
    save_file({name: tensor + 1 for name, tensor in load(folders[2]).items()}, folders[2] / "model.safetensors")
    problem = only_problem(out)
    assert "input has changed" in problem.what
    assert str(folders[2]) in problem.where
    said = [problem.what for problem in library.verify(out, recompute=100).problems]
    assert sum("other bytes" in what for what in said) > 5
    shutil.rmtree(folders[2])
    found = library.verify(out)
    assert found.is_sound
    assert found.inputs == 3
    assert any("not there any more" in note for note in found.notes)
    assert "nothing could be recomputed" in only_problem(out, recompute=1).what


def test_full_checksums_see_what_a_sample_does_not(tmp_path):
    base = {"a.weight": tuned_tensors({"a.weight": load_big()}, 0)["a.weight"]}
    folders = [save(tmp_path / "base", base), save(tmp_path / "tuned", tuned_tensors(base, 1))]
    file = folders[1] / "model.safetensors"
    for checksums in ("sample", "full"):
        library.merge(recipe(folders, method="average"), tmp_path / checksums, checksums=checksums)
    content = bytearray(file.read_bytes())
    content[(1 << 20) + 100] ^= 1  # between the first MiB and the first block of the sample
    file.write_bytes(content)
    assert library.verify(tmp_path / "sample").is_sound
    assert "input has changed" in only_problem(tmp_path / "full").what
    assert not library.verify(tmp_path / "sample", recompute=1).is_sound
    with pytest.raises(SuperposeError, match="mark the inputs"):
        library.merge(recipe(folders, method="average"), tmp_path / "x", checksums="some")


def load_big():
    import torch

    return torch.zeros(1024, 1024)


def test_what_was_rebuilt_from_a_set_is_checked_too(tmp_path):
    folders = make_family(tmp_path)
    library.merge(recipe(folders, method="emr"), tmp_path / "set")
    library.rebuild(tmp_path / "set", "ft1", tmp_path / "out")
    found = library.verify(tmp_path / "out", recompute=3)
    assert found.is_sound
    assert found.recomputed == ()
    assert any("superpose rebuild" in note for note in found.notes)
    (file,) = (tmp_path / "out").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1] + b"\xff")
    assert not library.verify(tmp_path / "out").is_sound


def test_on_the_command_line(merged):
    _, out = merged
    done = superpose("verify", out, "--recompute", 3)
    assert "sound" in done.stdout
    assert "3 tensors recomputed" in done.stdout
    (out / "README.md").unlink()
    broken = superpose("verify", out, "--json", check=False)
    assert broken.returncode == 2
    told = json.loads(broken.stdout)
    assert not told["sound"]
    assert told["problems"][0]["what"] == "a file is missing"


@pytest.mark.parametrize("content", [None, "", "{", "[]", '{"tensors": []}', "[" * 100_000, '{"tensors": 3}'])
def test_what_is_no_output_is_said(tmp_path, content):
    (tmp_path / "out").mkdir()
    if content is not None:
        (tmp_path / "out" / "run.json").write_text(content)
    with pytest.raises(SuperposeError, match=r"no finished merge|record cannot be read"):
        library.verify(tmp_path / "out")


def test_a_record_leads_to_no_file_outside_its_folder(merged, tmp_path):
    _, out = merged
    (tmp_path / "secret").write_text("secret")
    told = json.loads((out / "run.json").read_text())
    told["files"] |= {"../secret": "0" * 64, str(tmp_path / "secret"): "0" * 64}
    (out / "run.json").write_text(json.dumps(told))
    assert [problem.what for problem in library.verify(out).problems] == ["a file is missing"] * 2
