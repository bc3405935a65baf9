"""AdaMerging's coefficients: Adam on the entropy of the merged model's predictions.

Yang et al. 2023, arXiv:2310.02575. The merge itself is never part of a graph: with merged = base + sum_i l_i tau_i, the
gradient for l_i is <dL/dmerged, tau_i>, so one backward pass on the merged weights and T inner products do.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from superpose.errors import SuperposeError
from superpose.inference import Batch, LiveModel
from superpose.learning.setting import Learned, Setting, Task
from superpose.learning.task_models import SharedWeights, fix_the_rest
from superpose.learning.task_vectors import TaskVectors
from superpose.methods.adamerging import AdamergingOptions, process
from superpose.one_thread_each import in_threads
from superpose.planning import EVERY_TENSOR

SECONDS_BETWEEN_SAVES = 60.0
STATE = "adamerging"


@dataclass(frozen=True)
class MergedModels:
    """The tasks' models with shared weights, and what these are made of.

    Args:
        models: one per task.
        weights: that they share.
        vectors: task vectors.
    """

    models: Sequence[LiveModel]
    weights: SharedWeights
    vectors: TaskVectors

    def fill(self, coefficients: Float[Tensor, "tensors tasks"]) -> None:
        """Set base + sum_i l_i tau_i, a row of coefficients for each tensor, or one for all."""
        for row, name in self._rows(coefficients):
            stacked, base = self.vectors.read(name)
            self.weights.fill(name, torch.tensordot(row.to(stacked), stacked, dims=1).add_(base))

    def gradient(
        self, gradients: Mapping[str, Tensor], like: Float[Tensor, "tensors tasks"]
    ) -> Float[Tensor, "tensors tasks"]:
        """Return the gradient for the coefficients, given that for the merged weights.

        Args:
            gradients: by the tensor's name; zero where not given.
            like: the coefficients.

        Returns:
            <dL/dmerged, tau_i> in float64, added up over the tensors where they share coefficients.
        """
        found = torch.zeros_like(like)
        for place, name in enumerate(self.vectors.names):
            if name in gradients:
                stacked, _ = self.vectors.read(name)
                products = torch.mv(stacked.reshape(len(stacked), -1), gradients[name].reshape(-1))
                found[place if len(like) > 1 else 0] += products.double().cpu()
        return found

    def _rows(self, coefficients: Tensor) -> Iterator[tuple[Tensor, str]]:
        for place, name in enumerate(self.vectors.names):
            yield coefficients[place if len(coefficients) > 1 else 0], name


def learn(setting: Setting, options: AdamergingOptions) -> Learned:
    """Learn the coefficients.

    Args:
        setting: models, data, where to keep what there is.
        options: of the method.

    Returns:
        One row per tensor, or one for all.

    Raises:
        SuperposeError: a task's model is no classifier.
    """
    merged = prepare(setting, options)
    names = merged.vectors.names
    tasks = len(setting.plan.recipe.models)
    rows = len(names) if options.granularity == "layer" else 1
    coefficients = torch.full((rows, tasks), options.initial, dtype=torch.float64)
    optimiser = torch.optim.Adam([coefficients], lr=options.learning_rate)
    history: list[list[float]] = []
    start = _resume(setting, coefficients, optimiser, history)
    feeds = [_feed(task, setting.plan.recipe.seed, start) for task in setting.tasks]
    saved = time.monotonic()
    for step in range(start, options.steps):
        setting.tell(step, options.steps)
        merged.fill(_within(coefficients, options))
        found = entropies(setting, merged, [next(feed) for feed in feeds])
        history.append([round(value, 6) for value, _ in found])
        gradient = merged.gradient(_added(found), coefficients)
        if options.clamp:
            gradient[(coefficients < 0) | (coefficients > 1)] = 0
        coefficients.grad = gradient
        optimiser.step()
        if time.monotonic() - saved > SECONDS_BETWEEN_SAVES:
            _save(setting, coefficients, optimiser, history)
            saved = time.monotonic()
    setting.tell(options.steps, options.steps)
    final = _within(coefficients, options)
    keys = names if options.granularity == "layer" else [EVERY_TENSOR]
    return Learned(
        {key: row.clone() for key, row in zip(keys, final, strict=True)},
        {
            "objective": "mean entropy of predictions on unlabelled inputs",
            "transductive": "it adapts to the inputs that it saw",
            "steps": options.steps,
            "mean_coefficients": dict(zip(setting.plan.recipe.task_names, final.mean(dim=0).tolist(), strict=True)),
            "entropy": {"tasks": [task.name for task in setting.tasks], "by_step": _thinned(history)},
        },
    )


def prepare(setting: Setting, options: AdamergingOptions) -> MergedModels:
    """Load the tasks' models, let them share the merged weights, and make the task vectors ready.

    Args:
        setting: what is merged.
        options: of the method.

    Returns:
        The models.

    Raises:
        SuperposeError: a task's model is no classifier.
    """
    models = [setting.load(task) for task in setting.tasks]
    for live, task in zip(models, setting.tasks, strict=True):
        if live.answers != "classes":
            mend = "give the task a classifier: a model with a classification head, or head: FILE"
            raise SuperposeError("AdaMerging learns from a classifier's predictions", where=task.location, mend=mend)
    weights = SharedWeights(models, setting.items, setting.plan.tied)
    fix_the_rest(models, setting.plan.items, setting.context)
    weights.ask_for_gradients()
    vectors = TaskVectors(
        setting.items, setting.context, room=setting.plan.settings.memory, process=process,
        surveys=setting.surveys(setting.items, setting.context),
    )  # fmt: skip
    return MergedModels(models, weights, vectors)


def entropies(
    setting: Setting, merged: MergedModels, batches: Sequence[Batch]
) -> list[tuple[float, dict[str, Tensor]]]:
    """Return each task's entropy on a batch, and its gradient for the merged weights, by name.

    Entropies are added up over the batch and divided by the task's batch size: examples count alike, whatever batch
    they are in.
    """
    parameters = merged.weights.parameters

    def one(place: int, stop: Any) -> tuple[float, dict[str, Tensor]]:
        del stop
        live, task = merged.models[place], setting.tasks[place]
        with torch.enable_grad():
            scores = live.scores(batches[place].to(setting.device))[:, 0]
            log_chances = scores.log_softmax(dim=-1)
            entropy = -(log_chances.exp() * log_chances).sum(dim=-1)
            loss = entropy.sum() / task.data.batch_size
        found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        gradients = {name: grad for name, grad in zip(parameters, found, strict=True) if grad is not None}
        return float(entropy.detach().mean()), gradients

    return in_threads(one, range(len(setting.tasks)), workers=setting.workers(2))


def _added(found: Sequence[tuple[float, dict[str, Tensor]]]) -> dict[str, Tensor]:
    """Return the gradients of all tasks added up, in the order of the tasks."""
    total: dict[str, Tensor] = {}
    for _, gradients in found:
        for name, gradient in gradients.items():
            total[name] = total[name].add_(gradient) if name in total else gradient
    return total


def _within(coefficients: Tensor, options: AdamergingOptions) -> Tensor:
    return coefficients.clamp(0, 1) if options.clamp else coefficients


def _feed(task: Task, seed: int, skipped: int) -> Iterator[Batch]:
    """Yield batches for ever, all of them once in a random order of its own each time round."""
    made = task.batches()
    name = int.from_bytes(task.name.encode()[:8], "big")
    number = 0
    while True:
        order = np.random.default_rng([seed % 2**64, name, number // len(made)]).permutation(len(made))
        for place in order[max(0, skipped - number) :] if skipped > number else order:
            yield made[place]
        number += len(made)


def _resume(setting: Setting, coefficients: Tensor, optimiser: torch.optim.Adam, history: list[list[float]]) -> int:
    """Put back what was kept, and return the number of steps that are in it."""
    kept = setting.state.load(STATE)
    if kept is None:
        return 0
    tensors, facts = kept
    coefficients.copy_(tensors["coefficients"])
    optimiser.state[coefficients] = {
        "step": torch.tensor(float(len(facts))), "exp_avg": tensors["mean"], "exp_avg_sq": tensors["square"],
    }  # fmt: skip
    history += facts
    return len(facts)


def _save(setting: Setting, coefficients: Tensor, optimiser: torch.optim.Adam, history: list[list[float]]) -> None:
    state = optimiser.state[coefficients]
    tensors = {"coefficients": coefficients, "mean": state["exp_avg"], "square": state["exp_avg_sq"]}
    setting.state.save(STATE, {name: tensor.clone() for name, tensor in tensors.items()}, history)


def _thinned(history: list[list[float]]) -> dict[int, list[float]]:
    """Return some twenty of the steps, the first and the last among them."""
    every = max(1, len(history) // 20)
    places = sorted({*range(0, len(history), every), len(history) - 1} - {-1})
    return {place: history[place] for place in places}
