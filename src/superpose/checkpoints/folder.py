"""A checkpoint as a user names it: a folder, a single file, or a hub id, and the headers of all its tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from superpose.checkpoints.adapted import files_of
from superpose.checkpoints.files import formats, headers_of, read_json
from superpose.checkpoints.headers import MOST_TENSORS, TensorHeader
from superpose.checkpoints.hub import fetch_from_hub, looks_like_hub_id
from superpose.checkpoints.lora import ADAPTER_CONFIG
from superpose.checkpoints.sidecars import is_own
from superpose.errors import SuperposeError, nearest

# Most preferred first; a converted repository often holds both.
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint, known by its headers.

    Args:
        name: what the user called it.
        folder: where its config and tokenizer lie; None for a bare weight file.
        revision: the commit that a hub id resolved to, "" for local ones.
        tensors: headers by name, each tensor once.
        aliases: other names of the same memory -> the name in `tensors`.
        config: the content of config.json, empty if there is none.
        problems: what is wrong with its files.
        is_there: whether its tensors can be read; adapters tell of a base that was not opened.
    """

    name: str
    folder: Path | None
    revision: str
    tensors: Mapping[str, TensorHeader]
    aliases: Mapping[str, str]
    config: Mapping[str, Any]
    problems: tuple[SuperposeError, ...]
    is_there: bool = True

    @property
    def files(self) -> list[Path]:
        """The weight files, in order of name."""
        if not self.is_there:
            return []
        return sorted({file for header in self.tensors.values() for file in files_of(header)})


def locate(location: str, *, where: str = "") -> tuple[Path, str]:
    """Return the local place of what a user names, and the commit that a hub id resolved to ("" for local ones).

    Args:
        location: local folder or file, or a hub id `org/name[@revision]`.
        where: who names it, for errors.

    Returns:
        Path and commit.

    Raises:
        SuperposeError: there is nothing of that name.
    """
    path = Path(location).expanduser()
    if exists(path):
        return path, ""
    if not looks_like_hub_id(location):
        raise _not_found(location, path, where)
    return fetch_from_hub(location, _nearest_path(path))


def open_checkpoint(location: str, *, where: str = "") -> Checkpoint:
    """Find a checkpoint and read its headers; no tensor is read.

    Args:
        location: local folder or weight file, or a hub id `org/name[@revision]`.
        where: who names it, for errors.

    Returns:
        The checkpoint; what is wrong with its files is in its `problems`.

    Raises:
        SuperposeError: there is nothing of that name, or no weights in it.
    """
    path, revision = locate(location, where=where)
    if not path.is_dir():
        headers = headers_of(path)
        return Checkpoint(location, None, revision, headers.tensors, headers.aliases, {}, headers.problems)
    files, declared, problems = _weight_files(path)
    tensors: dict[str, TensorHeader] = {}
    aliases: dict[str, str] = {}
    for file in files:
        headers = headers_of(file)
        problems.extend(headers.problems)
        for name, header in headers.tensors.items():
            if name in tensors:
                what = f"tensor {name} is in two files"
                both = f"{tensors[name].file} and {file}"
                problems.append(SuperposeError(what, where=both, mend="delete the file that is left over"))
            tensors.setdefault(name, header)
        aliases.update(headers.aliases)
        if len(tensors) > MOST_TENSORS:
            what = f"{len(tensors)} tensors and more, where {MOST_TENSORS} are the most"
            raise SuperposeError(what, where=str(path), mend="do not use this checkpoint")
    for name, file in declared.items():
        if name not in tensors and name not in aliases and exists(file) and not problems:
            what = f"the index promises tensor {name}, the file does not have it"
            problems.append(SuperposeError(what, where=str(file), mend="fetch or save the checkpoint again"))
    config, config_problems = _read_config(path)
    return Checkpoint(location, path, revision, tensors, aliases, config, tuple(problems + config_problems))


def _weight_files(folder: Path) -> tuple[list[Path], dict[str, Path], list[SuperposeError]]:
    """Return the weight files of a folder, which tensors the index promises, and the problems."""
    if (folder / ADAPTER_CONFIG).exists():
        mend = "name the model that the adapter changes: MODEL+ADAPTER"
        raise SuperposeError("an adapter, not a checkpoint", where=str(folder / ADAPTER_CONFIG), mend=mend)
    for index, single in zip(INDEX_FILES, WEIGHT_FILES, strict=True):
        if (folder / index).exists():
            return _indexed_files(folder, folder / index)
        if (folder / single).exists():
            return [folder / single], {}, []
    loose = sorted(file for file in folder.iterdir() if file.suffix in formats() and file.is_file())
    loose = [file for file in loose if file.name not in ("training_args.bin", "optimizer.pt", "scheduler.pt")]
    if len(loose) == 1:
        return loose, {}, []
    found = ", ".join(file.name for file in loose) or "none"
    mend = f"name the file itself, or save the model with an index (weight files here: {found})"
    raise SuperposeError(
        f"the folder has no {' or '.join(WEIGHT_FILES)} and no index of shards", where=str(folder), mend=mend
    )


def _indexed_files(folder: Path, index: Path) -> tuple[list[Path], dict[str, Path], list[SuperposeError]]:
    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise SuperposeError("the index has no weight_map", where=str(index), mend="save the checkpoint again")
    problems, declared = [], {}
    for tensor, name in weight_map.items():
        # A name that is more than a name could lead anywhere.
        if not isinstance(name, str) or not re.fullmatch(r"[\w.\-+= ]+", name) or name.startswith("."):
            what = f"the index sends tensor {tensor} to {name!r}, which is no file of its folder"
            problems.append(SuperposeError(what, where=str(index), mend="do not use this checkpoint"))
            continue
        declared[tensor] = folder / name
    for file in sorted(set(declared.values())):
        if not exists(file):
            missing = sorted(tensor for tensor, place in declared.items() if place == file)
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            what = f"shard {file.name} is missing"
            where = f"{index}, tensor {missing[0]}{more}"
            problems.append(SuperposeError(what, where=where, mend="fetch the shard again"))
    return sorted({file for file in declared.values() if exists(file)}), declared, problems


def _read_config(folder: Path) -> tuple[dict[str, Any], list[SuperposeError]]:
    file = folder / "config.json"
    if not file.exists():
        return {}, []
    if not is_own(file, folder):
        # It is copied into the result, and with it what a link in somebody's checkpoint leads to.
        what, mend = "the config is a link out of its folder, or no file", "put a copy of the file in its place"
        return {}, [SuperposeError(what, where=str(file), mend=mend)]
    try:
        config = read_json(file)
    except SuperposeError as problem:
        return {}, [problem]
    if not isinstance(config, dict):
        mend = "fetch or save the checkpoint again"
        return {}, [SuperposeError("the config is no mapping", where=str(file), mend=mend)]
    return config, []


def exists(path: Path) -> bool:
    """Whether something of that name is there."""
    try:
        return path.exists()
    except OSError:  # a name that no file can have
        return False


def _not_found(location: str, path: Path, where: str) -> SuperposeError:
    mend = "; ".join(filter(None, ["give a folder, a weight file, or a hub id org/name", _nearest_path(path)]))
    return SuperposeError(f"'{location[:200]}' does not exist", where=where, mend=mend)


def _nearest_path(path: Path) -> str:
    """Return which name in the path's folder comes nearest, "" where there is no such folder."""
    if not exists(path.parent) or not path.parent.is_dir():
        return ""
    return nearest(path.name, [entry.name for entry in path.parent.iterdir()])
