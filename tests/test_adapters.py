"""Adapters in, adapters out, with PEFT as the judge: the laws of issue-sized promises, on real PEFT folders."""

from __future__ import annotations

import json

import pytest
import torch
from adapters import adapter, added, deltas, distance, folded, gpt2, llama, loralib, state
from families import generator
from safetensors.torch import load_file
from typer.testing import CliRunner

import superpose
from superpose.cli import app

pytest.importorskip("peft")
EXACT = 1e-6
ONE = {"method": "task_arithmetic", "options": {"scaling_factor": 1.0}}
SHAPES = {
    "alpha is not the rank": {"r": 4, "lora_alpha": 10},
    "rank-stabilised": {"use_rslora": True},
    "ranks and alphas by pattern": {
        "rank_pattern": {"layers.0.self_attn.q_proj": 2, r"^model\.layers\.1\.self_attn\.v_proj": 6},
        "alpha_pattern": {"v_proj": 3},
    },
    "all linear maps": {"target_modules": "all-linear"},
    "the head": {"target_modules": ["q_proj", "lm_head"]},
    "embeddings": {"target_modules": ["embed_tokens", "q_proj"]},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return llama(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def conv1d(tmp_path_factory):
    return gpt2(tmp_path_factory.mktemp("models") / "gpt2")


@pytest.fixture(scope="module")
def three(base, tmp_path_factory):
    """Adapters of unequal ranks, scales and targets."""
    place = tmp_path_factory.mktemp("three")
    return [
        adapter(place / "first", base, 1),
        adapter(place / "second", base, 2, r=2, lora_alpha=6, target_modules=["q_proj", "up_proj"]),
        adapter(place / "third", base, 3, r=3, use_rslora=True, target_modules=["v_proj", "up_proj", "down_proj"]),
    ]


def merge(base, models, target, *, form="adapter", **recipe):
    output = {"form": form, **recipe.pop("output", {})}
    models = [model if isinstance(model, dict) else {"path": model} for model in models]
    return superpose.merge({"base": base, "models": models, "output": output, **recipe}, target)


@pytest.mark.parametrize("shape", SHAPES)
def test_one_adapter_of_weight_one_gives_back_its_delta(shape, base, tmp_path):
    one = adapter(tmp_path / "one", base, 5, **SHAPES[shape])
    merge(base, [one], tmp_path / "out", **ONE)
    assert distance(deltas(base, tmp_path / "out"), deltas(base, one)) < EXACT


def test_one_adapter_of_weights_stored_in_x_out_gives_back_its_delta(conv1d, tmp_path):
    one = adapter(tmp_path / "one", conv1d, 5, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)
    merge(conv1d, [one], tmp_path / "out", **ONE)
    assert distance(deltas(conv1d, tmp_path / "out"), deltas(conv1d, one)) < EXACT
    assert json.loads((tmp_path / "out/adapter_config.json").read_text())["fan_in_fan_out"] is True


@pytest.mark.parametrize("method", ["task_arithmetic", "average", "pem", "lorahub", "trimmed_task_arithmetic"])
def test_the_sum_is_exact_at_full_rank(method, base, three, tmp_path):
    options = {"scaling_factor": 0.7} if method in ("task_arithmetic", "pem", "trimmed_task_arithmetic") else {}
    factor = {"average": 1 / 3, "pem": 0.7 / 3, "lorahub": 1.0}.get(method, 0.7)
    record = merge(base, three, tmp_path / "out", method=method, options=options)
    expected = added(*(deltas(base, one) for one in three), factors=(factor,) * 3)
    assert distance(deltas(base, tmp_path / "out"), expected) < EXACT
    assert record.totals["truncation_error"] == 0
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 7  # q_proj: 4 + 2, v_proj: 4 + 3
    assert not config["rank_pattern"]


def dense(base, models, method, weights=None, **options):
    """Return what a method makes of the updates written out, in float64, by the code for models."""
    changes = [deltas(base, one) for one in models]
    names = sorted(set().union(*changes))
    shapes = {name: next(change[name].shape for change in changes if name in change) for name in names}
    zeros = {name: torch.zeros(shapes[name], dtype=torch.float64) for name in names}
    tuned = [{name: change[name].double() if name in change else zeros[name] for name in names} for change in changes]
    return superpose.merge_tensors(zeros, tuned, method, weights=weights, names=[one.name for one in models], **options)


FACTORED = {
    "stf": {"density": 1.0, "scaling_factor": 0.9},
    "stf, a ridge": {"density": 1.0, "ridge": 0.01},
    "stf, some features": {"density": 1.0, "rank": 2},
    "stf, without the ends": {"density": 1.0, "remove_smallest": 0.3, "remove_largest": 0.3},
    "tsv": {},
    "iso_c": {},
    "iso_cts": {"common_fraction": 0.9},
    "iso_share": {},
    "knots": {"density": 0.3},
    "knots, by tensor": {"density": 0.3, "density_scope": "tensor"},
    "knots, strengths apart": {"density": 0.5, "weight_by_sigma": False},
    "knots, dare_ties": {"merger": "dare_ties", "density": 0.5, "dare_density": 0.8},
    "knots, task_arithmetic": {"merger": "task_arithmetic"},
}


@pytest.mark.parametrize("case", FACTORED)
@pytest.mark.parametrize("layout", ["out x in", "in x out"])
def test_factors_merge_as_the_updates_written_out_do(case, layout, base, conv1d, three, tmp_path):
    method, options = case.partition(",")[0], FACTORED[case]
    models = three
    if layout == "in x out":
        base = conv1d
        models = [
            adapter(tmp_path / str(seed), conv1d, seed, r=2 + seed % 2, target_modules=["c_proj", "c_fc"])
            for seed in (1, 2, 3)
        ]
    made = superpose.plan({"base": base, "models": [{"path": one} for one in models], "method": method,
                           "options": options, "output": {"form": "adapter"}})  # fmt: skip
    assert all(item.in_factors and not item.reads_base for item in made.items)
    merge(base, models, tmp_path / "out", method=method, options=options)
    expected = {name: delta for name, delta in dense(base, models, method, **options).items() if delta.abs().max() > 0}
    assert distance(deltas(base, tmp_path / "out"), expected) < 5 * EXACT


@pytest.mark.parametrize("method", ["ties", "dare_ties", "pcb", "slerp", "breadcrumbs", "stf"])
def test_what_needs_entries_is_merged_tensor_by_tensor(method, base, three, tmp_path):
    models = three[:2]
    options = {"density": 0.5} if method in ("ties", "stf") else {}
    merge(base, models, tmp_path / "out", method=method, options=options, output={"rank": 24})
    expected = dense(base, models, method, **options) if method != "slerp" else None
    found = deltas(base, tmp_path / "out")
    if expected is None:  # it acts on weights
        merge(base, models, tmp_path / "model", form="model", method=method)
        merged, own = state(tmp_path / "model"), state(base)
        expected = {name: merged[name].double() - own[name].double() for name in found}
        assert distance(found, expected) < 1e-4  # differences of float32 weights
        return
    assert distance(found, {name: delta for name, delta in expected.items() if delta.abs().max() > 0}) < 5 * EXACT


def test_without_a_rank_such_a_method_makes_no_adapter(base, three, tmp_path):
    with pytest.raises(superpose.SuperposeError, match="changes single entries") as caught:
        merge(base, three, tmp_path / "out", method="ties")
    assert "--adapter-rank" in caught.value.mend
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("shape", SHAPES)
def test_folding_gives_the_model_that_peft_gives(shape, base, tmp_path):
    one = adapter(tmp_path / "one", base, 5, **SHAPES[shape])
    merge(base, [one], tmp_path / "out", form="model", **ONE)
    found, expected = state(tmp_path / "out"), folded(base, one)
    assert set(found) == set(expected)
    assert all(torch.allclose(found[name], expected[name], rtol=0, atol=2e-6) for name in expected)


def test_both_forms_say_the_same(base, three, tmp_path):
    merge(base, three, tmp_path / "out", form="both", method="stf")
    merge(base, three, tmp_path / "model", form="model", method="stf")
    model, apart = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "model"))
    assert all(torch.equal(model[name], apart[name]) for name in apart)
    own = load_file(base / "model.safetensors")
    for name, delta in deltas(base, tmp_path / "out/adapter").items():
        assert torch.allclose(own[name] + delta.float(), model[name], rtol=0, atol=2e-6)


