"""The plan: every decision and every problem from headers alone."""

import json
import shutil

import pytest
import torch
from families import base_tensors, load, make_family, save, superpose, tuned_tensors

import superpose as library
from superpose import Problems, SuperposeError


def recipe(folders, **more):
    return {"base": str(folders[0]), "models": [str(folder) for folder in folders[1:]], **more}


def test_four_problems_are_listed_at_once_each_with_file_and_tensor(tmp_path):
    folders = make_family(tmp_path, tasks=4)
    tensors = load(folders[1])
    without = {name: tensor for name, tensor in tensors.items() if name != "layers.0.mlp.up_proj.weight"}
    shutil.rmtree(folders[1])
    save(folders[1], without)
    tensors = load(folders[2])
    tensors["layers.1.self_attn.q_proj.weight"] = tensors["layers.1.self_attn.q_proj.weight"][:-1].clone()
    shutil.rmtree(folders[2])
    save(folders[2], tensors)
    cut = folders[3] / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-100])
    done = superpose("plan", *folders, "--method", "ties", "--densty", "0.3", check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    problems = done.stderr.split("\n\n")
    assert len(problems) == 4
    text = done.stderr
    assert "method ties has no option 'densty'" in text
    assert "nearest match is 'density'" in text
    for file, tensor, what in (
        (folders[1] / "model.safetensors", "layers.0.mlp.up_proj.weight", "tensor missing"),
        (folders[2] / "model.safetensors", "layers.1.self_attn.q_proj.weight", "shape 15 x 16, the base has 16 x 16"),
        (cut, "lm_head.weight", "truncated"),
    ):
        (found,) = [problem for problem in problems if what in problem]
        assert str(file) in found
        assert tensor in found
        assert "mend: " in found
    assert "Traceback" not in text


def test_plan_reads_no_tensor(tmp_path, monkeypatch):
    folders = make_family(tmp_path)
    monkeypatch.setattr("superpose.reading._reader", None)
    plan = library.plan(recipe(folders, method="stf"))
    assert len(plan.items) == len(base_tensors())


def test_kinds_are_chosen_by_rule_then_name(tmp_path):
    folders = make_family(tmp_path)
    plan = library.plan(recipe(folders, rules=[{"match": "lm_head.*", "kind": "linear"}]))
    kinds = {item.name: (str(item.kind), item.kind_from) for item in plan.items}
    assert kinds["lm_head.weight"] == ("linear", "rule")
    assert kinds["embed_tokens.weight"] == ("embedding", "name")
    assert kinds["norm.weight"] == ("norm", "name")
    assert kinds["layers.0.mlp.up_proj.bias"] == ("bias", "name")
    assert kinds["logit_scale"] == ("scalar", "name")


def test_rules_choose_methods_and_keep_tensors(tmp_path):
    folders = make_family(tmp_path)
    rules = [
        {"match": "layers.0.*", "kind": "linear", "method": "average"},
        {"kind": "norm", "keep": "base"},
        {"match": "*.bias", "options": {"density": 1}},
    ]
    plan = library.plan(recipe(folders, method="ties", options={"scaling_factor": 0.5}, rules=rules))
    items = {item.name: item for item in plan.items}
    assert items["layers.0.mlp.up_proj.weight"].method == "average"
    assert items["layers.1.mlp.up_proj.weight"].method == "ties"
    assert items["norm.weight"].action == "copy"
    assert items["layers.1.mlp.up_proj.bias"].options.density == 1
    assert items["layers.1.mlp.up_proj.bias"].options.scaling_factor == 0.5


def test_extra_tensors_are_a_problem_unless_a_rule_drops_them(tmp_path):
    folders = make_family(tmp_path)
    tensors = {**load(folders[1]), "classifier.weight": torch.ones(3, 16)}
    shutil.rmtree(folders[1])
    save(folders[1], tensors)
    with pytest.raises(SuperposeError, match="1 tensor that the base does not have") as caught:
        library.plan(recipe(folders))
    assert "classifier.weight" in caught.value.where
    assert "drop: true" in caught.value.mend
    plan = library.plan(recipe(folders, rules=[{"match": "classifier.*", "drop": True}]))
    assert len(plan.items) == len(base_tensors())


def test_a_vocabulary_of_another_size_is_named_and_can_be_kept(tmp_path):
    folders = make_family(tmp_path)
    tensors = load(folders[2])
    tensors["lm_head.weight"] = torch.zeros(48, 16)
    shutil.rmtree(folders[2])
    save(folders[2], tensors)
    with pytest.raises(SuperposeError, match=r"48 rows .*, the base has 40") as caught:
        library.plan(recipe(folders))
    assert str(folders[2]) in caught.value.where
    rules = [{"match": "lm_head.weight", "keep": "base"}]
    assert library.plan(recipe(folders, rules=rules)).items


def test_a_fine_tune_under_a_head_is_matched_by_its_prefix(tmp_path):
    folders = make_family(tmp_path, tasks=2)
    tensors = {f"bert.{name}": tensor for name, tensor in load(folders[1]).items()}
    shutil.rmtree(folders[1])
    save(folders[1], {**tensors, "score.weight": torch.ones(2, 16)})
    plan = library.plan(recipe(folders, rules=[{"match": "score.*", "drop": True}]))
    assert all(item.tuned[0].name == f"bert.{item.name}" for item in plan.items)
    assert any("bert." in note for note in plan.notes)


def test_unrelated_models_are_refused_with_a_short_list(tmp_path):
    folders = make_family(tmp_path, tasks=1)
    save(tmp_path / "other", {f"block.{i}.w": torch.ones(2) for i in range(50)})
    with pytest.raises(Problems) as caught:
        library.plan(recipe([folders[0], tmp_path / "other"]))
    assert len(caught.value.problems) <= 8
    assert "more tensors of the base are missing" in str(caught.value)


def test_weights_are_refused_by_a_method_that_has_none(tmp_path):
    folders = make_family(tmp_path, tasks=2)
    models = [{"path": str(folders[1]), "weight": 0.5}, {"path": str(folders[2])}]
    with pytest.raises(SuperposeError, match="stf has no weights per model"):
        library.plan({"base": str(folders[0]), "models": models, "method": "stf"})
    assert library.plan({"base": str(folders[0]), "models": models, "method": "average"}).weights == (0.5, 1.0)
    models = [{"path": str(folders[1]), "weight": 1}, {"path": str(folders[2]), "weight": -1}]
    with pytest.raises(SuperposeError, match="add up to zero"):
        library.plan({"base": str(folders[0]), "models": models, "method": "average"})


def test_too_little_room_on_the_disk_is_said_before_anything_is_written(tmp_path, monkeypatch):
    folders = make_family(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6, 1000))
    with pytest.raises(SuperposeError, match="not enough room"):
        library.plan(recipe(folders), tmp_path / "out")


