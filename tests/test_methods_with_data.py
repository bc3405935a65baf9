"""Methods that look at data, end to end on small real models: statistics, learning, reuse, restarts."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys

import adapters
import pytest
import torch
from families import load, weights
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_models import (
    classified,
    family,
    make_gpt2,
    make_llama,
    prompted,
    read,
    recipe_of,
    save_sharded,
)
from typer.testing import CliRunner

import superpose as library
from superpose import Problems, RunRecord, SuperposeError
from superpose.api import compute_statistics
from superpose.cli import app
from superpose.maths.bits import unpack

KINDS = {"fisher": "fisher", "regmean": "gram"}
OPTIONS = {
    "adamerging": {"steps": 4, "learning_rate": 0.01},
    "localize_and_stitch": {
        "masks": "learned", "epochs": 2, "initial_density": 0.1, "learning_rate": 1e4, "l1": 0.01,
    },
    "lorahub": {"evaluations": 6},
}  # fmt: skip
LEARNING = sorted(OPTIONS)
METHODS = [*KINDS, *LEARNING]
TASK = {"label": "label", "batch_size": 4}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def folders(root):
    return family(root / "family")


@pytest.fixture(scope="module")
def files(root):
    return [classified(root / f"rows{task}.jsonl", 10, seed=task) for task in (1, 2)]


@pytest.fixture(scope="module")
def statistics(root, folders, files):
    """Files of statistics, by kind and name of the fine-tune."""
    found = {}
    for kind in KINDS.values():
        for folder, file in zip(folders[1:], files, strict=True):
            out = root / f"{folder.name}.{kind}.safetensors"
            compute_statistics(kind, folder, {"data": file, "label": "label"}, out, threads=1)
            found[kind, folder.name] = out
    return found


@pytest.fixture(scope="module")
def recipe(folders, files, statistics):
    def make(method, places=folders, **more):
        if method in KINDS:
            models = [
                {"path": str(place), "statistics": str(statistics[KINDS[method], folder.name]), "name": folder.name}
                for folder, place in zip(folders[1:], places[1:], strict=True)
            ]
            return {"base": str(places[0]), "models": models, "method": method, **more}
        made = recipe_of(places, files, method, task=TASK, more=more, **OPTIONS[method])
        for entry, folder in zip(made["models"], folders[1:], strict=True):
            entry["name"] = folder.name
        return made

    return make


@pytest.fixture(scope="module")
def merged(root, recipe):
    """Each method's merge, made once."""
    found = {}
    for method in METHODS:
        library.merge(recipe(method), root / f"merged-{method}")
        found[method] = root / f"merged-{method}"
    return found


def model_of(folder):
    return {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}


def same(first, second):
    """Compare the model's weights and what was learned, tensor by tensor."""
    for name in ("model.safetensors", "learned.safetensors"):
        assert (first / name).exists() == (second / name).exists()
        if (first / name).exists():
            one, other = load_file(first / name), load_file(second / name)
            assert one.keys() == other.keys()
            assert all(torch.equal(tensor, other[key]) for key, tensor in one.items()), name


def told_by(folder):
    with safe_open(str(folder / "learned.safetensors"), framework="pt") as opened:
        return json.loads(opened.metadata()["superpose"])


@pytest.mark.parametrize("method", METHODS)
def test_folders_and_mappings_merge_alike(folders, statistics, merged, method):
    base, *tuned = [model_of(folder) for folder in folders]
    known = {}
    if method in KINDS:
        given = [load_with_shared(statistics[KINDS[method], folder.name]) for folder in folders[1:]]
        known["statistics"] = given
    else:
        learned = load_file(merged[method] / "learned.safetensors")
        if method == "localize_and_stitch":
            learned = {
                name: torch.stack([unpack(row, base[name].numel()).reshape(base[name].shape) for row in rows])
                for name, rows in learned.items()
            }
        known["learned"] = learned
    names = [folder.name for folder in folders[1:]]
    found = library.merge_tensors(base, tuned, method, names=names, **known, **OPTIONS.get(method, {}))
    wanted = load(merged[method])
    for name, tensor in found.items():
        assert torch.equal(tensor, wanted[name]), name
    assert any(not torch.equal(tensor, base[name]) for name, tensor in found.items())


