"""What a merge decided and measured: `run.json` beside the result."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

RECORD_FILE = "run.json"


@dataclass(frozen=True)
class TensorRecord:
    """What was done to one tensor.

    Args:
        name: its name in the output.
        kind: what it is in its network.
        kind_from: how that is known: "module", "name" or "rule".
        action: "merge" or "copy".
        method: the method that merged it, "" for a copy.
        dtype: of the output, as safetensors names it.
        shape: its dimensions.
        parts: number of maps a fused projection was split into, 1 for a single one.
        sha256: of its bytes in the output; "" where an adapter holds its update alone.
        stats: what the method says of how it was found.
        measures: how well each task's features survived, if asked for.
        warnings: what the user should know.
        seconds: time it took.
        beside: tensors written beside it, with the sha256 of their bytes.
        factors: the factors of its update in the adapter, with the sha256 of their bytes.
        written: its names in the output's files, where these are others than its own.
    """

    name: str
    kind: str
    kind_from: str
    action: str
    method: str
    dtype: str
    shape: tuple[int, ...]
    parts: int
    sha256: str
    stats: Mapping[str, Any] = field(default_factory=dict)
    measures: Mapping[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    seconds: float = 0.0
    beside: Mapping[str, str] = field(default_factory=dict)
    factors: Mapping[str, str] = field(default_factory=dict)
    written: tuple[str, ...] = ()


@dataclass(frozen=True)
class RunRecord:
    """What a merge decided and measured.

    Args:
        output: the folder of the merged checkpoint.
        recipe: the recipe as it was understood, defaults filled in.
        sources: what each checkpoint resolved to: path, revision, and files with their sizes and a digest of a sample
            of their content (see `superpose.checkpoints.stamps`); of all of it, if that was asked for.
        versions: of superpose, torch, Python, and the digest of superpose's code.
        settings: device, backend, workers, memory.
        tensors: one record per tensor of the output, by name.
        warnings: of all tensors and of the plan.
        totals: counts, bytes, seconds.
        learned: what was learned from data: by which method, from which data, coefficients, the file that holds it all.
        files: sha256 of every file of the output but weights, whose tensors have their own, and the record itself.
    """

    output: str
    recipe: Mapping[str, Any]
    sources: tuple[Mapping[str, Any], ...]
    versions: Mapping[str, str]
    settings: Mapping[str, Any]
    tensors: tuple[TensorRecord, ...]
    warnings: tuple[str, ...]
    totals: Mapping[str, Any]
    learned: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        """Return the record as JSON text."""
        return json.dumps(dataclasses.asdict(self), indent=2, default=str) + "\n"

    @classmethod
    def from_json(cls, text: str) -> RunRecord:
        """Return the record that `to_json` wrote."""
        content = json.loads(text)
        tensors = tuple(tensor_record(entry) for entry in content.pop("tensors"))
        content["sources"] = tuple(content["sources"])
        content["warnings"] = tuple(content["warnings"])
        return cls(tensors=tensors, **content)

    @classmethod
    def load(cls, folder: str | Path) -> RunRecord:
        """Return the record of a merged folder."""
        return cls.from_json((Path(folder) / RECORD_FILE).read_text(encoding="utf-8"))


def is_output(folder: Path) -> bool:
    """Whether a folder holds a record of superpose, and not just a file of that name."""
    try:
        content = json.loads((folder / RECORD_FILE).read_text(encoding="utf-8"))
        return "superpose" in content["versions"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):  # no record, or not ours
        return False


def tensor_record(entry: Mapping[str, Any]) -> TensorRecord:
    """Return a tensor's record from its JSON form."""
    lists = {key: tuple(entry[key]) for key in ("shape", "warnings", "written") if key in entry}
    content = {**entry, **lists}
    return TensorRecord(**content)
