"""Merge by a setting, score the result, and keep what was found: one small file each, so that a run can be resumed.

A row is kept under what decides it: benchmark, fine-tunes, tasks merged, the setting with its defaults filled in, part
of the examples, arithmetic. The code that made it is on record in it, and does not decide: a row of older code stays
until it is deleted, and the page says which code.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from grid import Setting
from suite import Answers, Part, Suite

import superpose
from superpose.demo.encoder import fast_bfloat16
from superpose.demo.folders import scratch_folder
from superpose.own_code import code_digest
from superpose.registry import find_method


@dataclass(frozen=True)
class Row:
    """What one model answers.

    Args:
        benchmark: name of the suite.
        seed: of the fine-tunes.
        name: "pretrained", "fine-tuned", or the setting in one line.
        setting: of the merge; empty for models that are not merged.
        merged: names of the tasks that were merged.
        part: of the examples.
        answers: by task, packed.
        merge_seconds: wall-clock time of the merge, beside other work, and less where another had solved for it.
        scored_seconds: of the scoring.
        made_by: versions, code, date.
        stats: what the merge's record says of it.
    """

    benchmark: str
    seed: int
    name: str
    setting: Mapping[str, Any]
    merged: Sequence[str]
    part: Part
    answers: Mapping[str, str]
    merge_seconds: float
    scored_seconds: float
    made_by: Mapping[str, Any]
    stats: Mapping[str, Any]

    @property
    def accuracy(self) -> dict[str, float]:
        """Accuracy by task."""
        return {task: Answers.unpacked(text).accuracy for task, text in self.answers.items()}

    @property
    def mean(self) -> float:
        """Mean accuracy of all tasks."""
        return sum(self.accuracy.values()) / len(self.answers)


class Evaluated:
    """Rows of a benchmark in a folder.

    Args:
        suite: models and tasks.
        folder: that keeps the rows.
    """

    def __init__(self, suite: Suite, folder: Path) -> None:
        self.suite, self.folder = suite, folder

    def row(
        self,
        setting: Setting | str,
        seed: int,
        part: Part,
        merged: Sequence[str] = (),
        scored: Sequence[str] = (),
        *,
        cache: Path | None = None,
    ) -> Row:
        """Return the row of a setting, made now if it is not there.

        Args:
            setting: of the merge; or "pretrained", or "fine-tuned", each of which is scored on its own task.
            seed: of the fine-tunes.
            part: of the examples.
            merged: names of the tasks that are merged; all if none is named.
            scored: names of the tasks that are scored; all if none is named.
            cache: folder of solutions that other merges may share.
        """
        merged, scored = list(merged or self.suite.tasks), list(scored or self.suite.tasks)
        name = setting if isinstance(setting, str) else setting.text
        mark = self.mark(setting, seed, part, merged, scored)
        words = "".join(letter if letter.isalnum() else "-" for letter in name)[:60]
        file = self.folder / self.suite.name / f"{words}-{seed}-{part}-{mark}.json"
        if not file.exists():
            made = self._made(setting, name, seed, part, merged, scored, cache)
            file.parent.mkdir(parents=True, exist_ok=True)
            partial = file.with_suffix(f".{os.getpid()}.partial")
            partial.write_text(json.dumps(asdict(made), indent=1), encoding="utf-8")
            partial.replace(file)
            print(f"{self.suite.name}, seed {seed}, {part}: {name} {made.mean:.4f}", file=sys.stderr, flush=True)
        return Row(**json.loads(file.read_text(encoding="utf-8")))

    def mark(
        self, setting: Setting | str, seed: int, part: str, merged: Sequence[str] = (), scored: Sequence[str] = ()
    ) -> str:
        """Return a digest of all that decides what is found, but for the code."""
        decided_by = {
            "setting": setting if isinstance(setting, str) else {**asdict(setting), "options": resolved(setting)},
            "fine-tunes": [f"{path.parent.name}/{path.name}" for path in self.suite.tuned(seed)], "seed": seed,
            "part": part, "merged": list(merged), "scored": list(scored), "suite": self.suite.mark,
            "bfloat16": fast_bfloat16(), "torch": torch.__version__, "transformers": transformers.__version__,
        }  # fmt: skip
        return hashlib.sha256(json.dumps(decided_by, sort_keys=True).encode()).hexdigest()[:16]

    def _made(
        self,
        setting: Setting | str,
        name: str,
        seed: int,
        part: Part,
        merged: Sequence[str],
        scored: Sequence[str],
        cache: Path | None,
    ) -> Row:
        row = Row(
            self.suite.name, seed, name, {} if isinstance(setting, str) else asdict(setting), merged, part,
            {}, 0.0, 0.0, made_by(), {},
        )  # fmt: skip
        if setting == "pretrained":
            return self._scored(row, dict.fromkeys(scored, self.suite.base))
        if setting == "fine-tuned":
            return self._scored(row, {task: self.suite.finetune(task, seed) for task in scored})
        assert isinstance(setting, Setting), "a name stands for no other model"
        with scratch_folder(scratch_of(self.suite.name, self.folder.parent)) as scratch:
            recipe = recipe_of(self.suite, setting, seed, merged)
            record = superpose.merge(recipe, scratch / "merged", workers=1, cache=cache)
            row = replace(row, merge_seconds=record.totals["seconds"], stats={"warnings": len(record.warnings)})
            places = dict.fromkeys(scored, scratch / "merged")
            if find_method(setting.method).beside is not None:  # a model for each task
                for task in set(scored) & set(merged):
                    places[task] = scratch / f"of {task}"
                    superpose.rebuild(scratch / "merged", task, places[task])
            return self._scored(row, places)

    def _scored(self, row: Row, places: Mapping[str, Path]) -> Row:
        started = time.perf_counter()
        by_place: dict[Path, list[str]] = {}
        for task, place in places.items():
            by_place.setdefault(place, []).append(task)
        found: dict[str, Answers] = {}
        for place, tasks in by_place.items():
            found |= self.suite.answers(place, tasks, row.seed, row.part)
        packed = {task: found[task].packed() for task in places}
        return replace(row, answers=packed, scored_seconds=round(time.perf_counter() - started, 2))


def recipe_of(suite: Suite, setting: Setting, seed: int, merged: Sequence[str]) -> dict[str, Any]:
    """Return the recipe of a merge of some tasks."""
    tuned = dict(zip(suite.tasks, suite.tuned(seed), strict=True))
    models = [{"path": str(tuned[task]), "name": task, **suite.data(setting, task, seed)} for task in merged]
    return {
        "base": str(suite.base), "models": models, "method": setting.method,
        "options": dict(setting.options), "rules": list(suite.rules),
    }  # fmt: skip


def resolved(setting: Setting) -> dict[str, Any]:
    """Return a setting's options with the method's defaults filled in: those may change."""
    return asdict(find_method(setting.method).options(**setting.options))


def made_by() -> dict[str, Any]:
    """Return what a row was made by, and when."""
    return {
        "code": code_digest()[:12], "torch": torch.__version__, "transformers": transformers.__version__,
        "python": platform.python_version(), "threads": torch.get_num_threads(),
        "at": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
    }  # fmt: skip


def scratch_of(name: str, out: Path) -> Path:
    """Return the folder of a benchmark's merges, which nothing needs once they are scored."""
    return out / "scratch" / name


def clean_up(name: str, out: Path) -> None:
    """Remove what interrupted merges of a benchmark left; no other process may be at work on it."""
    shutil.rmtree(scratch_of(name, out), ignore_errors=True)
