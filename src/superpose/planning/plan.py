"""The plan of a merge: a recipe and its checkpoints, understood; no tensor is read."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from superpose.backends import make_backend
from superpose.checkpoints.adapted import AdaptedTensor
from superpose.checkpoints.architecture import Architecture, read_architecture
from superpose.checkpoints.compare import Alignment, align
from superpose.checkpoints.folder import Checkpoint
from superpose.checkpoints.headers import DTYPE_NAMES, TORCH_DTYPES, TensorHeader, TensorInMemory
from superpose.checkpoints.lora import Adapter
from superpose.checkpoints.models import base_of_adapters, open_base, open_model
from superpose.checkpoints.names import kind_of
from superpose.checkpoints.stamps import FileStamp
from superpose.checkpoints.writer import Layout, lay_out, lay_out_beside
from superpose.errors import SuperposeError, nearest, raise_all
from superpose.kinds import Kind
from superpose.planning.adapters import (
    align_adapter,
    as_adapter,
    factor_space_problems,
    lay_out_adapter,
    needs_base,
    spell,
    with_factors,
    with_tied_names,
)
from superpose.planning.checks import (
    check_backend,
    check_device,
    check_output,
    check_room,
    check_rules,
    check_settings,
    unused_rules,
)
from superpose.planning.choices import ChosenMethods, choose_kinds, is_dropped, is_kept
from superpose.planning.data import KnownData, with_data, with_tensors
from superpose.planning.items import (
    Settings,
    WorkItem,
    make_item,
    sources_of,
    stamps_of,
    with_common_dtype,
    with_cost,
    with_keys,
)
from superpose.recipe import Recipe
from superpose.registry import find_method

MASKS_FILE = "tasks/masks.safetensors"
"""Where a method's tensors beside the model go."""


@dataclass(frozen=True)
class Plan:
    """Every decision of a merge.

    Args:
        recipe: what was asked for.
        settings: how it will be run.
        base: the base checkpoint.
        tuned: the tuned ones.
        items: one per tensor of the output, by name.
        layout: where each tensor goes.
        weights: one per tuned model.
        options: of the recipe's method, defaults filled in.
        notes: what was assumed, in words.
        spelling: base tensor to what an adapter calls it: its name in the model.
        statistics: where each model's statistics come from, if the method needs some.
        to_learn: method and options of what is learned from data first; None for nothing.
        learned: where what was learned before comes from, if that is used.
        tied: names of tensors that share the memory of another, to that.
        stamps: what each file that is read was when the plan was made.
    """

    recipe: Recipe
    settings: Settings
    base: Checkpoint
    tuned: tuple[Checkpoint | Adapter, ...]
    items: tuple[WorkItem, ...]
    layout: Layout
    weights: tuple[float, ...]
    options: Any
    notes: tuple[str, ...]
    spelling: Mapping[str, str]
    statistics: tuple[Mapping[str, Any], ...] = ()
    to_learn: tuple[str, Any] | None = None
    learned: Mapping[str, Any] = field(default_factory=dict)
    tied: Mapping[str, str] = field(default_factory=dict)
    stamps: Mapping[Path, FileStamp] = field(default_factory=dict)

    @property
    def bytes_read(self) -> int:
        """Bytes of all tensors that are read once."""
        headers = [header for item in self.items for header in sources_of(item) if header]
        return sum(header.nbytes for header in headers)

    @property
    def bytes_surveyed(self) -> int:
        """Bytes read beforehand as a rule, for numbers over the whole model; a tensor counts once for every pass."""
        total = 0
        for item in self.items:
            if item.action == "merge":
                headers = [header for header in sources_of(item) if header]
                times = find_method(item.method).reads(item.options, item.compute)
                total += times * sum(header.nbytes for header in headers)
        return total

    @property
    def memory(self) -> int:
        """Bytes in flight at most."""
        largest = max((item.memory for item in self.items), default=0)
        settings = self.settings
        workers = make_backend(settings.backend, settings.workers, 0, settings.ray_address).workers
        busiest = sum(sorted((item.memory for item in self.items), reverse=True)[:workers])
        return max(largest, min(busiest, settings.memory))

    @property
    def learning_memory(self) -> int:
        """Bytes that learning from data takes, but for activations; 0 where nothing is learned."""
        if self.to_learn is None:
            return 0
        # AdaMerging: weights and two tasks' gradients; Localize-and-Stitch: weights, gradient, scores. Task vectors are
        # kept as far as the budget goes.
        merged = [item for item in self.items if item.action == "merge"]
        model = 4 * sum(item.numel for item in merged)
        vectors = sum(item.numel * 4 * (len(item.tuned) + 1) for item in merged)
        return 3 * model + min(vectors, self.settings.memory)

    @property
    def time_class(self) -> str:
        """How long it takes, roughly: seconds, minutes or hours."""
        seconds = sum(item.flops for item in self.items) / 2e10 + (self.bytes_read + self.layout.file_bytes) / 5e8
        seconds += self.bytes_surveyed / 1e8  # counting is slower than copying
        return "seconds" if seconds < 60 else "minutes" if seconds < 3600 else "hours"