def test_the_order_of_adapters_is_no_matter(base, three, tmp_path):
    merge(base, three, tmp_path / "one", method="stf")
    merge(base, three[::-1], tmp_path / "other", method="stf")
    assert distance(deltas(base, tmp_path / "one"), deltas(base, tmp_path / "other")) < EXACT


@pytest.mark.parametrize("place", ["tuned", "base"])
def test_a_model_with_an_adapter_on_it_is_a_model(place, base, three, tmp_path):
    merge(base, three[:1], tmp_path / "folded", form="model", **ONE)
    both = f"{base}+{three[0]}"
    models = [both, three[1]] if place == "tuned" else [three[1]]
    start = base if place == "tuned" else both
    merge(start, models, tmp_path / "out", form="model", **ONE)
    expected = added(*(deltas(base, one) for one in three[:2]))
    own, found = state(base), state(tmp_path / "out")
    assert all(torch.allclose(own[n].double() + expected[n], found[n].double(), rtol=0, atol=2e-6) for n in expected)
    assert all(torch.equal(own[name], found[name]) for name in set(own) - set(expected))


def test_full_models_and_adapters_merge_together(base, three, tmp_path):
    tuned = llama(tmp_path / "tuned", seed=3)
    merge(base, [tuned, three[0]], tmp_path / "out", form="model", method="average")
    own, other, found = state(base), state(tuned), state(tmp_path / "out")
    change = deltas(base, three[0])
    for name, tensor in found.items():
        expected = (own[name] + other[name]) / 2 + (change[name].float() / 2 if name in change else 0)
        assert torch.allclose(tensor, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("limit", [{"rank": 3}, {"energy": 0.8}, {"energy": 0.8, "per_layer_rank": True},
                                   {"rank": 5, "energy": 0.9, "per_layer_rank": True}])  # fmt: skip
def test_truncation_is_the_best_there_is_and_its_error_is_recorded(limit, base, three, tmp_path):
    record = merge(base, three, tmp_path / "out", method="stf", output=limit)
    merge(base, three, tmp_path / "whole", method="stf")
    found, whole = deltas(base, tmp_path / "out"), deltas(base, tmp_path / "whole")
    lost, norm = 0.0, 0.0
    for tensor in record.tensors:
        s = torch.linalg.svdvals(whole[tensor.name].double())
        rank = tensor.stats["adapter_rank"]
        share = s.square().cumsum(0) / s.square().sum()
        wanted = int(torch.searchsorted(share, limit["energy"])) + 1 if "energy" in limit else len(s)
        assert rank == min(wanted, limit.get("rank", wanted))
        best = float(s[rank:].norm())
        assert float((found[tensor.name] - whole[tensor.name]).norm()) == pytest.approx(best, rel=1e-3, abs=1e-5)
        assert tensor.stats["truncation_error"] == pytest.approx(best / float(s.norm()), rel=1e-3, abs=1e-6)
        lost, norm = lost + best**2, norm + float(s.square().sum())
    assert record.totals["truncation_error"] == pytest.approx((lost / norm) ** 0.5, rel=1e-3)
    ranks = {tensor.shape[0] for name, tensor in load_file(tmp_path / "out/adapter_model.safetensors").items()
             if name.endswith("lora_A.weight")}  # fmt: skip
    assert (len(ranks) > 1) == limit.get("per_layer_rank", False)


def test_an_update_of_biases_and_saved_modules_is_kept(base, tmp_path):
    one = adapter(tmp_path / "one", base, 5, modules_to_save=["norm"])
    other = adapter(tmp_path / "other", base, 6, modules_to_save=["norm"])
    merge(base, [one, other], tmp_path / "out", method="average")
    found = folded(base, tmp_path / "out")
    expected = (folded(base, one)["model.norm.weight"] + folded(base, other)["model.norm.weight"]) / 2
    assert torch.allclose(found["model.norm.weight"], expected, atol=1e-6)
    record = merge(base, [one, other], tmp_path / "without", method="average", output={"rest": "drop"})
    assert torch.equal(folded(base, tmp_path / "without")["model.norm.weight"], state(base)["model.norm.weight"])
    assert any("left out" in warning for warning in record.warnings)
    with pytest.raises(superpose.SuperposeError, match=r"holds no model\.layers\.0\.input_layernorm"):
        merge(base, [one, other], tmp_path / "refused", method="average", output={"rest": "refuse"})


def test_dora_is_folded_as_peft_folds_it(base, tmp_path):
    one = adapter(tmp_path / "one", base, 5, use_dora=True)
    merge(base, [one], tmp_path / "out", form="model", **ONE)
    found, expected = state(tmp_path / "out"), folded(base, one)
    assert all(torch.allclose(found[name], expected[name], rtol=0, atol=5e-6) for name in expected)


def test_a_head_tied_to_the_embedding_is_merged_as_an_adapter_only(tmp_path):
    tied = llama(tmp_path / "tied", tied=True)
    one = adapter(tmp_path / "one", tied, 5, target_modules=["q_proj", "lm_head"])
    with pytest.raises(superpose.SuperposeError, match=r"changes lm_head\.weight, which the base ties"):
        merge(tied, [one], tmp_path / "model", form="model", **ONE)
    merge(tied, [one], tmp_path / "out", **ONE)
    assert distance(deltas(tied, tmp_path / "out"), deltas(tied, one)) < EXACT


def test_the_base_is_not_needed_where_it_is_on_the_hub(base, three, tmp_path):
    record = merge("somebody/their-model", three, tmp_path / "out", method="stf")
    merge(base, three, tmp_path / "with", method="stf")
    assert distance(deltas(base, tmp_path / "out"), deltas(base, tmp_path / "with")) < EXACT
    assert not any("their-model" in str(source["files"]) for source in record.sources)


def test_an_adapter_of_another_base_is_refused(base, conv1d, tmp_path):
    one = adapter(tmp_path / "one", conv1d, 5, target_modules=["c_attn"])
    with pytest.raises(superpose.SuperposeError, match="changes 2 tensors that the base does not have"):
        merge(base, [one], tmp_path / "out", **ONE)
    wide = LlamaConfigWide(tmp_path / "wide")
    other = adapter(tmp_path / "other", wide, 5)
    with pytest.raises(superpose.SuperposeError, match="does not fit a weight of 24 x 24"):
        merge(base, [other], tmp_path / "out", **ONE)


def LlamaConfigWide(folder):  # noqa: N802 - makes a model of another width
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=60, hidden_size=32, intermediate_size=40, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


BROKEN = {
    "another kind": ({"peft_type": "IA3"}, "of type IA3"),
    "a changed base": ({"init_lora_weights": "pissa"}, "changes the base before training"),
    "tokens": ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
    "no alpha": ({"lora_alpha": None}, "does not say r and lora_alpha"),
    "another rank": ({"r": 7}, "rank 4, adapter_config.json says 7"),
    "a pattern that never ends": ({"rank_pattern": {"(a+)+": 3}}, "no mapping of patterns"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_no_low_rank_update_is_refused_by_name(case, base, three, tmp_path):
    change, message = BROKEN[case]
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        (broken / file).write_bytes((three[0] / file).read_bytes())
    config = json.loads((broken / "adapter_config.json").read_text())
    (broken / "adapter_config.json").write_text(json.dumps({**config, **change}))
    done = CliRunner().invoke(app, ["merge", str(base), str(broken), "-o", str(tmp_path / "out"), "--form", "adapter"])
    assert done.exit_code == 2
    assert message in done.output
    assert "mend:" in done.output
    assert not (tmp_path / "out").exists()


def test_grouped_factors_of_loralib_act_on_query_and_value(conv1d, tmp_path):
    name, rank, width = "transformer.h.0.attn.c_attn", 2, 24
    models, expected = [], []
    for seed in (1, 2):
        down = torch.randn(2 * rank, width, generator=generator("down", seed))
        up = torch.randn(2 * width, rank, generator=generator("up", seed))
        config = {"r": rank, "lora_alpha": 8, "fan_in_fan_out": True, "enable_lora": [True, False, True]}
        models.append(loralib(tmp_path / f"lib{seed}", {f"{name}.lora_A": down, f"{name}.lora_B": up}, **config))
        down, up = down.double() * 8 / rank, up.double()
        blocks = [up[:width] @ down[:rank], torch.zeros(width, width), up[width:] @ down[rank:]]
        expected.append(torch.cat(blocks).T)  # the weight is stored in x out
    merge(conv1d, models, tmp_path / "out", **ONE)
    total = added(*({f"{name}.weight": update} for update in expected))
    assert distance(deltas(conv1d, tmp_path / "out"), total) < EXACT
    # Map by map, as if query and value were stored apart.
    merge(conv1d, models, tmp_path / "stf", method="stf", options={"scaling_factor": 1.0})
    blocks = [[update[:, start : start + width] for update in expected] for start in (0, 24, 48)]
    merged = [
        superpose.merge_tensors(
            {"proj.weight": torch.zeros(width, width).double()},
            [{"proj.weight": block.double()} for block in of_map], "stf", density=1.0, scaling_factor=1.0,
        )["proj.weight"]
        for of_map in blocks
    ]  # fmt: skip
    whole = {f"{name}.weight": torch.cat(merged, dim=1)}
    assert distance(deltas(conv1d, tmp_path / "stf"), whole) < 5 * EXACT


def test_factors_of_several_maps_have_to_be_told_apart(conv1d, tmp_path):
    name = "transformer.h.0.attn.c_attn"
    tensors = {f"{name}.lora_A": torch.randn(4, 24), f"{name}.lora_B": torch.randn(48, 2)}
    one = loralib(tmp_path / "one", tensors, r=2, lora_alpha=8)
    with pytest.raises(superpose.SuperposeError, match="nothing says which"):
        merge(conv1d, [one], tmp_path / "out", **ONE)


@pytest.mark.parametrize("method", ["pem", "lorahub"])
def test_factor_space_adds_up_factors(method, base, tmp_path):
    models = [adapter(tmp_path / str(seed), base, seed) for seed in (1, 2)]
    weights = [0.25, 0.75]
    entries = [{"path": one, "weight": weight} for one, weight in zip(models, weights, strict=True)]
    merge(base, entries, tmp_path / "out", method=method, options={"space": "factor"})
    factors = [load_file(one / "adapter_model.safetensors") for one in models]
    expected = {}
    for key in factors[0]:
        if key.endswith("lora_A.weight"):
            down = sum(w * f[key] for w, f in zip(weights, factors, strict=True))
            up = sum(w * f[key.replace("lora_A", "lora_B")] for w, f in zip(weights, factors, strict=True))
            name = key.removeprefix("base_model.model.").replace("lora_A.weight", "weight")
            expected[name] = 2.0 * up @ down
    assert distance(deltas(base, tmp_path / "out"), expected) < EXACT
    assert json.loads((tmp_path / "out/adapter_config.json").read_text())["r"] == 4


@pytest.mark.parametrize("space", ["delta", "factor"])
def test_negation_is_its_own_inverse(space, base, three, tmp_path):
    options = {"space": space}
    merge(base, [{"path": three[0], "weight": -1}], tmp_path / "negated", method="pem", options=options)
    opposite = added(deltas(base, three[0]), factors=(-1.0,))
    assert distance(deltas(base, tmp_path / "negated"), opposite) < EXACT
    merge(base, [{"path": tmp_path / "negated", "weight": -1}], tmp_path / "again", method="pem", options=options)
    assert distance(deltas(base, tmp_path / "again"), deltas(base, three[0])) < EXACT


def test_factor_space_needs_adapters_of_one_rank(base, three, tmp_path):
    with pytest.raises(superpose.SuperposeError, match="ranks 2, 4 cannot be added up"):
        merge(base, three[:2], tmp_path / "out", method="pem", options={"space": "factor"})
    with pytest.raises(superpose.SuperposeError, match="only factors of adapters"):
        merge(base, [base, base], tmp_path / "out", form="model", method="pem", options={"space": "factor"})


def test_a_fine_tune_becomes_an_adapter(base, tmp_path):
    tuned = llama(tmp_path / "tuned", seed=3)
    for rank in (2, 24):
        record = superpose.extract(base, tuned, tmp_path / f"rank{rank}", rank=rank)
        own, other = state(base), state(tuned)
        found = deltas(base, tmp_path / f"rank{rank}")
        lost, norm = 0.0, 0.0
        for name, delta in found.items():
            whole = other[name].double() - own[name].double()
            best = float(torch.linalg.svdvals(whole)[rank:].norm())
            assert float((delta - whole).norm()) == pytest.approx(best, rel=0.05, abs=1e-5)
            lost, norm = lost + best**2, norm + float(whole.norm()) ** 2
        assert record.totals["truncation_error"] == pytest.approx((lost / norm) ** 0.5, rel=0.05, abs=1e-4)
        assert any("embed_tokens" in warning and "left out" in warning for warning in record.warnings)
    assert set(found) == {name for name in own if "proj" in name or name == "lm_head.weight"}


def test_a_fine_tune_of_weights_stored_in_x_out_becomes_an_adapter(conv1d, tmp_path):
    one = adapter(tmp_path / "one", conv1d, 5, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)
    merge(conv1d, [one], tmp_path / "tuned", form="model", **ONE)
    superpose.extract(conv1d, tmp_path / "tuned", tmp_path / "out", rank=4)
    assert distance(deltas(conv1d, tmp_path / "out"), deltas(conv1d, one)) < 1e-4  # the fine-tune was rounded


def test_an_adapter_gets_a_smaller_rank(base, three, tmp_path):
    record = superpose.extract(base, three[0], tmp_path / "small", rank=2)
    whole, found = deltas(base, three[0]), deltas(base, tmp_path / "small")
    assert all(torch.linalg.matrix_rank(delta) == 2 for delta in found.values())
    assert record.totals["truncation_error"] == pytest.approx(distance(found, whole), rel=1e-3)


def test_an_interrupted_merge_of_adapters_goes_on_to_the_same_bytes(base, three, tmp_path, monkeypatch):
    merge(base, three, tmp_path / "whole", method="stf", output={"energy": 0.9})
    import superpose.run as run

    done, merge_item = [], run.merge_item

    def failing(item, *rest):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(item.name)
        return merge_item(item, *rest)

    monkeypatch.setattr(run, "merge_item", failing)
    recipe = {"base": base, "models": [{"path": one} for one in three], "method": "stf",
              "output": {"form": "adapter", "energy": 0.9}}  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        superpose.merge(recipe, tmp_path / "out", backend="serial")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(run, "merge_item", merge_item)
    record = superpose.merge(recipe, tmp_path / "out", backend="serial")
    assert record.totals["resumed"] == 2
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        path.name for path in (tmp_path / "whole").iterdir()
    )


def test_features_survive_as_measured_in_factors(base, three, tmp_path):
    recipe = {"base": base, "models": [{"path": one} for one in three], "method": "stf"}
    in_factors = superpose.merge({**recipe, "output": {"form": "adapter"}}, tmp_path / "out", measure=True)
    for tensor in in_factors.tensors:
        assert tensor.measures["untrimmed"]["relative"] < 1e-4
        assert set(tensor.measures["untrimmed"]["by_task"]) == {"first", "second", "third"}


def test_adapters_are_compared_like_fine_tunes(base, three, tmp_path):
    full = []
    for number, one in enumerate(three[:2]):
        merge(base, [one], tmp_path / str(number), form="model", **ONE)
        full.append(tmp_path / str(number))
    found, expected = (superpose.compare(base, models) for models in (three[:2], full))
    for ours, theirs in zip(found.whole.tasks, expected.whole.tasks, strict=True):
        assert ours.norm == pytest.approx(theirs.norm, rel=1e-4)
    assert found.whole.pairs[0].cosine == pytest.approx(expected.whole.pairs[0].cosine, abs=1e-4)


@pytest.mark.parametrize("workers", [1, 2])
def test_the_bytes_are_the_same_whatever_the_workers(workers, base, three, tmp_path):
    recipe = {"base": base, "models": [{"path": one} for one in three], "method": "stf", "output": {"form": "both"}}
    superpose.merge(recipe, tmp_path / "serial", backend="serial")
    superpose.merge(recipe, tmp_path / "out", workers=workers)
    for file in ("model.safetensors", "adapter/adapter_model.safetensors"):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "serial" / file).read_bytes()


def test_the_command_line_tells_of_ranks_and_of_what_is_lost(base, three, tmp_path):
    arguments = ["merge", str(base), *map(str, three), "-o", str(tmp_path / "out"), "-m", "stf", "--form", "adapter",
                 "--adapter-rank", "4", "-q"]  # fmt: skip
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "an adapter of rank 4" in done.output
    assert "left out" in done.output
    shown = CliRunner().invoke(app, ["inspect", str(tmp_path / "out")])
    assert shown.exit_code == 0
    assert "rank" in shown.output


def test_extract_on_the_command_line(base, three, tmp_path):
    done = CliRunner().invoke(app, ["extract", str(base), str(three[0]), "-o", str(tmp_path / "o"), "--rank", "2"])
    assert done.exit_code == 0, done.output
    assert "updates of rank 2" in done.output
