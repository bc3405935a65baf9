"""Tasks that were not merged: a linear probe on merges of all the others, each task left out in turn."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from bootstrap import difference
from grid import Setting
from jobs import Bench, suite_of
from probe import probed
from rows import recipe_of, scratch_of
from suite import Answers

import superpose
from analyses.common import SEED, Chosen, Content, interval, kept, table, with_kernels
from superpose.demo.folders import scratch_folder

TITLE = "Tasks held out of the merge"
EXAMPLES = 500
"""That a probe learns from, and as many that it is asked, at most."""
METHODS = ("average", "task_arithmetic", "ties", "pcb", "stf", "iso_share")
"""Beside two spectral ones."""


def find(bench: Bench, chosen: Chosen) -> Content:
    """Probe merges by chosen settings on each task that they lack, and on the tasks that no model was tuned on."""
    names = (*METHODS, *(with_kernels(chosen, name) for name in ("tsv", "iso_c")))
    settings: dict[str, Setting | str] = {"pretrained": "pretrained", **{name: chosen[name] for name in names}}
    asked = [(name, task) for name in settings for task in (*bench.suite.tasks, *bench.suite.held_out)]
    found = bench.each(_probe, [(bench.name, bench.out, settings[name], task) for name, task in asked])
    by_method: dict[str, dict[str, str]] = {}
    for (name, task), answers in zip(asked, found, strict=True):
        by_method.setdefault(name, {})[task] = answers
    return {
        name: {
            "accuracy": {task: Answers.unpacked(text).accuracy for task, text in answers.items()},
            "less pretrained": asdict(difference([answers], [by_method["pretrained"]])),
        }
        for name, answers in by_method.items()
    }


def _probe(name: str, out: Path, setting: Setting | str, task: str) -> str:
    """Return what a probe answers on a task, on a merge of all tasks but it; packed."""
    suite = suite_of(name, out)

    def answers() -> str:
        if isinstance(setting, str):
            return _answers(name, out, suite.base, task)
        with scratch_folder(scratch_of(name, out)) as scratch:
            recipe = recipe_of(suite, setting, SEED, [other for other in suite.tasks if other != task])
            superpose.merge(recipe, scratch / "merged", workers=1)
            return _answers(name, out, scratch / "merged", task)

    return kept(name, out, f"probe of {task} by {EXAMPLES}", setting, answers)


def _answers(name: str, out: Path, model: Path, task: str) -> str:
    suite = suite_of(name, out)
    train, test = (suite.features(model, task, part, EXAMPLES) for part in ("train", "test"))
    return probed(train, test).packed()


def numbers(found: Content) -> dict[str, str]:
    """Return what the summary can name: every method's mean over the tasks that it lacks."""
    return {name.partition(",")[0]: f"{statistics.mean(one['accuracy'].values()):.3f}" for name, one in found.items()}


def lines(name: str, found: Content) -> Iterator[str]:
    """Yield the lines of the page."""
    del name
    yield (
        "Tasks that were not merged: each task left out of the merge in turn, and scored by a linear probe on the"
        f" merged model's features ({EXAMPLES} training examples, {EXAMPLES} test examples at most). Settings as chosen"
        " for all tasks, this one among them, so that they are not quite without it.\n"
    )
    tasks = list(found["pretrained"]["accuracy"])
    rows = []
    for method, one in found.items():
        mean = statistics.mean(one["accuracy"].values())
        less = interval(one["less pretrained"]) if method != "pretrained" else ""
        rows.append([method, *(f"{one['accuracy'][task]:.3f}" for task in tasks), f"{mean:.3f}", less])
    yield from table(["method", *tasks, "mean", "less pretrained"], rows)
