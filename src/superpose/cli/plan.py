"""`superpose plan`: every decision of a merge, or every problem, before a tensor is read."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import asdict
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from superpose.cli import common
from superpose.cli.common import exit_codes, output_from, print_table, recipe_from, size
from superpose.errors import printable

if TYPE_CHECKING:
    from superpose.planning import Plan, WorkItem


def plan(
    models: common.Models,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder of the result, to check.")] = None,
    method: common.MethodName = None,
    weights: common.Weights = None,
    statistics: common.StatisticsFiles = None,
    learned: common.LearnedPlace = None,
    dtype: common.Dtype = None,
    seed: common.Seed = None,
    non_finite: common.NonFinite = None,
    shard_size: common.ShardSize = None,
    form: common.Form = None,
    adapter_rank: common.AdapterRank = None,
    adapter_energy: common.AdapterEnergy = None,
    per_layer_rank: common.PerLayerRank = False,
    rest: common.Rest = None,
    device: common.Device = "cpu",
    backend: common.BackendName = "threads",
    ray_address: common.RayAddress = None,
    workers: common.Workers = None,
    memory: common.Memory = "4GiB",
    measure: common.Measure = False,
    overwrite: common.Overwrite = False,
    every: Annotated[bool, typer.Option("--every", help="A line per tensor, layers not drawn together.")] = False,
    quiet: common.Quiet = False,
    json: common.Json = False,
) -> None:
    """Show what `superpose merge` would do with the same arguments, and stop before a tensor is read.

    Every problem that can be seen from headers is shown at once.
    """
    del quiet
    with exit_codes():
        from superpose import api

        form_of_output = output_from(shard_size, form, adapter_rank, adapter_energy, per_layer_rank, rest)
        recipe = recipe_from(
            models, method=method, weights=weights, dtype=dtype, seed=seed, output=form_of_output,
            statistics=statistics, learned=learned, non_finite=non_finite,
        )  # fmt: skip
        made = api.plan(
            recipe,
            output,
            device=device,
            backend=backend,
            ray_address=ray_address,
            workers=workers,
            memory=memory,
            measure=measure,
            overwrite=overwrite,
        )
        if json:
            typer.echo(dumps(_as_json(made), indent=2, default=str))
        else:
            _print(made, every)


def _print(made: Plan, every: bool) -> None:
    rows: Counter[tuple] = Counter()
    for item in made.items:
        name = item.name if every else re.sub(r"(?<=\.)\d+(?=\.)", "*", item.name)
        rows[(name, *_decision(item))] += 1
    print_table(
        ["tensor", "number", "kind", "known by", "shape", "dtype", "what happens"],
        [(name, count, *rest) for (name, *rest), count in rows.items()],
        right=["number"],
    )
    for note in made.notes:
        typer.echo(f"note: {printable(note)}")
    merged = sum(item.action == "merge" for item in made.items)
    surveyed = f" ({size(made.bytes_surveyed)} more in survey passes)" if made.bytes_surveyed else ""
    typer.echo(
        f"{len(made.items)} tensors: {merged} merged, {len(made.items) - merged} copied; {len(made.tuned)} fine-tunes\n"
        f"reads {size(made.bytes_read)}{surveyed}, writes {size(made.layout.file_bytes)} in"
        f" {len(made.layout.all_files)} file(s)\n"
        f"memory in flight up to {size(made.memory)}; takes {made.time_class}"
    )
    if made.to_learn is not None:
        typer.echo(
            f"learning from data comes first: {size(made.learning_memory)} for weights, gradients and task vectors,"
            " and a batch's activations"
        )


def _decision(item: WorkItem) -> tuple[str, ...]:
    what = f"{item.method} {_options(item)}".strip() if item.action == "merge" else f"copied: {item.why}"
    if item.in_factors:
        what += ", in factors"
    if item.factors is not None:
        what += f", to rank {item.factors.room}"
    if item.parts:
        what += f", split in {len(item.parts[1])}"
    dtype = item.dtype if item.dtype == item.base.dtype else f"{item.base.dtype} -> {item.dtype}"
    return str(item.kind), item.kind_from, "x".join(map(str, item.shape)) or "scalar", dtype, what


def _options(item: WorkItem) -> str:
    """The options that are not at their defaults, and the two that everybody asks about."""
    shown = {"density", "scaling_factor"}
    defaults = asdict(type(item.options)())
    chosen = {k: v for k, v in asdict(item.options).items() if k in shown or v != defaults[k]}
    return " ".join(f"{name}={value}" for name, value in chosen.items())


def _written(item: WorkItem) -> tuple[str, ...]:
    return (*item.names, *((item.factors.down, item.factors.up) if item.factors is not None else ()))


def _as_json(made: Plan) -> dict[str, Any]:
    items = [
        {
            "name": item.name,
            "kind": str(item.kind),
            "kind_from": item.kind_from,
            "action": item.action,
            "why": item.why,
            "method": item.method,
            "options": asdict(item.options) if item.options is not None else None,
            "shape": item.shape,
            "dtype": item.dtype,
            "file": made.layout.slots[_written(item)[0]].file,
            "in_factors": item.in_factors,
            "rank": item.factors.room if item.factors is not None else None,
            "memory": item.memory,
        }
        for item in made.items
    ]
    return {
        "recipe": made.recipe.model_dump(mode="json"),
        "notes": made.notes,
        "totals": {
            "tensors": len(items),
            "bytes_read": made.bytes_read,
            "bytes_surveyed": made.bytes_surveyed,
            "bytes_written": made.layout.file_bytes,
            "files": [file.name for file in made.layout.files],
            "memory": made.memory,
            "learning_memory": made.learning_memory,
            "time": made.time_class,
        },
        "items": items,
    }
