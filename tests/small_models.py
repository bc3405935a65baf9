"""Small models in folders, their data, and what statistics of them are by loops over single examples."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from evaluators.tiny_models import (
    WORDS,
    byte_tokenizer,
    make_bert,
    make_llama,
    make_t5,
    save,
    some_texts,
    word_tokenizer,
    write_rows,
)
from families import save as save_checkpoint
from families import tuned_tensors
from safetensors.torch import load_file, save_file

__all__ = [
    "WORDS",
    "byte_tokenizer",
    "classified",
    "close",
    "family",
    "make_bert",
    "make_gpt2",
    "make_llama",
    "make_t5",
    "make_vit",
    "names_on_disk",
    "prompted",
    "read",
    "recipe_of",
    "save",
    "save_sharded",
    "setting_of",
    "some_texts",
    "squared_gradients",
    "word_tokenizer",
    "write_images",
    "write_rows",
]


def make_gpt2(folder, *, seed=0):
    """A GPT-2: head and embedding are one tensor, linear maps are stored in x out."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=258, n_embd=24, n_layer=2, n_head=4, n_positions=64, bos_token_id=None, eos_token_id=1,
        initializer_range=0.3,
    )  # fmt: skip
    return save(GPT2LMHeadModel(config), byte_tokenizer(), folder)


def make_vit(folder, *, seed=0):
    """A ViT: class token and positions are parameters of modules that have parts."""
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    torch.manual_seed(seed)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, image_size=8, patch_size=4,
        num_labels=3, initializer_range=0.3,
    )  # fmt: skip
    model = ViTForImageClassification(config)
    with torch.no_grad():
        for parameter in model.parameters():  # none like another: some names on disk are not the module's
            parameter.add_(0.1 * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folder)
    return folder


def write_images(folder, count):
    """Images of noise, and a table of them."""
    from PIL import Image

    folder.mkdir()
    draw = torch.Generator().manual_seed(0)
    rows = []
    for number in range(count):
        pixels = torch.randint(0, 256, (8, 8, 3), generator=draw, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{number}.png")
        rows.append({"image": f"{number}.png", "label": number % 3})
    return write_rows(folder / "rows.jsonl", rows)


def classified(file, count=9, *, classes=3, seed=0, longest=6):
    """Texts of many lengths with a class each."""
    texts = some_texts(count, seed=seed, longest=longest)
    return write_rows(file, [{"text": text, "label": number % classes} for number, text in enumerate(texts)])


def prompted(file, count=7, *, seed=0, longest=3):
    """Prompts, and what is to be written after (or from) them."""
    texts, wanted = (some_texts(count, seed=seed + more, longest=longest) for more in (0, 100))
    rows = [{"text": text, "target": f" {answer}"} for text, answer in zip(texts, wanted, strict=True)]
    return write_rows(file, rows)


def family(root, make=make_bert, tasks=2, size=0.05, **more):
    """A base and fine-tunes of it, which are the base with noise; tokenizers with each."""
    folders = [make(root / "base", **more)]
    for task in range(1, tasks + 1):
        folder = root / f"task{task}"
        shutil.copytree(folders[0], folder)
        tensors = load_file(folder / "model.safetensors")
        tuned = tuned_tensors(tensors, task, size)
        save_file(tuned, folder / "model.safetensors", {"format": "pt"})
        folders.append(folder)
    return folders


def save_sharded(folder, target, *, dtype=None):
    """Copy a model's folder, its tensors in another order and in several files, in another dtype if one is given."""
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("*.safetensors"))
    tensors = {
        name: tensor.to(dtype or tensor.dtype) for name, tensor in load_file(folder / "model.safetensors").items()
    }
    scratch = save_checkpoint(target / "scratch", tensors, shards=5, reverse=True)
    for file in scratch.iterdir():
        file.rename(target / file.name)
    scratch.rmdir()
    return target


def recipe_of(folders, files, method, *, more=None, task=None, **options):
    """Return a recipe whose models have data."""
    models = [
        {"path": str(folder), **({"task": {"data": file, **(task or {})}} if file else {})}
        for folder, file in zip(folders[1:], files, strict=True)
    ]
    return {"base": str(folders[0]), "models": models, "method": method, "options": options, **(more or {})}


def setting_of(recipe, folder, **settings):
    """Return what a learner is given for a recipe, and its options."""
    from superpose.learning import learn as frame
    from superpose.learning.setting import Setting, State
    from superpose.planning import Settings, make_plan
    from superpose.recipe import load_recipe
    from superpose.run import _context, make_backend, survey_all

    plan = make_plan(load_recipe(recipe), Settings(**settings))
    assert plan.to_learn is not None, "there is nothing to learn"
    method, options = plan.to_learn
    context = _context(plan, None)
    items = tuple(item for item in plan.items if item.action == "merge" and item.method == method)

    def surveys(items, of):
        return survey_all(items, items, make_backend("serial", None, 0), of, lambda _: None)

    folder.mkdir(exist_ok=True)
    tasks = frame._tasks(plan, method, context)
    state = State(folder, "key")
    return Setting(plan, items, context, tasks, surveys, state, lambda done, total: None), options


def read(file):
    """Return the rows of a file."""
    return [json.loads(line) for line in Path(file).read_text(encoding="utf-8").splitlines()]


def names_on_disk(folder, model):
    """Return the name in the folder's file of each parameter of the module, told by their values."""
    stored = load_file(folder / "model.safetensors")
    return {
        own: next(name for name, tensor in stored.items() if torch.equal(tensor, parameter))
        for own, parameter in model.named_parameters()
    }


def squared_gradients(model, terms):
    """Return the mean over examples of sum_y chance(y) (d value(y) / d theta)^2, by plain loops.

    Args:
        model: the module.
        terms: one per example: a function that runs the model and returns pairs (value, chance).
    """
    total = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    for example in terms:
        count = len(example())
        for place in range(count):
            model.zero_grad(set_to_none=True)
            value, chance = example()[place]
            value.backward()
            for name, parameter in model.named_parameters():
                if parameter.grad is not None:
                    total[name] += chance * parameter.grad**2
    return {name: tensor / len(terms) for name, tensor in total.items()}


def close(found, expected, tolerance=1e-5):
    """Compare tensors by name, each relative to its own largest entry; what is rounding noise alone may differ."""
    assert set(found) == set(expected)
    noise = 1e-9 * max(float(tensor.abs().max()) for tensor in expected.values())
    for name, tensor in expected.items():
        assert found[name].shape == tensor.shape, name
        distance, size = float((found[name] - tensor).abs().max()), float(tensor.abs().max())
        assert distance <= tolerance * size + noise, (name, distance, size)
