"""LoraHub's coefficients: a search without gradients on the loss of a few examples.

Huang et al. 2023, arXiv:2307.13269: (mean loss per example) + penalty * mean |w|, w within bounds, from w = 0, which is
the base. Every trial merges by the code that merges files, so that the loss is that of what would be written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from superpose.checkpoints.headers import DTYPE_NAMES, TORCH_DTYPES, TensorInMemory
from superpose.checkpoints.writer import as_bytes
from superpose.learning.setting import Learned, Setting, losses
from superpose.learning.task_models import SharedWeights, fix_the_rest
from superpose.maths.quadratic_search import best, minimise
from superpose.merge_tensor import merge_item
from superpose.methods.lorahub import LorahubOptions
from superpose.one_thread_each import in_threads
from superpose.parts import Context
from superpose.planning import EVERY_TENSOR, WorkItem

STATE = "lorahub"


def learn(setting: Setting, options: LorahubOptions) -> Learned:
    """Search for the coefficients.

    Args:
        setting: models, data, where to keep what there is.
        options: of the method.

    Returns:
        One row for all tensors.
    """
    models = [setting.load(task) for task in setting.tasks]
    weights = SharedWeights(models, setting.items, setting.plan.tied)
    fix_the_rest(models, setting.plan.items, setting.context)
    batches = [task.batches() for task in setting.tasks]
    kept = setting.state.load(STATE)
    values: list[float] = list(kept[1]) if kept is not None else []
    known = tuple(values)

    def loss_of(place: int, stop: object) -> float:
        del stop
        with torch.inference_mode():
            found = [losses(models[place], batch.to(setting.device)).sum().item() for batch in batches[place]]
        return sum(found) / len(setting.tasks[place].examples)

    def value(point: tuple[float, ...]) -> float:
        setting.tell(len(values), options.evaluations)
        for name, tensor in merged_tensors(setting.items, setting.context, point).items():
            weights.fill(name, tensor)
        found = in_threads(loss_of, range(len(models)), workers=setting.plan.settings.workers)
        size = sum(map(abs, point)) / len(point)
        values.append(sum(found) / len(found) + options.penalty * size)
        setting.state.save(STATE, {}, values)
        return values[-1]

    start = [0.0] * len(setting.plan.recipe.models)
    trials = minimise(
        value, start, bound=options.bound, evaluations=options.evaluations, seed=setting.plan.recipe.seed, known=known
    )
    setting.tell(options.evaluations, options.evaluations)
    chosen = best(trials)
    return Learned(
        {EVERY_TENSOR: torch.tensor(chosen.point, dtype=torch.float64)},
        {
            "objective": f"mean loss per example + {options.penalty:g} mean |w|",
            "coefficients": dict(zip(setting.plan.recipe.task_names, chosen.point, strict=True)),
            "value": chosen.value,
            "value_of_the_base": trials[0].value,
            "evaluations": len(trials),
        },
    )


def merged_tensors(items: Sequence[WorkItem], context: Context, point: Sequence[float]) -> Mapping[str, Tensor]:
    """Return the tensors that a merge with these coefficients would write.

    Args:
        items: of the tensors, merged whole or in factors.
        context: of the merge.
        point: one coefficient per task.

    Returns:
        By name, in the dtype of the output.
    """
    learned = torch.tensor(point, dtype=torch.float64)
    header = TensorInMemory(EVERY_TENSOR, DTYPE_NAMES[learned.dtype], tuple(learned.shape), Path("trial"), learned)
    merged = {item.name: torch.empty(item.shape, dtype=TORCH_DTYPES[item.dtype]) for item in items}

    def write(name: str, start: int, piece: Tensor) -> memoryview:
        data, target = as_bytes(piece), as_bytes(merged[name])
        target[start : start + len(data)] = data
        return data

    rows = tuple(range(len(point)))
    for item in items:
        # The whole tensor, whatever the output's form.
        whole = replace(item, learned=(header, rows), names=(item.name,), factors=None, reads_base=True)
        merge_item(whole, {}, context, write)
    return merged
