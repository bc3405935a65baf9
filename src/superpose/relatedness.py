"""Whether tuned models look like fine-tunes of the base: a sample of their weights, before a merge begins.

A fine-tune stays near its base: real ones move by a hundredth to a few tenths of its norm, at cosines above 0.9. Models
of one shape that have nothing to do with each other have a cosine near 0 and lie 1.4 norms apart.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from superpose.checkpoints.adapted import AdaptedTensor
from superpose.checkpoints.headers import TensorHeader
from superpose.kinds import Kind
from superpose.planning import WorkItem
from superpose.reading import read_tensor

PIECE = 4096
"""Entries read of a tensor, from its middle."""
MOST_PIECES = 2048
"""Pieces read in all, of all models."""
LEAST_COSINE = 0.5
"""Below, a model is doubted."""
WEIGHTS = (Kind.LINEAR, Kind.CONV, Kind.EMBEDDING, Kind.HEAD)
"""Kinds that tell: norms are near 1 in all models, biases near 0."""


def doubts(items: Sequence[WorkItem], task_names: Sequence[str]) -> list[str]:
    """Return what is odd about tuned models, seen beside the base.

    Args:
        items: all of a merge.
        task_names: one per tuned model.

    Returns:
        A warning for each full model that is the base itself, or is no fine-tune of it, as far as the sample shows.
    """
    merged = [item for item in items if item.action == "merge" and item.reads_base and item.numel]
    step = max(1, math.ceil(len(merged) * (1 + len(task_names)) / MOST_PIECES))
    chosen = merged[::step]
    found = []
    for task, name in enumerate(task_names):
        pairs = [(item, base, tuned) for item in chosen for base, tuned in _pieces(item, task)]
        if pairs and all(torch.equal(base, tuned) for _, base, tuned in pairs):
            entries = sum(base.numel() for _, base, _ in pairs)
            found.append(
                f"{name}: no difference from the base in {entries} entries of {len(pairs)} tensors: is it the base?"
            )
        elif told := _figures([(base, tuned) for item, base, tuned in pairs if item.kind in WEIGHTS]):
            cosine, distance = told
            if cosine < LEAST_COSINE:
                found.append(
                    f"{name}: its weights have a cosine of {cosine:.2f} to the base's and lie {distance:.2f} times"
                    " their norm apart, in a sample: it does not look like a fine-tune of this base"
                )
    return found


def _pieces(item: WorkItem, task: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield a piece of the base's tensor and of a tuned model's; nothing for adapters, which are updates of a base."""
    tuned = item.tuned[task]
    if tuned is None or isinstance(tuned, AdaptedTensor) or isinstance(item.base, AdaptedTensor):
        return
    yield _middle(item.base), _middle(tuned)


def _middle(header: TensorHeader) -> Tensor:
    whole = read_tensor(header).reshape(-1)
    start = max(0, (whole.numel() - PIECE) // 2)
    return whole[start : start + PIECE]


def _figures(pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[float, float] | None:
    """Return cosine, and distance in norms of the base, over all pieces; None where a norm is 0."""
    product = of_base = of_tuned = 0.0
    for base, tuned in pairs:
        first, second = base.double(), tuned.double()
        sound = torch.isfinite(first) & torch.isfinite(second)
        first, second = first[sound], second[sound]
        product += float(first @ second)
        of_base += float(first @ first)
        of_tuned += float(second @ second)
    if not of_base or not of_tuned:
        return None
    distance = math.sqrt(max(0.0, of_base + of_tuned - 2 * product) / of_base)
    return product / math.sqrt(of_base * of_tuned), distance
