"""A recipe: what is merged, how, and into what. YAML or a mapping in, a frozen `Recipe` out."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from superpose.errors import SuperposeError, nearest, raise_all
from superpose.kinds import Kind
from superpose.task_data import TaskData

DEFAULT_METHOD = "stf"
LARGEST_RECIPE = 300_000
"""Bytes; a recipe that names a thousand models takes a third, and to read this many takes seconds."""
_UNITS = {
    "": 1,
    "k": 10**3,
    "m": 10**6,
    "g": 10**9,
    "t": 10**12,
    "ki": 2**10,
    "mi": 2**20,
    "gi": 2**30,
    "ti": 2**40,
}


def parse_bytes(text: str | int) -> int:
    """Return a number of bytes from text such as "4GiB", "250M" or "5 GB".

    Args:
        text: number and unit; a bare number is bytes.

    Returns:
        The number of bytes.

    Raises:
        ValueError: the text is no size.
    """
    number = r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:e\+?([0-9]{1,3}))?"
    match = re.fullmatch(rf"\s*{number}\s*([kmgt]?i?)b?\s*", str(text).lower())
    if match is None or match[3] not in _UNITS or isinstance(text, bool):
        raise ValueError(f"'{str(text)[:40]}' is no size; write 4GiB, 250MB or a number of bytes")
    exact = Decimal(match[1]).scaleb(int(match[2] or 0)) * _UNITS[match[3]]
    if not 1 <= exact < 2**63:
        raise ValueError(f"'{str(text)[:40]}' is no size: between one byte and 8 EiB are")
    return int(exact)


def _path_text(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="constants")


class ModelEntry(_Strict):
    """One tuned model."""

    path: Annotated[str, BeforeValidator(_path_text)]
    weight: float = Field(default=1.0, allow_inf_nan=False)
    name: str = ""
    statistics: Annotated[str, BeforeValidator(_path_text)] = ""
    """File that `superpose statistics` made of this model, for methods that need one."""
    task: TaskData | None = None
    """Data of the model's task, for methods that learn from some."""


class Rule(_Strict):
    """One rule about tensors: the first that matches wins.

    A rule with `match` and `kind` alone says what kind those tensors are. In a rule that does something (keep, drop,
    method, options), `match` and `kind` are conditions.
    """

    match: str | None = None
    kind: Kind | None = None
    keep: Literal["base"] | None = None
    drop: bool = False
    method: str | None = None
    options: dict[str, Any] = {}

    @property
    def sets_kind(self) -> bool:
        """Whether the rule says what kind tensors are, and nothing else."""
        return self.kind is not None and not (self.keep or self.drop or self.method or self.options)

    def applies(self, name: str, kind: Kind | None) -> bool:
        """Whether the rule's conditions hold for a tensor."""
        named = self.match is None or fnmatchcase(name, self.match)
        return named and (self.sets_kind or self.kind is None or self.kind is kind)

    @model_validator(mode="after")
    def _says_something(self) -> Rule:
        if self.match is None and self.kind is None:
            raise ValueError("a rule needs match, kind, or both")
        if self.sets_kind and self.match is None:
            raise ValueError("a rule with kind alone does nothing; add match, or one of keep, method, options")
        if not (self.kind or self.keep or self.drop or self.method or self.options):
            raise ValueError("a rule needs something to do: kind, keep, drop, method or options")
        return self

    def __str__(self) -> str:
        return ", ".join(
            f"{key}: {value}" for key, value in self.model_dump(exclude_defaults=True, mode="json").items()
        )


class Output(_Strict):
    """What comes out: a model, an adapter, or both; and what it looks like.

    Of an adapter: `rank` or `energy` truncate the updates (neither keeps them exactly), `per_layer_rank` lets every
    module have its own, and `rest` says what happens to what no low-rank update can hold (norms, biases, free vectors).
    """

    form: Literal["model", "adapter", "both"] = "model"
    rank: Annotated[int | None, Field(ge=1)] = None
    energy: Annotated[float | None, Field(gt=0, le=1)] = None
    per_layer_rank: bool = False
    rest: Literal["save", "drop", "refuse"] = "save"
    shard_size: Annotated[int, BeforeValidator(parse_bytes)] = 5 * 10**9
    tokenizer: Literal["base"] = "base"