def make_plan(recipe: Recipe, settings: Settings, output: Path | None = None) -> Plan:
    """Plan a merge.

    Args:
        recipe: what is merged, how, and into what.
        settings: how it will be run.
        output: folder of the result; checked for room when given.

    Returns:
        The plan.

    Raises:
        SuperposeError: something does not fit.
        Problems: several things do not; all that headers show are in it.
    """
    problems: list[SuperposeError] = []
    problems += check_device(settings)
    problems += check_backend(settings)
    problems += check_settings(settings)
    base, tuned = _open_all(recipe, problems)
    adapters = [model for model in tuned if isinstance(model, Adapter)]
    chosen = ChosenMethods(recipe, problems, only_adapters=len(adapters) == len(recipe.models))
    if base is not None and output is not None:
        problems += check_output(base, tuned, output, overwrite=settings.overwrite)
    if base is None:
        raise_all(problems)
        raise AssertionError("no base and no problem")
    architecture = read_architecture(base.folder, base.config, len(base.tensors))
    kinds = choose_kinds(base, architecture, recipe.rules, problems)
    tied = {**architecture.tied, **base.aliases}
    if recipe.output.form == "adapter":
        base = with_tied_names(base, adapters, tied, architecture)
        untold = {name: header for name, header in base.tensors.items() if name not in kinds}
        kinds |= {
            name: (kind_of(name, header.shape, is_float=header.is_float), "name") for name, header in untold.items()
        }
    notes = [f"kinds are told by names and shapes: {architecture.reason}"] if architecture.reason else []
    names = sorted(base.tensors)
    if not names and not base.problems:
        mend = "give a checkpoint with weights"
        problems.append(SuperposeError("the base holds no tensors", where=base.name, mend=mend))
    problems += check_rules(recipe.rules, kinds)
    notes += unused_rules(recipe.rules, [base, *tuned])
    notes += _bases(tuned)
    wanted = {name: kinds[name][0] for name in names if not is_kept(name, kinds[name][0], recipe.rules)}
    alignments = []
    for checkpoint in tuned:
        found = _align(base, checkpoint, wanted, tied, recipe, architecture)
        alignments.append(found.sources)
        problems += found.problems
        notes += found.notes
    raise_all(problems)
    weights = tuple(entry.weight for entry in recipe.models)
    items = []
    for name in names:
        header, (kind, kind_from) = base.tensors[name], kinds[name]
        sources = tuple(found.get(name) for found in alignments)
        items.append(make_item(header, kind, kind_from, sources, recipe, chosen, architecture))
    known = with_data(items, recipe, tuned, tied, problems)
    raise_all(problems)
    items = [with_factors(item) for item in known.items]
    raise_all([*factor_space_problems(items), *_set_problems(items, base), *_keep_problems(recipe)])
    spelling = spell(base, adapters, architecture)
    items, problems, left_out = as_adapter(items, recipe, base, tuned, tied, spelling)
    raise_all(problems)
    items = [with_cost(item, settings) for item in with_common_dtype(items)]
    stamps = stamps_of(items)
    items = with_keys(items, recipe, weights, settings, stamps)
    layout = Layout((), {})
    if recipe.output.form != "adapter":
        layout = lay_out([(item.name, item.dtype, item.shape) for item in items], recipe.output.shard_size)
    layout = lay_out_adapter(layout, items, recipe.output)
    layout = lay_out_beside(layout, MASKS_FILE, [tensor for item in items for tensor in item.beside])
    raise_all(check_room(layout, output))
    notes += [*known.notes, *_learning_notes(known, recipe)]
    notes += [*dict.fromkeys(chosen.notes), *left_out, *_notes(items, base, settings)]
    return Plan(
        recipe, settings, base, tuple(tuned), tuple(items), layout, weights, chosen.of(None)[1], tuple(notes), spelling,
        known.statistics, known.to_learn, known.learned, tied, stamps,
    )  # fmt: skip


