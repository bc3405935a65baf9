"""Files of statistics about a model: the tensors and what they were computed from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from superpose.checkpoints.files import headers_of, is_file
from superpose.checkpoints.headers import TensorHeader
from superpose.errors import SuperposeError, raise_all

KINDS = ("fisher", "gram")


@dataclass(frozen=True)
class StatisticsFile:
    """What one file of statistics declares.

    Args:
        file: the file.
        kind: "fisher" or "gram".
        tensors: headers by the name of the checkpoint's tensor that they are about.
        in_x_out: tensors of linear maps that the checkpoint stores in x out (for "gram").
        provenance: model, data, examples, tokens, seed and versions.
    """

    file: Path
    kind: str
    tensors: Mapping[str, TensorHeader]
    in_x_out: frozenset[str]
    provenance: Mapping[str, Any]


def content_digest(files: Iterable[Path]) -> str:
    """Return the sha256 of the bytes of all files, one after the other in order of name."""
    digest = hashlib.sha256()
    for file in sorted(files):
        with file.open("rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def open_statistics(file: Path, kind: str, where: str) -> StatisticsFile:
    """Read the header of a file of statistics.

    Args:
        file: as `superpose statistics` wrote it.
        kind: "fisher" or "gram", what is needed.
        where: whose statistics they are to be, for errors.

    Returns:
        What it declares; maps that share a Gram matrix have one header.

    Raises:
        SuperposeError: it is no such file, or is of another kind.
    """
    mend = f"make it: superpose statistics {kind} MODEL --data DATA -o {file.name}"
    if not is_file(file):
        raise SuperposeError(f"there is no file {str(file)[:200]}", where=where, mend=mend)
    found = headers_of(file)
    raise_all(list(found.problems))
    try:
        with safe_open(str(file), framework="pt") as opened:
            told = json.loads((opened.metadata() or {})["superpose"])
        known_kind = str(told["statistics"])
        same = {str(name): str(owner) for name, owner in told.get("same", {}).items()}
        in_x_out = frozenset(map(str, told.get("in_x_out", ())))
        tensors = {**found.tensors, **{name: found.tensors[owner] for name, owner in same.items()}}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        what = "it was not written by superpose statistics: its metadata does not say what it holds"
        raise SuperposeError(what, where=str(file), mend=mend) from error
    if known_kind != kind:
        raise SuperposeError(f"it holds statistics of kind {known_kind}, not {kind}", where=str(file), mend=mend)
    odd = [header for header in tensors.values() if header.dtype != "F32"]
    if odd:
        raise SuperposeError(f"{odd[0].name} is {odd[0].dtype}, not F32", where=str(file), mend=mend)
    return StatisticsFile(file, kind, tensors, in_x_out, told)