def load_with_shared(file):
    tensors = load_file(file)
    with safe_open(str(file), framework="pt") as opened:
        told = json.loads(opened.metadata()["superpose"])
    return tensors | {name: tensors[owner] for name, owner in told.get("same", {}).items()}


def test_masks_of_another_shape_are_no_masks_of_the_tensor():
    """Even if they have as many entries."""
    base, tuned = {"up.weight": torch.zeros(4, 6)}, [{"up.weight": torch.ones(4, 6)}]
    learned = {"up.weight": torch.ones(1, 6, 4, dtype=torch.bool)}
    with pytest.raises((SuperposeError, Problems), match="does not fit the tensor"):
        library.merge_tensors(base, tuned, "localize_and_stitch", masks="learned", learned=learned)
    learned = {"up.weight": torch.ones(1, 4, 6, dtype=torch.bool)}
    found = library.merge_tensors(base, tuned, "localize_and_stitch", masks="learned", learned=learned)
    assert torch.equal(found["up.weight"], tuned[0]["up.weight"])


@pytest.mark.parametrize("method", METHODS)
def test_same_bytes_whatever_the_backend_the_workers_and_the_seed_of_hashes(tmp_path, recipe, merged, method):
    for name, settings in {
        "serial": {"backend": "serial"}, "one": {"workers": 1}, "three": {"workers": 3},
        "small": {"memory": "1KiB", "workers": 2},
    }.items():  # fmt: skip
        library.merge(recipe(method), tmp_path / name, **settings)
        assert weights(tmp_path / name) == weights(merged[method]), name


@pytest.mark.parametrize("method", METHODS)
def test_the_number_of_threads_of_the_caller_does_not_matter(tmp_path, recipe, merged, method):
    before = torch.get_num_threads()
    seen = []
    torch.set_num_threads(2)
    try:
        library.merge(
            recipe(method), tmp_path / "out", report=lambda now: seen.append((now.phase, torch.get_num_threads()))
        )
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert weights(tmp_path / "out") == weights(merged[method])
    if method in OPTIONS:
        assert {threads for phase, threads in seen if phase == "learn"} >= {1}


@pytest.mark.parametrize("method", METHODS)
def test_shards_and_their_order_do_not_matter(tmp_path, folders, recipe, merged, method):
    sharded = [save_sharded(folder, tmp_path / folder.name) for folder in folders]
    library.merge(recipe(method, sharded), tmp_path / "out")
    same(tmp_path / "out", merged[method])


@pytest.mark.parametrize("method", METHODS)
def test_large_tensors_are_merged_in_pieces_as_in_one(tmp_path, recipe, merged, method, monkeypatch):
    monkeypatch.setattr("superpose.merge_tensor.CHUNK", 56)
    monkeypatch.setattr("superpose.merge_tensor.SURVEY_CHUNK", 88)
    library.merge(recipe(method), tmp_path / "out")
    assert weights(tmp_path / "out") == weights(merged[method])


@pytest.mark.parametrize("method", METHODS)
def test_a_base_in_bfloat16_in_shards(tmp_path, folders, recipe, method):
    half = [save_sharded(folder, tmp_path / folder.name, dtype=torch.bfloat16) for folder in folders]
    library.merge(recipe(method, half), tmp_path / "out")
    found, base = load(tmp_path / "out"), load(half[0])
    for name in base:
        assert found[name].dtype == torch.bfloat16
        assert found[name].isfinite().all()
    assert any(not torch.equal(found[name], tensor) for name, tensor in base.items())


@pytest.mark.parametrize("method", ["adamerging", "lorahub"])
def test_the_seed_decides_what_is_drawn(tmp_path, recipe, merged, method):
    if method == "lorahub":
        more = {"options": {"evaluations": 12}}
        library.merge(recipe(method) | more | {"seed": 0}, tmp_path / "zero")
        library.merge(recipe(method) | more | {"seed": 1}, tmp_path / "one")
        assert weights(tmp_path / "zero") != weights(tmp_path / "one")
        return
    library.merge(recipe(method, seed=1), tmp_path / "one")
    assert weights(tmp_path / "one") != weights(merged[method])


@pytest.mark.parametrize("method", LEARNING)
def test_what_was_learned_is_used_again_without_data(tmp_path, folders, recipe, merged, method):
    options = {"options": OPTIONS[method]}
    for learned in (merged[method], merged[method] / "learned.safetensors"):
        made = {"base": str(folders[0]), "models": [str(folder) for folder in folders[1:]], "method": method, **options}
        record = library.merge({**made, "learned": str(learned)}, tmp_path / learned.name)
        assert weights(tmp_path / learned.name) == weights(merged[method])
        assert record.learned["saw"] == RunRecord.load(merged[method]).learned["saw"]


