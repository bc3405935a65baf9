"""Sets of task models, end to end: a merge by EMR, and the model of each task rebuilt from it."""

import json
import shutil

import numpy as np
import pytest
import torch
from families import base_tensors, generator, load, make_family, save, tuned_tensors, weights
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import superpose as library
from superpose import RunRecord
from superpose.cli import app

MASKS, TASKS = "tasks/masks.safetensors", "tasks/tasks.json"
Q_PROJ = "layers.0.self_attn.q_proj.weight"


def run(*arguments):
    """Run the command line in this process: importing torch anew takes longer than the merge."""
    done = CliRunner().invoke(app, [*map(str, arguments)])
    assert done.exit_code == 0, (done.stderr, done.exception)
    return done.stdout


def refused(*arguments):
    """Return the error text of a command that ends with exit code 2, three lines a problem, and no traceback."""
    done = CliRunner().invoke(app, [*map(str, arguments)])
    assert done.exit_code == 2, (done.stdout, done.stderr, done.exception)
    assert isinstance(done.exception, SystemExit)
    assert "Traceback" not in done.stderr
    first = done.stderr.strip().split("\n\n")[0].splitlines()
    assert [line.partition(":")[0] for line in first] == ["error", "where", "mend"]
    return done.stderr


def merge(folders, out, *more):
    run("merge", *folders, "-o", out, "--method", "emr", "--quiet", *more)
    return out


def rebuild(folder, task, out, *more):
    run("rebuild", folder, "--task", task, "-o", out, *more)
    return load(out)


def set_bytes(folder):
    return weights(folder) | weights(folder / "tasks") | {"tasks.json": (folder / TASKS).read_bytes()}


def by_formula(base, tuned):
    """Return each task's model: base + scale * mask o unified vector, in NumPy float64."""
    stacks = {name: np.array([model[name].double() - base[name].double() for model in tuned]) for name in base}
    signs = {name: np.sign(stack.sum(axis=0)) for name, stack in stacks.items()}
    masks = {name: (np.sign(stack) == signs[name]) & (signs[name] != 0) for name, stack in stacks.items()}
    unified = {
        name: signs[name] * np.where(masks[name], abs(stack), 0).max(axis=0, initial=0)
        for name, stack in stacks.items()
    }
    models = []
    for task in range(len(tuned)):
        parts = {name: mask[task] * unified[name] for name, mask in masks.items()}
        shared = sum(abs(part).sum() for part in parts.values())
        scale = sum(abs(stack[task]).sum() for stack in stacks.values()) / shared if shared else 1.0
        models.append({name: base[name].double().numpy() + scale * part for name, part in parts.items()})
    return models


