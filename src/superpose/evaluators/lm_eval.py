"""Tasks of EleutherAI's lm-evaluation-harness, run on the model in memory.

`--tasks` names them with commas: tasks and groups of YAML files under `--include`, or the harness's own, whose data
comes from the hub. Metrics are named task/metric, or task/metric/filter where the task has filters. Which way is better
is what the task says. A task that runs code that the model wrote needs `--allow-code`.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Annotated, Any

import torch

from superpose.errors import SuperposeError, nearest
from superpose.evaluators.live import load_language_model, tokenizer_of
from superpose.evaluators.packages import the_package
from superpose.evaluators.registry import Better, Measured, Report, evaluator, silent
from superpose.inference import TaskData
from superpose.inference.library import quietly
from superpose.options import Range

EXECUTES = "HF_ALLOW_CODE_EVAL"
"""Variable by which the metric of HumanEval asks whether it may run code."""


@dataclass(frozen=True, kw_only=True)
class LmEvalOptions:
    """Which tasks are run, and how."""

    tasks: str = ""
    """Names of tasks or groups, with commas."""
    include: str = ""
    """Folder of YAML files of tasks; functions that they name are run."""
    limit: Annotated[int | None, Range(1, 1_000_000_000)] = None
    """Documents of each task, the first ones; all where not given."""
    num_fewshot: Annotated[int | None, Range(0, 1000)] = None
    """Examples in the prompt; as many as the task says where not given."""
    batch_size: Annotated[int, Range(1, 100_000)] = 8
    """Requests at a time."""
    allow_code: bool = False
    """Whether tasks may run code that the model writes, on this machine and unprotected."""


@evaluator("lm_eval", options=LmEvalOptions, packages=("lm-eval", "transformers", "datasets"))
def lm_eval(model: str, options: LmEvalOptions, *, device: torch.device, report: Report) -> Measured:
    """Return what the harness measures.

    Args:
        model: folder, hub id, or MODEL+ADAPTER of a language model.
        options: the tasks.
        device: where the model goes.
        report: the harness shows bars of its own, on stderr, unless this is `silent`.

    Returns:
        The metrics, and the tasks' versions, shots, documents and digests.

    Raises:
        SuperposeError: the harness is not installed, a task is unknown, cannot be read, or would run code.
    """
    names = [name.strip() for name in options.tasks.split(",") if name.strip()]
    if not names:
        mend = "name some: --tasks NAME,NAME"
        raise SuperposeError("lm_eval runs tasks, and none are named", where="evaluator lm_eval", mend=mend)
    harness = the_package("lm_eval.evaluator", extra="eval", what="the evaluator lm_eval")
    with _quiet(bars=report is not silent), _random_state_kept(), _code_allowed(options.allow_code):
        manager, tasks = _tasks(names, options)
        # An encoder-decoder wants a target's column to be named, though no row is read by it here.
        live = load_language_model(model, TaskData(data="lm_eval", target="target"), device)
        wrapper = the_package("lm_eval.models.huggingface", extra="eval", what="the evaluator lm_eval").HFLM
        wrapped = wrapper(pretrained=live.module, tokenizer=tokenizer_of(live, model), batch_size=options.batch_size)
        try:
            found = harness.simple_evaluate(
                wrapped, tasks=tasks, task_manager=manager, limit=options.limit, num_fewshot=options.num_fewshot,
                bootstrap_iters=0, confirm_run_unsafe_code=options.allow_code,
            )  # fmt: skip
        except Exception as error:  # tasks are YAML and functions of anybody's; the text says what failed
            raise _failure(error, f"tasks {options.tasks}") from error
    return _measured(found)


def _tasks(names: Sequence[str], options: LmEvalOptions) -> tuple[Any, list[Any]]:
    """Return the harness's manager and the tasks and groups, read and checked."""
    managers = the_package("lm_eval.tasks", extra="eval", what="the evaluator lm_eval")
    include = str(Path(options.include).expanduser()) if options.include else None
    if include is not None and not Path(include).is_dir():
        mend = "name a folder of YAML files"
        raise SuperposeError("there is no such folder", where=f"include {options.include}", mend=mend)
    manager = managers.TaskManager(include_path=include, include_defaults=False)
    if not set(names) <= set(manager.all_tasks):
        # To look through the harness's own tasks takes half a minute.
        manager = managers.TaskManager(include_path=include)
    for name in names:
        if name not in manager.all_tasks:
            where = f"tasks {options.tasks}{f', include {options.include}' if include else ''}"
            raise SuperposeError(f"no task is named '{name}'", where=where, mend=nearest(name, manager.all_tasks))
    try:
        loaded = manager.load(list(names))
    except Exception as error:  # data from anywhere, and functions of anybody's; the text says what failed
        raise _failure(error, f"tasks {options.tasks}") from error
    unsafe = [name for name, task in loaded["tasks"].items() if getattr(task, "UNSAFE_CODE", False)]
    if unsafe and not options.allow_code:
        what = f"task {unsafe[0]} runs code that the model writes, on this machine and unprotected"
        mend = "run it in a container, and say --allow-code"
        raise SuperposeError(what, where=f"tasks {options.tasks}", mend=mend)
    groups = [loaded["groups"][name] for name in names if name in loaded["groups"]]
    grouped = {task.task_name for group in groups for task in group.get_all_tasks()}
    return manager, [*groups, *(task for name, task in loaded["tasks"].items() if name not in grouped)]