def plan_tensors(
    base: Mapping[str, Tensor],
    tuned: Sequence[Mapping[str, Tensor]],
    recipe: Recipe,
    kinds: Mapping[str, Kind] | None,
    statistics: Sequence[Mapping[str, Tensor]] | None = None,
    learned: Mapping[str, Tensor] | None = None,
    in_x_out: Collection[str] = (),
) -> list[WorkItem]:
    """Plan a merge of tensors in memory.

    Args:
        base: the base's tensors.
        tuned: those of each tuned model.
        recipe: method, options and weights; its paths are not read.
        kinds: what each tensor is; told by names and shapes where not given.
        statistics: of each tuned model, by the tensor's name: Fisher information in its shape, or a Gram matrix.
        learned: coefficients, shape (tasks,), by the tensor's name or "*" for all; or masks, shape (tasks, *shape).
        in_x_out: weights of linear maps that are stored in x out, as Gram matrices need to be told.

    Returns:
        One item per tensor, by name.

    Raises:
        SuperposeError: something does not fit.
        Problems: several things do not.
    """
    problems: list[SuperposeError] = []
    chosen = ChosenMethods(recipe, problems)
    checkpoints = [_in_memory("base", base)]
    checkpoints += [_in_memory(name, tensors) for name, tensors in zip(recipe.task_names, tuned, strict=True)]
    for checkpoint in checkpoints:
        problems += checkpoint.problems
    known: dict[str, tuple[Kind, str]] = {}
    for name in kinds or {}:
        if name not in base:
            problems.append(SuperposeError(f"the base has no tensor {name}", where="kinds", mend=nearest(name, base)))
    if unknown := [kind for kind in (kinds or {}).values() if kind not in set(Kind)]:
        mend = nearest(str(unknown[0]), [str(kind) for kind in Kind])
        raise SuperposeError(f"'{unknown[0]}' is no kind", where="kinds", mend=mend)
    for name, header in checkpoints[0].tensors.items():
        given = (kinds or {}).get(name)
        told = kind_of(name, header.shape, is_float=header.is_float)
        known[name] = (Kind(given), "rule") if given is not None and header.is_float else (told, "name")
    wanted = {name: kind for name, (kind, _) in known.items()}
    found = []
    for checkpoint in checkpoints[1:]:
        alignment = align(checkpoints[0], checkpoint, wanted, tied={}, dropped=lambda _: False)
        problems += alignment.problems
        found.append(alignment.sources)
    raise_all(problems)
    items = [
        make_item(header, kind, kind_from, tuple(part.get(name) for part in found), recipe, chosen, Architecture())
        for name, header in sorted(checkpoints[0].tensors.items())
        for kind, kind_from in [known[name]]
    ]
    items = with_tensors(items, statistics, learned, in_x_out, problems)
    raise_all(problems)
    return [with_cost(item, Settings()) for item in with_common_dtype(items)]


def _in_memory(name: str, tensors: Mapping[str, Tensor]) -> Checkpoint:
    headers: dict[str, TensorHeader] = {}
    problems = []
    aliases = shared_memory(tensors)
    for key, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or tensor.dtype not in DTYPE_NAMES:
            what = f"{key} is no tensor of a dtype that can be merged or copied"
            problems.append(SuperposeError(what, where=name, mend="leave it out, or convert it"))
        elif key not in aliases:
            shape = tuple(tensor.shape)
            headers[key] = TensorInMemory(key, DTYPE_NAMES[tensor.dtype], shape, Path(name), tensor.detach())
    return Checkpoint(name, None, "", headers, aliases, {}, tuple(problems))


def shared_memory(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the names of tensors that are the same memory as an earlier one, to that one's name."""
    seen: dict[tuple, str] = {}
    aliases = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, Tensor) and tensor.numel() and tensor.layout == torch.strided:
            place = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
            if seen.setdefault(place, name) != name:
                aliases[name] = seen[place]
    return aliases


