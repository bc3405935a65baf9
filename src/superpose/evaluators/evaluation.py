"""One evaluation: what was asked for checked, the evaluator called, and what it found put on record."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from superpose.errors import SuperposeError, raise_all
from superpose.evaluators.registry import Better, Evaluator, Measured, Report, silent
from superpose.options import build_options
from superpose.task_data import TaskData

MODEL = "{model}"
"""Stands for the model's path in the name of a head, so that several models can have one each."""


@dataclass(frozen=True)
class Evaluation:
    """How good a model is, and what that was measured on.

    Args:
        model: as the user named it.
        evaluator: name of the evaluator.
        metrics: by name.
        better: which way each metric is better.
        facts: the data, its digest, the options and the versions.
    """

    model: str
    evaluator: str
    metrics: Mapping[str, float]
    better: Mapping[str, Better]
    facts: Mapping[str, Any] = field(default_factory=dict)


def evaluate_model(
    model: str,
    by: Evaluator,
    *,
    task: TaskData | None,
    options: Mapping[str, Any],
    device: torch.device,
    report: Report = silent,
) -> Evaluation:
    """Return what an evaluator finds of a model.

    Args:
        model: folder, hub id, or MODEL+ADAPTER.
        by: the evaluator.
        task: the data, if it reads any; {model} in the name of a head stands for the model.
        options: of the evaluator, by name.
        device: where the model goes.
        report: called with how much is done, and of how much.

    Returns:
        The evaluation.

    Raises:
        SuperposeError: the model, the data or an option is not as it should be.
        Problems: several of them are not.
    """
    built, problems = build_options(by.options, options, where="evaluate", owner=f"evaluator {by.name}")
    task, found = _task_for(by, task, model)
    raise_all([*problems, *found])
    available = {"task": task, "device": device, "report": report}
    measured = by.function(model, built, **{name: available[name] for name in by.wants})
    better = by.better if measured.better is None else measured.better
    facts = {**({"data": task.provenance()} if task is not None else {}), **measured.facts, "options": asdict(built)}
    facts["versions"] = _versions(by)
    return Evaluation(model, by.name, _finite(measured, by, model), dict(better), facts)


def _task_for(by: Evaluator, task: TaskData | None, model: str) -> tuple[TaskData | None, list[SuperposeError]]:
    where = f"evaluator {by.name}"
    if not by.reads_data:
        mend = "leave the data out"
        unread = [SuperposeError(f"{by.name} reads no data of yours", where=where, mend=mend)] if task else []
        return None, unread
    if task is None:
        mend = "name a .jsonl or .csv file, or a dataset: --data FILE"
        return None, [SuperposeError(f"{by.name} reads data, and none is named", where=where, mend=mend)]
    changes = {name: value for name, value in by.data_defaults.items() if name not in task.model_fields_set}
    if MODEL in task.head:
        changes["head"] = task.head.replace(MODEL, model)
    return task.model_copy(update=changes), by.problems(task)


def _finite(measured: Measured, by: Evaluator, model: str) -> dict[str, float]:
    for name, value in measured.metrics.items():
        if not math.isfinite(value):
            mend = "look for NaN and huge values in the model's tensors"
            raise SuperposeError(f"{name} is {value}", where=f"evaluator {by.name}, {model}", mend=mend)
    return {name: float(value) for name, value in measured.metrics.items()}


def _versions(by: Evaluator) -> dict[str, str]:
    found = {}
    for package in ("superpose", "torch", *by.packages):
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # run from a checkout, or an extra that this evaluation did without
            continue
    return found
