"""What adapters change about a plan: task matrices that stay factors, and results that are written as an adapter."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from superpose.checkpoints.adapted import AdaptedTensor
from superpose.checkpoints.architecture import Architecture
from superpose.checkpoints.compare import Alignment
from superpose.checkpoints.folder import Checkpoint
from superpose.checkpoints.headers import DTYPE_NAMES, TensorHeader
from superpose.checkpoints.hub import looks_like_hub_id
from superpose.checkpoints.lora import CONV1D_MODULES, PREFIX, Adapter, match_names, stores_in_x_out
from superpose.checkpoints.models import adapt, unchanged
from superpose.checkpoints.writer import Layout, lay_out_beside
from superpose.errors import SuperposeError
from superpose.kinds import Kind
from superpose.maths.matrices import is_depthwise
from superpose.planning.items import FactorOutput, WorkItem
from superpose.recipe import Output, Recipe
from superpose.registry import find_method

ADAPTER_FILE = "adapter_model.safetensors"
WIDE_FILE = "factors.safetensors"
"""Where factors wait whose rank is known when all are made."""
MOST_NAMED = 3


def needs_base(models: Sequence[Checkpoint | Adapter | None], location: str, form: str) -> bool:
    """Whether a merge has to open its base: adapters of one that is on the hub can be merged without it.

    Args:
        models: the tuned models, None for those that could not be opened.
        location: of the base.
        form: of the output.

    Returns:
        True, but where every model is a plain LoRA adapter, the output is one, and the base is no local path.
    """
    plain = all(
        isinstance(model, Adapter)
        and not model.full
        and all(module.bias is None and module.magnitude is None for module in model.modules.values())
        for model in models
    )
    return not (plain and form == "adapter" and looks_like_hub_id(location) and not Path(location).exists())


def align_adapter(
    base: Checkpoint,
    adapter: Adapter,
    wanted: Mapping[str, Kind],
    architecture: Architecture,
    *,
    tied: Mapping[str, str],
    dropped: Callable[[str], bool],
) -> Alignment:
    """Find what an adapter makes of every base tensor that takes part in the merge.

    Args:
        base: the base.
        adapter: the adapter.
        wanted: names of base tensors that take part.
        architecture: what the base's modules say.
        tied: names that share another tensor's memory, to that tensor's name.
        dropped: whether a tensor that only the adapter has is left out by a rule.

    Returns:
        A source for every wanted tensor, the base's own where the adapter does not mention it; and what does not fit.
    """
    in_x_out = stores_in_x_out(base.config, base.tensors) if base.is_there else None
    found = adapt(
        adapter, base.tensors, tied, wanted=lambda name: name in wanted, dropped=dropped,
        path=architecture.path, in_x_out=in_x_out,
    )  # fmt: skip
    sources = {name: found.sources.get(name) or unchanged(base.tensors[name]) for name in wanted}
    return Alignment(sources, found.problems, found.notes)


def with_tied_names(
    base: Checkpoint, adapters: Sequence[Adapter], tied: Mapping[str, str], architecture: Architecture
) -> Checkpoint:
    """Return the base with an entry of their own for tied weights that adapters change: an adapter can hold that."""
    changed = {name for adapter in adapters for name in adapter.tensors}
    own = {}
    for name, owner in tied.items():
        if {name, architecture.path(name)} & changed and name not in base.tensors and owner in base.tensors:
            header = base.tensors[owner]
            own[name] = AdaptedTensor(name, header.dtype, header.shape, header.file, onto=header)
    return replace(base, tensors={**base.tensors, **own})


def spell(base: Checkpoint, adapters: Sequence[Adapter], architecture: Architecture) -> dict[str, str]:
    """Return what an adapter calls each tensor of the base: as the first of them does, else as the model does."""
    paths = {name: architecture.path(name) for name in base.tensors}
    if not adapters:
        return paths
    strip, add = match_names(list(adapters[0].tensors), dict.fromkeys(paths.values()))
    return {name: strip + path[len(add) :] if path.startswith(add) else path for name, path in paths.items()}


def is_changed(source: TensorHeader | None) -> bool:
    """Whether a tuned model can differ from the base in a tensor."""
    return source is not None and not (isinstance(source, AdaptedTensor) and not source.parts)


def with_factors(item: WorkItem) -> WorkItem:
    """Return the item as it is merged where adapters take part: copied if none changes it, in factors if all do."""
    sources = item.tuned
    if not any(isinstance(source, AdaptedTensor) for source in sources):
        return item
    if item.action == "merge" and not any(map(is_changed, sources)) and find_method(item.method).beside is None:
        return replace(item, action="copy", why="no model changes it", method="", options=None, parts=None, tuned=())
    if item.action == "copy" or not all(isinstance(source, AdaptedTensor) and source.is_update for source in sources):
        return item
    factored = find_method(item.method).factored
    matrix = len(item.shape) > 1 and not is_depthwise(item.kind, item.shape)
    matrix = matrix and not (item.kind is Kind.LINEAR and len(item.shape) > 2)
    if factored is None or not matrix or not factored.allows(item.options, item.kind):
        return item
    return replace(item, in_factors=True, parts=item.parts if factored.splits else None)


def factor_space_problems(items: Sequence[WorkItem]) -> list[SuperposeError]:
    """Return what forbids a composition in factor space: models that are no adapters, ranks that differ."""
    for item in items:
        if item.action != "merge" or getattr(item.options, "space", None) != "factor":
            continue
        where = f"method {item.method}, space: factor, tensor {item.name}"
        if not item.in_factors:
            mend = "use space: delta, or adapters alone"
            return [SuperposeError("only factors of adapters can be composed so", where=where, mend=mend)]
        ranks = {source.rank for source in item.tuned if isinstance(source, AdaptedTensor) and source.rank}
        if len(ranks) > 1:
            what = f"factors of ranks {', '.join(map(str, sorted(ranks)))} cannot be added up"
            return [SuperposeError(what, where=where, mend="use space: delta, or adapters of one rank")]
    return []


def as_adapter(
    items: Sequence[WorkItem],
    recipe: Recipe,
    base: Checkpoint,
    models: Sequence[Checkpoint | Adapter],
    tied: Mapping[str, str],
    spelling: Mapping[str, str],
) -> tuple[list[WorkItem], list[SuperposeError], list[str]]:
    """Return the items with their places in an adapter, and without those that have none.

    Args:
        items: of a model.
        recipe: what was asked for.
        base: the base.
        models: the tuned ones.
        tied: names that share another tensor's memory, to that tensor's name.
        spelling: what an adapter calls each tensor.

    Returns:
        The items, what forbids an adapter, and what is left out.
    """
    output = recipe.output
    if output.form == "model":
        return list(items), [], []
    turned = any(
        stores_in_x_out(model.config, base.tensors) for model in (base, *models) if isinstance(model, Checkpoint)
    )
    dtype = "F32" if recipe.dtype == "base" else DTYPE_NAMES[getattr(torch, recipe.dtype)]
    kept: list[WorkItem] = []
    rest: list[WorkItem] = []
    dense: list[WorkItem] = []
    for item in items:
        own = item if output.form == "both" else replace(item, names=())
        if item.action == "copy":
            kept += [own] if output.form == "both" else []
        elif _fits_factors(item):
            exact = item.in_factors and not (output.rank or output.energy)
            bound = _rank_of(item) if item.in_factors else min(item.shape[0], item.numel // max(1, item.shape[0]))
            if not item.in_factors and not (output.rank or output.energy):
                dense.append(item)
            room = bound if exact or not output.rank else min(bound, output.rank)
            place = _place(item, spelling[item.name], turned, room, output, dtype)
            kept.append(replace(own, factors=place))
        else:
            rest.append(item)
            kept.append(own)
    if not output.per_layer_rank:
        room = output.rank or max((item.factors.room for item in kept if item.factors), default=1)
        kept = [replace(i, factors=replace(i.factors, room=room)) if i.factors else i for i in kept]
    if output.rest == "save":
        kept = _with_saved(kept, rest, items, tied, spelling)
    kept = [item for item in kept if item.names or item.factors is not None]
    kept = [replace(item, reads_base=_reads_base(item)) for item in kept]
    problems = _problems(dense, rest, kept, output, base)
    notes = []
    if rest and output.rest == "drop":
        notes.append(f"an adapter of low rank holds no {_named(rest)}: left out")
    elif lost := [item for item in rest if not _module_parameter(item)]:
        notes.append(f"an adapter cannot hold {_named(lost)}: left out")
    return kept, problems, notes


def lay_out_adapter(layout: Layout, items: Sequence[WorkItem], output: Output) -> Layout:
    """Return the layout with the adapter's file.

    Args:
        layout: of the model, or an empty one.
        items: with their places.
        output: what comes out.

    Returns:
        The layout; slots of saved tensors go by their names in the adapter.
    """
    if output.form == "model":
        return layout
    tensors = []
    for item in items:
        if item.factors is not None:
            down, up = item.factors.shapes(item.size)
            tensors += [(item.factors.down, item.factors.dtype, down), (item.factors.up, item.factors.dtype, up)]
        tensors += [(name, item.dtype, item.shape) for name in item.names if name.startswith(PREFIX)]
    file = WIDE_FILE if output.energy is not None else ADAPTER_FILE
    return lay_out_beside(layout, f"adapter/{file}" if output.form == "both" else file, tensors)


def _with_saved(
    kept: Sequence[WorkItem],
    rest: Sequence[WorkItem],
    items: Sequence[WorkItem],
    tied: Mapping[str, str],
    spelling: Mapping[str, str],
) -> list[WorkItem]:
    """Return the items, those that no low-rank update holds with their names in the adapter too.

    A bias beside factors goes with them; any other bias by itself; the rest makes PEFT save modules as a whole, so that
    everything in these modules has to be there, and what is tied to it.
    """
    paths = {item.name: spelling[item.name].rpartition(".")[0] for item in items}
    beside_factors = {paths[item.name] for item in kept if item.factors is not None}
    saved = {paths[item.name] for item in rest if _module_parameter(item) and item.kind is not Kind.BIAS}
    also = {owner: [spelling.get(name, name) for name, to in tied.items() if to == owner] for owner in tied.values()}
    names: dict[str, tuple[str, ...]] = {}
    for item in items:
        own, path = spelling[item.name], paths[item.name]
        if not _module_parameter(item):
            continue
        if item in rest and item.kind is Kind.BIAS and path not in saved:
            ending = own.rpartition(".")[2]
            names[item.name] = (f"{PREFIX}{path}.base_layer.{ending}" if path in beside_factors else PREFIX + own,)
        elif path in saved:
            names[item.name] = tuple(PREFIX + name for name in (own, *also.get(item.name, ())))
    there = {item.name for item in kept}
    missing = [replace(item, names=()) for item in items if item.name in names and item.name not in there]
    return [replace(item, names=(*item.names, *names.get(item.name, ()))) for item in (*kept, *missing)]


def _place(item: WorkItem, name: str, turned: bool, room: int, output: Output, dtype: str) -> FactorOutput:
    path = PREFIX + name.removesuffix(".weight")
    sources = [source for source in item.tuned if isinstance(source, AdaptedTensor) and source.pairs]
    looked_up = sources[0].pairs[0].looked_up if sources else item.kind is Kind.EMBEDDING
    conv1d = turned and name.removesuffix(".weight").rpartition(".")[2] in CONV1D_MODULES
    transposed = sources[0].pairs[0].transposed if sources else conv1d
    words = ("lora_embedding_A", "lora_embedding_B") if looked_up else ("lora_A.weight", "lora_B.weight")
    return FactorOutput(
        down=f"{path}.{words[0]}", up=f"{path}.{words[1]}", transposed=transposed or looked_up,
        kernel=item.shape[2:] if item.kind is Kind.CONV else (), room=max(1, room), dtype=dtype, rank=output.rank,
        energy=output.energy or 1.0,
    )  # fmt: skip


def _fits_factors(item: WorkItem) -> bool:
    """Whether PEFT has a place for a low-rank update of a tensor."""
    if len(item.shape) < 2 or not item.name.endswith(".weight") or 0 in item.shape:
        return False
    if item.kind is Kind.CONV:
        return not is_depthwise(item.kind, item.shape) and item.parts is None  # PEFT wants others of a grouped one
    if len(item.shape) > 2:
        return False
    # A table is small work for an adapter of it, and half of the model for anything else.
    only_updates = all(isinstance(s, AdaptedTensor) and s.onto is None for s in item.tuned)
    return item.kind is not Kind.EMBEDDING or only_updates


def _module_parameter(item: WorkItem) -> bool:
    """Whether a module of that name can be saved in an adapter: free vectors and running statistics cannot."""
    return item.name.endswith((".weight", ".bias")) and item.kind is not Kind.BUFFER


def _rank_of(item: WorkItem) -> int:
    """Return the rank of what is merged in factors at most: the sum of all updates' ranks, for every map by itself."""
    sources = [source for source in item.tuned if isinstance(source, AdaptedTensor)]
    pairs = [pair for source in sources for pair in source.pairs]
    if getattr(item.options, "space", None) == "factor":  # factors are added up, not put side by side
        return max((source.rank for source in sources), default=0)
    if item.parts is None:
        return sum(pair.rank for pair in pairs)
    axis, sizes = item.parts
    total, start = 0, 0
    for size in sizes:
        total += sum(pair.rank for pair in pairs if pair.reaches(axis, start, start + size))
        start += size
    return total


