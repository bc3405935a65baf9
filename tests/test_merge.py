"""Merging folders, end to end through the command line."""

import json
import shutil

import pytest
import torch
from families import base_tensors, load, make_family, save, superpose, tuned_tensors, weights
from safetensors.torch import save_file
from typer.testing import CliRunner

import superpose as library
from superpose import RunRecord, SuperposeError
from superpose.cli import app
from superpose.planning import Settings, make_plan
from superpose.recipe import load_recipe
from superpose.run import run_plan

METHODS = [method.name for method in library.list_methods() if not method.needs]
"""Those that read data are in test_methods_with_data.py."""
MOST = {method.name: method.models[1] for method in library.list_methods()}
SIDED = {"iso_cts", "knots"}  # a basis of the output side: a matrix stored in x out is merged as stored
RANDOM = {method.name for method in library.list_methods() if "generator" in method.wants}


def recipe(folders, **more):
    """Return a recipe with as many of the fine-tunes as its method can merge."""
    models = fitting(more.get("method", "stf"), folders)[1:]
    return {"base": str(folders[0]), "models": [str(folder) for folder in models], **more}


def in_process(*arguments):
    """Run the command line in this process: importing torch anew takes longer than the merge."""
    done = CliRunner().invoke(app, [*map(str, arguments), "--quiet"])
    assert done.exit_code == 0, done.stderr


def fitting(method, models):
    """Return the base and as many fine-tunes as the method can merge."""
    return models if MOST[method] is None else models[: MOST[method] + 1]


@pytest.mark.parametrize("method", METHODS)
def test_folders_and_mappings_merge_alike(tmp_path, method):
    folders = fitting(method, make_family(tmp_path))
    in_process("merge", *folders, "-o", tmp_path / "out", "--method", method)
    names = [folder.name for folder in folders[1:]]
    expected = library.merge_tensors(load(folders[0]), [load(folder) for folder in folders[1:]], method, names=names)
    found = load(tmp_path / "out")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    assert any(not torch.equal(found[name], tensor) for name, tensor in load(folders[0]).items())


@pytest.mark.parametrize("method", METHODS)
def test_same_bytes_whatever_the_backend_and_the_shards(tmp_path, method):
    folders = fitting(method, make_family(tmp_path, layers=4, dtype=torch.bfloat16))
    sharded = [save(tmp_path / "sharded" / folder.name, load(folder), shards=7, reverse=True) for folder in folders]
    in_process("merge", *folders, "-o", tmp_path / "a", "--method", method, "--backend", "serial")
    in_process("merge", *sharded, "-o", tmp_path / "b", "--method", method, "--workers", "3")
    assert weights(tmp_path / "a") == weights(tmp_path / "b")
    small = ["--shard-size", "1KiB", "--memory", "1KiB"]
    in_process("merge", *folders, "-o", tmp_path / "c", "--method", method, *small)
    assert len(weights(tmp_path / "c")) > 10
    merged, pieces = load(tmp_path / "a"), load(tmp_path / "c")
    assert all(torch.equal(pieces[name], tensor) for name, tensor in merged.items())


@pytest.mark.parametrize("method", ["stf", "dare_ties", "pcb"])
def test_same_bytes_whatever_the_hash_seed(tmp_path, method):
    folders = make_family(tmp_path)
    for seed in ("1", "2"):
        superpose("merge", *folders, "-o", tmp_path / seed, "--method", method, "--quiet", PYTHONHASHSEED=seed)
    assert weights(tmp_path / "1") == weights(tmp_path / "2")


def test_large_tensors_are_merged_in_pieces_as_in_one(tmp_path, monkeypatch):
    folders = make_family(tmp_path, layers=1, width=24)
    for method in METHODS:
        library.merge(recipe(folders, method=method), tmp_path / f"{method}-whole")
    monkeypatch.setattr("superpose.merge_tensor.CHUNK", 56)
    monkeypatch.setattr("superpose.merge_tensor.SURVEY_CHUNK", 88)
    for method in METHODS:
        library.merge(recipe(folders, method=method), tmp_path / f"{method}-pieces")
        assert weights(tmp_path / f"{method}-whole") == weights(tmp_path / f"{method}-pieces"), method


