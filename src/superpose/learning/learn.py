"""The frame of learning: what is known already, the tasks' data, the file that is written, and its provenance."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from superpose.checkpoints.models import open_model
from superpose.errors import SuperposeError
from superpose.inference import TaskData, encode_rows
from superpose.learning.setting import Learned, RunSurveys, Setting, State, Task, Tell
from superpose.learning.task_models import load_for
from superpose.output_folder import sync
from superpose.parts import Context
from superpose.planning import LEARNED_FILE, Plan, attach_learned
from superpose.registry import find_method

STATE_FOLDER = "learning"
"""In the folder of a merge under way: what a learner has so far."""


def learn_first(
    plan: Plan, folder: Path, context: Context, surveys: RunSurveys, tell: Tell
) -> tuple[Plan, Mapping[str, Any]]:
    """Learn what a plan's method learns from data, or find it learned, and hand it to the items.

    Args:
        plan: the merge.
        folder: of the merge under way; the file of what was learned goes there.
        context: of the merge.
        surveys: (items, context) -> what the survey of their method ends with.
        tell: called with steps done and steps to do.

    Returns:
        The plan with what was learned, and what the record says of it.

    Raises:
        SuperposeError: a model or its data is not as it should be.
    """
    file = folder / LEARNED_FILE
    if plan.to_learn is None:
        file.unlink(missing_ok=True)
        if plan.recipe.learned:
            place = Path(plan.recipe.learned).expanduser()
            shutil.copyfile(place / LEARNED_FILE if place.is_dir() else place, file)
        return plan, plan.learned
    method, options = plan.to_learn
    if not plan.base.is_there:
        mend = "give the base, so that the model can be run"
        raise SuperposeError(f"{method} learns from the model's outputs", where=f"base {plan.base.name}", mend=mend)
    tasks = _tasks(plan, method, context)
    key = _key(plan, tasks)
    took: dict[str, float] = {}
    if not _is_there(file, key):
        started = time.perf_counter()
        items = tuple(item for item in plan.items if item.action == "merge" and item.method == method)
        state = State(folder / STATE_FOLDER, key)
        setting = Setting(plan, items, context, tasks, surveys, state, tell)
        found = _on_one_thread(method, setting, options)
        _write(file, found, _provenance(plan, tasks, found, key))
        took = {"seconds": round(time.perf_counter() - started, 3)}  # for the record: the file is the same each time
    shutil.rmtree(folder / STATE_FOLDER, ignore_errors=True)
    items, told = attach_learned(plan.items, file, plan.recipe.task_names)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    items = [replace(item, key=_digest([item.key, digest])) if item.learned is not None else item for item in items]
    return replace(plan, items=tuple(items)), {**told, **took, "sha256": digest}


def _on_one_thread(method: str, setting: Setting, options: Any) -> Learned:
    """Let a method learn; with more threads sums round in another order, and what it learns depended on the machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return import_module(f"superpose.learning.{method}").learn(setting, options)
    finally:
        torch.set_num_threads(before)


def _tasks(plan: Plan, method: str, context: Context) -> tuple[Task, ...]:
    """Read the tasks' data as their models read it."""
    labelled = method != "adamerging"
    if plan.recipe.task is not None and method == "lorahub":
        return (_task("task", plan.recipe.task, plan.recipe.task.model or plan.recipe.base, labelled, context),)
    found = []
    for entry, name, model in zip(plan.recipe.models, plan.recipe.task_names, plan.tuned, strict=True):
        assert entry.task is not None, "the plan has seen to it"
        # An adapter has no model of its own: the base's is filled with the merged weights.
        own = plan.recipe.base if not hasattr(model, "config") else entry.path
        found.append(_task(name, entry.task, entry.task.model or own, labelled, context))
    return tuple(found)


def _task(name: str, data: TaskData, location: str, labelled: bool, context: Context) -> Task:
    live = load_for(location, data, context.device)
    if live.answers == "features":
        mend = "give the task a model with a head (model:), a head: FILE, or a loader"
        raise SuperposeError("the task's model has no head: nothing can be learned from it", where=location, mend=mend)
    examples, rows = encode_rows(live, data, labelled=labelled)
    return Task(name, data, location, examples, rows)


def _key(plan: Plan, tasks: Sequence[Task]) -> str:
    made_of = [
        [item.key for item in plan.items],
        [[task.data.model_dump(), task.location, task.rows.digest, _made_of(task)] for task in tasks],
    ]
    return _digest(made_of)


def _made_of(task: Task) -> list[Any]:
    """Return what tells a task's model from another of that name: its files, its head, its loader's code."""
    files = [] if task.data.loader else open_model(task.location).files
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return [stats, task.data.hashes()]


def _is_there(file: Path, key: str) -> bool:
    try:
        with safe_open(str(file), framework="pt") as opened:
            return json.loads((opened.metadata() or {})["superpose"])["key"] == key
    except (SafetensorError, OSError, ValueError, KeyError):  # none, or torn: it is learned now
        return False


def _provenance(plan: Plan, tasks: Sequence[Task], found: Learned, key: str) -> dict[str, Any]:
    assert plan.to_learn is not None, "there was something to learn"
    method, options = plan.to_learn
    labels = "unlabelled" if method == "adamerging" else "labelled"
    return {
        "learned": method,
        "options": asdict(options),
        "task_names": list(plan.recipe.task_names),
        "saw": [
            {
                "task": task.name, **task.data.provenance(), **task.data.hashes(),
                "examples": len(task.examples), "rows": task.rows.total,
                "sha256": task.rows.digest, "used": labels,
            }
            for task in tasks
        ],
        "model": find_method(method).source,
        "key": key,
        "torch": torch.__version__,
        **found.facts,
    }  # fmt: skip


def _write(file: Path, found: Learned, told: Mapping[str, Any]) -> None:
    scratch = file.with_name(f"{file.name}.new")
    tensors = {name: tensor.contiguous() for name, tensor in found.tensors.items()}
    save_file(tensors, scratch, {"superpose": json.dumps(told)})  # one key: several come in any order
    sync(scratch)  # the name must not outlast the content when the power goes
    scratch.replace(file)


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()