@pytest.mark.parametrize("more", [[], ["--dtype", "float32"]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_task_is_rebuilt_as_in_memory_and_as_the_formula_says(tmp_path, dtype, more):
    folders = make_family(tmp_path, dtype=dtype)
    base, *tuned = map(load, folders)
    out = merge(folders, tmp_path / "set", *more)
    assert {tensor.dtype for tensor in load(out).values()} == {torch.float32 if more else dtype}
    assert load(out).keys() == base.keys()
    names = [folder.name for folder in folders[1:]]
    in_memory = library.merge_to_set(base, tuned, names=names)
    tolerance = 1e-5 if dtype == torch.float32 else 2**-7
    for name, expected in zip(names, by_formula(base, tuned), strict=True):
        found = rebuild(out, name, tmp_path / f"task-{name}")
        assert {tensor.dtype for tensor in found.values()} == {dtype}
        for key, tensor in in_memory.model(name, base).items():
            assert torch.equal(found[key], tensor), (name, key)
            np.testing.assert_allclose(found[key].double().numpy(), expected[key], rtol=tolerance, atol=tolerance)


def test_names_and_scales_in_the_set_are_those_of_the_merge_and_masks_are_bits(tmp_path):
    folders = make_family(tmp_path)
    out = merge(folders, tmp_path / "set")
    content = json.loads((out / TASKS).read_text())
    assert [task["name"] for task in content["tasks"]] == ["ft1", "ft2", "ft3"]
    base, *tuned = map(load, folders)
    assert tuple(task["scale"] for task in content["tasks"]) == library.merge_to_set(base, tuned).scales
    masks = load_file(out / MASKS)
    assert masks.keys() == {f"{task}:{name}" for task in range(3) for name in base}
    # A bit an entry: an eighth of a byte, whatever the models' dtype.
    assert all(len(masks[f"0:{name}"]) == (tensor.numel() + 7) // 8 for name, tensor in base.items())


def test_the_rebuilt_folder_is_a_model_with_its_sidecars_and_record(tmp_path):
    folders = make_family(tmp_path)
    (folders[0] / "config.json").write_text('{"hidden": 3}')
    (folders[0] / "tokenizer.json").write_text('{"vocab": {}}')
    out = merge(folders, tmp_path / "set")
    text = run("rebuild", out, "--task", "ft2", "-o", tmp_path / "two", "--json")
    assert json.loads(text)["tensors"] == len(load(folders[0]))
    assert json.loads((tmp_path / "two" / "config.json").read_text()) == {"hidden": 3}
    assert (tmp_path / "two" / "tokenizer.json").read_text() == '{"vocab": {}}'
    record = RunRecord.load(tmp_path / "two")
    assert record.recipe["rebuilt"] == {"set": str(out), "task": "ft2"}
    assert {tensor.name for tensor in record.tensors} == load(folders[0]).keys()
    assert {path.name for path in tmp_path.iterdir()} == {"base", "ft1", "ft2", "ft3", "set", "two"}
    assert library.inspect(tmp_path / "two").checkpoint.problems == ()


def test_one_task_in_bfloat16_is_rebuilt_bit_for_bit(tmp_path):
    folders = make_family(tmp_path, tasks=1, dtype=torch.bfloat16)
    rebuilt = rebuild(merge(folders, tmp_path / "set"), "ft1", tmp_path / "one")
    assert all(torch.equal(rebuilt[name], tensor) for name, tensor in load(folders[1]).items())


def test_same_bytes_whatever_the_backend_the_shards_and_the_pieces(tmp_path, monkeypatch):
    folders = make_family(tmp_path, dtype=torch.bfloat16)
    expected = set_bytes(merge(folders, tmp_path / "a", "--backend", "serial"))
    sharded = [save(tmp_path / "sharded" / folder.name, load(folder), shards=5, reverse=True) for folder in folders]
    assert set_bytes(merge(sharded, tmp_path / "b", "--workers", "3")) == expected
    monkeypatch.setattr("superpose.merge_tensor.CHUNK", 56)
    monkeypatch.setattr("superpose.merge_tensor.SURVEY_CHUNK", 88)
    assert load(merge(folders, tmp_path / "c")).keys() == load(folders[0]).keys()
    assert (weights(tmp_path / "c"), weights(tmp_path / "c/tasks")) == (
        weights(tmp_path / "a"),
        weights(tmp_path / "a/tasks"),
    )
    whole = rebuild(tmp_path / "a", "ft3", tmp_path / "whole")
    monkeypatch.setattr("superpose.task_sets.CHUNK", 56)
    pieces = rebuild(tmp_path / "a", "ft3", tmp_path / "pieces")
    assert all(torch.equal(pieces[name], tensor) for name, tensor in whole.items())
    small = merge(folders, tmp_path / "d", "--shard-size", "1KiB", "--memory", "1KiB")
    again = rebuild(small, "ft3", tmp_path / "from-shards")
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())


def test_a_mask_that_got_lost_in_a_kill_is_made_again(tmp_path, monkeypatch):
    folders, count = make_family(tmp_path), []
    expected = set_bytes(merge(folders, tmp_path / "whole"))
    from superpose import run as runs

    real = runs.merge_item

    def failing(item, *arguments, **more):
        if len(count) == 5:
            raise KeyboardInterrupt
        count.append(item)
        return real(item, *arguments, **more)

    recipe = {"base": str(folders[0]), "models": [str(folder) for folder in folders[1:]], "method": "emr"}
    with monkeypatch.context() as patch:
        patch.setattr(runs, "merge_item", failing)
        with pytest.raises(KeyboardInterrupt):
            library.merge(recipe, tmp_path / "out", backend="serial")
    assert not (tmp_path / "out").exists()
    largest = max(count, key=lambda item: item.numel)
    file = tmp_path / "out.partial" / MASKS
    with file.open("r+b") as stream:
        length = int.from_bytes(stream.read(8), "little")
        start = json.loads(stream.read(length))[f"1:{largest.name}"]["data_offsets"][0]
        stream.seek(8 + length + start)
        byte = stream.read(1)[0]
        stream.seek(8 + length + start)
        stream.write(bytes([byte ^ 255]))
    record = library.merge(recipe, tmp_path / "out")
    assert record.totals["resumed"] == 4
    assert set_bytes(tmp_path / "out") == expected


def test_fused_projections_and_tensors_of_odd_sizes(tmp_path):
    shapes = {"h.0.attn.c_attn.weight": (5, 15), "h.0.attn.c_attn.bias": (15,), "h.0.attn.in_proj_weight": (15, 5)}
    shapes |= {"a.experts.weight": (3, 3, 5), "conv.weight": (3, 3, 3, 3), "empty.weight": (0, 4), "odd.bias": (7,)}
    base = {name: torch.randn(shape, generator=generator(name)) for name, shape in shapes.items()}
    tuned = [tuned_tensors(base, seed) for seed in range(2)]
    folders = [save(tmp_path / name, model) for name, model in zip("bxy", (base, *tuned), strict=True)]
    out = merge(folders, tmp_path / "set")
    for name, expected in zip("xy", by_formula(base, tuned), strict=True):
        for key, tensor in rebuild(out, name, tmp_path / f"task-{name}").items():
            np.testing.assert_allclose(tensor.double().numpy(), expected[key], rtol=1e-5, atol=1e-6)


def test_a_tensor_without_entries_that_comes_first(tmp_path):
    base = {"a.weight": torch.zeros(0, 3), "b.weight": torch.zeros(3, 3)}
    folders = [save(tmp_path / "base", base), save(tmp_path / "ft", {**base, "b.weight": torch.eye(3)})]
    rebuilt = rebuild(merge(folders, tmp_path / "set"), "ft", tmp_path / "one")
    assert torch.equal(rebuilt["b.weight"], torch.eye(3))


def test_rules_leave_tensors_to_the_base_or_to_another_method(tmp_path):
    folders = make_family(tmp_path)
    rules = [{"match": "lm_head*", "keep": "base"}, {"kind": "bias", "method": "average"}]
    content = {"base": str(folders[0]), "models": [*map(str, folders[1:])], "method": "emr", "rules": rules}
    (tmp_path / "recipe.yaml").write_text(json.dumps(content))
    run("merge", tmp_path / "recipe.yaml", "-o", tmp_path / "set", "--quiet")
    base, *tuned = map(load, folders)
    rebuilt = rebuild(tmp_path / "set", "ft1", tmp_path / "one")
    assert torch.equal(rebuilt["lm_head.weight"], base["lm_head.weight"])
    bias = "layers.0.mlp.up_proj.bias"
    torch.testing.assert_close(rebuilt[bias], torch.stack([model[bias] for model in tuned]).mean(dim=0))
    left = {name: tensor for name, tensor in base.items() if "lm_head" not in name and "bias" not in name}
    for name, expected in by_formula(left, tuned)[0].items():
        np.testing.assert_allclose(rebuilt[name].double().numpy(), expected, rtol=1e-5, atol=1e-6)


# Bad input.


@pytest.fixture
def made(tmp_path):
    """A family, and a set made of it: the base's folder, the set's."""
    folders = make_family(tmp_path, tasks=2)
    return folders[0], merge(folders, tmp_path / "set")


def named(*tasks):
    """Return a file of names and scales, the scales as they are to be written."""
    return '{"tasks": [' + ", ".join(f'{{"name": "{name}", "scale": {scale}}}' for name, scale in tasks) + "]}"


BROKEN_TASKS = {
    "no JSON": "{",
    "no text": b"\xff\xfe\x00",
    "deep": "[" * 100_000,
    "list": "[]",
    "number": '{"tasks": 3}',
    "text": '{"tasks": "ft1"}',
    "no scale": '{"tasks": [{"name": "ft1"}, {"name": "ft2"}]}',
    "scale is null": named(("ft1", "null"), ("ft2", 1)),
    "scale is NaN": named(("ft1", "NaN"), ("ft2", 1)),
    "scale is infinite": named(("ft1", "1e999"), ("ft2", 1)),
    "scale is a huge whole number": named(("ft1", "1" + "0" * 400), ("ft2", 1)),
    "scale is negative": named(("ft1", -1), ("ft2", 1)),
    "fewer names than masks": named(("ft1", 1)),
    "more names than masks": named(("x", 1), ("y", 1), ("ft1", 1)),
    "the same name twice": named(("ft1", 1), ("ft1", 2)),
    "huge": named(("ft1", 1), ("ft2", 1)) + " " * 50_000_000,
}


@pytest.mark.parametrize("case", BROKEN_TASKS)
def test_broken_names_and_scales_are_refused(tmp_path, made, case):
    content = BROKEN_TASKS[case]
    (made[1] / TASKS).write_bytes(content if isinstance(content, bytes) else content.encode())
    said = refused("rebuild", made[1], "--task", "ft1", "-o", tmp_path / "out")
    assert "tasks.json" in said or "masks.safetensors" in said
    assert not (tmp_path / "out").exists()


def with_mask(make):
    """Return what writes the masks anew, one as `make` makes it of the true one; without it, if that is None."""

    def rewrite(file):
        masks = load_file(file)
        changed = make(masks.pop(f"0:{Q_PROJ}"))
        save_file(masks if changed is None else {**masks, f"0:{Q_PROJ}": changed}, file)

    return rewrite


BROKEN_MASKS = {
    "gone": lambda file: file.unlink(),
    "empty": lambda file: file.write_bytes(b""),
    "cut off": lambda file: file.write_bytes(file.read_bytes()[:-10]),
    "no header": lambda file: file.write_bytes(b"\xff" * 100),
    "shorter mask": with_mask(lambda mask: mask[:-1]),
    "another shape": with_mask(lambda mask: mask.reshape(2, -1)),
    "another dtype": with_mask(lambda mask: mask.view(torch.int8)),
    "a mask left out": with_mask(lambda mask: None),
    "other bits": with_mask(lambda mask: mask ^ 255),
}


@pytest.mark.parametrize("case", BROKEN_MASKS)
def test_broken_masks_are_refused(tmp_path, made, case):
    BROKEN_MASKS[case](made[1] / MASKS)
    assert "masks.safetensors" in refused("rebuild", made[1], "--task", "ft1", "-o", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", ["{", "[]", '{"sources": []}'])
def test_a_broken_record_is_refused(tmp_path, made, content):
    (made[1] / "run.json").write_text(content)
    assert "run.json" in refused("rebuild", made[1], "--task", "ft1", "-o", tmp_path / "out")


def test_interrupted_nothing_is_under_the_name_and_the_same_command_mends_it(tmp_path, made, monkeypatch):
    expected = rebuild(made[1], "ft1", tmp_path / "undisturbed")
    from superpose import task_sets

    real, done = task_sets.rebuild_piece, []

    def failing(*arguments):
        done.append(arguments)
        if len(done) == 5:
            raise KeyboardInterrupt
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(task_sets, "rebuild_piece", failing)
        stopped = CliRunner().invoke(app, ["rebuild", str(made[1]), "--task", "ft1", "-o", str(tmp_path / "out")])
    assert stopped.exit_code == 130
    assert not (tmp_path / "out").exists()
    found = rebuild(made[1], "ft1", tmp_path / "out")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert not list(tmp_path.glob("*.partial*"))


def test_an_unknown_task_is_refused_with_the_nearest(tmp_path, made):
    said = refused("rebuild", made[1], "--task", "ft11", "-o", tmp_path / "out")
    assert "no task 'ft11'" in said
    assert "nearest match is 'ft1'" in said
    assert not (tmp_path / "out").exists()


def test_what_is_no_set_is_refused(tmp_path, made):
    base, folder = made
    for other in (base, tmp_path / "nowhere", folder / "model.safetensors", folder / "tasks"):
        assert "no set of task models" in refused("rebuild", other, "--task", "ft1", "-o", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_base_that_moved_is_given_anew(tmp_path, made):
    base, folder = made
    expected = rebuild(folder, "ft1", tmp_path / "before")
    shutil.move(base, tmp_path / "moved")
    refused("rebuild", folder, "--task", "ft1", "-o", tmp_path / "after")
    found = rebuild(folder, "ft1", tmp_path / "after", "--base", tmp_path / "moved")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("options", [{"layers": 1}, {"width": 8}, {"dtype": torch.bfloat16}])
def test_another_base_is_refused(tmp_path, made, options):
    other = save(tmp_path / "other", base_tensors(**options))
    said = refused("rebuild", made[1], "--task", "ft1", "-o", tmp_path / "out", "--base", other)
    assert "--base" in said
    assert not (tmp_path / "out").exists()


def test_an_existing_output_is_kept_unless_overwriting_is_asked_for(tmp_path, made):
    rebuild(made[1], "ft1", tmp_path / "out")
    first = weights(tmp_path / "out")
    assert "exists already" in refused("rebuild", made[1], "--task", "ft2", "-o", tmp_path / "out")
    assert weights(tmp_path / "out") == first
    rebuild(made[1], "ft2", tmp_path / "out", "--overwrite")
    assert weights(tmp_path / "out") != first


def test_the_output_never_lies_in_or_replaces_the_set_or_the_base(tmp_path, made):
    base, folder = made
    before = set_bytes(folder), weights(base)
    for out in (folder, folder / "inside", folder / "tasks", base, base / "inside", tmp_path):
        for more in ([], ["--overwrite"]):
            refused("rebuild", folder, "--task", "ft1", "-o", out, *more)
    assert (set_bytes(folder), weights(base)) == before
    assert {path.name for path in folder.iterdir()} == {"README.md", "model.safetensors", "run.json", "tasks"}


def test_another_model_of_the_same_shape_is_no_base(tmp_path, made):
    said = refused("rebuild", made[1], "--task", "ft1", "-o", tmp_path / "out", "--base", tmp_path / "ft2")
    assert "--base" in said
    assert str(tmp_path / "ft2" / "model.safetensors") in said
    assert not (tmp_path / "out").exists()