def test_merging_a_model_with_itself_returns_it(tmp_path):
    folders = make_family(tmp_path, tasks=1, dtype=torch.bfloat16)
    for method, options in {
        "stf": {"density": 1, "scaling_factor": 1},
        "ties": {"density": 1, "scaling_factor": 1},
        "average": {},
    }.items():
        out = tmp_path / method
        same = [folders[0], *[folders[1]] * 3]
        library.merge(recipe(same, method=method, options=options), out)
        tuned, merged = load(folders[1]), load(out)
        for name, tensor in merged.items():
            # STF adds embeddings, biases and heads up, as its paper does; matrices and norms come back.
            if method != "stf" or name.endswith(("proj.weight", "norm.weight")):
                assert torch.equal(tensor, tuned[name]), (method, name)


def test_inputs_are_left_as_they_were(tmp_path):
    folders = make_family(tmp_path)
    before = [weights(folder) for folder in folders]
    times = [(folder / "model.safetensors").stat().st_mtime_ns for folder in folders]
    for method in METHODS:
        library.merge(recipe(folders, method=method), tmp_path / method, measure=True)
    assert [weights(folder) for folder in folders] == before
    assert [(folder / "model.safetensors").stat().st_mtime_ns for folder in folders] == times


def test_mappings_are_left_as_they_were_and_results_share_no_memory():
    base = base_tensors()
    tuned = [tuned_tensors(base, seed) for seed in range(2)]
    copies = [{name: tensor.clone() for name, tensor in model.items()} for model in (base, *tuned)]
    for method in METHODS:
        merged = library.merge_tensors(base, tuned, method)
        for tensor in merged.values():
            tensor.zero_()
    for model, copy in zip((base, *tuned), copies, strict=True):
        assert all(torch.equal(model[name], tensor) for name, tensor in copy.items())


def test_an_existing_output_is_kept_unless_overwriting_is_asked_for(tmp_path):
    folders = make_family(tmp_path)
    out = tmp_path / "out"
    superpose("merge", *folders, "-o", out, "--method", "average", "--quiet")
    first = weights(out)
    done = superpose("merge", *folders, "-o", out, "--method", "task_arithmetic", check=False)
    assert done.returncode == 2
    assert "exists already" in done.stderr
    assert weights(out) == first
    superpose("merge", *folders, "-o", out, "--method", "task_arithmetic", "--overwrite", "--quiet")
    assert weights(out) != first
    assert not list(tmp_path.glob("out.*"))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("method", METHODS)
def test_nan_and_infinity_are_refused_by_name_of_file_and_tensor(tmp_path, method, bad):
    folders = make_family(tmp_path)
    tensors = load(folders[2])
    tensors["layers.1.mlp.up_proj.weight"][3, 2:5] = bad
    save_file(tensors, folders[2] / "model.safetensors")
    with pytest.raises(SuperposeError, match="3 entries are NaN or infinite") as caught:
        library.merge(recipe(folders, method=method), tmp_path / "out")
    assert str(folders[2] / "model.safetensors") in caught.value.where
    assert "layers.1.mlp.up_proj.weight" in caught.value.where
    assert not (tmp_path / "out").exists()


