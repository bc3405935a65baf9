"""What CLIP's text side makes of a task's classes, once: a linear head on the vision encoder's pooled output.

CLIP compares the projected image with a class's text by their cosine. The image's norm is one for all classes and the
temperature one for all images, so that the winner is that of the linear map (normalised text features) x (visual
projection) on what the vision encoder pools. The text side is the base's for every model, as in the papers.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from recipes.clip_vit.tasks import TASKS
from safetensors.torch import save_file


def write_head(clip: Path, classes: Sequence[str], prompts: Sequence[str], file: Path) -> Path:
    """Write a task's head in the form that superpose's `classify` takes.

    Args:
        clip: folder of the whole CLIP model.
        classes: their names, in the order of the labels.
        prompts: sentences with {} for a class; their features are averaged.
        file: where to.

    Returns:
        The file.
    """
    from transformers import AutoTokenizer, CLIPModel

    model, tokenizer = CLIPModel.from_pretrained(clip).eval(), AutoTokenizer.from_pretrained(clip)
    rows = []
    with torch.inference_mode():
        for name in classes:
            read = tokenizer([prompt.format(name) for prompt in prompts], padding=True, return_tensors="pt")
            pooled = model.text_model(input_ids=read["input_ids"], attention_mask=read["attention_mask"]).pooler_output
            features = torch.nn.functional.normalize(model.text_projection(pooled), dim=-1)
            rows.append(torch.nn.functional.normalize(features.mean(dim=0), dim=-1))
        weight = torch.stack(rows) @ model.visual_projection.weight
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({"weight": weight.contiguous()}, file, {"classes": json.dumps(list(classes))})
    return file


def write_heads(clip: Path, data: Path, heads: Path) -> None:
    """Write the heads of all tasks whose class names are there (`classes.json` beside their rows)."""
    for name, task in TASKS.items():
        if (told := data / name / "classes.json").is_file():
            write_head(clip, json.loads(told.read_text(encoding="utf-8")), task.prompts, heads / f"{name}.safetensors")