def test_an_output_that_exists_or_is_an_input_is_refused(tmp_path):
    folders = make_family(tmp_path)
    with pytest.raises(SuperposeError, match="would lie in or replace"):
        library.plan(recipe(folders), folders[1], overwrite=True)
    (tmp_path / "taken").mkdir()
    assert library.plan(recipe(folders), tmp_path / "taken").items  # an empty folder is no output
    (tmp_path / "taken" / "notes.txt").write_text("mine")
    with pytest.raises(SuperposeError, match="exists already"):
        library.plan(recipe(folders), tmp_path / "taken")


@pytest.mark.parametrize(
    ("settings", "what"),
    [({"device": "cuda:7"}, "no such GPU"), ({"device": "tpux"}, "no device"), ({"backend": "thread"}, "no backend")],
)
def test_devices_and_backends_that_are_not_there_are_refused(tmp_path, settings, what):
    with pytest.raises(SuperposeError, match=what):
        library.plan(recipe(make_family(tmp_path)), **settings)


def test_tied_weights_are_merged_once(tmp_path):
    base = base_tensors()
    config = {"model_type": "llama", "architectures": ["NoSuchModel"], "tie_word_embeddings": True}
    folders = []
    for number in range(3):
        tensors = dict(base) if number == 0 else tuned_tensors(base, number)
        tensors["lm_head.weight"] = tensors["embed_tokens.weight"]
        folder = tmp_path / f"m{number}"
        folder.mkdir()
        torch.save(tensors, folder / "pytorch_model.bin")
        (folder / "config.json").write_text(json.dumps(config))
        folders.append(folder)
    plan = library.plan(recipe(folders))
    names = [item.name for item in plan.items]
    assert len(names) == len(base) - 1
    assert ("lm_head.weight" in names) != ("embed_tokens.weight" in names)