def test_a_failed_merge_leaves_no_output_and_exits_with_2(tmp_path):
    folders = make_family(tmp_path)
    tensors = load(folders[1])
    tensors["norm.weight"][0] = float("nan")
    save_file(tensors, folders[1] / "model.safetensors")
    done = superpose("merge", *folders, "-o", tmp_path / "out", check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert [line.partition(":")[0] for line in done.stderr.splitlines()] == ["error", "where", "mend"]
    assert not (tmp_path / "out").exists()


def test_the_record_and_the_card_say_what_was_done(tmp_path):
    folders = make_family(tmp_path)
    record = library.merge(recipe(folders, method="stf", options={"density": 0.5}), tmp_path / "out", measure=True)
    assert RunRecord.load(tmp_path / "out") == record
    tensors = {tensor.name: tensor for tensor in record.tensors}
    linear = tensors["layers.0.mlp.up_proj.weight"]
    assert linear.stats["features"] == linear.stats["rank"] == 48
    assert linear.stats["residual"] < 1e-6
    assert linear.stats["condition"] >= 1
    assert linear.measures["trimmed"]["relative"] < 1e-4 < linear.measures["untrimmed"]["relative"]
    assert list(linear.measures["trimmed"]["by_task"]) == ["ft1", "ft2", "ft3"]
    assert "features" not in tensors["norm.weight"].stats
    assert record.recipe["options"]["density"] == 0.5
    assert record.recipe["options"]["scaling_factor"] == 0.8
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Merged by `stf`" in card
    assert "| linear | stf | 4 |" in card


def test_measuring_does_not_change_the_result(tmp_path):
    folders = make_family(tmp_path)
    for method in METHODS:
        library.merge(recipe(folders, method=method), tmp_path / f"{method}-a")
        record = library.merge(recipe(folders, method=method), tmp_path / f"{method}-b", measure=True)
        measured = [tensor for tensor in record.tensors if tensor.measures]
        assert {tensor.kind for tensor in measured} == {"linear"}
        a, b = load(tmp_path / f"{method}-a"), load(tmp_path / f"{method}-b")
        assert all(torch.allclose(a[name], tensor, rtol=1e-6, atol=1e-7) for name, tensor in b.items())


def test_the_output_dtype_can_be_chosen(tmp_path):
    folders = make_family(tmp_path, dtype=torch.bfloat16)
    (folders[0] / "config.json").write_text(json.dumps({"dtype": "bfloat16", "hidden": 3}))
    superpose("merge", *folders, "-o", tmp_path / "out", "--method", "average", "--dtype", "float32", "--quiet")
    merged = load(tmp_path / "out")
    assert {tensor.dtype for tensor in merged.values()} == {torch.float32}
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"dtype": "float32", "hidden": 3}
    mean = sum(load(folder)["norm.weight"].double() for folder in folders[1:]) / 3
    assert torch.allclose(merged["norm.weight"].double(), mean, rtol=1e-6)


def test_integers_and_buffers_are_copied_and_differences_are_said(tmp_path):
    base = {**base_tensors(), "position_ids": torch.arange(5), "bn.running_var": torch.ones(4)}
    base["bn.num_batches_tracked"] = torch.tensor(7)
    folders = [save(tmp_path / "base", base)]
    for seed in (1, 2):
        tensors = {**base, **tuned_tensors(base_tensors(), seed), "bn.running_var": torch.full((4,), 2.0 * seed)}
        tensors["bn.num_batches_tracked"] = torch.tensor(7 + seed)
        folders.append(save(tmp_path / f"ft{seed}", tensors))
    record = library.merge(recipe(folders, method="task_arithmetic"), tmp_path / "out")
    merged = load(tmp_path / "out")
    assert torch.equal(merged["position_ids"], base["position_ids"])
    assert torch.equal(merged["bn.num_batches_tracked"], base["bn.num_batches_tracked"])
    assert torch.equal(merged["bn.running_var"], torch.full((4,), 3.0))
    text = "\n".join(record.warnings)
    assert "bn.num_batches_tracked" in text
    assert "ft1, ft2 differ" in text
    assert "position_ids" not in text


def test_conflicts_are_reported_with_tensor_and_tasks(tmp_path):
    u, v = torch.randn(16, 1, generator=torch.Generator().manual_seed(1)), torch.ones(1, 16)
    base = {"a.weight": torch.zeros(16, 16), "b.weight": torch.zeros(16, 16)}
    tuned = [{**base, "a.weight": scale * u @ v} for scale in (3.0, 1.0)]
    folders = [save(tmp_path / "base", base), *(save(tmp_path / f"m{i}", t) for i, t in enumerate(tuned))]
    options = {"density": 1, "scaling_factor": 1}
    record = library.merge(recipe(folders, method="stf", options=options), tmp_path / "out")
    (warning,) = [warning for warning in record.warnings if "contradict" in warning]
    assert warning.startswith("a.weight: ")
    assert "(tasks: m0, m1)" in warning
    assert torch.allclose(load(tmp_path / "out")["a.weight"], 2 * u @ v, atol=1e-5)


