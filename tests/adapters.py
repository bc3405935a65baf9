"""Small models with adapters that PEFT makes, and PEFT as the judge of what an adapter adds."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from families import generator
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

ATTENTION = ["q_proj", "v_proj"]


def llama(folder: Path, *, tied: bool = False, seed: int = 0) -> Path:
    """Save a Llama of two layers."""
    config = LlamaConfig(
        vocab_size=60, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=tied,
    )  # fmt: skip
    torch.manual_seed(seed)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def gpt2(folder: Path) -> Path:
    """Save a GPT-2 of two layers, whose linear maps are stored in x out."""
    config = GPT2Config(vocab_size=60, n_embd=24, n_layer=2, n_head=4, n_positions=32)
    torch.manual_seed(1)
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def adapter(folder: Path, base: Path, seed: int, *, size: float = 0.3, **config: object) -> Path:
    """Save an adapter with random factors, and random values in whatever else it holds."""
    from peft import LoraConfig, get_peft_model

    settings = {"r": 4, "lora_alpha": 8, "target_modules": ATTENTION, "init_lora_weights": True, **config}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about Conv1D and tied weights: what is tested here
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), LoraConfig(**settings))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    noise = torch.randn(parameter.shape, generator=generator(seed, name)) * size
                    parameter.copy_(parameter.abs() + noise.abs() if "magnitude" in name else noise)
        model.save_pretrained(folder)
    return folder


def loaded(base: Path, folder: Path):
    """Return the base with the adapter on it, as PEFT loads it; a key that it does not know is an error."""
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        return PeftModel.from_pretrained(model, folder)


def deltas(base: Path, folder: Path) -> dict[str, Tensor]:
    """Return what an adapter adds to every weight, as stored, as PEFT computes it in float64; zeros left out."""
    found = {}
    for name, module in loaded(base, folder).double().named_modules():
        if hasattr(module, "get_delta_weight") and "default" in module.scaling:
            delta = module.get_delta_weight("default").detach()
            if delta.abs().max() > 0:
                found[name.removeprefix("base_model.model.") + ".weight"] = delta
    return found


def folded(base: Path, folder: Path) -> dict[str, Tensor]:
    """Return the state of the base with the adapter merged into it, by PEFT."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return loaded(base, folder).merge_and_unload().state_dict()


def state(folder: Path) -> dict[str, Tensor]:
    """Return a model's state as transformers loads it."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()


def added(*changes: Mapping[str, Tensor], factors: tuple[float, ...] | None = None) -> dict[str, Tensor]:
    """Return the sum of updates by name, each times its factor, in float64; what one lacks is zero."""
    total: dict[str, Tensor] = {}
    for change, factor in zip(changes, factors or (1.0,) * len(changes), strict=True):
        for name, delta in change.items():
            total[name] = total.get(name, torch.zeros_like(delta).double()) + factor * delta.double()
    return total


def distance(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Return how far updates are from others, relative to the norm of those; names have to agree."""
    assert set(found) == set(expected)
    lost = sum(float((found[name].double() - expected[name].double()).square().sum()) for name in expected)
    return (lost / sum(float(delta.double().square().sum()) for delta in expected.values())) ** 0.5


def loralib(folder: Path, tensors: Mapping[str, Tensor], **config: object) -> Path:
    """Save a state dict as loralib makes it, with the config that it lacks."""
    folder.mkdir(parents=True)
    save_file(dict(tensors), folder / "checkpoint.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def named(folder: Path, model: object) -> Path:
    """Save any model of transformers."""
    model.save_pretrained(folder)
    return folder


def noisy(folder: Path, model: object, size: float = 0.05) -> Path:
    """Save a fine-tune of a model: noise on all of its parameters. The model itself stays as it is."""
    kept = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator("noisy", name)) * size)
        model.save_pretrained(folder)
        for name, parameter in model.named_parameters():
            parameter.copy_(kept[name])
    return folder
