"""What an evaluator is, and the table of those that exist.

An evaluator is a function from a model's location to numbers. The decorator records it and changes nothing. What the
function wants beyond the location and its options it names in its signature:

    task      the data and its columns (`TaskData`), checked
    device    where the model goes
    report    called with how much is done, and of how much
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from superpose.errors import SuperposeError, nearest
from superpose.task_data import TaskData

Better = Literal["higher", "lower"]
Report = Callable[[int, int], None]
WANTED_BY_NAME = frozenset({"task", "device", "report"})
CHOSEN_FIELDS = ("text", "pair", "label", "target", "image", "head", "pooling", "model")
"""Fields of `TaskData` that not every evaluator has a use for."""


def silent(done: int, total: int) -> None:
    """Report nothing: what is handed over where no progress is wanted."""


@dataclass(frozen=True)
class Measured:
    """What an evaluator found.

    Args:
        metrics: by name.
        facts: what they were measured on, for the record.
        better: which way each is better, where the evaluator did not declare it.
    """

    metrics: Mapping[str, float]
    facts: Mapping[str, Any] = field(default_factory=dict)
    better: Mapping[str, Better] | None = None


@dataclass(frozen=True)
class Evaluator:
    """A registered evaluator; `function` is the plain function."""

    name: str
    function: Callable[..., Measured]
    options: type
    better: Mapping[str, Better]
    reads: Sequence[str]
    needs: Sequence[str]
    data_defaults: Mapping[str, Any]
    packages: Sequence[str]
    wants: frozenset[str]

    @property
    def reads_data(self) -> bool:
        """Whether it reads rows of data."""
        return "task" in self.wants

    @property
    def summary(self) -> str:
        """What it measures, in a line."""
        return self.description.partition("\n")[0]

    @property
    def description(self) -> str:
        """The docstring of its module."""
        return inspect.cleandoc(sys.modules[self.function.__module__].__doc__ or "")

    def problems(self, task: TaskData) -> list[SuperposeError]:
        """Return what the task's data lacks, and what of it the evaluator would leave unread."""
        where = f"evaluator {self.name}"
        found = [
            SuperposeError(f"{self.name} does not read '{name}'", where=where, mend=f"leave --{name} out")
            for name in CHOSEN_FIELDS
            if name in task.model_fields_set and getattr(task, name) and name not in self.reads
        ]
        lacking = [name for name in self.needs if not getattr(task, name)]
        return found + [
            SuperposeError(f"{self.name} needs the column '{name}'", where=where, mend=f"name it: --{name} COLUMN")
            for name in lacking
        ]


_EVALUATORS: dict[str, Evaluator] = {}


def evaluator(
    name: str,
    *,
    options: type,
    better: Mapping[str, Better] | None = None,
    reads: Sequence[str] = (),
    needs: Sequence[str] = (),
    data_defaults: Mapping[str, Any] | None = None,
    packages: Sequence[str] = (),
) -> Callable:
    """Return a decorator that registers an evaluator and leaves the function as it is.

    Args:
        name: on the command line.
        options: frozen dataclass of its options, every field with a default.
        better: which way each of its metrics is better; None where only a run can tell.
        reads: the fields of `TaskData` it has a use for, out of `CHOSEN_FIELDS`.
        needs: those it cannot do without.
        data_defaults: defaults of other fields of `TaskData` that suit it better than the usual ones.
        packages: distributions whose versions belong into the record, where they are installed.

    Returns:
        The decorator.

    Raises:
        ValueError: the name is taken, or the declaration contradicts itself.
    """

    def register(function: Callable[..., Measured]) -> Callable[..., Measured]:
        wants = frozenset(list(inspect.signature(function).parameters)[2:])
        if unknown := wants - WANTED_BY_NAME:
            raise ValueError(f"{name}: nothing is handed over as {sorted(unknown)}; {sorted(WANTED_BY_NAME)} are")
        if unknown := set(reads) - set(CHOSEN_FIELDS):
            raise ValueError(f"{name}: not to be chosen: {sorted(unknown)}; {CHOSEN_FIELDS} are")
        if name in _EVALUATORS and _EVALUATORS[name].function.__module__ != function.__module__:
            raise ValueError(f"an evaluator named {name} exists: {_EVALUATORS[name].function.__module__}")
        _EVALUATORS[name] = Evaluator(
            name, function, options, dict(better or {}), tuple(reads), tuple(needs), dict(data_defaults or {}),
            tuple(packages), wants,
        )  # fmt: skip
        return function

    return register


def registered_evaluators() -> list[Evaluator]:
    """Return every registered evaluator, by name."""
    return [_EVALUATORS[name] for name in sorted(_EVALUATORS)]


def find_evaluator(name: str, *, where: str = "") -> Evaluator:
    """Return the evaluator of that name.

    Args:
        name: as registered.
        where: who asks, for the error.

    Returns:
        The evaluator.

    Raises:
        SuperposeError: there is none.
    """
    try:
        return _EVALUATORS[name]
    except KeyError:
        mend = nearest(name, _EVALUATORS)
        raise SuperposeError(f"no evaluator is named '{name}'", where=where, mend=mend) from None