def test_quantised_checkpoints_are_refused(tmp_path):
    folders = make_family(tmp_path)
    (folders[1] / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(SuperposeError, match="quantised"):
        library.plan(recipe(folders))


def test_plan_on_the_command_line_shows_totals_and_json(tmp_path):
    folders = make_family(tmp_path)
    text = superpose("plan", *folders, "--method", "stf", "--density", "0.5").stdout
    assert "layers.*.mlp.up_proj.weight" in text
    assert "stf density=0.5" in text
    assert "memory in flight" in text
    content = json.loads(superpose("plan", *folders, "--json").stdout)
    assert content["totals"]["tensors"] == len(base_tensors())
    assert {item["method"] for item in content["items"]} == {"stf"}


def test_only_outputs_of_ours_are_overwritten_and_inputs_never(tmp_path):
    folders = make_family(tmp_path)
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.tex").write_text("five years")
    with pytest.raises(SuperposeError, match="no output of superpose"):
        library.plan(recipe(folders), tmp_path / "precious", overwrite=True)
    for inside in (folders[1] / "model.safetensors", folders[0] / "out"):
        with pytest.raises(SuperposeError, match="would lie in or replace"):
            library.plan(recipe(folders), inside, overwrite=True)


def test_rules_that_cannot_be_meant_are_refused_or_noted(tmp_path):
    folders = make_family(tmp_path)
    with pytest.raises(SuperposeError, match=r"drops lm_head\.weight"):
        library.plan(recipe(folders, rules=[{"match": "lm_head*", "drop": True}]))
    with pytest.raises(SuperposeError, match="cannot be of kind linear"):
        library.plan(recipe(folders, rules=[{"match": "norm*", "kind": "linear"}]))
    plan = library.plan(recipe(folders, rules=[{"match": "lm_haed*", "keep": "base"}]))
    assert any("lm_haed" in note and "matches no tensor" in note for note in plan.notes)


def test_survey_passes_are_told_with_their_bytes(tmp_path):
    folders = make_family(tmp_path)
    models = {"base": str(folders[0]), "models": [str(folder) for folder in folders[1:]]}
    once = library.plan({**models, "method": "average"})
    assert once.bytes_surveyed == 0
    for method, passes in (("ties", 1), ("metagpt", 1), ("pcb", 6)):
        assert library.plan({**models, "method": method}).bytes_surveyed == passes * once.bytes_read
    assert "more in survey passes" in superpose("plan", *folders, "--method", "ties").stdout


def test_numbers_of_models_that_a_method_cannot_merge_are_refused(tmp_path):
    folders = [str(folder) for folder in make_family(tmp_path)]
    with pytest.raises(SuperposeError, match="slerp merges 1 to 2 fine-tunes, and these are 3"):
        library.plan({"base": folders[0], "models": folders[1:], "method": "slerp"})
    with pytest.raises(SuperposeError, match="model_stock merges at least 2 fine-tunes, and these are 1"):
        library.plan({"base": folders[0], "models": folders[1:2], "method": "model_stock"})


def test_contradictory_options_and_weights_that_cancel_are_refused(tmp_path):
    folders = [str(folder) for folder in make_family(tmp_path)]
    recipe = {"base": folders[0], "models": folders[1:]}
    with pytest.raises(SuperposeError, match=r"density 1 with epsilon 0\.07"):
        library.plan({**recipe, "method": "della", "options": {"density": 1}})
    cancelling = [{"path": path, "weight": w} for path, w in zip(folders[1:], (0.1, 0.2, -0.3), strict=True)]
    with pytest.raises(SuperposeError, match="add up to zero"):
        library.plan({"base": folders[0], "models": cancelling, "method": "average"})
    idle = [{"path": path, "weight": 0} for path in folders[1:]]
    with pytest.raises(SuperposeError, match="all weights are zero"):
        library.plan({"base": folders[0], "models": idle, "method": "pem"})


def test_notes_tell_what_options_will_do(tmp_path):
    folders = [str(folder) for folder in make_family(tmp_path)]
    recipe = {"base": folders[0], "models": folders[1:]}
    asked = library.plan({**recipe, "method": "consensus", "options": {"agreement": 5}}).notes
    assert any("all have to agree" in note for note in asked)
    dropped = library.plan({**recipe, "method": "breadcrumbs", "options": {"density": 1}}).notes
    assert any("remove_top" in note for note in dropped)


@pytest.mark.parametrize("method", ["ties", "dare_ties", "metagpt", "pcb", "knots"])
def test_a_thousand_models_of_a_few_entries_need_little_memory(tmp_path, method):
    base, tuned = make_family(tmp_path, tasks=1)
    models = [{"path": str(tuned), "name": f"model{number}"} for number in range(1000)]
    plan = library.plan({"base": str(base), "models": models, "method": method})
    assert plan.memory < 500 * 2**20