class Recipe(_Strict):
    """What is merged, how, and into what."""

    base: Annotated[str, BeforeValidator(_path_text)]
    models: tuple[ModelEntry, ...]
    method: str = DEFAULT_METHOD
    options: dict[str, Any] = {}
    rules: tuple[Rule, ...] = ()
    dtype: Literal["base", "float64", "float32", "float16", "bfloat16"] = "base"
    seed: int = 0
    non_finite: Literal["refuse", "zero", "keep"] = "refuse"
    """What becomes of NaN and infinity in inputs (see `superpose.non_finite`)."""
    task: TaskData | None = None
    """Data of a new task, for methods that learn coefficients for one."""
    learned: Annotated[str, BeforeValidator(_path_text)] = ""
    """What an earlier merge learned: its folder, or the file in it. Nothing is learned then, and no data is read."""
    output: Output = Output()

    @model_validator(mode="after")
    def _names_are_distinct(self) -> Recipe:
        if not self.models:
            raise ValueError("models: give at least one tuned model")
        names = [entry.name for entry in self.models if entry.name]
        if repeated := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"two models are named {sorted(repeated)[0]}")
        return self

    @property
    def task_names(self) -> tuple[str, ...]:
        """One distinct name per model: its own, or the last part of its path in which the models differ."""
        given = {entry.name for entry in self.models if entry.name}
        names: list[str] = []
        for entry, told in zip(self.models, _telling_parts([entry.path for entry in self.models]), strict=True):
            name = entry.name or told
            distinct, number = name, 2
            while not entry.name and distinct in given.union(names):
                distinct, number = f"{name}-{number}", number + 1
            names.append(distinct)
        return tuple(names)


def _telling_parts(paths: Sequence[str]) -> list[str]:
    """Return the last part of each path, or, where run/checkpoint-9 meets run-2/checkpoint-9, the part that tells."""
    split = [Path(path.partition("@")[0]) for path in paths]
    parts = [tuple(part for part in path.parts if part != path.anchor) or ("model",) for path in split]
    for depth in range(1, min(map(len, parts), default=0) + 1):
        told = [part[-depth] for part in parts]
        if len(set(told)) == len(told):
            return told
    return [part[-1] for part in parts]


def load_recipe(source: Recipe | Mapping[str, Any] | str | Path) -> Recipe:
    """Return a recipe from a mapping, or from a YAML file.

    Args:
        source: the mapping, the file's path, or a recipe, which is returned as it is.

    Returns:
        The recipe.

    Raises:
        SuperposeError: it cannot be read, or has keys or values that a recipe does not have.
    """
    if isinstance(source, Recipe):
        return source
    if isinstance(source, Mapping):
        return _validate(dict(source), "the recipe", {})
    path = Path(source)
    try:
        text = _read(path)
    except (OSError, ValueError) as error:
        mend = "give the path of a YAML file"
        raise SuperposeError(f"the recipe cannot be read: {error}", where=str(path), mend=mend) from error
    try:
        node = yaml.compose(text, Loader=_RecipeLoader)
        content, lines = yaml.load(text, Loader=_RecipeLoader), _lines(node)
    except (
        yaml.YAMLError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RecursionError
    ) as error:  # fmt: skip
        # Beside its own errors the library lets through those of a number or date that is none, and of endless nesting.
        mark = getattr(error, "problem_mark", None)
        where = f"{path}, line {mark.line + 1}" if mark else str(path)
        reason = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
        what = f"no valid YAML: {str(reason).strip().partition(chr(10))[0]}"
        raise SuperposeError(what, where=where, mend="mend the file at that place") from error
    if not isinstance(content, dict):
        raise SuperposeError("a recipe is a mapping", where=str(path), mend="begin with base: and models:")
    if "merge_method" in content:
        raise SuperposeError(
            "this looks like a mergekit recipe, which cannot be read yet",
            where=str(path),
            mend="write base:, models: [{path: ...}], method: and options: instead",
        )
    return _validate(content, str(path), lines)


