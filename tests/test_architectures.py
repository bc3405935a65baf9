"""Real architectures, tiny and random: every tensor accounted for, loaded by transformers without a warning."""

import logging
import warnings

import pytest
import torch
import transformers
from families import load, superpose
from safetensors import safe_open

import superpose as library
from superpose import RunRecord

SMALL = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32, "intermediate_size": 64}
VISION = {**SMALL, "image_size": 32, "patch_size": 8}
T5 = {"d_model": 32, "d_ff": 64, "num_layers": 2, "num_heads": 2, "d_kv": 16, "vocab_size": 99}
WHISPER = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "vocab_size": 99, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "decoder_start_token_id": 1, "suppress_tokens": [], "begin_suppress_tokens": [],
}  # fmt: skip
RESNET = {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1]}
TOKENS = {"bos_token_id": 1, "eos_token_id": 2}
MODELS = {
    "bert": ("BertModel", "BertConfig", {**SMALL, "vocab_size": 99}),
    "bert-classifier": ("BertForSequenceClassification", "BertConfig", {**SMALL, "vocab_size": 99, "num_labels": 3}),
    "t5": ("T5ForConditionalGeneration", "T5Config", T5),
    "t5-gated": ("T5ForConditionalGeneration", "T5Config", {**T5, "feed_forward_proj": "gated-gelu"}),
    "whisper": ("WhisperForConditionalGeneration", "WhisperConfig", WHISPER),
    "vit": ("ViTForImageClassification", "ViTConfig", {**VISION, "num_labels": 5}),
    "clip": (
        "CLIPModel",
        "CLIPConfig",
        {"text_config": {**SMALL, **TOKENS, "vocab_size": 99}, "vision_config": VISION, "projection_dim": 16},
    ),
    "resnet": ("ResNetForImageClassification", "ResNetConfig", RESNET),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 99, **TOKENS}),
    "llama": ("LlamaForCausalLM", "LlamaConfig", {**SMALL, "vocab_size": 99, "tie_word_embeddings": True}),
    "mobilenet": ("MobileNetV2ForImageClassification", "MobileNetV2Config", {"depth_multiplier": 0.35}),
}  # fmt: skip


def make(root, name, tasks=3):
    """Save a tiny model and fine-tunes of it; return the class and the folders, the base first."""
    class_name, config_name, options = MODELS[name]
    torch.manual_seed(0)
    model_class = getattr(transformers, class_name)
    model = model_class(getattr(transformers, config_name)(**options))
    folders = []
    for number in range(tasks + 1):
        if number:
            torch.manual_seed(number)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter += 0.02 * torch.randn_like(parameter)
                for name_, buffer in model.named_buffers():
                    if name_.endswith("running_mean"):
                        buffer += 0.1 * number
        folders.append(root / f"model{number}")
        model.save_pretrained(folders[-1])
    return model_class, folders


@pytest.fixture(autouse=True)
def _quiet():
    transformers.logging.disable_progress_bar()
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(level)


def load_without_a_warning(model_class, folder, caplog):
    transformers.logging.set_verbosity_warning()
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model, info = model_class.from_pretrained(folder, output_loading_info=True)
    finally:
        logger.removeHandler(caplog.handler)
    assert not caplog.records, caplog.text
    assert not any(info.values()), info
    return model


@pytest.mark.parametrize("name", MODELS)
def test_a_merged_model_loads_with_every_tensor_accounted_for(tmp_path, caplog, name):
    model_class, folders = make(tmp_path, name)
    options = {"density": 1, "scaling_factor": 1}
    recipe = {"base": str(folders[0]), "models": list(map(str, folders[1:])), "method": "stf", "options": options}
    record = library.merge(recipe, tmp_path / "out")
    base, merged = load(folders[0]), load(tmp_path / "out")
    assert merged.keys() == base.keys()
    assert {tensor.name for tensor in record.tensors} == base.keys()
    tuned = [load(folder) for folder in folders[1:]]
    for tensor in record.tensors:
        changed = not torch.equal(merged[tensor.name], base[tensor.name])
        differs = any(not torch.equal(model[tensor.name], base[tensor.name]) for model in tuned)
        assert changed == differs, tensor
    free = {tensor.name for tensor in record.tensors if tensor.kind_from != "module"}
    assert all("token" in name or "embedding" in name or "num_batches" in name for name in free), free
    model = load_without_a_warning(model_class, tmp_path / "out", caplog)
    state = model.state_dict()
    shared = [tensor for key, tensor in merged.items() if key in state]
    assert shared
    assert all(torch.equal(state[key], tensor) for key, tensor in merged.items() if key in state)


def test_the_command_line_merges_an_encoder_and_copies_what_lies_beside_it(tmp_path):
    _, folders = make(tmp_path, "bert")
    for name in ("tokenizer.json", "vocab.txt", "tokenizer_config.json"):
        (folders[0] / name).write_text("{}")
    superpose("merge", *folders, "-o", tmp_path / "out", "--method", "stf", "--quiet")
    names = {file.name for file in (tmp_path / "out").iterdir()}
    copied = {"config.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt"}
    assert names == copied | {"README.md", "model.safetensors", "run.json"}
    record = RunRecord.load(tmp_path / "out")
    assert {tensor.kind_from for tensor in record.tensors} == {"module"}


def test_tied_heads_are_written_once_and_tied_again_on_loading(tmp_path):
    model_class, folders = make(tmp_path, "t5")
    recipe = {"base": str(folders[0]), "models": list(map(str, folders[1:])), "method": "average"}
    library.merge(recipe, tmp_path / "out")
    assert "lm_head.weight" not in load(tmp_path / "out")
    model = model_class.from_pretrained(tmp_path / "out")
    assert model.lm_head.weight.data_ptr() == model.shared.weight.data_ptr()


def test_a_pickled_checkpoint_with_tied_copies_merges_like_the_safetensors_one(tmp_path):
    _, folders = make(tmp_path, "t5")
    pickled = []
    for folder in folders:
        other = tmp_path / f"{folder.name}-bin"
        other.mkdir()
        tensors = load(folder)
        for alias in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"):
            tensors[alias] = tensors["shared.weight"]
        torch.save(tensors, other / "pytorch_model.bin")
        (other / "config.json").write_text((folder / "config.json").read_text())
        pickled.append(other)
    recipe = {"method": "stf"}
    library.merge({**recipe, "base": str(folders[0]), "models": list(map(str, folders[1:]))}, tmp_path / "a")
    library.merge({**recipe, "base": str(pickled[0]), "models": list(map(str, pickled[1:]))}, tmp_path / "b")
    a, b = load(tmp_path / "a"), load(tmp_path / "b")
    assert a.keys() == b.keys()
    assert all(torch.equal(b[name], tensor) for name, tensor in a.items())


def test_grouped_and_depthwise_convolutions_are_not_taken_for_matrices(tmp_path):
    _, folders = make(tmp_path, "mobilenet")
    recipe = {"base": str(folders[0]), "models": list(map(str, folders[1:])), "method": "stf"}
    record = library.merge(recipe, tmp_path / "out")
    with safe_open(folders[0] / "model.safetensors", "pt") as stream:
        depthwise = {name for name in stream.keys() if stream.get_slice(name).get_shape()[1:2] == [1]}  # noqa: SIM118
    convolutions = {tensor.name: tensor for tensor in record.tensors if tensor.kind == "conv"}
    assert depthwise & convolutions.keys()
    for name, tensor in convolutions.items():
        assert ("features" in tensor.stats) == (name not in depthwise), name
