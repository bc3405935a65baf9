"""promptsource's templates: which of them ask for the task's own answer, and a row as each of them puts it."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jinja2.sandbox import SandboxedEnvironment

BETWEEN = "|||"
HIDDEN = "\x00"
"""Stands for the separator where a row's own text holds it."""
METRIC = "Accuracy"


@dataclass(frozen=True)
class Template:
    """A template: Jinja2 for prompt and answer with ||| between, and for the choices with ||| between."""

    name: str
    text: str
    choices: str


class _Loader(yaml.SafeLoader):
    """Reads promptsource's own types as plain mappings."""


_Loader.add_multi_constructor("!Template", lambda loader, _, node: loader.construct_mapping(node, deep=True))


def read_templates(file: Path, ignored: Sequence[str], added: Sequence[tuple[str, str]]) -> list[Template]:
    """Return a task's templates in the order of the file: the first is the one that is trained with.

    Args:
        file: `templates.yaml` of promptsource.
        ignored: names of templates that are left out.
        added: name and text of templates whose choices are the column `endings`.

    Returns:
        Those of the task itself that are measured by accuracy, and what is added.
    """
    found = yaml.load(file.read_text(encoding="utf-8"), _Loader)["templates"].values()
    kept = [
        Template(each["name"], each["jinja"], each["answer_choices"])
        for each in found
        if each["metadata"]["original_task"]
        and set(each["metadata"]["metrics"] or ()) <= {METRIC}
        and each["name"] not in ignored
    ]
    return kept + [Template(name, text, "{{ endings | join('|||') }}") for name, text in added]


def put(template: Template, row: Mapping[str, Any], seed: int = 0) -> tuple[str, list[str], str]:
    """Return a row's prompt, choices and answer.

    Args:
        template: how to put it.
        row: columns of the data.
        seed: of what a template draws at random.

    Returns:
        The three, outer whitespace stripped.
    """
    environment = SandboxedEnvironment()
    environment.globals["zip"] = zip
    environment.filters |= {"choice": random.Random(seed).choice, "most_frequent": _most_frequent}
    values = {key: value.replace(BETWEEN, HIDDEN) if isinstance(value, str) else value for key, value in row.items()}
    choices = _parts(environment.from_string(template.choices or "").render(**values))
    parts = _parts(environment.from_string(template.text).render(**values, answer_choices=choices))
    return parts[0], choices, parts[1] if len(parts) > 1 else ""


def _parts(text: str) -> list[str]:
    return [part.strip().replace(HIDDEN, BETWEEN) for part in text.split(BETWEEN)]


def _most_frequent(items: Sequence[Any]) -> list[Any]:
    counts = Counter(items)
    return [item for item, count in counts.items() if count == max(counts.values())]