def test_bare_files_and_pickles_merge_like_folders(tmp_path):
    folders = make_family(tmp_path)
    files = []
    for folder in folders:
        files.append(tmp_path / f"{folder.name}.pt")
        torch.save({"state_dict": load(folder)}, files[-1])
    library.merge(recipe(folders, method="stf"), tmp_path / "a")
    library.merge(recipe(files, method="stf"), tmp_path / "b")
    assert weights(tmp_path / "a") == weights(tmp_path / "b")


def test_fused_projections_merge_like_split_ones():
    generator = torch.Generator().manual_seed(0)
    parts = [[torch.randn(12, 12, generator=generator) for _ in "qkv"] for _ in range(4)]
    split = [{f"attn.{name}_proj.weight": part for name, part in zip("qkv", model, strict=True)} for model in parts]
    fused = [{"attn.in_proj_weight": torch.cat(model)} for model in parts]
    stored = [{"h.attn.c_attn.weight": torch.cat([part.T for part in model], dim=1)} for model in parts]
    for method in sorted(set(METHODS) - RANDOM | {"knots", "metagpt"}):  # random numbers go by the tensor's name
        split, fused, stored = (fitting(method, models) for models in (split, fused, stored))
        options = {"density_scope": "tensor"} if method == "ties" else {}
        apart = library.merge_tensors(split[0], split[1:], method, **options)
        whole = library.merge_tensors(fused[0], fused[1:], method, **options)["attn.in_proj_weight"]
        other = library.merge_tensors(stored[0], stored[1:], method, **options)["h.attn.c_attn.weight"]
        expected = torch.cat([apart[f"attn.{name}_proj.weight"] for name in "qkv"])
        assert torch.equal(whole, expected), method
        assert method in SIDED or torch.allclose(other.T, expected, atol=1e-5), method


def test_a_hub_id_is_merged_from_the_cache_with_its_commit_in_the_record(tmp_path, monkeypatch):
    folders = make_family(tmp_path)
    sha = "0123456789abcdef0123456789abcdef01234567"
    cache = tmp_path / "hub" / "models--org--base"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text(sha)
    (cache / "snapshots").mkdir()
    shutil.copytree(folders[0], cache / "snapshots" / sha)
    superpose(
        "merge", "org/base", *folders[1:], "-o", tmp_path / "out", "--method", "average", "--quiet",
        HF_HUB_CACHE=str(tmp_path / "hub"),
    )  # fmt: skip
    record = RunRecord.load(tmp_path / "out")
    assert record.sources[0]["path"] == "org/base"
    assert record.sources[0]["revision"] == sha
    card = (tmp_path / "out" / "README.md").read_text()
    assert "base_model:\n- org/base\n" in card


def test_the_json_result_is_the_record(tmp_path):
    folders = make_family(tmp_path)
    done = superpose("merge", *folders, "-o", tmp_path / "out", "--method", "average", "--json", "--quiet")
    assert RunRecord.from_json(done.stdout) == RunRecord.load(tmp_path / "out")


def test_a_recipe_file_is_merged(tmp_path):
    folders = make_family(tmp_path)
    text = (
        f"base: {folders[0]}\nmodels:\n  - {folders[1]}\n  - path: {folders[2]}\n    weight: 3\n    name: math\n"
        "method: average\nrules:\n  - {kind: norm, keep: base}\n"
    )
    (tmp_path / "recipe.yaml").write_text(text)
    superpose("merge", tmp_path / "recipe.yaml", "-o", tmp_path / "out", "--quiet")
    base, first, second = map(load, folders[:3])
    merged = load(tmp_path / "out")
    assert torch.equal(merged["norm.weight"], base["norm.weight"])
    expected = (first["lm_head.weight"] + 3 * second["lm_head.weight"]) / 4
    assert torch.allclose(merged["lm_head.weight"], expected, atol=1e-6)


def test_float32_and_float64_tensors_share_one_threshold():
    generator = torch.Generator().manual_seed(0)
    base = {"a.weight": torch.zeros(6, 5), "b.weight": torch.zeros(7, 5, dtype=torch.float64)}
    tuned = {name: torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype) for name, tensor in base.items()}
    merged = library.merge_tensors(base, [tuned], "ties", density=0.2)
    magnitudes = torch.cat([tensor.double().abs().flatten() for tensor in tuned.values()]).sort().values
    for name, tensor in merged.items():
        assert tensor.dtype == base[name].dtype
        assert torch.equal(tensor != 0, tuned[name].double().abs() > magnitudes[-14])


