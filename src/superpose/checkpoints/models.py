"""What a user names as a model: a checkpoint, an adapter of the base, or MODEL+ADAPTER, a model with one applied."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from superpose.checkpoints.adapted import AdaptedTensor
from superpose.checkpoints.architecture import read_architecture
from superpose.checkpoints.compare import Alignment
from superpose.checkpoints.folder import Checkpoint, exists, locate, open_checkpoint
from superpose.checkpoints.headers import TensorHeader
from superpose.checkpoints.lora import (
    ADAPTER_CONFIG,
    Adapter,
    adapted_tensor,
    is_adapter,
    match_names,
    open_adapter,
    stored_shape,
    stores_in_x_out,
    unknown,
)
from superpose.errors import SuperposeError


def open_model(location: str, *, where: str = "") -> Checkpoint | Adapter:
    """Find a model and read its headers; no tensor is read.

    Args:
        location: folder, weight file or hub id of a checkpoint or of an adapter; or MODEL+ADAPTER.
        where: who names it, for errors.

    Returns:
        The checkpoint or adapter; what is wrong with its files is in its `problems`.

    Raises:
        SuperposeError: there is nothing of that name, or no weights in it.
    """
    model, plus, adapter = location.rpartition("+")
    if plus and model and adapter and not exists(Path(location).expanduser()):
        return _applied(open_model(model, where=where), open_model(adapter, where=where), location, where)
    path, revision = locate(location, where=where)
    if path.is_dir() and is_adapter(path):
        return open_adapter(path, location, revision)
    return open_checkpoint(location, where=where)


def open_base(location: str) -> Checkpoint:
    """Find the base of a merge.

    Args:
        location: as for `open_model`.

    Returns:
        The checkpoint.

    Raises:
        SuperposeError: there is nothing of that name, or an adapter alone.
    """
    found = open_model(location, where="base")
    if isinstance(found, Adapter):
        where = f"base {found.folder / ADAPTER_CONFIG}"
        mend = "name the model that it was trained on first, or MODEL+ADAPTER"
        raise SuperposeError("an adapter alone is no base", where=where, mend=mend)
    return found


def adapt(
    adapter: Adapter,
    base: Mapping[str, TensorHeader],
    tied: Mapping[str, str],
    *,
    onto: bool = False,
    wanted: Callable[[str], bool] = lambda name: True,
    dropped: Callable[[str], bool] = lambda name: False,
    path: Callable[[str], str] = lambda name: name,
    in_x_out: bool | None = None,
) -> Alignment:
    """Return the tensors of a base that an adapter changes.

    Args:
        adapter: the adapter.
        base: the base's tensors by name.
        tied: names that share another tensor's memory, to that tensor's name.
        onto: whether the adapted tensors name the base's as what they are added to.
        wanted: whether a base tensor takes part; what does not need not fit.
        dropped: whether a tensor that only the adapter has is left out by a rule.
        path: a tensor's name in the model, which is what adapters call it, given that in the files.
        in_x_out: whether the base stores its linear maps so; None where nothing tells.

    Returns:
        Base name to adapted tensor, for those alone that it changes; and what does not fit.
    """
    in_files = {path(name): name for name in (*base, *tied)}
    strip, add = match_names(list(adapter.tensors), in_files)

    def renamed(name: str) -> str:
        found = add + name[len(strip) :] if name.startswith(strip) else name
        return in_files.get(found, found)

    sources: dict[str, TensorHeader] = {}
    problems, missing, notes = [], [], []
    for name, header in {**adapter.full, **adapter.copies}.items():
        own = base.get(renamed(name))
        if own is None:
            missing.append(name)
        elif not wanted(renamed(name)):
            continue
        elif own.shape != header.shape:
            what = f"shape {list(header.shape)}, the base has {list(own.shape)}"
            where = f"{header.file}, tensor {header.name} (base: {own.file})"
            mend = f"use an adapter of this very base, or keep the base's: a rule {{match: '{own.name}', keep: base}}"
            problems.append(SuperposeError(what, where=where, mend=mend))
        elif name in adapter.full:
            sources[renamed(name)] = header
    for place, module in adapter.modules.items():
        name = renamed(f"{place}.weight")
        if name not in base:
            missing.append(f"{place}.weight")
            continue
        if not wanted(name):
            continue
        own = base[name]
        try:
            made = adapted_tensor(module, name, own.shape, in_x_out=in_x_out, onto=own if onto else None)
        except SuperposeError as problem:
            problems.append(problem)
            continue
        sources[name] = replace(made, dtype=own.dtype) if onto else made
        bias = renamed(f"{place}.bias")
        if module.bias is None:
            continue
        if bias not in base:
            missing.append(f"{place}.bias")
            continue
        if base[bias].shape != module.bias.shape:
            what = f"shape {list(module.bias.shape)}, the base's bias has {list(base[bias].shape)}"
            where = f"{module.bias.file}, tensor {module.bias.name} (base: {base[bias].file})"
            problems.append(SuperposeError(what, where=where, mend="use an adapter of this very base"))
            continue
        sources[bias] = AdaptedTensor(
            bias, base[bias].dtype if onto else module.bias.dtype, base[bias].shape, module.bias.file,
            onto=base[bias] if onto else None, addend=module.bias, addend_scale=module.scale,
        )  # fmt: skip
    for name in [name for name in missing if renamed(name) in tied]:
        missing.remove(name)
        owner = tied[renamed(name)]
        what = f"it changes {renamed(name)}, which the base ties to {owner}: a model that ties them cannot hold that"
        mend = "merge into an adapter (--form adapter), or untie the two in the base first"
        problems.append(SuperposeError(what, where=str(adapter.folder), mend=mend))
    problems += unknown([name for name in missing if not dropped(name)], sorted(base), adapter)
    both_ends = sorted(set(sources) & set(tied.values()))
    if both_ends:
        notes.append(f"{adapter.name}: it changes {both_ends[0]}, which other parts of the model are tied to")
    if adapter.copies:
        shown = ", ".join(sorted(adapter.copies))
        notes.append(f"{adapter.name}: {shown} in it is taken for a copy of the base's")
    if strip or add:
        notes.append(f"{adapter.name}: names were matched by putting '{add}' in place of '{strip}'")
    return Alignment(sources, tuple(problems), tuple(notes))


def unchanged(header: TensorHeader) -> AdaptedTensor:
    """Return a base tensor as an adapter sees it that does not mention it."""
    return AdaptedTensor(header.name, header.dtype, header.shape, header.file)


def base_of_adapters(adapters: list[Adapter], name: str) -> Checkpoint:
    """Return the base that adapters change, as far as they tell: its tensors cannot be read.

    Args:
        adapters: all of one base.
        name: what the user calls the base.

    Returns:
        The tensors that they change, by the names that adapters give them.
    """
    tensors: dict[str, TensorHeader] = {}
    for adapter in adapters:
        names = {f"{path}.weight": module for path, module in adapter.modules.items()}
        strip, add = match_names(list(names), tensors)
        for own, module in names.items():
            called = add + own[len(strip) :] if own.startswith(strip) else own
            header = TensorHeader(called, "F32", stored_shape(module), module.down.file)
            tensors.setdefault(called, header)
    return Checkpoint(name, None, "", tensors, {}, {}, (), is_there=False)


def _applied(model: Checkpoint | Adapter, adapter: Checkpoint | Adapter, location: str, where: str) -> Checkpoint:
    if isinstance(model, Adapter) or not isinstance(adapter, Adapter):
        what = "MODEL+ADAPTER is a checkpoint and an adapter, in this order"
        raise SuperposeError(what, where=f"{where} {location}", mend="name the model first, then the adapter")
    architecture = read_architecture(model.folder, model.config, len(model.tensors))
    tied = {**architecture.tied, **model.aliases}
    in_x_out = stores_in_x_out(model.config, model.tensors)
    found = adapt(adapter, model.tensors, tied, onto=True, path=architecture.path, in_x_out=in_x_out)
    problems = (*model.problems, *adapter.problems, *found.problems)
    return replace(model, name=location, tensors={**model.tensors, **found.sources}, problems=problems)
