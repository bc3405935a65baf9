"""What a merge knows from data: statistics of each model, and what was learned or is to be learned first."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from superpose.checkpoints.files import headers_of, is_file
from superpose.checkpoints.folder import Checkpoint
from superpose.checkpoints.headers import DTYPE_NAMES, TensorHeader, TensorInMemory
from superpose.checkpoints.lora import Adapter
from superpose.checkpoints.statistics_files import StatisticsFile, content_digest, open_statistics
from superpose.errors import SuperposeError, nearest
from superpose.maths.bits import pack, packed_bytes
from superpose.planning.items import WorkItem
from superpose.recipe import Recipe
from superpose.registry import Method, find_method

LEARNED_FILE = "learned.safetensors"
"""What was learned, in the folder of the output."""
EVERY_TENSOR = "*"
"""Name of what was learned once for the whole model."""


@dataclass(frozen=True)
class KnownData:
    """What data a plan found.

    Args:
        items: those of the plan, with their statistics and what was learned.
        notes: for the user.
        statistics: provenance of each model's statistics, in the recipe's order; empty where none are needed.
        to_learn: method and options of what has to be learned first; None where nothing has.
        learned: provenance of what was learned before.
    """

    items: list[WorkItem]
    notes: list[str]
    statistics: tuple[Mapping[str, Any], ...]
    to_learn: tuple[str, Any] | None
    learned: Mapping[str, Any]


def with_data(
    items: Sequence[WorkItem],
    recipe: Recipe,
    tuned: Sequence[Checkpoint | Adapter],
    tied: Mapping[str, str],
    problems: list[SuperposeError],
) -> KnownData:
    """Return the items with the statistics that their methods need, and with what was learned before.

    Args:
        items: the plan's.
        recipe: names files of statistics, tasks, and what was learned.
        tuned: the fine-tunes.
        tied: names of shared tensors, to the name in the base.
        problems: what is wrong is added to it.

    Returns:
        The items and the rest.
    """
    made, notes, provenance = _with_statistics(items, recipe, tuned, tied, problems)
    made, to_learn, learned = _with_learned(made, recipe, problems)
    return KnownData(made, notes, provenance, to_learn, learned)


def _with_statistics(
    items: Sequence[WorkItem],
    recipe: Recipe,
    tuned: Sequence[Checkpoint | Adapter],
    tied: Mapping[str, str],
    problems: list[SuperposeError],
) -> tuple[list[WorkItem], list[str], tuple[Mapping[str, Any], ...]]:
    kinds = sorted({kind for item in items if (kind := _statistics(item)) is not None})
    if not kinds:
        return list(items), [], ()
    if len(kinds) > 1:
        mend = "merge in two steps, or choose one of the methods for all tensors"
        what = "a model has one file of statistics, and the rules ask for Fisher information and Gram matrices"
        problems.append(SuperposeError(what, where="rules", mend=mend))
        return list(items), [], ()
    files: list[StatisticsFile] = []
    for entry, name in zip(recipe.models, recipe.task_names, strict=True):
        where = f"model {name}"
        if not entry.statistics:
            what = f"the method needs {kinds[0]} statistics of this model"
            mend = (
                f"superpose statistics {kinds[0]} {entry.path} --data DATA -o FILE.safetensors, and name the file: "
                + ("statistics: in the recipe, or --statistics FILE,FILE")
            )
            problems.append(SuperposeError(what, where=where, mend=mend))
            continue
        try:
            files.append(open_statistics(Path(entry.statistics).expanduser(), kinds[0], where))
        except SuperposeError as problem:
            problems.append(problem)
    if len(files) < len(recipe.models):
        return list(items), [], ()
    names: dict[str, list[str]] = {}
    for alias, owner in tied.items():
        names.setdefault(owner, []).append(alias)
        names.setdefault(alias, []).append(owner)
    found = [_item_with(item, files, names, problems) if _statistics(item) else item for item in items]
    notes = _other_models(files, recipe, tuned, problems) + _without(found, kinds[0])
    return found, notes, tuple(file.provenance for file in files)


def _statistics(item: WorkItem) -> str | None:
    return find_method(item.method).statistics if item.action == "merge" else None


def _item_with(
    item: WorkItem,
    files: Sequence[StatisticsFile],
    names: Mapping[str, Sequence[str]],
    problems: list[SuperposeError],
) -> WorkItem:
    """Return an item with its header in each file of statistics."""
    kind = _statistics(item)
    found: list[TensorHeader | None] = []
    in_x_out = False
    for file, tuned in zip(files, item.tuned, strict=True):
        # A fine-tune can have the tensor under another name than the base: with its body's prefix, or tied.
        own = () if tuned is None else (tuned.name,)
        known = [name for name in (*own, item.name, *names.get(item.name, ())) if name in file.tensors]
        header = file.tensors[known[0]] if known else None
        found.append(header)
        if header is None:
            if kind == "fisher":
                mend = f"make the file of this model again; {nearest(item.name, file.tensors)}"
                where = f"{file.file}, tensor {item.name}"
                problems.append(SuperposeError("the statistics lack a tensor that is merged", where=where, mend=mend))
            continue
        in_x_out = in_x_out or known[0] in file.in_x_out
        wanted = item.shape if kind == "fisher" else _gram_shape(item, in_x_out)
        if header.shape != wanted:
            where = f"{file.file}, tensor {known[0]}"
            what = f"its shape is {list(header.shape)}, the model's asks for {list(wanted)}"
            mend = "make the file from the model that is merged"
            problems.append(SuperposeError(what, where=where, mend=mend))
    return replace(item, statistics=tuple(found), in_x_out=in_x_out)


def _gram_shape(item: WorkItem, in_x_out: bool) -> tuple[int, ...]:
    width = item.shape[0 if in_x_out else -1] if item.shape else 0
    return width, width


def _other_models(
    files: Sequence[StatisticsFile],
    recipe: Recipe,
    tuned: Sequence[Checkpoint | Adapter],
    problems: list[SuperposeError],
) -> list[str]:
    """Add a problem for each model whose weights are not those that its statistics were made from.

    Fine-tunes of one base have files of the same names and sizes: only their bytes tell one from another, or from what
    it was before more training. All of them are read, which the merge does anyway.

    Args:
        files: of statistics.
        recipe: names the models.
        tuned: the models.
        problems: what is wrong is added to it.

    Returns:
        A note for each model that is stored in other files: they may hold the same weights, in another dtype.
    """
    there = [{(one.name, one.stat().st_size) for one in model.files} for model in tuned]
    told = [_told(file) for file in files]
    looked_at = [place for place, known in enumerate(there) if any(known == names for names, _ in told)]
    with ThreadPoolExecutor() as pool:
        found = pool.map(lambda place: content_digest(tuned[place].files), looked_at)
        digests = dict(zip(looked_at, found, strict=True))
    notes = []
    for place, (file, name, model, (names, digest)) in enumerate(
        zip(files, recipe.task_names, tuned, told, strict=True)
    ):
        if not names or not isinstance(model, Checkpoint) or digests.get(place) == digest:
            continue
        others = [recipe.task_names[other] for other, known in digests.items() if known == digest]
        if others or names == there[place]:
            mend = f"make them again: superpose statistics {file.kind} {recipe.models[place].path} --data DATA -o FILE"
            if others:
                mend = f"they are those of model {others[0]}: name the files in the order of the models"
            what = f"the statistics of model {name} were made from other weights than it has"
            problems.append(SuperposeError(what, where=str(file.file), mend=mend))
        else:
            notes.append(f"{file.file} was made from files that differ in name or size from those of model {name}")
    return notes


def _told(file: StatisticsFile) -> tuple[set[tuple[str, int]], str]:
    """Return names and sizes of the files that statistics were made from, and the digest of their bytes."""
    try:
        model = file.provenance["model"]
        return {(str(one["name"]), int(one["bytes"])) for one in model["files"]}, str(model["sha256"])
    except (KeyError, TypeError, ValueError):  # made by another program, or by hand
        return set(), ""


def _without(items: Sequence[WorkItem], kind: str) -> list[str]:
    if kind != "gram":
        return []
    lacking = [item for item in items if item.statistics and len(item.shape) == 2 and not all(item.statistics)]
    by_kind = Counter(str(item.kind) for item in lacking)
    said = ", ".join(f"{count} {name}" for name, count in sorted(by_kind.items()))
    return [f"matrices without Gram matrices are averaged: {said}"] if lacking else []


def _with_learned(
    items: Sequence[WorkItem], recipe: Recipe, problems: list[SuperposeError]
) -> tuple[list[WorkItem], tuple[str, Any] | None, Mapping[str, Any]]:
    merged = [item for item in items if item.action == "merge"]
    learning = {(item.method, item.options) for item in merged if _learns(find_method(item.method), item.options)}
    if recipe.learned:
        return _attach(items, recipe, problems)
    tasks = [entry.task for entry in recipe.models if entry.task is not None]
    if recipe.task is None and not tasks:  # what can do without data does
        learning = {(method, options) for method, options in learning if not find_method(method).without_data}
    if not learning:
        return list(items), None, {}
    (method, options), *more = sorted(learning, key=str)
    others = {item.method for item in merged if str(item.kind) != "buffer"} - {method}
    if more or others:
        what = f"{method} learns from the model as it will be merged, and rules merge parts of it otherwise"
        mend = "keep those tensors at the base (keep: base), or leave the rules out"
        problems.append(SuperposeError(what, where="rules", mend=mend))
    problems += _lacking_tasks(method, recipe)
    return list(items), (method, options), {}


def _learns(method: Method, options: Any) -> bool:
    return method.learns is not None and method.learns(options)


def _lacking_tasks(method: str, recipe: Recipe) -> list[SuperposeError]:
    """Return what data is missing that a method learns from."""
    if method == "lorahub" and recipe.task is not None:
        return []
    mend = (
        "give each model in the recipe a task: {data: FILE, label: COLUMN}, or use what was learned before: learned:"
        " FOLDER, or --learned FOLDER; see docs/data.md"
    )
    return [
        SuperposeError(f"{method} learns from data, and this model has no task", where=f"model {name}", mend=mend)
        for entry, name in zip(recipe.models, recipe.task_names, strict=True)
        if entry.task is None
    ]


def _attach(
    items: Sequence[WorkItem], recipe: Recipe, problems: list[SuperposeError]
) -> tuple[list[WorkItem], None, Mapping[str, Any]]:
    place = Path(recipe.learned).expanduser()
    file = place if is_file(place) else place / LEARNED_FILE
    try:
        found, told = attach_learned(items, file, recipe.task_names)
        return found, None, told
    except SuperposeError as problem:
        problems.append(problem)
        return list(items), None, {}


def attach_learned(
    items: Sequence[WorkItem], file: Path, task_names: Sequence[str]
) -> tuple[list[WorkItem], Mapping[str, Any]]:
    """Return items with what was learned for them.

    Args:
        items: those of a plan.
        file: what a merge wrote as `learned.safetensors`.
        task_names: of the tuned models, in the recipe's order.

    Returns:
        The items, and what the file says about itself.

    Raises:
        SuperposeError: it is no such file, knows another method or other tasks, or does not fit.
    """
    mend = "name the folder of a merge that learned, with the same method, tensors and names of models"
    if not is_file(file):
        raise SuperposeError(f"there is no file {str(file)[:200]}", where="learned", mend=mend)
    headers = headers_of(file)
    if headers.problems:
        raise headers.problems[0]
    try:
        with safe_open(str(file), framework="pt") as opened:
            told = json.loads((opened.metadata() or {})["superpose"])
        method, names = str(told["learned"]), [str(name) for name in told["task_names"]]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise SuperposeError("the file does not say what was learned", where=str(file), mend=mend) from error
    unknown = [name for name in task_names if name not in names]
    if unknown:
        what = f"nothing was learned for model {unknown[0]}; {', '.join(names)} are known"
        raise SuperposeError(what, where=str(file), mend="name the models as they were named then (name:)")
    rows = tuple(names.index(name) for name in task_names)
    taking = [item for item in items if item.action == "merge" and "learned" in find_method(item.method).wants]
    if not taking or any(item.method != method for item in taking):
        used = ", ".join(sorted({item.method for item in items if item.action == "merge"}))
        raise SuperposeError(f"it was learned by {method}, and the method is {used}", where=str(file), mend=mend)
    found, names_taking = [], {item.name for item in taking}
    for item in items:
        if item.name not in names_taking:
            found.append(item)
            continue
        header = headers.tensors.get(item.name, headers.tensors.get(EVERY_TENSOR))
        _check_learned(header, item, len(names), file, mend)
        found.append(replace(item, learned=(header, rows)))
    return found, told


def _check_learned(header: TensorHeader | None, item: WorkItem, tasks: int, file: Path, mend: str) -> None:
    wanted = {("F64", (tasks,)), ("U8", (tasks, packed_bytes(item.numel)))}
    if header is None or (header.dtype, header.shape) not in wanted:
        what = "nothing was learned for it" if header is None else f"what was learned has shape {list(header.shape)}"
        raise SuperposeError(what, where=f"{file}, tensor {item.name}", mend=mend)


def with_tensors(
    items: Sequence[WorkItem],
    statistics: Sequence[Mapping[str, Tensor]] | None,
    learned: Mapping[str, Tensor] | None,
    in_x_out: Collection[str],
    problems: list[SuperposeError],
) -> list[WorkItem]:
    """Return items with statistics and what was learned, both in memory.

    Args:
        items: of a merge in memory.
        statistics: of each model, by the tensor's name.
        learned: by the tensor's name, or `EVERY_TENSOR`.
        in_x_out: weights of linear maps that are stored in x out.
        problems: what is wrong is added to it.

    Returns:
        The items.
    """
    problems += _not_given(items, statistics, learned)
    found = []
    for item in items:
        method = find_method(item.method) if item.action == "merge" else None
        if statistics is not None and method is not None and method.statistics is not None:
            headers = tuple(_header(item.name, known.get(item.name)) for known in statistics)
            turned = item.name in in_x_out
            wanted = item.shape if method.statistics == "fisher" else _gram_shape(item, turned)
            lacking = [place for place, header in enumerate(headers, 1) if header is None]
            if method.statistics == "fisher" and 0 < len(lacking) < len(headers):
                what = f"the statistics of model {lacking[0]} lack a tensor that others have"
                mend = "give it for all models (zeros where nothing depends on it), or for none"
                problems.append(SuperposeError(what, where=item.name, mend=mend))
            if any(header is not None and header.shape != wanted for header in headers):
                mend = f"give {method.statistics} statistics of shape {list(wanted)}"
                problems.append(SuperposeError("statistics do not fit the tensor", where=item.name, mend=mend))
            item = replace(item, statistics=headers, in_x_out=turned)
        tensor = None if learned is None else learned.get(item.name, learned.get(EVERY_TENSOR))
        if tensor is not None and method is not None and "learned" in method.wants:
            tasks = len(item.tuned)
            masks = tensor.dtype == torch.bool
            fits = not masks or tuple(tensor.shape) in {(tasks, *item.shape), (tasks, item.numel)}  # or flattened
            header = _header(item.name, torch.stack([pack(row) for row in tensor]) if masks and fits else tensor)
            if not fits or header is None or header.shape not in {(tasks,), (tasks, packed_bytes(item.numel))}:
                mend = f"give coefficients of shape [{tasks}], or masks of the stacked task vectors' shape"
                problems.append(SuperposeError("what was learned does not fit the tensor", where=item.name, mend=mend))
            else:
                item = replace(item, learned=(header, tuple(range(tasks))))
        found.append(item)
    return found


def _header(name: str, tensor: Tensor | None) -> TensorInMemory | None:
    if tensor is None:
        return None
    return TensorInMemory(name, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), Path("in memory"), tensor.detach())


def _not_given(items: Sequence[WorkItem], statistics: object, learned: object) -> list[SuperposeError]:
    """Return what data a merge in memory lacks: what it would do without is another method."""
    used = {(item.method, item.options) for item in items if item.action == "merge"}
    problems = []
    for name, options in sorted(used, key=str):
        method = find_method(name)
        if method.statistics is not None and statistics is None:
            what, mend = f"{name} needs {method.statistics} statistics", "give statistics=, one mapping per model"
            problems.append(SuperposeError(what, where=f"method {name}", mend=mend))
        if _learns(method, options) and learned is None and not method.without_data:
            mend = "give learned=, what a merge of files has learned; or choose options that learn nothing"
            problems.append(SuperposeError(f"{name} learns from data", where=f"method {name}", mend=mend))
    return problems
