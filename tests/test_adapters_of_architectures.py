"""Adapters of models that name, store or share their weights in ways of their own; PEFT loads what comes out."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
import transformers as tf
from adapters import adapter, deltas, distance, folded, gpt2, llama, named, noisy, state
from families import generator
from safetensors.torch import load_file, save_file

import superpose

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")  # what PEFT says of tied weights; of missing keys see `on`
ONE = {"method": "task_arithmetic", "options": {"scaling_factor": 1.0}}
WHOLE = {"form": "adapter", "rank": 24}


def merge(base, models, target, output, **recipe):
    return superpose.merge(
        {"base": base, "models": [{"path": model} for model in models], "output": output, **recipe}, target
    )


def on(kind, base, folder):
    """Return the base with the adapter on it; a warning of PEFT about keys is an error."""
    model = kind.from_pretrained(base, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message=".*missing.*|.*unexpected.*")
        return peft.PeftModel.from_pretrained(model, folder)


def qwen(folder, *, tied=False):
    config = tf.Qwen2Config(
        vocab_size=60, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=tied, max_window_layers=2,
    )  # fmt: skip
    torch.manual_seed(0)
    return tf.Qwen2ForCausalLM(config)


def same(found, expected, tolerance):
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert torch.allclose(found[name], tensor, rtol=0, atol=tolerance), name


@pytest.mark.parametrize("tied", [False, True])
def test_a_fine_tune_with_biases_norms_and_embeddings_comes_back_whole(tied, tmp_path):
    model = qwen(tmp_path, tied=tied)
    base, tuned = named(tmp_path / "base", model), noisy(tmp_path / "tuned", model)
    merge(base, [tuned], tmp_path / "out", {**WHOLE, "rank": 60}, **ONE)
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["bias"] == "all"
    same(on(tf.AutoModelForCausalLM, base, tmp_path / "out").merge_and_unload().state_dict(), state(tuned), 2e-5)


@pytest.mark.parametrize("bias", [{"bias": "all"}, {"bias": "lora_only"}, {"lora_bias": True}])
def test_adapters_with_biases_come_back(bias, tmp_path):
    base = named(tmp_path / "base", qwen(tmp_path))
    one = adapter(tmp_path / "one", base, 5, **bias)
    merge(base, [one], tmp_path / "out", {"form": "adapter"}, **ONE)
    same(on(tf.AutoModelForCausalLM, base, tmp_path / "out").merge_and_unload().state_dict(), folded(base, one), 5e-6)
    merge(base, [one], tmp_path / "model", {"form": "model"}, **ONE)
    same(state(tmp_path / "model"), folded(base, one), 5e-6)


def test_weights_stored_in_x_out_are_told_by_the_base(tmp_path):
    base = gpt2(tmp_path / "base")
    one = adapter(tmp_path / "one", base, 5, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    config = json.loads((one / "adapter_config.json").read_text())
    (one / "adapter_config.json").write_text(json.dumps({**config, "fan_in_fan_out": False}))  # as PEFT saves some
    merge(base, [one], tmp_path / "model", {"form": "model"}, **ONE)
    same(state(tmp_path / "model"), folded(base, one), 5e-6)


def test_a_bare_file_of_weights_stored_in_x_out(tmp_path):
    base = gpt2(tmp_path / "base")
    one = adapter(tmp_path / "one", base, 5, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)
    merge(base, [one], tmp_path / "tuned", {"form": "model"}, **ONE)
    superpose.extract(base / "model.safetensors", tmp_path / "tuned/model.safetensors", tmp_path / "out", rank=4)
    assert distance(deltas(base, tmp_path / "out"), deltas(base, one)) < 1e-4


def test_a_body_saved_without_its_prefix_is_called_as_adapters_call_it(tmp_path):
    whole = gpt2(tmp_path / "whole")
    (tmp_path / "base").mkdir()
    tensors = {name.removeprefix("transformer."): t for name, t in load_file(whole / "model.safetensors").items()}
    save_file(tensors, tmp_path / "base/model.safetensors", {"format": "pt"})
    (tmp_path / "base/config.json").write_bytes((whole / "config.json").read_bytes())
    one = adapter(tmp_path / "one", whole, 5, target_modules=["c_attn"], fan_in_fan_out=True)
    merge(tmp_path / "base", [one], tmp_path / "out", {"form": "adapter"}, **ONE)
    assert distance(deltas(whole, tmp_path / "out"), deltas(whole, one)) < 1e-6
    superpose.extract(tmp_path / "base", noisy(tmp_path / "t", tf.AutoModelForCausalLM.from_pretrained(whole)),
                      tmp_path / "extracted", rank=4)  # fmt: skip
    assert any(name.startswith("transformer.h.0") for name in deltas(whole, tmp_path / "extracted"))


def test_adapters_that_spell_modules_otherwise_are_one_base_without_it_too(tmp_path):
    base = llama(tmp_path / "base")
    first, second = adapter(tmp_path / "first", base, 1), adapter(tmp_path / "second", base, 2)
    file = second / "adapter_model.safetensors"
    shorter = {key.replace("base_model.model.model.", "base_model.model."): t for key, t in load_file(file).items()}
    save_file(shorter, file)
    merge("somebody/base", [first, second], tmp_path / "out", {"form": "adapter"}, **ONE)
    merge(base, [first, second], tmp_path / "with", {"form": "adapter"}, **ONE)
    found = deltas(base, tmp_path / "out")
    assert len(found) == 4
    assert distance(found, deltas(base, tmp_path / "with")) < 1e-6


VISION = {
    "vit": lambda: tf.ViTForImageClassification(
        tf.ViTConfig(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=40, image_size=16,
                     patch_size=8, num_labels=3)
    ),
    "resnet": lambda: tf.ResNetForImageClassification(
        tf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", VISION)
def test_a_model_whose_files_and_modules_have_other_names(name, tmp_path):
    torch.manual_seed(0)
    model = VISION[name]().eval()
    base, tuned = named(tmp_path / "base", model), noisy(tmp_path / "tuned", model)
    record = superpose.extract(base, tuned, tmp_path / "out", rank=64, rest="drop")
    merged = on(type(model), base, tmp_path / "out").merge_and_unload().state_dict()
    expected = type(model).from_pretrained(tuned).state_dict()
    own = model.state_dict()
    changed = {key for key in own if not torch.equal(merged[key], own[key])}
    assert len(changed) == len([tensor for tensor in record.tensors if tensor.factors])
    assert all(torch.allclose(merged[key], expected[key], rtol=0, atol=2e-5) for key in changed)
    assert changed == {key for key in own if key.endswith(".weight") and own[key].ndim in (2, 4)}


def test_a_vision_adapter_of_peft_finds_its_modules(tmp_path):
    torch.manual_seed(0)
    model = VISION["vit"]()
    base = named(tmp_path / "base", model)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear"))
    with torch.no_grad():
        for key, parameter in wrapped.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator(key)))
    wrapped.save_pretrained(tmp_path / "one")
    merge(base, [tmp_path / "one"], tmp_path / "out", {"form": "model"}, **ONE)
    found = tf.ViTForImageClassification.from_pretrained(tmp_path / "out").state_dict()
    same(found, wrapped.merge_and_unload().state_dict(), 1e-5)


def test_stf_of_fine_tuned_matrices_reads_the_base(tmp_path):
    base = llama(tmp_path / "base")
    models = [adapter(tmp_path / str(seed), base, seed) for seed in (1, 2)]
    options = {"matrices": "finetuned", "density": 1.0}
    merge(base, models, tmp_path / "both", {"form": "both", "rank": 24}, method="stf", options=options)
    merge(base, models, tmp_path / "out", {"form": "adapter", "rank": 24}, method="stf", options=options)
    assert distance(deltas(base, tmp_path / "out"), deltas(base, tmp_path / "both/adapter")) < 1e-6
    with pytest.raises(superpose.SuperposeError, match="stf reads the base"):
        merge("somebody/base", models, tmp_path / "no", {"form": "adapter", "rank": 9}, method="stf", options=options)


def test_a_tied_head_is_read_from_what_it_is_tied_to(tmp_path):
    base = llama(tmp_path / "base", tied=True)
    models = [adapter(tmp_path / str(seed), base, seed, target_modules=["lm_head"]) for seed in (1, 2)]
    merge(base, models, tmp_path / "out", {"form": "adapter", "rank": 24}, method="slerp")
    assert set(deltas(base, tmp_path / "out")) == {"lm_head.weight"}


def test_a_set_of_models_is_no_adapter(tmp_path):
    base = llama(tmp_path / "base")
    one = adapter(tmp_path / "one", base, 1)
    with pytest.raises(superpose.SuperposeError, match="emr makes a set of models"):
        merge(base, [one], tmp_path / "out", {"form": "adapter", "rank": 4}, method="emr")
    with pytest.raises(superpose.SuperposeError, match="needs a base that is one checkpoint"):
        merge(f"{base}+{one}", [one], tmp_path / "out", {"form": "model"}, method="emr")


def test_updates_that_are_written_out_count_as_memory(tmp_path):
    base = llama(tmp_path / "base")
    models = [adapter(tmp_path / str(seed), base, seed) for seed in (1, 2, 3)]
    made = superpose.plan({"base": base, "models": [{"path": one} for one in models], "method": "dare"})
    merged = [item for item in made.items if item.action == "merge"]
    assert merged
    assert all(item.memory > 3 * 4 * item.numel for item in merged)


def test_a_rule_keeps_the_bases_tensor_whatever_the_adapter_has(tmp_path):
    base = llama(tmp_path / "base")
    one = adapter(tmp_path / "one", base, 1, modules_to_save=["norm"])
    file = one / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "base_model.model.model.norm.weight": torch.ones(7)}, file)
    with pytest.raises(superpose.SuperposeError, match=r"shape \[7\]"):
        merge(base, [one], tmp_path / "out", {"form": "model"}, **ONE)
    rules = [{"match": "model.norm.weight", "keep": "base"}]
    merge(base, [one], tmp_path / "out", {"form": "model"}, rules=rules, **ONE)
    assert torch.equal(state(tmp_path / "out")["model.norm.weight"], state(base)["model.norm.weight"])


def test_an_update_of_a_shared_table_is_told_of(tmp_path):
    base = llama(tmp_path / "base", tied=True)
    one = adapter(tmp_path / "one", base, 1, target_modules=["embed_tokens"])
    record = merge(base, [one], tmp_path / "out", {"form": "model"}, **ONE)
    assert any("tied to" in warning for warning in record.warnings)
