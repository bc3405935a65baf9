"""`superpose extract`: a fine-tune as an adapter of its base."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from superpose.cli import common
from superpose.cli.common import exit_codes, size, warn
from superpose.cli.progress import progress
from superpose.places import absolute


def extract(
    base: Annotated[str, typer.Argument(help="The base: folder, weight file, hub id, or MODEL+ADAPTER.")],
    tuned: Annotated[str, typer.Argument(help="Its fine-tune; or an adapter, to give it a smaller rank.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the adapter.")],
    rank: Annotated[int | None, typer.Option(min=1, help="Most directions of every module.")] = None,
    energy: Annotated[
        float | None, typer.Option(help="Share of every update's squared norm that is kept; 0.99 without --rank.")
    ] = None,
    per_layer_rank: common.PerLayerRank = False,
    rest: common.Rest = None,
    dtype: common.Dtype = None,
    device: common.Device = "cpu",
    backend: common.BackendName = "threads",
    ray_address: common.RayAddress = None,
    workers: common.Workers = None,
    memory: common.Memory = "4GiB",
    overwrite: common.Overwrite = False,
    quiet: common.Quiet = False,
    json: common.Json = False,
) -> None:
    """Write a fine-tune as a LoRA adapter that PEFT loads, and say how much of the fine-tune it holds."""
    with exit_codes():
        output = absolute(output)
    with exit_codes(kept=output.parent / f"{output.name}.partial"):
        from superpose import api

        with progress(quiet) as report:
            record = api.extract(
                base, tuned, output, rank=rank, energy=energy, per_layer_rank=per_layer_rank, rest=rest or "drop",
                dtype=dtype or "base", device=device, backend=backend, ray_address=ray_address, workers=workers,
                memory=memory, overwrite=overwrite, report=report,
            )  # fmt: skip
        warn(record)
        if json:
            typer.echo(record.to_json().rstrip("\n"))
            return
        ranks = [tensor.stats["adapter_rank"] for tensor in record.tensors if tensor.factors]
        lost = record.totals.get("truncation_error", 0.0)
        typer.echo(
            f"{record.output}: {len(ranks)} updates of rank {max(ranks, default=0)} at most, {lost:.2%} of their norm"
            f" lost; {size(record.totals['bytes_written'])} in {record.totals['seconds']:.1f} s"
        )