@pytest.mark.parametrize("method", LEARNING)
def test_in_another_order_of_models_too(tmp_path, folders, merged, method):
    models = [str(folders[2]), str(folders[1])]
    made = {"base": str(folders[0]), "models": models, "method": method, "options": OPTIONS[method]}
    library.merge({**made, "learned": str(merged[method])}, tmp_path / "out")
    found, wanted = load(tmp_path / "out"), load(merged[method])
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-7)


def test_by_the_command_line(tmp_path, folders, merged):
    options = [
        word for name, value in OPTIONS["adamerging"].items() for word in (f"--{name.replace('_', '-')}", str(value))
    ]
    done = CliRunner().invoke(
        app,
        ["merge", *map(str, folders), "-o", str(tmp_path / "out"), "--method", "adamerging", "--quiet",
         "--learned", str(merged["adamerging"]), *options],
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    assert weights(tmp_path / "out") == weights(merged["adamerging"])


def test_with_errors_that_name_the_model_the_method_or_the_tensor(tmp_path, folders, merged):
    def fails(change, *parts, learned=merged["adamerging"]):
        made = {"base": str(folders[0]), "models": [str(folder) for folder in folders[1:]], "method": "adamerging",
                "learned": str(learned), **change}  # fmt: skip
        with pytest.raises((SuperposeError, Problems)) as found:
            library.merge(made, tmp_path / "never")
        assert all(part in str(found.value) for part in parts), found.value
        assert not (tmp_path / "never").exists()

    renamed = [{"path": str(folders[1]), "name": "other"}, str(folders[2])]
    fails({"models": renamed}, "nothing was learned for model other", "task1, task2 are known")
    fails({"method": "lorahub"}, "it was learned by adamerging, and the method is lorahub")
    fails({"method": "task_arithmetic"}, "it was learned by adamerging, and the method is task_arithmetic")
    fails({}, "there is no file", learned=tmp_path / "nowhere")
    plain = tmp_path / "plain.safetensors"
    save_file({"*": torch.zeros(2, dtype=torch.float64)}, plain)
    fails({}, "does not say what was learned", learned=plain)
    torn = tmp_path / "torn.safetensors"
    torn.write_bytes((merged["adamerging"] / "learned.safetensors").read_bytes()[:-9])
    fails({}, "torn.safetensors", learned=torn)
    tensors, told = load_file(merged["adamerging"] / "learned.safetensors"), told_by(merged["adamerging"])
    name = "bert.encoder.layer.0.output.dense.weight"
    lacks = tmp_path / "lacks.safetensors"
    kept = {key: tensor for key, tensor in tensors.items() if key != name}
    save_file(kept, lacks, {"superpose": json.dumps(told)})
    fails({}, "nothing was learned for it", name, learned=lacks)
    odd = tmp_path / "odd.safetensors"
    save_file({**tensors, name: torch.zeros(3, dtype=torch.float64)}, odd, {"superpose": json.dumps(told)})
    fails({}, "what was learned has shape [3]", name, learned=odd)


@pytest.mark.parametrize("method", ["adamerging", "localize_and_stitch"])
def test_a_model_without_a_task_is_named(tmp_path, recipe, method):
    made = recipe(method)
    del made["models"][1]["task"]
    with pytest.raises((SuperposeError, Problems), match="learns from data, and this model has no task") as found:
        library.merge(made, tmp_path / "out")
    assert "task2" in str(found.value)


@pytest.mark.parametrize("method", sorted(KINDS))
def test_a_model_without_statistics_is_named(tmp_path, recipe, method):
    made = recipe(method)
    del made["models"][0]["statistics"]
    with pytest.raises((SuperposeError, Problems), match=r"needs .* statistics of this model") as found:
        library.merge(made, tmp_path / "out")
    assert "task1" in str(found.value)


@pytest.mark.parametrize("method", LEARNING)
def test_the_record_names_what_was_seen(recipe, files, merged, method):
    record = json.loads((merged[method] / "run.json").read_text())["learned"]
    assert record["sha256"] == hashlib.sha256((merged[method] / "learned.safetensors").read_bytes()).hexdigest()
    assert [seen["task"] for seen in record["saw"]] == ["task1", "task2"]
    assert [seen["data"] for seen in record["saw"]] == files
    assert {seen["examples"] for seen in record["saw"]} == {10}
    assert {seen["used"] for seen in record["saw"]} == {"unlabelled" if method == "adamerging" else "labelled"}
    assert ("transductive" in record) == (method == "adamerging")
    assert record["options"].items() >= OPTIONS[method].items()
    assert told_by(merged[method])["saw"] == record["saw"]


def test_the_record_names_the_split(tmp_path, folders):
    datasets = pytest.importorskip("datasets")
    splits = {"train": ["red", "blue"], "test": ["cold", "old warm"]}
    datasets.DatasetDict(
        {name: datasets.Dataset.from_dict({"text": texts}) for name, texts in splits.items()}
    ).save_to_disk(str(tmp_path / "set"))
    made = recipe_of(folders, [str(tmp_path / "set")] * 2, "adamerging", task={"split": "test"}, steps=1)
    record = library.merge(made, tmp_path / "out")
    assert [seen["split"] for seen in record.learned["saw"]] == ["test", "test"]
    assert "(test)" in " ".join(library.plan(made).notes)


@pytest.mark.parametrize("method", sorted(KINDS))
def test_the_record_names_the_statistics(merged, statistics, method):
    sources = RunRecord.load(merged[method]).sources
    told = [source["statistics"] for source in sources[1:]]
    assert [one["statistics"] for one in told] == [KINDS[method]] * 2
    assert all(len(one["data"]["sha256"]) == len(one["model"]["sha256"]) == 64 for one in told)


@pytest.mark.parametrize("method", LEARNING)
def test_a_plan_says_what_is_learned(recipe, files, method):
    made = library.plan(recipe(method))
    assert made.to_learn is not None
    assert any(f"{method} learns first, from {files[0]}" in note for note in made.notes)
    assert made.learning_memory > 0


@pytest.mark.parametrize("method", LEARNING)
def test_a_rule_keeps_tensors_at_the_base_while_the_rest_is_learned(tmp_path, folders, recipe, method):
    rules = [{"match": "*layer.0*", "keep": "base"}]
    library.merge(recipe(method, rules=rules), tmp_path / "out")
    base, found = load(folders[0]), load_file(tmp_path / "out" / "model.safetensors")
    learned = load_file(tmp_path / "out" / "learned.safetensors")
    for name, tensor in base.items():
        if "layer.0" in name:
            assert torch.equal(found[name], tensor)
            assert name not in learned
    assert any(not torch.equal(found[name], tensor) for name, tensor in base.items())
    # The models that are learned with have the base's tensors there: others would have another loss.
    everywhere = [folders[0]]
    for folder in folders[1:]:
        other = tmp_path / folder.name
        shutil.copytree(folder, other)
        tensors = {name: base[name] if "layer.0" in name else t for name, t in load(folder).items()}
        save_file(tensors, other / "model.safetensors", {"format": "pt"})
        everywhere.append(other)
    library.merge(recipe(method, everywhere, rules=rules), tmp_path / "again")
    same(tmp_path / "out", tmp_path / "again")


def test_rules_with_other_methods_do_not_go_with_learning(tmp_path, recipe):
    made = recipe("adamerging", rules=[{"match": "*bias", "method": "average"}])
    with pytest.raises((SuperposeError, Problems), match="rules merge parts of it otherwise"):
        library.merge(made, tmp_path / "out")


KILLED = """
import os, signal, sys
from superpose.cli import main
from superpose.learning import adamerging, localize_and_stitch, lorahub, setting

adamerging.SECONDS_BETWEEN_SAVES = -1.0
real, count = setting.State.save, [0]

def save(state, *arguments):
    real(state, *arguments)
    count[0] += 1
    if count[0] == int(os.environ["DIES_AFTER"]):
        os.kill(os.getpid(), 9)

setting.State.save = save
main()
"""


@pytest.mark.parametrize(
    "method", [pytest.param(method, marks=pytest.mark.slow) if method != "lorahub" else method for method in LEARNING]
)
def test_killed_while_it_learns_it_goes_on_to_the_same_bytes(tmp_path, recipe, merged, method):
    file, out = tmp_path / "recipe.yaml", tmp_path / "out"
    file.write_text(json.dumps(recipe(method)))
    command = [sys.executable, "-c", KILLED, "merge", str(file), "-o", str(out), "--quiet", "--workers", "1"]
    after = {"adamerging": "3", "localize_and_stitch": "1", "lorahub": "4"}[method]
    done = subprocess.run(command, env={**os.environ, "HF_HUB_OFFLINE": "1", "DIES_AFTER": after}, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not out.exists()
    state = tmp_path / "out.partial" / "learning"
    assert list(state.iterdir())
    steps = []
    library.merge(recipe(method), out, report=lambda now: steps.append(now.done) if now.phase == "learn" else None)
    assert weights(out) == weights(merged[method])
    assert steps[0] > 0 or method == "localize_and_stitch"
    assert not (out / "learning").exists()
    assert not state.exists()


@pytest.mark.parametrize("method", LEARNING)
def test_stopped_while_it_merges_it_does_not_learn_again(tmp_path, recipe, merged, method, monkeypatch):
    from superpose import run

    real, count = run.merge_item, []

    def failing(item, *arguments, **more):
        count.append(item.name)
        if len(count) == 5:
            raise KeyboardInterrupt
        return real(item, *arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(run, "merge_item", failing)
        with pytest.raises(KeyboardInterrupt):
            library.merge(recipe(method), tmp_path / "out", backend="serial")
    phases = []
    record = library.merge(recipe(method), tmp_path / "out", report=lambda now: phases.append(now.phase))
    assert "learn" not in phases
    assert record.totals["resumed"] == 4
    assert weights(tmp_path / "out") == weights(merged[method])


def test_what_was_learned_from_other_data_is_not_used(tmp_path, recipe, monkeypatch):
    from superpose import run

    with monkeypatch.context() as patch:
        patch.setattr(run, "merge_item", lambda *a, **m: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            library.merge(recipe("lorahub"), tmp_path / "out", backend="serial")
    other = recipe("lorahub")
    other["models"][0]["task"]["data"] = classified(tmp_path / "other.jsonl", 10, seed=77)
    library.merge(other, tmp_path / "out")
    library.merge(other, tmp_path / "whole")
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")


def test_inputs_are_left_as_they_were(folders, files, statistics, merged, root):
    """After all of the above merges."""
    again = family(root / "again")
    assert [weights(folder) for folder in folders] == [weights(folder) for folder in again]


def test_fisher_and_gram_of_gpt2_merge(tmp_path, root):
    """Its head is tied, its maps are stored in x out and fused."""
    folders = family(tmp_path / "gpt2", make_gpt2)
    file = prompted(tmp_path / "prompts.jsonl")
    for method, kind in KINDS.items():
        models = []
        for folder in folders[1:]:
            out = tmp_path / f"{folder.name}.{kind}.safetensors"
            compute_statistics(kind, folder, {"data": file, "target": "target"}, out, threads=1)
            models.append({"path": str(folder), "statistics": str(out)})
        library.merge({"base": str(folders[0]), "models": models, "method": method}, tmp_path / method)
        found = load(tmp_path / method)
        name = "transformer.h.0.mlp.c_fc.weight"
        tuned = [load(folder)[name].double() for folder in folders[1:]]
        known = [load_file(model["statistics"])[name].double() for model in models]
        if method == "fisher":
            norms = [sum(t.double().square().sum() for t in load_file(m["statistics"]).values()).sqrt() for m in models]
            counted = [(each / norm).clamp_min(1e-6) for each, norm in zip(known, norms, strict=True)]
            wanted = sum(c * t for c, t in zip(counted, tuned, strict=True)) / sum(counted)
        else:  # stored in x out: no transposes
            shrunk = [0.9 * g + 0.1 * torch.diag(g.diagonal()) for g in known]
            wanted = torch.linalg.solve(sum(shrunk), sum(g @ t for g, t in zip(shrunk, tuned, strict=True)))
        assert (found[name] - wanted).abs().max() < 1e-3 * (tuned[0] - tuned[1]).abs().max()
        assert "lm_head.weight" not in found


@pytest.fixture(scope="module")
def adapted(root):
    base = make_llama(root / "llama")
    places = [adapters.adapter(root / f"adapter{seed}", base, seed, size=0.05) for seed in (1, 2, 3)]
    return base, places, prompted(root / "new.jsonl", 4)


@pytest.mark.parametrize("space", ["delta", "factor"])
@pytest.mark.parametrize("form", ["model", "adapter"])
def test_lorahub_finds_coefficients_for_a_new_task(tmp_path, adapted, space, form):
    base, places, file = adapted
    made = {
        "base": str(base), "models": [str(place) for place in places], "method": "lorahub",
        "options": {"evaluations": 10, "space": space}, "output": {"form": form},
        "task": {"data": file, "target": "target"},
    }  # fmt: skip
    record = library.merge(made, tmp_path / "out")
    told = record.learned
    assert told["evaluations"] == 10
    assert told["value"] <= told["value_of_the_base"]
    found = load_file(tmp_path / "out" / "learned.safetensors")["*"]
    assert found.abs().max() <= 1.5
    assert list(told["coefficients"].values()) == found.tolist()
    assert [seen["task"] for seen in told["saw"]] == ["task"]
    again = {name: value for name, value in made.items() if name != "task"} | {"learned": str(tmp_path / "out")}
    library.merge(again, tmp_path / "again")
    assert weights(tmp_path / "again") == weights(tmp_path / "out")


def test_lorahub_values_what_it_writes(tmp_path, adapted):
    """The value in the record is the loss of the model that is written, and the penalty."""
    from transformers import AutoTokenizer, LlamaForCausalLM

    base, places, file = adapted
    made = {
        "base": str(base), "models": [str(place) for place in places], "method": "lorahub",
        "options": {"evaluations": 8, "penalty": 0.2}, "task": {"data": file, "target": "target", "batch_size": 3},
    }  # fmt: skip
    told = library.merge(made, tmp_path / "out").learned
    tokenizer, values = AutoTokenizer.from_pretrained(base), {}
    for folder in (base, tmp_path / "out"):
        model, losses = LlamaForCausalLM.from_pretrained(folder).eval(), []
        for row in read(file):
            prompt, rest = tokenizer(row["text"])["input_ids"], [*tokenizer(row["target"])["input_ids"], 1]
            with torch.no_grad():
                scores = model(input_ids=torch.tensor([prompt + rest])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            losses.append(-scores[range(len(rest)), rest].mean().item())
        values[folder] = sum(losses) / len(losses)
    size = sum(map(abs, told["coefficients"].values())) / 3
    assert told["value_of_the_base"] == pytest.approx(values[base], rel=1e-5)
    assert told["value"] == pytest.approx(values[tmp_path / "out"] + 0.2 * size, rel=1e-5)


def test_lorahub_without_data_takes_the_weights(tmp_path, adapted):
    base, places, _ = adapted
    models = [{"path": str(place), "weight": weight} for place, weight in zip(places, (0.5, 1.0, -0.25), strict=True)]
    library.merge({"base": str(base), "models": models, "method": "lorahub"}, tmp_path / "out")
    wanted = adapters.added(*[adapters.deltas(base, place) for place in places], factors=(0.5, 1.0, -0.25))
    before, after = adapters.state(base), adapters.state(tmp_path / "out")
    found = {name: (after[name] - before[name]).double() for name in wanted}
    assert adapters.distance(found, wanted) < 1e-5


def test_statistics_of_adapters(tmp_path, adapted):
    """MODEL+ADAPTER has statistics under the names of the base's tensors."""
    base, places, file = adapted
    for method, kind in KINDS.items():
        models = []
        for place in places[:2]:
            out = tmp_path / f"{place.name}.{kind}.safetensors"
            task = {"data": file, "target": "target"}
            compute_statistics(kind, f"{base}+{place}", task, out, threads=1)
            models.append({"path": str(place), "statistics": str(out)})
        made = {"base": str(base), "models": models, "method": method}
        assert not [note for note in library.plan(made).notes if "differ in name or size" in note]
        library.merge(made, tmp_path / method)
        found = load(tmp_path / method)
        assert any(not torch.equal(found[name], tensor) for name, tensor in load(base).items())


def test_two_merges_wait_for_none_of_the_learning(tmp_path, recipe):
    """A merge that learns holds the output's lock all along."""
    from superpose.output_folder import locked

    with locked(tmp_path / "out.partial"), pytest.raises(SuperposeError, match="another merge"):
        library.merge(recipe("lorahub"), tmp_path / "out")
    assert not (tmp_path / "out.partial" / "learning").exists()
