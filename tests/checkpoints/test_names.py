"""What tensors are: told by their names, told by the modules of the model, and where the two must agree."""

from __future__ import annotations

import builtins
import json
import sys
from functools import cache

import pytest
import torch
from safetensors.torch import load_file, save_file

import superpose
from superpose.checkpoints.architecture import read_architecture
from superpose.checkpoints.folder import open_checkpoint
from superpose.checkpoints.names import find_prefix, fused_parts, kind_of
from superpose.kinds import Kind

LINEAR, CONV, NORM, BIAS = Kind.LINEAR, Kind.CONV, Kind.NORM, Kind.BIAS
EMBEDDING, HEAD, SCALAR, BUFFER = Kind.EMBEDDING, Kind.HEAD, Kind.SCALAR, Kind.BUFFER

# Names as published checkpoints have them.
NAMES = {
    "bert": [
        ("bert.embeddings.word_embeddings.weight", (30522, 768), EMBEDDING),
        ("bert.embeddings.position_embeddings.weight", (512, 768), EMBEDDING),
        ("bert.embeddings.token_type_embeddings.weight", (2, 768), EMBEDDING),
        ("bert.embeddings.LayerNorm.weight", (768,), NORM),
        ("bert.embeddings.LayerNorm.bias", (768,), NORM),
        ("bert.embeddings.LayerNorm.gamma", (768,), NORM),
        ("bert.embeddings.LayerNorm.beta", (768,), NORM),
        ("bert.encoder.layer.0.attention.self.query.weight", (768, 768), LINEAR),
        ("bert.encoder.layer.0.attention.self.query.bias", (768,), BIAS),
        ("bert.encoder.layer.0.attention.output.dense.weight", (768, 768), LINEAR),
        ("bert.encoder.layer.0.attention.output.LayerNorm.weight", (768,), NORM),
        ("bert.encoder.layer.0.intermediate.dense.bias", (3072,), BIAS),
        ("bert.encoder.layer.0.output.LayerNorm.bias", (768,), NORM),
        ("bert.pooler.dense.weight", (768, 768), LINEAR),
        ("bert.pooler.dense.bias", (768,), BIAS),
        ("cls.predictions.bias", (30522,), HEAD),
        ("cls.predictions.transform.dense.weight", (768, 768), LINEAR),
        ("cls.predictions.transform.dense.bias", (768,), BIAS),
        ("cls.predictions.transform.LayerNorm.weight", (768,), NORM),
        ("cls.predictions.decoder.weight", (30522, 768), HEAD),
        ("cls.seq_relationship.weight", (2, 768), HEAD),
        ("cls.seq_relationship.bias", (2,), HEAD),
        ("classifier.weight", (3, 768), HEAD),
        ("classifier.bias", (3,), HEAD),
        ("qa_outputs.weight", (2, 768), HEAD),
    ],
    "roberta": [
        ("roberta.embeddings.word_embeddings.weight", (50265, 768), EMBEDDING),
        ("roberta.encoder.layer.11.attention.self.value.weight", (768, 768), LINEAR),
        ("classifier.dense.weight", (768, 768), LINEAR),
        ("classifier.dense.bias", (768,), BIAS),
        ("classifier.out_proj.weight", (2, 768), HEAD),
        ("classifier.out_proj.bias", (2,), HEAD),
        ("lm_head.dense.weight", (768, 768), LINEAR),
        ("lm_head.dense.bias", (768,), BIAS),
        ("lm_head.layer_norm.weight", (768,), NORM),
        ("lm_head.layer_norm.bias", (768,), NORM),
        ("lm_head.decoder.weight", (50265, 768), HEAD),
        ("lm_head.bias", (50265,), HEAD),
    ],
    "gpt2": [
        ("wte.weight", (50257, 768), EMBEDDING),
        ("wpe.weight", (1024, 768), EMBEDDING),
        ("h.0.ln_1.weight", (768,), NORM),
        ("h.0.ln_1.bias", (768,), NORM),
        ("h.0.attn.masked_bias", (), BUFFER),
        ("h.0.attn.c_attn.weight", (768, 2304), LINEAR),
        ("h.0.attn.c_attn.bias", (2304,), BIAS),
        ("h.0.attn.c_proj.weight", (768, 768), LINEAR),
        ("h.0.mlp.c_fc.bias", (3072,), BIAS),
        ("transformer.ln_f.weight", (768,), NORM),
        ("lm_head.weight", (50257, 768), HEAD),
        ("score.weight", (2, 768), HEAD),
    ],
    "llama": [
        ("model.embed_tokens.weight", (32000, 4096), EMBEDDING),
        ("model.layers.0.input_layernorm.weight", (4096,), NORM),
        ("model.layers.0.post_attention_layernorm.weight", (4096,), NORM),
        ("model.layers.0.self_attn.q_proj.weight", (4096, 4096), LINEAR),
        ("model.layers.0.self_attn.q_proj.bias", (4096,), BIAS),
        ("model.layers.0.self_attn.q_norm.weight", (128,), NORM),
        ("model.layers.0.mlp.gate_proj.weight", (11008, 4096), LINEAR),
        ("model.layers.0.mlp.experts.3.w1.weight", (14336, 4096), LINEAR),
        ("model.layers.0.mlp.experts.gate_up_proj", (8, 4096, 22016), LINEAR),
        ("model.layers.0.self_attn.rotary_emb.inv_freq", (64,), BUFFER),
        ("model.norm.weight", (4096,), NORM),
        ("lm_head.weight", (32000, 4096), HEAD),
    ],
    "t5": [
        ("shared.weight", (32128, 512), EMBEDDING),
        ("encoder.embed_tokens.weight", (32128, 512), EMBEDDING),
        ("encoder.block.0.layer.0.SelfAttention.q.weight", (512, 512), LINEAR),
        ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", (32, 8), EMBEDDING),
        ("encoder.block.0.layer.0.layer_norm.weight", (512,), NORM),
        ("decoder.block.0.layer.1.EncDecAttention.k.weight", (512, 512), LINEAR),
        ("encoder.block.0.layer.1.DenseReluDense.wi.weight", (2048, 512), LINEAR),
        ("encoder.block.0.layer.1.DenseReluDense.wi_1.weight", (1024, 512), LINEAR),
        ("decoder.final_layer_norm.weight", (512,), NORM),
        ("lm_head.weight", (32128, 512), HEAD),
    ],
    "whisper": [
        ("model.encoder.conv1.weight", (384, 80, 3), CONV),
        ("model.encoder.conv1.bias", (384,), BIAS),
        ("model.encoder.embed_positions.weight", (1500, 384), EMBEDDING),
        ("model.encoder.layers.0.self_attn.k_proj.weight", (384, 384), LINEAR),
        ("model.encoder.layers.0.self_attn_layer_norm.weight", (384,), NORM),
        ("model.decoder.layers.0.encoder_attn_layer_norm.bias", (384,), NORM),
        ("model.decoder.embed_tokens.weight", (51865, 384), EMBEDDING),
        ("model.decoder.embed_positions.weight", (448, 384), EMBEDDING),
        ("model.encoder.layer_norm.weight", (384,), NORM),
        ("proj_out.weight", (51865, 384), HEAD),
    ],
    "vit": [
        ("vit.embeddings.cls_token", (1, 1, 768), EMBEDDING),
        ("vit.embeddings.mask_token", (1, 1, 768), EMBEDDING),
        ("vit.embeddings.position_embeddings", (1, 197, 768), EMBEDDING),
        ("vit.embeddings.patch_embeddings.projection.weight", (768, 3, 16, 16), CONV),
        ("vit.embeddings.patch_embeddings.projection.bias", (768,), BIAS),
        ("vit.encoder.layer.0.attention.attention.query.weight", (768, 768), LINEAR),
        ("vit.encoder.layer.0.layernorm_before.weight", (768,), NORM),
        ("vit.encoder.layer.0.layernorm_after.bias", (768,), NORM),
        ("vit.layernorm.weight", (768,), NORM),
        ("classifier.weight", (1000, 768), HEAD),
    ],
    "clip": [
        ("logit_scale", (), SCALAR),
        ("text_model.embeddings.token_embedding.weight", (49408, 512), EMBEDDING),
        ("text_model.embeddings.position_embedding.weight", (77, 512), EMBEDDING),
        ("text_model.encoder.layers.0.layer_norm1.weight", (512,), NORM),
        ("text_model.encoder.layers.0.self_attn.q_proj.weight", (512, 512), LINEAR),
        ("text_model.encoder.layers.0.mlp.fc1.bias", (2048,), BIAS),
        ("text_model.final_layer_norm.weight", (512,), NORM),
        ("vision_model.embeddings.class_embedding", (768,), EMBEDDING),
        ("vision_model.embeddings.patch_embedding.weight", (768, 3, 32, 32), CONV),
        ("vision_model.embeddings.position_embedding.weight", (50, 768), EMBEDDING),
        ("vision_model.pre_layrnorm.weight", (768,), NORM),
        ("vision_model.pre_layrnorm.bias", (768,), NORM),
        ("vision_model.post_layernorm.bias", (768,), NORM),
        ("visual_projection.weight", (512, 768), LINEAR),
        ("text_projection.weight", (512, 512), LINEAR),
    ],
    "resnet": [
        ("resnet.embedder.embedder.convolution.weight", (64, 3, 7, 7), CONV),
        ("resnet.embedder.embedder.normalization.weight", (64,), NORM),
        ("resnet.embedder.embedder.normalization.running_mean", (64,), BUFFER),
        ("resnet.encoder.stages.0.layers.0.shortcut.convolution.weight", (256, 64, 1, 1), CONV),
        ("resnet.encoder.stages.0.layers.0.layer.1.normalization.bias", (64,), NORM),
        ("classifier.1.weight", (1000, 2048), HEAD),
        ("classifier.1.bias", (1000,), HEAD),
        # torchvision and timm
        ("conv1.weight", (64, 3, 7, 7), CONV),
        ("bn1.weight", (64,), NORM),
        ("bn1.bias", (64,), NORM),
        ("bn1.running_var", (64,), BUFFER),
        ("layer1.0.conv2.weight", (64, 64, 3, 3), CONV),
        ("layer1.0.bn2.bias", (64,), NORM),
        ("layer1.0.downsample.0.weight", (256, 64, 1, 1), CONV),
        ("fc.weight", (1000, 2048), HEAD),
        ("fc.bias", (1000,), HEAD),
    ],
    "timm": [
        ("cls_token", (1, 1, 768), EMBEDDING),
        ("pos_embed", (1, 197, 768), EMBEDDING),
        ("dist_token", (1, 1, 768), EMBEDDING),
        ("reg_token", (1, 4, 768), EMBEDDING),
        ("patch_embed.proj.weight", (768, 3, 16, 16), CONV),
        ("patch_embed.proj.bias", (768,), BIAS),
        ("blocks.0.norm1.weight", (768,), NORM),
        ("blocks.0.norm2.bias", (768,), NORM),
        ("blocks.0.attn.qkv.weight", (2304, 768), LINEAR),
        ("blocks.0.attn.qkv.bias", (2304,), BIAS),
        ("blocks.0.attn.proj.weight", (768, 768), LINEAR),
        ("blocks.0.attn.q_norm.weight", (64,), NORM),
        ("blocks.0.mlp.fc1.weight", (3072, 768), LINEAR),
        ("norm.weight", (768,), NORM),
        ("fc_norm.weight", (768,), NORM),
        ("head.weight", (1000, 768), HEAD),
        ("head.bias", (1000,), HEAD),
        ("head.fc.weight", (1000, 768), HEAD),
        ("layers.0.blocks.1.attn.relative_position_bias_table", (169, 3), EMBEDDING),
    ],
    "open_clip": [
        ("positional_embedding", (77, 512), EMBEDDING),
        ("text_projection", (512, 512), LINEAR),
        ("logit_scale", (), SCALAR),
        ("logit_bias", (), SCALAR),
        ("token_embedding.weight", (49408, 512), EMBEDDING),
        ("transformer.resblocks.0.attn.in_proj_weight", (1536, 512), LINEAR),
        ("transformer.resblocks.0.attn.in_proj_bias", (1536,), BIAS),
        ("transformer.resblocks.0.attn.out_proj.weight", (512, 512), LINEAR),
        ("transformer.resblocks.0.ln_1.weight", (512,), NORM),
        ("transformer.resblocks.0.mlp.c_fc.weight", (2048, 512), LINEAR),
        ("ln_final.weight", (512,), NORM),
        ("visual.class_embedding", (768,), EMBEDDING),
        ("visual.positional_embedding", (50, 768), EMBEDDING),
        ("visual.proj", (768, 512), LINEAR),
        ("visual.conv1.weight", (768, 3, 32, 32), CONV),
        ("visual.ln_pre.weight", (768,), NORM),
        ("visual.transformer.resblocks.0.mlp.c_proj.bias", (768,), BIAS),
        ("visual.ln_post.bias", (768,), NORM),
        ("visual.trunk.blocks.0.norm1.weight", (768,), NORM),
    ],
}


