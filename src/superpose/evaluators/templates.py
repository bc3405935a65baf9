"""Prompt templates of multiple-choice tasks: a YAML list, each with a prompt, its choices and the right one.

- name: which is it
  prompt: "{{ question }} Answer:"        # Jinja2; the row's columns are its variables
  choices: ["yes", "no"]                  # Jinja2 each; or choices_column: an expression for a list of texts
  label: answer                           # an expression: a column, or {answer|int - 1}; a number from 0, or a choice
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jinja2 import StrictUndefined, TemplateError, Undefined, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from superpose.errors import SuperposeError, nearest
from superpose.inference import Row

KEYS = ("name", "prompt", "choices", "choices_column", "label")
MEND = 'write a list of templates, each with name:, prompt:, choices: ["yes", "no"] (or choices_column:) and label:'


@dataclass(frozen=True)
class Asked:
    """One row as a template puts it: outer whitespace stripped, `right` the number of the right choice."""

    prompt: str
    choices: tuple[str, ...]
    right: int


@dataclass(frozen=True)
class Template:
    """A prompt template.

    Args:
        name: for the metrics.
        columns: of the data that it reads.
        ask: row -> what is asked; an error names template and row.
    """

    name: str
    columns: frozenset[str]
    ask: Callable[[Row], Asked]


def read_templates(file: Path, label: str) -> tuple[list[Template], str]:
    """Read a file of templates.

    Args:
        file: YAML.
        label: column of the right choice, for templates that name none.

    Returns:
        The templates, and a digest of the file.

    Raises:
        SuperposeError: the file or a template is not as it should be.
    """
    try:
        raw = file.read_bytes()
        root = yaml.compose(raw, Loader=yaml.BaseLoader)
        # Every scalar stays the text it is: yes and no are choices here, no booleans.
        content = yaml.load(raw, Loader=yaml.BaseLoader)
    except OSError as error:
        raise SuperposeError(f"no readable templates: {error.strerror}", where=str(file), mend=MEND) from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{file}, line {mark.line + 1}" if mark else str(file)
        raise SuperposeError(f"no valid YAML: {getattr(error, 'problem', error)}", where=where, mend=MEND) from error
    if not isinstance(content, list) or not content or not isinstance(root, yaml.SequenceNode):
        raise SuperposeError("the file is no list of templates", where=str(file), mend=MEND)
    environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined)
    templates = [
        _template(environment, entry, f"{file}, line {node.start_mark.line + 1}", label)
        for entry, node in zip(content, root.value, strict=True)
    ]
    names = [template.name for template in templates]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise SuperposeError(f"two templates are named '{twice[0]}'", where=str(file), mend="name each differently")
    return templates, hashlib.sha256(raw).hexdigest()


def _check(entry: Any, where: str) -> None:
    """Raise what is wrong with a template's entry."""
    if not isinstance(entry, dict):
        raise SuperposeError("a template is a mapping", where=where, mend=MEND)
    for key in entry:
        if key not in KEYS:
            raise SuperposeError(f"a template has no '{key}'", where=where, mend=nearest(str(key), KEYS))
    choices, column = entry.get("choices"), entry.get("choices_column")
    several = isinstance(choices, list) and len(choices) > 1 and all(isinstance(choice, str) for choice in choices)
    for told, good in {
        "has no name": _is_text(entry.get("name")),
        "has no prompt": _is_text(entry.get("prompt")),
        "has no label, and no --label says which column it is": _is_text(entry.get("label")),
        "has neither choices nor choices_column, or both": (choices is None) != (column is None),
        "has choices that are not two texts or more": choices is None or several,
        "has a choices_column that is no text": column is None or _is_text(column),
    }.items():
        if not good:
            raise SuperposeError(f"a template {told}", where=where, mend=MEND)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _template(environment: ImmutableSandboxedEnvironment, entry: Any, where: str, label: str) -> Template:
    if isinstance(entry, dict) and not entry.get("label"):
        entry = {**entry, "label": label}
    _check(entry, where)
    name, prompt, choices, column = entry["name"], entry["prompt"], entry.get("choices"), entry.get("choices_column")
    where = f"{where}, template {name}"
    pieces = [_text(environment, prompt, where), *(_text(environment, choice, where) for choice in choices or ())]
    wanted = _value(environment, entry["label"], where)
    listed = None if column is None else _value(environment, column, where)
    columns = frozenset().union(*(columns for columns, _ in [*pieces, wanted, *([listed] if listed else [])]))

    def ask(row: Row) -> Asked:
        place = f"{row.where}, template {name}"
        rendered = [_filled(make, row.values, place) for _, make in pieces]
        found = rendered[1:] if listed is None else _list(_filled(listed[1], row.values, place), column, place)
        options = tuple(choice.strip() for choice in found)
        if not rendered[0].strip():
            raise SuperposeError("the prompt is empty", where=place, mend="mend the template or the row")
        return Asked(rendered[0].strip(), options, _number(_filled(wanted[1], row.values, place), options, place))

    return Template(name, columns, ask)


Piece = tuple[frozenset[str], Callable[[Mapping[str, Any]], Any]]


def _text(environment: ImmutableSandboxedEnvironment, text: str, where: str) -> Piece:
    """Return the columns that a template text reads, and what fills it in."""
    try:
        columns = meta.find_undeclared_variables(environment.parse(text))
        made = environment.from_string(text)
    except TemplateError as error:
        mend = "write columns as {{ column }}"
        raise SuperposeError(f"no valid Jinja2: {error.message} in '{text}'", where=where, mend=mend) from error
    return frozenset(columns), lambda values: made.render(**values)


def _value(environment: ImmutableSandboxedEnvironment, text: str, where: str) -> Piece:
    """Return the columns that an expression reads, and what gives its value."""
    try:
        columns = meta.find_undeclared_variables(environment.parse("{{ " + text + " }}"))
        made = environment.compile_expression(text, undefined_to_none=False)
    except TemplateError as error:
        mend = "write the name of a column, or an expression such as answer|int - 1"
        raise SuperposeError(f"no valid expression: {error.message} in '{text}'", where=where, mend=mend) from error
    return frozenset(columns), lambda values: made(**values)


def _filled(make: Callable[[Mapping[str, Any]], Any], values: Mapping[str, Any], place: str) -> Any:
    try:
        found = make(values)
    except Exception as error:  # a template calls what it likes on what the row holds; the text says what failed
        what = f"the template cannot be filled in: {type(error).__name__}: {error}"
        raise SuperposeError(what, where=place, mend="mend the template or the row") from error
    if isinstance(found, Undefined):
        mend = "name what the row holds"
        raise SuperposeError(f"the template names what is not there: {found._undefined_name}", where=place, mend=mend)
    return found


def _list(found: Any, column: str | None, place: str) -> Sequence[str]:
    if not isinstance(found, (list, tuple)) or len(found) < 2 or not all(isinstance(text, str) for text in found):
        what = f"choices_column '{column}' holds no list of two texts or more"
        raise SuperposeError(what, where=place, mend="name a column with a list of texts, such as choices.text")
    return found


def _number(value: Any, choices: Sequence[str], place: str) -> int:
    """Return the number of the right choice: told as the choice itself, or as its number from 0."""
    text = str(value).strip()
    if isinstance(value, str) and text in choices:
        return choices.index(text)
    if not isinstance(value, bool) and text.isdecimal() and int(text) < len(choices):
        return int(text)
    known = ", ".join(repr(choice) for choice in choices)
    mend = f"number the choices from 0 to {len(choices) - 1}, or give one of them"
    raise SuperposeError(f"label {value!r} is none of the choices {known}", where=place, mend=mend)