def _open_all(recipe: Recipe, problems: list[SuperposeError]) -> tuple[Checkpoint | None, list[Checkpoint | Adapter]]:
    opened: list[Checkpoint | Adapter | None] = []
    found: list[list[SuperposeError]] = []
    places = [*((f"model {entry.path}", entry.path) for entry in recipe.models), ("base", recipe.base)]
    for place, location in places:
        found.append([])
        try:
            if place == "base" and not needs_base(opened, location, recipe.output.form):
                opened.append(base_of_adapters([model for model in opened if isinstance(model, Adapter)], location))
                continue
            checkpoint = open_base(location) if place == "base" else open_model(location, where=place)
        except SuperposeError as problem:
            found[-1].append(problem)
            opened.append(None)
            continue
        found[-1] += checkpoint.problems
        if isinstance(checkpoint, Checkpoint) and checkpoint.config.get("quantization_config"):
            mend = "merge the unquantised weights and quantise the result"
            where = f"{checkpoint.folder}/config.json"
            found[-1].append(SuperposeError("the checkpoint is quantised", where=where, mend=mend))
        opened.append(checkpoint)
    problems += [problem for of_one in (found[-1], *found[:-1]) for problem in of_one]
    *tuned, base = opened
    return base if isinstance(base, Checkpoint) else None, [model for model in tuned if model is not None]


def _align(
    base: Checkpoint,
    model: Checkpoint | Adapter,
    wanted: Mapping[str, Kind],
    tied: Mapping[str, str],
    recipe: Recipe,
    architecture: Architecture,
) -> Alignment:
    def dropped(name: str) -> bool:
        return is_dropped(name, recipe.rules)

    if isinstance(model, Adapter):
        return align_adapter(base, model, wanted, architecture, tied=tied, dropped=dropped)
    return align(base, model, wanted, tied=tied, dropped=dropped)


def _set_problems(items: Sequence[WorkItem], base: Checkpoint) -> list[SuperposeError]:
    """Return what forbids a set of models: rebuilding one of them needs a base that lies in one place."""
    made = [item for item in items if item.action == "merge" and find_method(item.method).beside is not None]
    if not made or not any(isinstance(header, AdaptedTensor) for header in base.tensors.values()):
        return []
    mend = "fold the adapter into its model first: superpose merge MODEL ADAPTER -m task_arithmetic --scaling-factor 1"
    return [
        SuperposeError(f"{made[0].method} needs a base that is one checkpoint", where=f"base {base.name}", mend=mend)
    ]


def _keep_problems(recipe: Recipe) -> list[SuperposeError]:
    """Return what forbids to keep NaN in its place: low-rank factors have no place for an entry."""
    if recipe.non_finite != "keep" or recipe.output.form == "model":
        return []
    mend = "choose --non-finite zero, or --form model"
    return [SuperposeError("an adapter cannot keep NaN and infinity in their places", where="non_finite", mend=mend)]


def _bases(models: Sequence[Checkpoint | Adapter]) -> list[str]:
    """Return a note where adapters name different bases."""
    named = sorted({model.base for model in models if isinstance(model, Adapter) and model.base})
    return [f"the adapters name different bases: {', '.join(named)}"] if len(named) > 1 else []


def _learning_notes(known: KnownData, recipe: Recipe) -> list[str]:
    """Return what is learned first, and from what."""
    if known.to_learn is None:
        return []
    method, _ = known.to_learn
    tasks = [recipe.task] if recipe.task is not None else [entry.task for entry in recipe.models]
    read = ", ".join(f"{task.data}{f' ({task.split})' if task.split else ''}" for task in tasks if task is not None)
    return [
        f"{method} learns first, from {read}; what is learned has seen that data",
    ]


def _widest(item: WorkItem) -> str:
    """Return the widest dtype among the output's and the sources'."""
    dtypes = [item.dtype, *(source.dtype for source in item.tuned if source)]
    return max(dtypes, key=lambda name: torch.finfo(TORCH_DTYPES[name]).bits)


def _notes(items: Sequence[WorkItem], base: Checkpoint, settings: Settings) -> list[str]:
    notes = []
    large = [item for item in items if item.memory > settings.memory]
    if large:
        most = max(item.memory for item in large) / 2**30
        notes.append(f"{len(large)} tensors need more than --memory each, up to {most:.1f} GiB: they are merged alone")
    narrower = [item for item in items if item.beside and item.dtype != _widest(item)]
    if narrower:
        notes.append(
            f"the set is stored in {narrower[0].dtype}, narrower than the models: rebuilt models lose what that rounds"
        )
    if base.aliases:
        notes.append(f"tied weights are written once, without {', '.join(sorted(base.aliases))}")
    if any(item.method == "average" and item.kind is Kind.BUFFER for item in items):
        notes.append("running statistics of normalisation are averaged; measuring them anew on data is better")
    return notes
