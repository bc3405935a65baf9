"""A linear layer of its own on top of an encoder: features of a text or an image, and the classes made of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from superpose.errors import SuperposeError


@dataclass(frozen=True)
class Head:
    """A linear layer and the names of its classes, none where its file tells none."""

    layer: nn.Linear
    classes: tuple[str, ...]


def read_head(file: Path, width: int | None) -> Head:
    """Read a head.

    Args:
        file: safetensors with `weight` (classes, features) and, if there is one, `bias` (classes,); the names of the
            classes may be a JSON list in its metadata, under "classes".
        width: features of the model, if known.

    Returns:
        The head, in float32.

    Raises:
        SuperposeError: it is no such file.
    """
    mend = "give a safetensors file with weight (classes, features) and bias (classes,)"
    if not file.is_file():
        raise SuperposeError("there is no such file", where=f"head {file}", mend=mend)
    try:
        with safe_open(str(file), framework="pt") as opened:
            tensors = {name: opened.get_tensor(name).float() for name in opened.keys()}  # noqa: SIM118 - no mapping
            metadata = opened.metadata() or {}
        classes = tuple(str(name) for name in json.loads(metadata.get("classes", "[]")))
    except (SafetensorError, OSError, ValueError, TypeError, RecursionError) as error:
        raise SuperposeError(f"no readable head: {error}", where=f"head {file}", mend=mend) from error
    weight, bias = tensors.get("weight"), tensors.get("bias")
    if weight is None or weight.ndim != 2 or (bias is not None and bias.shape != weight.shape[:1]):
        shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
        raise SuperposeError(f"no linear layer: it holds {shapes}", where=f"head {file}", mend=mend)
    if width is not None and weight.shape[1] != width:
        what = f"the head takes {weight.shape[1]} features, the model has {width}"
        raise SuperposeError(what, where=f"head {file}, tensor weight", mend="give the head of this model")
    if classes and len(classes) != len(weight):
        what = f"{len(classes)} names for {len(weight)} classes"
        raise SuperposeError(what, where=f"head {file}, metadata", mend="name each class once")
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    layer.requires_grad_(False)
    layer.weight.copy_(weight)
    if bias is not None:
        layer.bias.copy_(bias)
    return Head(layer, classes)


def with_head(module: nn.Module, head: nn.Linear, pooling: str) -> Callable[[Mapping[str, Tensor]], Tensor]:
    """Return what answers with the head's scores.

    Args:
        module: the body.
        head: the layer on top; it stays where the inputs are.
        pooling: "mean" of the last hidden states, the "first" of them, or the model's own "pooler".

    Returns:
        Named inputs, stacked and without padding -> scores before the softmax.
    """

    def forward(inputs: Mapping[str, Tensor]) -> Tensor:
        found: Any = module(**inputs)
        if pooling == "pooler":
            features = getattr(found, "pooler_output", None)
            if features is None:
                mend = "choose --pooling mean or first"
                raise SuperposeError("the model has no pooler", where=type(module).__name__, mend=mend)
        else:
            states = found.last_hidden_state
            features = states.mean(dim=1) if pooling == "mean" else states[:, 0]
        head.to(features.device)
        return head(features.to(torch.float32))

    return forward