TEXT = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
WORDS = {**TEXT, "vocab_size": 40, "max_position_embeddings": 20}
IMAGE = {**TEXT, "image_size": 8, "patch_size": 4, "num_labels": 3}
GPT2 = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 40, "n_positions": 20}
DISTIL = {"dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 16, "vocab_size": 40, "max_position_embeddings": 20}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 40}
TWO_SIDES = {
    "d_model": 16, "vocab_size": 40, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16,
}  # fmt: skip
WHISPER = {
    **TWO_SIDES, "num_mel_bins": 8, "max_source_positions": 10, "max_target_positions": 10, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip
SWIN = {"image_size": 16, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 2, "num_labels": 3}

# Tiny models of transformers, of every family whose layout we know: the class, and its config's arguments.
MODELS = {
    "bert": ("BertModel", WORDS),
    "bert pretraining": ("BertForPreTraining", WORDS),
    "bert classifier": ("BertForSequenceClassification", {**WORDS, "num_labels": 3}),
    "bert answers": ("BertForQuestionAnswering", WORDS),
    "distilbert": ("DistilBertForMaskedLM", DISTIL),
    "roberta": ("RobertaForMaskedLM", WORDS),
    "roberta classifier": ("RobertaForSequenceClassification", {**WORDS, "num_labels": 3}),
    "gpt2": ("GPT2LMHeadModel", GPT2),
    "gpt2 classifier": ("GPT2ForSequenceClassification", {**GPT2, "num_labels": 3}),
    "gpt neox": ("GPTNeoXForCausalLM", WORDS),
    "llama": ("LlamaForCausalLM", WORDS),
    "llama tied": ("LlamaForCausalLM", {**WORDS, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3ForCausalLM", {**WORDS, "head_dim": 8}),
    "t5": ("T5ForConditionalGeneration", T5),
    "t5 gated": ("T5ForConditionalGeneration", {**T5, "feed_forward_proj": "gated-gelu"}),
    "bart classifier": ("BartForSequenceClassification", {**TWO_SIDES, "num_labels": 3}),
    "whisper": ("WhisperForConditionalGeneration", WHISPER),
    "vit": ("ViTForImageClassification", IMAGE),
    "deit": ("DeiTForImageClassificationWithTeacher", IMAGE),
    "swin": ("SwinForImageClassification", SWIN),
    "clip": ("CLIPModel", {"text_config": WORDS, "vision_config": IMAGE, "projection_dim": 8}),
    "siglip": ("SiglipVisionModel", IMAGE),
    "resnet": (
        "ResNetForImageClassification",
        {"embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1], "num_labels": 3},
    ),
    "mobilenet": ("MobileNetV2ForImageClassification", {"depth_multiplier": 0.1, "image_size": 16, "num_labels": 3}),
}
# Parameters that lie in no module of their own, by the end of their names.
FREE = {
    "cls_token": EMBEDDING,
    "distillation_token": EMBEDDING,
    "class_embedding": EMBEDDING,
    "position_embeddings": EMBEDDING,
    "relative_position_bias_table": EMBEDDING,
    "probe": EMBEDDING,
    "in_proj_weight": LINEAR,
    "in_proj_bias": BIAS,
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Return a function from a model's name to its folder, as save_pretrained writes it."""
    root = tmp_path_factory.mktemp("models")

    @cache
    def save(model):
        import transformers

        transformers.utils.logging.disable_progress_bar()
        class_name, arguments = MODELS[model]
        model_class = getattr(transformers, class_name)
        torch.manual_seed(0)
        model_class(model_class.config_class(**arguments)).save_pretrained(root / model)
        return root / model

    return save


@pytest.fixture(scope="module")
def opened(saved):
    """Return a function from a model's name to its checkpoint and what its modules say."""

    @cache
    def open_saved(model):
        checkpoint = open_checkpoint(str(saved(model)))
        return checkpoint, read_architecture(checkpoint.folder, checkpoint.config)

    return open_saved


# Told by names.


@pytest.mark.parametrize(
    ("name", "shape", "kind"),
    [pytest.param(*row, id=f"{family}-{row[0]}") for family, rows in NAMES.items() for row in rows],
)
def test_kind_is_told_by_the_name(name, shape, kind):
    assert kind_of(name, shape) is kind


@pytest.mark.parametrize(
    "name", ["embeddings.position_ids", "layer.weight", "bn1.num_batches_tracked", "lm_head.weight"]
)
def test_what_holds_no_floats_is_a_buffer(name):
    assert kind_of(name, (1, 512), is_float=False) is BUFFER


@pytest.mark.parametrize(
    ("shape", "kind"),
    [((), SCALAR), ((1,), SCALAR), ((1, 1), SCALAR), ((5,), BIAS), ((5, 4), LINEAR), ((5, 4, 3), CONV),
     ((5, 4, 3, 3), CONV), ((5, 4, 3, 3, 3), CONV), ((0,), BIAS), ((0, 4), LINEAR)],
)  # fmt: skip
def test_names_that_tell_nothing_leave_the_shape(shape, kind):
    assert kind_of("w", shape) is kind
    assert kind_of("", shape) is kind


# Told by modules.


@pytest.mark.parametrize("model", MODELS)
def test_modules_and_names_tell_the_same_kinds(opened, model):
    """Without transformers, or of a bare file, the names alone have to do."""
    checkpoint, architecture = opened(model)
    assert architecture.reason == ""
    differing = {}
    for name, header in checkpoint.tensors.items():
        by_name = kind_of(name, header.shape, is_float=header.is_float)
        known = architecture.kinds.get(name) or FREE[name.rpartition(".")[2]]
        if by_name is not known:
            differing[name] = f"{known}, by its name {by_name}"
    assert differing == {}


@pytest.mark.parametrize("model", MODELS)
def test_the_files_and_the_modules_have_the_same_names(opened, model):
    checkpoint, architecture = opened(model)
    unknown = {name.rpartition(".")[2] for name in checkpoint.tensors.keys() - architecture.kinds.keys()}
    assert unknown <= FREE.keys()
    absent = architecture.kinds.keys() - checkpoint.tensors.keys() - architecture.tied.keys()
    assert {name.rpartition(".")[2] for name in absent} <= {"position_ids", "token_type_ids"}


def test_every_kind_occurs_in_the_models_above(opened):
    assert {kind for model in MODELS for kind in opened(model)[1].kinds.values()} == set(Kind)


def test_grouped_convolutions_have_their_groups(opened):
    checkpoint, architecture = opened("mobilenet")
    depthwise = {
        name: header.shape[0]
        for name, header in checkpoint.tensors.items()
        if architecture.kinds[name] is CONV and header.shape[1] == 1
    }
    assert len(depthwise) > 10
    assert architecture.groups == depthwise
    assert opened("resnet")[1].groups == {}


def test_tied_names_lead_to_what_is_in_the_file(opened):
    for model, tied in (
        ("bert", {}),
        ("llama", {}),
        ("llama tied", {"lm_head.weight": "model.embed_tokens.weight"}),
        ("gpt2", {"lm_head.weight": "transformer.wte.weight"}),
        ("whisper", {"proj_out.weight": "model.decoder.embed_tokens.weight"}),
        ("roberta", {
            "lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight",
            "lm_head.decoder.bias": "lm_head.bias",
        }),
        ("t5", {
            "encoder.embed_tokens.weight": "shared.weight",
            "decoder.embed_tokens.weight": "shared.weight",
            "lm_head.weight": "shared.weight",
        }),
    ):  # fmt: skip
        checkpoint, architecture = opened(model)
        assert architecture.tied == tied
        assert set(tied.values()) <= checkpoint.tensors.keys()
        assert not set(tied) & checkpoint.tensors.keys()


@pytest.mark.parametrize("model", ["t5 gated", "gpt2"])
def test_a_head_stored_beside_the_embedding_it_could_be_tied_to_is_merged(saved, tmp_path, model):
    """As Flan-T5 does: transformers keeps the two apart when a file has both, and so must the merge."""
    folders = []
    for number in range(3):
        folder = tmp_path / str(number)
        folder.mkdir()
        config = json.loads((saved(model) / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": model == "gpt2"}))
        tensors = load_file(saved(model) / "model.safetensors")
        save_file({**tensors, "lm_head.weight": torch.full((40, 16), float(number))}, folder / "model.safetensors")
        folders.append(str(folder))
    superpose.merge({"base": folders[0], "models": folders[1:], "method": "average"}, tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert "lm_head.weight" in merged
    assert torch.equal(merged["lm_head.weight"], torch.full((40, 16), 1.5))


# What modules cannot tell.


def reason(folder, config):
    found = read_architecture(folder, config)
    assert (found.kinds, found.groups, found.tied) == ({}, {}, {})
    assert "\n" not in found.reason
    return found.reason


def test_without_a_config_nothing_is_known(tmp_path):
    assert "no config.json" in reason(None, {})
    assert "no config.json" in reason(tmp_path, {})
    assert "no config.json" in reason(tmp_path, {"architectures": ["BertModel"]})


def test_without_transformers_a_reason_is_given(saved, monkeypatch):
    checkpoint = open_checkpoint(str(saved("bert")))
    monkeypatch.setitem(sys.modules, "transformers", None)
    told = reason(checkpoint.folder, checkpoint.config)
    assert "transformers is not installed" in told
    assert "superpose[transformers]" in told


def written(folder, **config):
    (folder / "config.json").write_text(json.dumps(config))
    return config


def test_a_model_type_that_transformers_does_not_know_gives_a_reason(tmp_path):
    assert "could not build" in reason(tmp_path, written(tmp_path, model_type="nosuch"))


def test_an_architecture_that_transformers_does_not_know_is_named(tmp_path):
    config = written(tmp_path, model_type="bert", architectures=["NoSuchModel"])
    assert "has no NoSuchModel" in reason(tmp_path, config)


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": 7},
        {"model_type": None},
        {"model_type": ["bert"]},
        {"model_type": "bert", "hidden_size": "large"},
        {"model_type": "bert", "num_hidden_layers": -1, "hidden_size": -4},
        {"model_type": "bert", "architectures": "BertModel"},
        {"model_type": "bert", "architectures": ["logging"]},
        {"model_type": "bert", "architectures": ["__name__"]},
        {"model_type": "bert", "architectures": [None]},
        {"model_type": "bert", "architectures": {"first": "BertModel"}},
        {"model_type": "bert", "architectures": 7},
    ],
    ids=str,
)
def test_a_config_that_makes_no_sense_gives_a_reason(tmp_path, config):
    assert reason(tmp_path, written(tmp_path, **config))


def test_code_that_comes_with_a_model_is_never_run(tmp_path, monkeypatch):
    """transformers would ask on the terminal, and run it for a user (or a pipe) that says yes."""
    marker = tmp_path / "marker"
    code = (
        f"from pathlib import Path\nfrom transformers import PretrainedConfig\nPath({str(marker)!r}).touch()\n"
        "class OwnConfig(PretrainedConfig):\n    model_type = 'own'\n"
    )
    (tmp_path / "configuration_own.py").write_text(code)
    asked = []
    monkeypatch.setattr(builtins, "input", lambda question="": asked.append(question) or "y")
    config = written(tmp_path, model_type="own", auto_map={"AutoConfig": "configuration_own.OwnConfig"})
    assert reason(tmp_path, config)
    assert asked == []
    assert not marker.exists()


def test_looking_at_a_model_prints_nothing_and_changes_nothing(saved, capfd):
    checkpoint = open_checkpoint(str(saved("whisper")))
    capfd.readouterr()
    before = torch.random.get_rng_state()
    assert read_architecture(checkpoint.folder, checkpoint.config).kinds
    assert capfd.readouterr() == ("", "")
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.empty(0).device.type == "cpu"


# Fused projections.


@pytest.mark.parametrize(
    ("name", "shape", "parts"),
    [
        ("transformer.h.0.attn.c_attn.weight", (16, 48), (1, (16, 16, 16))),
        ("transformer.h.0.attn.c_attn.bias", (48,), (0, (16, 16, 16))),
        ("transformer.h.0.attn.c_attn.weight", (48, 16), (0, (16, 16, 16))),  # Qwen: out x in
        ("visual.transformer.resblocks.0.attn.in_proj_weight", (48, 16), (0, (16, 16, 16))),
        ("visual.transformer.resblocks.0.attn.in_proj_bias", (48,), (0, (16, 16, 16))),
        ("in_proj_weight", (48, 16), (0, (16, 16, 16))),
        ("blocks.0.attn.qkv.weight", (48, 16), (0, (16, 16, 16))),
        ("blocks.0.attn.qkv.bias", (48,), (0, (16, 16, 16))),
        ("model.layers.0.mlp.gate_up_proj.weight", (64, 16), (0, (32, 32))),
    ],
)
def test_fused_projections_are_split(name, shape, parts):
    assert fused_parts(name, shape) == parts


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("transformer.h.0.attn.c_proj.weight", (16, 16)),
        ("transformer.h.0.attn.c_attn.weight", (16, 24)),  # one head for all keys and values
        ("transformer.h.0.crossattention.c_attn.weight", (16, 32)),
        ("transformer.h.0.crossattention.c_attn.bias", (32,)),
        ("blocks.0.attn.qkv_norm.weight", (48,)),
        ("blocks.0.attn.qkv_norm.bias", (48,)),
        ("blocks.0.attn.qkv_proj.weight", (48, 16)),
        ("blocks.0.attn.qkv.lora_A.weight", (48, 16)),
        ("blocks.0.attn.qkv.weight", (47, 16)),
        ("transformer.h.0.self_attention.query_key_value.weight", (48, 16)),  # interleaved by heads
        ("gpt_neox.layers.0.attention.query_key_value.bias", (48,)),
        ("backbone.layers.0.mixer.in_proj.weight", (48, 16)),
        ("in_proj_weight", ()),
        ("layers.0.main_proj_weight", (48, 16)),
        ("model.layers.0.mlp.gate_proj.weight", (64, 16)),
        ("model.layers.0.mlp.up_proj.weight", (64, 16)),
        ("model.layers.0.mlp.gate_up_proj.weight", (63, 16)),
        ("model.layers.0.mlp.experts.gate_up_proj", (8, 16, 64)),
        ("model.layers.0.self_attn.q_proj.weight", (48, 16)),
        ("lm_head.weight", (48, 16)),
    ],
)
def test_single_maps_are_not_split(name, shape):
    assert fused_parts(name, shape) is None


@pytest.mark.parametrize("model", MODELS)
def test_parts_of_real_models_add_up(opened, model):
    for name, header in opened(model)[0].tensors.items():
        parts = fused_parts(name, header.shape)
        if parts is not None:
            axis, sizes = parts
            assert sum(sizes) == header.shape[axis]
            assert "attn" in name or "attention" in name


# Prefixes.

BODY = ["embeddings.word_embeddings.weight", "pooler.dense.weight", *(f"encoder.layer.{i}.weight" for i in range(5))]
UNDER_A_HEAD = [f"bert.{name}" for name in BODY] + ["classifier.weight", "classifier.bias"]


@pytest.mark.parametrize(
    ("base", "tuned", "found"),
    [
        (BODY, UNDER_A_HEAD, ("", "bert.")),
        (UNDER_A_HEAD, BODY, ("bert.", "")),
        (BODY, BODY, None),
        (UNDER_A_HEAD, UNDER_A_HEAD, None),
        (BODY, [name for name in UNDER_A_HEAD if "pooler" not in name], ("", "bert.")),
        (UNDER_A_HEAD, [name for name in BODY if "pooler" not in name], ("bert.", "")),
        (BODY, ["down.0.conv.weight", "up.0.conv.weight"], None),
        (BODY, [], None),
        ([], BODY, None),
        (["weight", "bias"], ["bert.weight", "bert.bias"], ("", "bert.")),
        (BODY, [f"a.{name}" for name in BODY[:5]] + [f"b.{name}" for name in BODY], ("", "b.")),
        (BODY, [f"bert.{name}" for name in BODY[:3]], None),
    ],
    ids=["body, head", "head, body", "same", "same under a head", "without pooler", "without pooler, head",
         "unrelated", "empty tuned", "empty base", "names without dots", "best of two", "less than half"],
)  # fmt: skip
def test_a_prefix_is_found_where_it_helps(base, tuned, found):
    assert find_prefix(base, tuned) == found
    assert find_prefix(base[::-1], tuned[::-1]) == found
    assert find_prefix(iter(base), iter(tuned)) == found


@pytest.mark.parametrize(("body", "head"), [("bert", "bert classifier"), ("gpt2", "gpt2 classifier")])
def test_prefixes_of_real_models(opened, body, head):
    base, tuned = opened(body)[0].tensors, opened(head)[0].tensors
    found = find_prefix(base, tuned)
    assert found == (("", "bert.") if body == "bert" else None)
    assert find_prefix(tuned, base) == (("bert.", "") if body == "bert" else None)