def _read(path: Path) -> str:
    if not path.is_file():  # what a pipe or a device holds need not end
        path.stat()
        raise ValueError("it is no file")
    with path.open("rb") as stream:
        content = stream.read(min(path.stat().st_size, LARGEST_RECIPE) + 1)
    if len(content) > LARGEST_RECIPE:
        raise ValueError(f"larger than {LARGEST_RECIPE} bytes")
    return content.decode("utf-8")


def _validate(content: dict[str, Any], where: str, lines: Mapping[tuple, int]) -> Recipe:
    if isinstance(content.get("models"), (list, tuple)):
        content = {**content, "models": [_as_entry(entry) for entry in content["models"]]}
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        problems = [_problem(dict(detail), where, lines) for detail in error.errors()]
        raise_all(problems)
        raise AssertionError("a validation error without details") from error


def _as_entry(entry: Any) -> Any:
    return {"path": str(entry)} if isinstance(entry, (str, Path)) else entry


def _problem(detail: dict[str, Any], where: str, lines: Mapping[tuple, int]) -> SuperposeError:
    path = tuple(detail["loc"])
    line = next((lines[path[:end]] for end in range(len(path), 0, -1) if path[:end] in lines), None)
    place = f"{where}, line {line}" if line else where
    dotted = ".".join(map(str, path))
    if detail["type"] == "extra_forbidden":
        owner = _owner(path[:-1])
        mend = nearest(str(path[-1]), owner.model_fields)
        return SuperposeError(f"'{dotted}' is no key of a recipe", where=place, mend=mend)
    if detail["type"] == "missing":
        return SuperposeError(f"'{dotted}' is missing", where=place, mend=f"add {path[-1]}: to the recipe")
    message = str(detail["msg"]).removeprefix("Value error, ")
    return SuperposeError(f"{dotted or 'recipe'}: {message}", where=place, mend="choose a value as described")


def _owner(path: tuple) -> type[BaseModel]:
    if "task" in path:
        return TaskData
    homes: dict[Any, type[BaseModel]] = {"models": ModelEntry, "rules": Rule, "output": Output}
    return homes.get(path[0], Recipe) if path else Recipe


class _RecipeLoader(yaml.SafeLoader):
    """YAML as its users mean it: 1e-3 is a number, off is a word, a key that occurs twice is an error."""

    def construct_scalar(self, node: yaml.ScalarNode) -> Any:
        found = super().construct_scalar(node)
        if isinstance(found, str):
            found.encode("utf-8")  # half a character, which "\\ud800" makes, would become another name further on
        return found

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key is no plain word", key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} occurs twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _decimal(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    """YAML 1.1 reads 010 as eight; nobody means that."""
    return int(str(loader.construct_scalar(node)).replace("_", ""))


_RecipeLoader.add_constructor("tag:yaml.org,2002:int", _decimal)
_RecipeLoader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", list("-+.0123456789")),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", list("-+.")),
):
    _RecipeLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)


def _lines(root: yaml.Node | None) -> dict[tuple, int]:
    """Return the line of every key and item, by its path in the recipe."""
    found: dict[tuple, int] = {}
    visited: set[int] = set()

    def visit(node: yaml.Node, path: tuple, outside: frozenset[int] = frozenset()) -> None:
        found.setdefault(path, node.start_mark.line + 1)
        if id(node) in outside:
            raise yaml.constructor.ConstructorError(None, None, "a value holds itself", node.start_mark)
        if id(node) in visited:  # an alias: a few of them in each other would take for ever
            return
        visited.add(id(node))
        outside = outside | {id(node)}
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                found[(*path, key.value)] = key.start_mark.line + 1
                visit(value, (*path, key.value), outside)
        elif isinstance(node, yaml.SequenceNode):
            for place, value in enumerate(node.value):
                visit(value, (*path, place), outside)

    if root is not None:
        visit(root, ())
    return found
