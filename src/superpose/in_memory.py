"""Merging of mappings of tensors that are in memory, by the code that merges files."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import superpose.methods  # noqa: F401 - registers the methods
from superpose.errors import SuperposeError
from superpose.kinds import Kind
from superpose.parts import Context
from superpose.planning import WorkItem, plan_tensors, shared_memory
from superpose.recipe import ModelEntry, Recipe
from superpose.run import merge_in_memory
from superpose.task_sets import TaskSet


def merge_tensors(
    base: Mapping[str, Tensor],
    tuned: Sequence[Mapping[str, Tensor]],
    method: str,
    *,
    weights: Sequence[float] | None = None,
    kinds: Mapping[str, Kind] | None = None,
    seed: int = 0,
    names: Sequence[str] | None = None,
    statistics: Sequence[Mapping[str, Tensor]] | None = None,
    learned: Mapping[str, Tensor] | None = None,
    in_x_out: Collection[str] = (),
    non_finite: str = "refuse",
    **options: Any,
) -> dict[str, Tensor]:
    """Merge mappings of tensors in memory, by the code that merges files.

    Args:
        base: the base's tensors, such as a state dict.
        tuned: those of each tuned model.
        method: name of the method.
        weights: one per tuned model, for methods that take them.
        kinds: what each tensor is in its network; told by names and shapes where not given.
        seed: for methods that draw random numbers.
        names: one per tuned model; a model's random numbers go by its name. "model 1" and so on when not given.
        statistics: of each tuned model, by the tensor's name: Fisher information in the tensor's shape (`fisher`), or
            the Gram matrix of a linear map's inputs (`regmean`); what no model has is averaged.
        learned: what a method learns from data: coefficients, shape (tasks,), by the tensor's name or "*" for all
            (`adamerging`, `lorahub`), or masks, shape (tasks, *shape) (`localize_and_stitch`). Nothing is learned here.
        in_x_out: weights of linear maps that are stored in x out (GPT-2's), for `regmean`.
        non_finite: what becomes of NaN and infinity: "refuse"; "zero", the base's entry or 0 instead; or "keep".
        **options: options of the method.

    Returns:
        New tensors under the base's names, in its dtypes; the inputs are not touched.

    Raises:
        SuperposeError: something does not fit.
        Problems: several things do not.
    """
    if statistics is not None and len(statistics) != len(tuned):
        what = f"statistics of {len(statistics)} models for {len(tuned)}"
        raise SuperposeError(what, where="statistics", mend="give one mapping per model")
    known = (statistics, learned, in_x_out)
    items, context = _plan_in_memory(base, tuned, method, options, weights, kinds, seed, names, known)
    if non_finite not in ("refuse", "zero", "keep"):
        mend = "choose one of refuse, zero, keep"
        raise SuperposeError(f"'{non_finite}' is no treatment of NaN", where="non_finite", mend=mend)
    merged, _ = merge_in_memory(items, replace(context, non_finite=non_finite))
    tied = {alias: merged[owner] for alias, owner in shared_memory(base).items()}
    return {name: merged[name] if name in merged else tied[name] for name in base}


def merge_to_set(
    base: Mapping[str, Tensor],
    tuned: Sequence[Mapping[str, Tensor]],
    *,
    names: Sequence[str] | None = None,
    kinds: Mapping[str, Kind] | None = None,
) -> TaskSet:
    """Merge mappings of tensors in memory by EMR, into one model from which each task's can be rebuilt.

    Args:
        base: the base's tensors, such as a state dict.
        tuned: those of each tuned model.
        names: one per tuned model; "model 1" and so on when not given.
        kinds: what each tensor is in its network; told by names and shapes where not given.

    Returns:
        The set; `model(name, base)` rebuilds a task's tensors.

    Raises:
        SuperposeError: something does not fit.
        Problems: several things do not.
    """
    items, context = _plan_in_memory(base, tuned, "emr", {}, None, kinds, 0, names)
    outputs, records = merge_in_memory(items, context)
    merged = {item.name: outputs[item.name] for item in items}
    masks = {name: tensor for name, tensor in outputs.items() if name not in merged}
    scales = next(
        (record.stats["scales"] for record in records.values() if "scales" in record.stats), [1.0] * len(tuned)
    )
    return TaskSet(merged, masks, tuple(scales), context.task_names, shared_memory(base))


def _plan_in_memory(
    base: Mapping[str, Tensor],
    tuned: Sequence[Mapping[str, Tensor]],
    method: str,
    options: Mapping[str, Any],
    weights: Sequence[float] | None,
    kinds: Mapping[str, Kind] | None,
    seed: int,
    names: Sequence[str] | None,
    known: tuple[Sequence[Mapping[str, Tensor]] | None, Mapping[str, Tensor] | None, Collection[str]] = (
        None,
        None,
        (),
    ),
) -> tuple[list[WorkItem], Context]:
    """Return the items of a merge in memory and what they share."""
    if not tuned:
        raise SuperposeError("nothing to merge", where="tuned", mend="give at least one tuned model")
    if weights is not None and len(weights) != len(tuned):
        what = f"{len(weights)} weights for {len(tuned)} models"
        raise SuperposeError(what, where="weights", mend="give one per model")
    if names is not None and (len(names) != len(tuned) or len(set(names)) != len(names)):
        raise SuperposeError("names are one per model, and distinct", where="names", mend="give other names")
    shares = [1.0] * len(tuned) if weights is None else [float(weight) for weight in weights]
    called = list(names) if names is not None else [f"model {number}" for number in range(1, len(tuned) + 1)]
    models = tuple(ModelEntry(path=name, weight=share, name=name) for name, share in zip(called, shares, strict=True))
    if not all(math.isfinite(share) for share in shares):
        raise SuperposeError("a weight is no finite number", where="weights", mend="give finite numbers")
    recipe = Recipe(base="base", models=models, method=method, options=dict(options), seed=seed)
    items = plan_tensors(base, tuned, recipe, kinds, *known)
    return items, Context(recipe.task_names, tuple(shares), torch.device("cpu"), measure=False, seed=seed)
