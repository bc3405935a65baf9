"""Write the tasks as superpose reads them: rows with every template's prompt and choices, and a file of templates.

python -m recipes.t5_base.prepare [--tasks NAME ...]

Rows come from the hub, or from --raw: FOLDER/TASK/SPLIT.jsonl, a JSON object of the data's columns on each line. Story
Cloze has to be asked for, and comes that way alone.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from recipes.fetching import fetch_file
from recipes.t5_base.prompts import Template, put, read_templates
from recipes.t5_base.tasks import TASKS, Task

DATA = Path("data/t5_base")
PROMPTSOURCE = "https://raw.githubusercontent.com/bigscience-workshop/promptsource/{}/promptsource/templates/{}"
SEED = 42
HELD_BACK = 32
"""Rows of a validation split by which training is stopped."""
Rows = Sequence[Mapping[str, Any]]


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line and write the tasks."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--raw", type=Path, default=DATA / "raw")
    parser.add_argument("--templates", type=Path, default=DATA / "promptsource")
    parser.add_argument("--promptsource", default="v0.2.3", help="tag or commit of the templates")
    asked = parser.parse_args(arguments)
    for name in asked.tasks:
        task = TASKS[name]
        file = asked.templates / task.templates / "templates.yaml"
        fetch_file(PROMPTSOURCE.format(asked.promptsource, f"{task.templates}/templates.yaml"), file)
        templates = read_templates(file, task.ignored, task.added)
        if task.count and len(templates) != task.count:
            print(f"{name}: {len(templates)} templates, the papers' average is over {task.count}", file=sys.stderr)
        splits = read_splits(name, task, asked.raw)
        if splits is None:
            print(f"{name}: left out; ask for it, and put its rows in {asked.raw / name}", file=sys.stderr)
        else:
            write_task(asked.data / name, task, templates, splits)


def read_splits(name: str, task: Task, raw: Path) -> dict[str, Rows] | None:
    """Return a task's rows to train on, to stop by and to test; None where they have to be asked for."""
    wanted = {task.test, task.validation, *(() if task.held_out else (task.train,))}
    files = {split: raw / name / f"{split}.jsonl" for split in wanted}
    if not task.data and not all(file.is_file() for file in files.values()):
        return None
    found = {split: _rows(file, task, split) for split, file in files.items()}
    shuffled = list(found[task.validation])
    # As the code of TIES-Merging does it: its own seeded shuffle, not the data library's.
    random.Random(SEED).shuffle(shuffled)
    kept = HELD_BACK if len(shuffled) > HELD_BACK else len(shuffled) // 2
    splits: dict[str, Rows] = {"validation": shuffled[:kept]}
    splits["test"] = shuffled[kept:] if task.test == task.validation else list(found[task.test])
    return splits if task.held_out else {**splits, "train": list(found[task.train])}


def _rows(file: Path, task: Task, split: str) -> Rows:
    if file.is_file():
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    import datasets

    try:
        found: Any = datasets.load_dataset(task.data, task.subset, split=split, revision=task.revision)
        return list(found)
    except Exception as error:  # the hub's own text says what failed
        sys.exit(f"{task.data}, split {split}, cannot be fetched: {error}\nOr put its rows in {file}.")


def write_task(folder: Path, task: Task, templates: Sequence[Template], splits: Mapping[str, Rows]) -> None:
    """Write a task: its templates for `rank`, and its splits."""
    folder.mkdir(parents=True, exist_ok=True)
    content = [
        {"name": each.name, "prompt": f"{{{{ prompt_{number} }}}}", "choices_column": f"choices_{number}",
         "label": "label"}
        for number, each in enumerate(templates)
    ]  # fmt: skip
    (folder / "templates.yaml").write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True))
    (folder / "first.yaml").write_text(yaml.safe_dump(content[:1], sort_keys=False, allow_unicode=True))
    for split, rows in splits.items():
        lines = [json.dumps(_asked(row, task, templates, number)) for number, row in enumerate(rows)]
        (folder / f"{split}.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _asked(row: Mapping[str, Any], task: Task, templates: Sequence[Template], number: int) -> dict[str, Any]:
    """Return a row as every template puts it; what is trained on is the first template's answer."""
    found: dict[str, Any] = {"label": task.label(row)}
    for place, template in enumerate(templates):
        prompt, choices, answer = put(template, row, SEED + number)
        found |= {f"prompt_{place}": prompt, f"choices_{place}": choices}
        if place == 0:
            found["answer"] = answer
    return found


if __name__ == "__main__":
    main()
