"""Localize-and-Stitch's masks, learned from labelled examples of each task.

He et al. 2024, arXiv:2408.13656: gradient descent on S_i, a step for each pass over the examples, at the weights
base + sigma(S_i) o tau_i. Tasks are independent; each is kept when it is finished.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from threading import Event
from typing import Any

import torch
from torch import Tensor

from superpose.inference import LiveModel
from superpose.learning.setting import Learned, Setting, losses
from superpose.learning.task_models import SharedWeights, fix_the_rest
from superpose.learning.task_vectors import TaskVectors
from superpose.maths.bits import pack
from superpose.maths.sparsify import Cuts, apply_cuts
from superpose.methods.localize_and_stitch import LocalizeAndStitchOptions
from superpose.one_thread_each import in_threads
from superpose.parts import Context
from superpose.planning import WorkItem

FIRM = 5.0
"""S at the beginning, in the mask; sigma(5) is .9933."""


def learn(setting: Setting, options: LocalizeAndStitchOptions) -> Learned:
    """Learn every task's masks.

    Args:
        setting: models, data, where to keep what there is.
        options: of the method.

    Returns:
        The masks, packed.
    """
    of_tasks = [_of_one(setting, place, options) for place in range(len(setting.tasks))]
    done: dict[int, int] = {}

    def one(place: int, stop: Event) -> tuple[dict[str, Tensor], dict[str, Any]]:
        kept = setting.state.load(f"masks-{place}")
        if kept is not None:
            return kept

        def tell(epoch: int) -> None:
            done[place] = epoch
            setting.tell(sum(done.values()), options.epochs * len(setting.tasks))
            if stop.is_set():
                raise KeyboardInterrupt

        found = _masks_of_one(setting, place, of_tasks[place], options, tell)
        setting.state.save(f"masks-{place}", *found)
        return found

    results = in_threads(one, range(len(setting.tasks)), workers=setting.workers(4))
    tensors = {item.name: torch.stack([masks[item.name] for masks, _ in results]) for item in setting.items}
    facts = {task.name: facts for task, (_, facts) in zip(setting.tasks, results, strict=True)}
    return Learned(tensors, {"objective": "labelled loss of each task at base + sigma(S) o tau", "tasks": facts})


@dataclass(frozen=True)
class _OneTask:
    """The merge as if one task were all: its tensors, and where its largest entries begin."""

    items: list[WorkItem]
    context: Context
    surveys: Mapping[Any, Any]


def _of_one(setting: Setting, place: int, options: LocalizeAndStitchOptions) -> _OneTask:
    one = slice(place, place + 1)
    items = [replace(item, tuned=item.tuned[one], options=options.initial()) for item in setting.items]
    names, weights = setting.context.task_names[one], setting.context.weights[one]
    context = replace(setting.context, task_names=names, weights=weights)
    return _OneTask(items, context, setting.surveys(items, context))


def _masks_of_one(
    setting: Setting, place: int, own: _OneTask, options: LocalizeAndStitchOptions, tell: Callable[[int], None]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    live = setting.load(setting.tasks[place])
    weights = SharedWeights([live], own.items, setting.plan.tied)
    fix_the_rest([live], setting.plan.items, setting.context)
    weights.ask_for_gradients()
    room = setting.plan.settings.memory // setting.workers(4)
    vectors = TaskVectors(own.items, own.context, room=room)
    chosen = TaskVectors(own.items, own.context, room=0, surveys=own.surveys, process=_largest)
    scores = {name: torch.where(chosen.read(name)[0][0] != 0, FIRM, -FIRM) for name in vectors.names}
    history: list[float] = []
    for epoch in range(options.epochs):
        tell(epoch)
        for name in vectors.names:
            stacked, base = vectors.read(name)
            weights.fill(name, base + torch.sigmoid(scores[name]) * stacked[0])
        history.append(_pass(setting, live, weights, place))
        for name in vectors.names:
            parameter = weights.parameters.get(name)
            gradient = None if parameter is None else parameter.grad
            scores[name] -= step_of(scores[name], gradient, vectors.read(name)[0][0], options)
            if parameter is not None:
                parameter.grad = None
    tell(options.epochs)
    masks = {name: (scores[name] > 0) & (vectors.read(name)[0][0] != 0) for name in vectors.names}
    kept, total = sum(int(mask.sum()) for mask in masks.values()), sum(mask.numel() for mask in masks.values())
    facts = {"density": kept / max(total, 1), "loss": history}
    return {name: pack(mask) for name, mask in masks.items()}, facts


def step_of(scores: Tensor, gradient: Tensor | None, task_vector: Tensor, options: LocalizeAndStitchOptions) -> Tensor:
    """Return what is taken from S in one step.

    Args:
        scores: S.
        gradient: of the loss for the weights; None for zero.
        task_vector: tau.
        options: of the method.

    Returns:
        The step, in the shape of S.
    """
    inside = torch.sigmoid(scores)
    slope = inside * (1 - inside)
    pull = options.l1 * slope
    if options.regulariser == "binarise":
        pull = pull * -torch.where(scores > 0, 1.0, -1.0)
    if gradient is None:
        return pull
    return options.learning_rate * gradient * task_vector * slope + pull


def _pass(setting: Setting, live: LiveModel, weights: SharedWeights, place: int) -> float:
    """Add the gradient of the mean loss over all examples up in the weights, and return the loss."""
    task, total = setting.tasks[place], 0.0
    for batch in task.batches():
        with torch.enable_grad():
            loss = losses(live, batch.to(setting.device)).sum() / len(task.examples)
        loss.backward()
        total += loss.item()
    return round(total, 6)


def _largest(task_vectors: Tensor, options: Any, cuts: Cuts) -> Tensor:
    del options
    return apply_cuts(task_vectors, cuts)
