"""Which kind each tensor is of, and which rule, method and options it gets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import superpose.methods  # noqa: F401 - registers the methods
from superpose.checkpoints.architecture import Architecture
from superpose.checkpoints.folder import Checkpoint
from superpose.checkpoints.names import kind_of
from superpose.errors import SuperposeError
from superpose.kinds import MATRIX_KINDS, Kind
from superpose.options import build_options
from superpose.recipe import Recipe, Rule
from superpose.registry import Method, find_method


class ChosenMethods:
    """The recipe's method and options, and those of its rules, built once.

    Args:
        recipe: what was asked for.
        problems: what is wrong is added to it.
        only_adapters: whether all models are adapters, for which some methods have other defaults.
    """

    def __init__(self, recipe: Recipe, problems: list[SuperposeError], *, only_adapters: bool = False) -> None:
        self._found: dict[int | None, tuple[Method, Any]] = {}
        self._problems = problems
        weighted = any(entry.weight != 1 for entry in recipe.models)
        self._models = len(recipe.models)
        self._only_adapters = only_adapters
        self.notes: list[str] = []
        for number, rule in enumerate([None, *recipe.rules]):
            if rule is not None and not (rule.method or rule.options):
                continue
            name = (rule and rule.method) or recipe.method
            given = {**(recipe.options if name == recipe.method else {}), **(rule.options if rule else {})}
            where = f"rule {number}, method {name}" if rule else f"method {name}"
            self._add(rule, name, given, where, weighted)
        weights = [entry.weight for entry in recipe.models]
        names = {method.name for method, _ in self._found.values()}
        # Up to rounding: 0.1 + 0.2 - 0.3 is 5.6e-17.
        if "average" in names and abs(sum(weights)) <= 1e-9 * sum(map(abs, weights)):
            what, mend = "the weights add up to zero", "give other weights"
            problems.append(SuperposeError(what, where="method average", mend=mend))
        found = sorted(names & {"fisher", "regmean"})
        if found and (min(weights) < 0 or not any(weights)):
            what, mend = "weights of this method are not negative, nor all zero", "give other weights"
            problems.append(SuperposeError(what, where=f"method {found[0]}", mend=mend))
        if "pem" in names and not any(weights):
            problems.append(SuperposeError("all weights are zero", where="method pem", mend="give other weights"))

    def of(self, rule: Rule | None) -> tuple[Method, Any]:
        """Return the method and options for tensors of a rule, None for the recipe's own."""
        return self._found[id(rule) if rule is not None else None]

    def _add(self, rule: Rule | None, name: str, given: Mapping[str, Any], where: str, weighted: bool) -> None:
        try:
            method = find_method(name, where=where)
        except SuperposeError as problem:
            self._problems.append(problem)
            return
        if self._only_adapters and (others := {k: v for k, v in method.for_adapters.items() if k not in given}):
            given = {**others, **given}
            said = ", ".join(f"{key} {value:g}" for key, value in others.items())
            self.notes.append(f"all models are adapters: {method.name} takes {said} where nothing is said")
        options, problems = build_options(method.options, given, where=where, owner=f"method {name}")
        self._problems += problems
        fewest, most = method.models
        if self._models < fewest or (most is not None and self._models > most):
            wanted = f"{fewest} to {most}" if most is not None else f"at least {fewest}"
            what = f"method {name} merges {wanted} fine-tunes, and these are {self._models}"
            self._problems.append(SuperposeError(what, where=where, mend="choose another method, or other models"))
        if weighted and "weights" not in method.wants:
            what = f"method {name} has no weights per model"
            self._problems.append(SuperposeError(what, where=where, mend="leave the models' weights at 1"))
        if method.notes is not None:
            self.notes += method.notes(options, self._models)
        self._found[id(rule) if rule is not None else None] = (method, options)


def choose_kinds(
    base: Checkpoint, architecture: Architecture, rules: Sequence[Rule], problems: list[SuperposeError]
) -> dict[str, tuple[Kind, str]]:
    """Return each tensor's kind and how it is known: by a rule, by its module, else by name and shape.

    Args:
        base: the base.
        architecture: what its modules say.
        rules: the recipe's.
        problems: what is wrong is added to it.

    Returns:
        Tensor name to kind and "rule", "module" or "name".
    """
    kinds = {}
    for name, header in base.tensors.items():
        rule = next((rule for rule in rules if rule.sets_kind and rule.applies(name, None)), None)
        if rule is not None and rule.kind is not None and header.is_float:
            kinds[name] = rule.kind, "rule"
            if rule.kind in MATRIX_KINDS and len(header.shape) < 2:
                what = f"a tensor of shape {list(header.shape)} cannot be of kind {rule.kind}"
                where = f"{header.file}, tensor {name}, rule {{{rule}}}"
                problems.append(SuperposeError(what, where=where, mend="narrow the rule's match"))
        elif name in architecture.kinds and header.is_float:
            kinds[name] = architecture.kinds[name], "module"
        else:
            kinds[name] = kind_of(name, header.shape, is_float=header.is_float), "name"
    return kinds


def acting_rule(name: str, kind: Kind, rules: Sequence[Rule]) -> Rule | None:
    """Return the first rule that does something to a tensor."""
    return next((rule for rule in rules if not rule.sets_kind and rule.applies(name, kind)), None)


def is_kept(name: str, kind: Kind, rules: Sequence[Rule]) -> bool:
    """Whether a rule keeps the base's tensor."""
    rule = acting_rule(name, kind, rules)
    return rule is not None and rule.keep is not None


def is_dropped(name: str, rules: Sequence[Rule]) -> bool:
    """Whether a rule leaves out a tensor that the base does not have."""
    return any(rule.drop and rule.match and rule.applies(name, None) for rule in rules)