def _failure(error: Exception, where: str) -> SuperposeError:
    text = str(error).strip().partition("\n")[0]
    mend = "check the task's YAML, and that its data is on this machine or the hub can be reached"
    return SuperposeError(f"the harness failed: {type(error).__name__}: {text}", where=where, mend=mend)


def _measured(found: Mapping[str, Any]) -> Measured:
    metrics: dict[str, float] = {}
    better: dict[str, Better] = {}
    assumed = []
    for task, told in {**found["results"], **found.get("groups", {})}.items():
        directions = found["higher_is_better"].get(task, {})
        for key, value in told.items():
            metric, comma, chosen = key.partition(",")
            if not comma or metric.endswith("_stderr") or isinstance(value, str):
                continue
            name = f"{task}/{metric}" if chosen == "none" else f"{task}/{metric}/{chosen}"
            metrics[name] = float(value)
            better[name] = "lower" if directions.get(metric) is False else "higher"
            if directions.get(metric) is None:
                assumed.append(name)
    facts = {
        task: {
            "version": found["versions"].get(task),
            "shots": found["n-shot"].get(task),
            "documents": found["n-samples"][task]["effective"],
            "documents_in_data": found["n-samples"][task]["original"],
            "digest": _digest(samples),
        }
        for task, samples in found["samples"].items()
    }
    return Measured(metrics, {"tasks": facts, "direction_assumed": assumed}, better)


def _digest(samples: Sequence[Mapping[str, Any]]) -> str:
    """Return a digest of the documents that were asked about."""
    documents = sorted({(int(sample["doc_id"]), str(sample["doc_hash"])) for sample in samples})
    return hashlib.sha256(repr(documents).encode()).hexdigest()


@contextlib.contextmanager
def _quiet(bars: bool) -> Iterator[None]:
    """Keep the harness's log off the terminal, and stdout for results."""
    logger, runner = logging.getLogger("lm_eval"), sys.modules["lm_eval.evaluator"]
    level, asked = logger.level, getattr(runner, "get_git_commit_hash", None)
    logger.setLevel(logging.ERROR)
    # Where the current folder is in no repository, git itself would write "fatal" on the terminal.
    runner.__dict__["get_git_commit_hash"] = lambda: None
    try:
        hidden = contextlib.nullcontext() if bars else contextlib.redirect_stderr(StringIO())
        with quietly(), contextlib.redirect_stdout(sys.stderr), hidden:
            yield
    finally:
        logger.setLevel(level)
        runner.__dict__["get_git_commit_hash"] = asked


@contextlib.contextmanager
def _random_state_kept() -> Iterator[None]:
    """Undo what the harness does to the random numbers of the whole process."""
    import numpy

    states = random.getstate(), numpy.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(states[0])
        numpy.random.set_state(states[1])


@contextlib.contextmanager
def _code_allowed(allowed: bool) -> Iterator[None]:
    before = os.environ.get(EXECUTES)
    if allowed:
        os.environ[EXECUTES] = "1"
    try:
        yield
    finally:
        if allowed and before is None:
            os.environ.pop(EXECUTES, None)
        elif allowed and before is not None:
            os.environ[EXECUTES] = before
