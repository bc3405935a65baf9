"""`superpose merge`: base and fine-tunes in, one model out."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from superpose.cli import common
from superpose.cli.common import exit_codes, recipe_from, scaling_factors, size
from superpose.cli.progress import progress

if TYPE_CHECKING:
    from superpose.records import RunRecord

MOST_WARNINGS = 10


def merge(
    models: common.Models,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the result.")],
    method: common.MethodName = None,
    weights: common.Weights = None,
    dtype: common.Dtype = None,
    seed: common.Seed = None,
    shard_size: common.ShardSize = None,
    device: common.Device = "cpu",
    backend: common.BackendName = "threads",
    ray_address: common.RayAddress = None,
    workers: common.Workers = None,
    memory: common.Memory = "4GiB",
    cache: common.CacheFolder = None,
    cache_size: common.CacheSize = "20GiB",
    split_tensors: common.SplitTensors = True,
    measure: common.Measure = False,
    overwrite: common.Overwrite = False,
    quiet: common.Quiet = False,
    json: common.Json = False,
) -> None:
    """Merge a base and its fine-tunes into one model.

    Options of the method follow as --OPTION VALUE, such as --density 0.2; `superpose methods NAME` lists them.
    Interrupted or killed, the same command goes on where it was. Several values of --scaling-factor make an output
    each, with {scaling_factor} in its name, and are solved once; going on, leave out those that are finished.
    """
    output = output.expanduser().resolve()
    with exit_codes(kept=output.parent / f"{output.name}.partial"):
        from superpose import api

        factors, models = scaling_factors(models, output)
        recipe = recipe_from(models, method=method, weights=weights, dtype=dtype, seed=seed, shard_size=shard_size)
        settings = {
            "device": device, "backend": backend, "ray_address": ray_address, "workers": workers, "memory": memory,
            "cache": cache, "cache_size": cache_size, "split_tensors": split_tensors, "measure": measure,
            "overwrite": overwrite,
        }  # fmt: skip
        with progress(quiet) as report:
            if factors:
                records = api.merge_scaled(recipe, output, factors, report=report, **settings)
            else:
                records = [api.merge(recipe, output, report=report, **settings)]
        for record in records:
            _warn(record)
        if json:
            texts = [record.to_json().rstrip("\n") for record in records]
            typer.echo("[" + ",\n".join(texts) + "]" if factors else texts[0])
            return
        for record in records:
            _report(record)


def _warn(record: RunRecord) -> None:
    for warning in record.warnings[:MOST_WARNINGS]:
        typer.echo(f"warning: {warning}", err=True)
    if len(record.warnings) > MOST_WARNINGS:
        more = len(record.warnings) - MOST_WARNINGS
        typer.echo(f"warning: {more} more warnings are in {Path(record.output) / 'run.json'}", err=True)


def _report(record: RunRecord) -> None:
    totals = record.totals
    resumed = f", {totals['resumed']} of them from the run before" if totals["resumed"] else ""
    typer.echo(
        f"{record.output}: {totals['merged']} tensors merged{_by(record)}, {totals['copied']} copied{resumed};"
        f" {size(totals['bytes_written'])} in {totals['seconds']:.1f} s"
    )


def _by(record: RunRecord) -> str:
    """Return by what methods, with their numbers of tensors where there are several."""
    methods = Counter(tensor.method for tensor in record.tensors if tensor.method)
    if len(methods) < 2:
        return "".join(f" by {method}" for method in methods)
    return " (" + ", ".join(f"{count} by {method}" for method, count in methods.most_common()) + ")"
