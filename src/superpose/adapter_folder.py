"""The folder of an adapter: its config as PEFT reads it, and factors cut to the rank that was found."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from superpose.checkpoints.files import formats
from superpose.checkpoints.lora import ADAPTER_CONFIG, PREFIX, Adapter
from superpose.checkpoints.writer import Layout, StreamWriter, lay_out_beside
from superpose.planning import ADAPTER_FILE, WIDE_FILE, Plan, WorkItem
from superpose.records import TensorRecord


def write_adapter(folder: Path, plan: Plan, records: Sequence[TensorRecord]) -> list[TensorRecord]:
    """Finish the adapter that a merge has written the factors of.

    Args:
        folder: of the output, not yet under its final name.
        plan: of the merge.
        records: of its tensors.

    Returns:
        The records; with the digests of the factors as they are now.
    """
    output = plan.recipe.output
    place = folder / "adapter" if output.form == "both" else folder
    ranks = {item.name: item.factors.room for item in plan.items if item.factors is not None}
    if output.energy is not None:
        found = {record.name: max(1, record.stats["adapter_rank"]) for record in records if record.name in ranks}
        most = max(found.values(), default=1)
        ranks = found if output.per_layer_rank else dict.fromkeys(ranks, most)
        records = _cut(place, plan.items, ranks, records)
    config = adapter_config(plan, ranks)
    (place / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return list(records)


def adapter_config(plan: Plan, ranks: Mapping[str, int]) -> dict[str, Any]:
    """Return the content of adapter_config.json.

    Args:
        plan: of the merge.
        ranks: of every module's factors, by the name of its weight.

    Returns:
        The config: alpha is the rank, so that nothing is scaled.
    """
    adapters = [model for model in plan.tuned if isinstance(model, Adapter)]
    rank = max(ranks.values(), default=1)
    paths = {name: plan.spelling[name].removesuffix(".weight") for name in ranks}
    # A pattern is matched from anywhere in a path: anchored, it is that of one module.
    own = {"^" + _escaped(paths[name]): width for name, width in sorted(ranks.items()) if width != rank}
    whole = {name.removeprefix(PREFIX) for item in plan.items for name in item.names if name.startswith(PREFIX)}
    biases = {name for name in whole if name.endswith(".bias") and f"{name.removesuffix('bias')}weight" not in whole}
    saved = sorted({name.rpartition(".")[0] for name in whole - biases})
    transposed = any(
        item.factors.transposed and "lora_embedding" not in item.factors.down
        for item in plan.items
        if item.factors is not None
    )
    return {
        "peft_type": "LORA",
        "task_type": _common([adapter.config.get("task_type") for adapter in adapters]),
        "base_model_name_or_path": _common([adapter.base for adapter in adapters]) or plan.base.name,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "target_modules": _targets(plan, sorted(paths.values())),
        "rank_pattern": own,
        "alpha_pattern": own,
        "modules_to_save": saved or None,
        "fan_in_fan_out": transposed,
        "bias": "all" if biases else "none",
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _targets(plan: Plan, paths: Sequence[str]) -> list[str] | str:
    """Return the modules by the last parts of their names where that means no others, else by the whole of them.

    PEFT takes a name for every module whose path ends in it: where one path ends another, a pattern tells them apart.
    """
    ends = {path.rpartition(".")[2] for path in paths}
    modules = {module for name in plan.spelling.values() for module in _containers(name)}
    others = modules - set(paths)
    if plan.base.is_there and not any(other.rpartition(".")[2] in ends for other in others):
        return sorted(ends)
    if not plan.base.is_there and not any(end.isdigit() for end in ends):
        return sorted(ends)
    if any(other.endswith(f".{path}") for other in modules for path in paths):
        return "|".join(map(_escaped, paths))
    return list(paths)


def _containers(name: str) -> list[str]:
    """Return the module that a tensor is of, and all that hold it."""
    parts = name.split(".")[:-1]
    return [".".join(parts[:stop]) for stop in range(1, len(parts) + 1)]


def _cut(
    place: Path, items: Sequence[WorkItem], ranks: Mapping[str, int], records: Sequence[TensorRecord]
) -> list[TensorRecord]:
    """Write the adapter's file from the one with room for more, which stays for a restart: `publish` takes it away."""
    wide = place / WIDE_FILE
    reader = formats()[wide.suffix].open(wide)
    tensors = []
    for item in items:
        if item.factors is not None:
            shapes = item.factors.shapes(item.size, ranks[item.name])
            names = item.factors.down, item.factors.up
            tensors += [(name, item.factors.dtype, shape) for name, shape in zip(names, shapes, strict=True)]
        tensors += [(name, item.dtype, item.shape) for name in item.names if name.startswith(PREFIX)]
    layout = lay_out_beside(Layout((), {}), ADAPTER_FILE, tensors)
    digests = {}
    with contextlib.closing(StreamWriter(place, layout)) as writer:
        for item in items:
            rank = ranks.get(item.name)
            names = [name for name in item.names if name.startswith(PREFIX)]
            pieces = {name: reader.read(name) for name in names}
            if item.factors is not None:
                pieces[item.factors.down] = reader.read(item.factors.down)[:rank]
                pieces[item.factors.up] = reader.read(item.factors.up)[:, :rank]
            for name, piece in pieces.items():
                digests[name] = hashlib.sha256(writer.write(name, 0, piece)).hexdigest()
        writer.sync()
    return [
        replace(record, factors={name: digests[name] for name in record.factors}) if record.factors else record
        for record in records
    ]


def _common(values: Sequence[Any]) -> Any:
    """Return the value that all agree on, None where they do not."""
    return values[0] if values and all(value == values[0] for value in values) else None


def _escaped(path: str) -> str:
    return path.replace(".", r"\.")
