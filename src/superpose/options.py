"""Options of methods: declared once on a dataclass, read by checks, help texts, searches and tests.

@dataclass(frozen=True, kw_only=True)
class TiesOptions:
    density: Annotated[float, Range(0, 1)] = 0.2
    \"\"\"Fraction of each task vector's entries kept.\"\"\"
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import math
import textwrap
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

from superpose.errors import SuperposeError, nearest


@dataclass(frozen=True)
class Range:
    """Closed interval that an option's value lies in."""

    low: float
    high: float

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high

    def __str__(self) -> str:
        return f"[{self.low:g}, {self.high:g}]"


@dataclass(frozen=True)
class OptionSpec:
    """One option of a method, as declared on its dataclass."""

    name: str
    type: type
    default: Any
    range: Range | None
    choices: tuple[str, ...]
    optional: bool
    help: str

    @property
    def allowed(self) -> str:
        """What values are allowed, in words."""
        if self.choices:
            words = " | ".join(self.choices)
            return f"{words} or none" if self.optional else words
        words = {bool: "true | false", int: "integer", float: "number", str: "text"}[self.type]
        if self.range is not None:
            words = f"{words} in {self.range}" if self.type is int else f"{self.range}"
        return f"{words} or none" if self.optional else words


@cache
def option_specs(options_type: type) -> tuple[OptionSpec, ...]:
    """Return the options that a dataclass declares, in order."""
    hints = typing.get_type_hints(options_type, include_extras=True)
    helps = _field_docstrings(options_type)
    return tuple(
        _spec(field, hints[field.name], helps.get(field.name, "")) for field in dataclasses.fields(options_type)
    )


def build_options(
    options_type: type, given: Mapping[str, Any], *, where: str, owner: str
) -> tuple[Any, list[SuperposeError]]:
    """Build a method's options from what a user gave.

    Args:
        options_type: dataclass of the options.
        given: names and values; text is converted to the option's type.
        where: place to name in errors, such as a recipe's line.
        owner: whose options these are, such as "method ties".

    Returns:
        The options (the defaults where a value is refused) and the problems found.
    """
    specs = {spec.name: spec for spec in option_specs(options_type)}
    values, problems = {}, []
    for name, value in given.items():
        spec = specs.get(name.replace("-", "_"))
        if spec is None:
            mend = nearest(name, specs) if specs else f"leave it out: {owner} has no options"
            problems.append(SuperposeError(f"{owner} has no option '{name}'", where=where, mend=mend))
            continue
        try:
            values[spec.name] = _convert(spec, value)
        except ValueError:
            problems.append(
                SuperposeError(
                    f"{name}={value} is not allowed: {owner} takes {spec.allowed}",
                    where=where,
                    mend=f"choose {spec.name} from {spec.allowed}; the default is {spec.default}",
                )
            )
    try:
        return options_type(**values), problems
    except ValueError as error:  # each is allowed, but not together
        if problems:  # what was refused may have fitted
            return options_type(), problems
        mend = "; ".join(f"{name} is in {spec.allowed}, {spec.default} by default" for name, spec in specs.items())
        return options_type(), [
            *problems,
            SuperposeError(f"{owner}: {error}", where=where, mend=f"choose others: {mend}"),
        ]


def _convert(spec: OptionSpec, value: Any) -> Any:
    """Return the value in the option's type; raise ValueError when it is not allowed."""
    if isinstance(value, str) and (spec.type is not str or (spec.optional and value.lower() in ("none", "null"))):
        value = _parse(value)
    if value is None:
        if not spec.optional:
            raise ValueError(value)
        return None
    if spec.type is str:
        if spec.choices and value not in spec.choices:
            raise ValueError(value)
        return str(value)
    if spec.type is bool:
        if not isinstance(value, bool):
            raise ValueError(value)
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(value)
    if spec.type is int and value != int(value):
        raise ValueError(value)
    if spec.range is not None and value not in spec.range:
        raise ValueError(value)
    return spec.type(value)


def _parse(text: str) -> Any:
    words = {"true": True, "false": False, "none": None, "null": None}
    if text.lower() in words:
        return words[text.lower()]
    return float(text)


def _spec(field: dataclasses.Field, hint: Any, help_text: str) -> OptionSpec:
    found_range = None
    if typing.get_origin(hint) is typing.Annotated:
        hint, *extras = typing.get_args(hint)
        found_range = next((extra for extra in extras if isinstance(extra, Range)), None)
    optional = False
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        members = [member for member in typing.get_args(hint) if member is not type(None)]
        optional = len(members) < len(typing.get_args(hint))
        (hint,) = members
    choices: tuple[str, ...] = ()
    if typing.get_origin(hint) is typing.Literal:
        choices, hint = typing.get_args(hint), str
    return OptionSpec(field.name, hint, field.default, found_range, choices, optional, help_text)


def _field_docstrings(options_type: type) -> dict[str, str]:
    """Return the text under each field; Python itself keeps no docstrings of fields."""
    helps: dict[str, str] = {}
    for owner in reversed(options_type.__mro__):
        if not dataclasses.is_dataclass(owner):
            continue
        try:
            source = textwrap.dedent(inspect.getsource(owner))
        except (OSError, TypeError):  # defined in a console or a frozen application: no help texts
            continue
        body = typing.cast(ast.ClassDef, ast.parse(source).body[0]).body
        for statement, following in pairwise(body):
            if (
                isinstance(statement, ast.AnnAssign)
                and isinstance(statement.target, ast.Name)
                and isinstance(following, ast.Expr)
                and isinstance(following.value, ast.Constant)
                and isinstance(following.value.value, str)
            ):
                helps[statement.target.id] = " ".join(following.value.value.split())
    return helps