def test_running_statistics_are_averaged_whatever_the_weights():
    base = {"bn.running_var": torch.ones(3), "bn.weight": torch.ones(3)}
    tuned = [{"bn.running_var": torch.full((3,), 2.0 * i), "bn.weight": torch.ones(3)} for i in (1, 2)]
    merged = library.merge_tensors(base, tuned, "task_arithmetic", weights=[1, -1])
    assert torch.equal(merged["bn.running_var"], torch.full((3,), 3.0))


def test_a_result_too_large_for_its_dtype_is_refused():
    base = {"a.weight": torch.full((4, 4), 60000.0).half()}
    tuned = [{"a.weight": torch.full((4, 4), 65000.0).half()}] * 3
    with pytest.raises(SuperposeError, match="too large for F16") as caught:
        library.merge_tensors(base, tuned, "task_arithmetic", scaling_factor=1)
    assert "a.weight" in caught.value.where


def test_tied_tensors_of_a_mapping_are_merged_once_and_stay_tied():
    base = base_tensors()
    base["lm_head.weight"] = base["embed_tokens.weight"]
    tuned = [tuned_tensors(base, seed) for seed in range(2)]
    for model in tuned:
        model["lm_head.weight"] = model["embed_tokens.weight"]
    alone = [{name: t for name, t in model.items() if name != "lm_head.weight"} for model in (base, *tuned)]
    for method in METHODS:
        merged = library.merge_tensors(base, tuned, method)
        assert list(merged) == list(base)
        assert merged["lm_head.weight"].data_ptr() == merged["embed_tokens.weight"].data_ptr()
        for name, tensor in library.merge_tensors(alone[0], alone[1:], method).items():
            assert torch.equal(merged[name], tensor), (method, name)


def test_stacked_experts_merge_like_experts_stored_one_by_one():
    generator = torch.Generator().manual_seed(0)
    models = [[scale * torch.randn(6, 5, generator=generator) for scale in (1, 10)] for _ in range(3)]
    stacks = [{"mlp.experts.up_proj": torch.stack(model)} for model in models]
    apart = [{f"mlp.experts.{i}.up_proj.weight": expert for i, expert in enumerate(model)} for model in models]
    merged = library.merge_tensors(stacks[0], stacks[1:], "stf")["mlp.experts.up_proj"]
    alone = library.merge_tensors(apart[0], apart[1:], "stf")
    assert torch.equal(merged, torch.stack(list(alone.values())))


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 3, 3), (2, 0, 3)])
@pytest.mark.parametrize("method", METHODS)
def test_tensors_without_entries_come_out_as_they_are(method, shape):
    base = {"a.weight": torch.zeros(shape), "b.weight": torch.ones(3, 3)}
    merged = library.merge_tensors(base, [base, base], method)
    assert merged["a.weight"].shape == shape


@pytest.mark.parametrize("method", ["slerp", "average"])
def test_nan_in_the_base_is_refused_by_methods_on_weights_too(tmp_path, method):
    folders = make_family(tmp_path, tasks=1)
    tensors = load(folders[0])
    tensors["norm.weight"][2] = float("nan")
    save_file(tensors, folders[0] / "model.safetensors")
    with pytest.raises(SuperposeError, match="1 entries are NaN or infinite") as caught:
        library.merge(recipe(folders, method=method), tmp_path / "out")
    assert str(folders[0] / "model.safetensors") in caught.value.where


@pytest.mark.parametrize("gone", [0, 2])
def test_input_that_vanishes_in_mid_run_is_named(tmp_path, gone):
    folders = make_family(tmp_path)
    plan = make_plan(load_recipe({"base": str(folders[0]), "models": list(map(str, folders[1:]))}), Settings(), None)
    (folders[gone] / "model.safetensors").unlink()
    with pytest.raises(SuperposeError, match="is gone since") as caught:
        run_plan(plan, tmp_path / "out")
    assert str(folders[gone]) in caught.value.where
    assert not (tmp_path / "out").exists()
