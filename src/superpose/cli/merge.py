"""`superpose merge`: base and fine-tunes or adapters in, one model or adapter out."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from superpose.cli import common
from superpose.cli.common import exit_codes, output_from, recipe_from, scaling_factors, size, warn
from superpose.cli.progress import progress
from superpose.places import absolute

if TYPE_CHECKING:
    from superpose.records import RunRecord


def merge(
    models: common.Models,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the result.")],
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
    cache: common.CacheFolder = None,
    cache_size: common.CacheSize = "20GiB",
    split_tensors: common.SplitTensors = True,
    checksums: common.Checksums = "sample",
    measure: common.Measure = False,
    overwrite: common.Overwrite = False,
    quiet: common.Quiet = False,
    json: common.Json = False,
) -> None:
    """Merge a base and its fine-tunes (or adapters) into one model, or one adapter.

    Options of the method follow as --OPTION VALUE, such as --density 0.2; `superpose methods NAME` lists them.
    Interrupted or killed, the same command goes on where it was. Several values of --scaling-factor make an output
    each, with {scaling_factor} in its name, and are solved once; going on, leave out those that are finished.
    """
    with exit_codes():
        output = absolute(output)
    with exit_codes(kept=output.parent / f"{output.name}.partial"):
        from superpose import api

        factors, models = scaling_factors(models, output)
        form_of_output = output_from(shard_size, form, adapter_rank, adapter_energy, per_layer_rank, rest)
        recipe = recipe_from(
            models, method=method, weights=weights, dtype=dtype, seed=seed, output=form_of_output,
            statistics=statistics, learned=learned, non_finite=non_finite,
        )  # fmt: skip
        settings = {
            "device": device, "backend": backend, "ray_address": ray_address, "workers": workers, "memory": memory,
            "cache": cache, "cache_size": cache_size, "split_tensors": split_tensors, "measure": measure,
            "overwrite": overwrite, "checksums": checksums,
        }  # fmt: skip
        with progress(quiet) as report:
            if factors:
                records = api.merge_scaled(recipe, output, factors, report=report, **settings)
            else:
                records = [api.merge(recipe, output, report=report, **settings)]
        for record in records:
            warn(record)
        if json:
            texts = [record.to_json().rstrip("\n") for record in records]
            typer.echo("[" + ",\n".join(texts) + "]" if factors else texts[0])
            return
        for record in records:
            _report(record)


def _report(record: RunRecord) -> None:
    totals = record.totals
    resumed = f", {totals['resumed']} of them from the run before" if totals["resumed"] else ""
    typer.echo(
        f"{record.output}: {totals['merged']} tensors merged{_by(record)}, {totals['copied']} copied{resumed};"
        f" {size(totals['bytes_written'])} in {totals['seconds']:.1f} s{_truncation(record)}"
    )


def _truncation(record: RunRecord) -> str:
    """Return what an adapter holds, and how far it is from the merged update."""
    held = [tensor.stats["adapter_rank"] for tensor in record.tensors if tensor.factors]
    if not held:
        return ""
    lost = record.totals["truncation_error"]
    return f"; an adapter of rank {max(held)}" + (f", {lost:.2%} of the update's norm left out" if lost else "")


def _by(record: RunRecord) -> str:
    """Return by what methods, with their numbers of tensors where there are several."""
    methods = Counter(tensor.method for tensor in record.tensors if tensor.method)
    if len(methods) < 2:
        return "".join(f" by {method}" for method in methods)
    return " (" + ", ".join(f"{count} by {method}" for method, count in methods.most_common()) + ")"