def _reads_base(item: WorkItem) -> bool:
    if item.names or item.action == "copy":
        return True
    if item.in_factors:
        return False
    updates = all(isinstance(source, AdaptedTensor) and source.is_update for source in item.tuned)
    return not updates or find_method(item.method).reads_base(item.options)


def _problems(
    dense: Sequence[WorkItem], rest: Sequence[WorkItem], kept: Sequence[WorkItem], output: Output, base: Checkpoint
) -> list[SuperposeError]:
    problems = []
    if dense:
        what = f"{dense[0].method} changes single entries of {_named(dense)}: no adapter of low rank holds that exactly"
        mend = "say how many directions to keep (--adapter-rank 16 or --adapter-energy 0.99)"
        problems.append(SuperposeError(what, where=f"output form: {output.form}", mend=mend))
    if rest and output.rest == "refuse":
        what = f"an adapter of low rank holds no {_named(rest)}"
        mend = "save them as they are (--rest save), leave them out (--rest drop), or keep the base's by a rule"
        problems.append(SuperposeError(what, where="--rest refuse", mend=mend))
    sets = [item for item in kept if item.action == "merge" and find_method(item.method).beside is not None]
    if sets and output.form == "adapter":
        what = f"{sets[0].method} makes a set of models around one, and no adapter"
        problems.append(SuperposeError(what, where="output form: adapter", mend="use --form model, or another method"))
    unread = [item for item in kept if item.reads_base] if not base.is_there else []
    if not kept:
        mend = "give models that differ from the base in a matrix"
        problems.append(SuperposeError("nothing is left for the adapter to hold", where=base.name, mend=mend))
    if unread:
        what = f"{unread[0].method} reads the base, and {base.name} was not opened"
        problems.append(SuperposeError(what, where=f"tensor {unread[0].name}", mend="give the base's local folder"))
    return problems


def _named(items: Sequence[WorkItem]) -> str:
    names = ", ".join(item.name for item in items[:MOST_NAMED])
    return names + (f" and {len(items) - MOST_NAMED} more" if len(items) > MOST_NAMED else "")
