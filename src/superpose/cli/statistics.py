"""`superpose statistics`: what Fisher merging and RegMean need to know of a model on its data."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from superpose.cli import common, task_flags
from superpose.cli.common import exit_codes, size
from superpose.places import absolute

if TYPE_CHECKING:
    from superpose.statistics import Advance, Request

SECONDS_BETWEEN_LINES = 10.0


def statistics(
    kind: Annotated[str, typer.Argument(metavar="fisher|gram", help="What Fisher merging needs, or RegMean.")],
    model: Annotated[str, typer.Argument(help="Model folder, hub id, or MODEL+ADAPTER.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The file, FILE.safetensors.")],
    data: task_flags.Data = None,
    subset: task_flags.Subset = None,
    split: task_flags.Split = None,
    text: task_flags.Text = None,
    pair: task_flags.Pair = None,
    label: task_flags.Label = None,
    target: task_flags.Target = None,
    image: task_flags.Image = None,
    examples: task_flags.Examples = None,
    batch_size: task_flags.BatchSize = None,
    max_length: task_flags.MaxLength = None,
    head: task_flags.HeadFile = None,
    pooling: task_flags.Pooling = None,
    loader: task_flags.Loader = None,
    seed: task_flags.DataSeed = None,
    labels: Annotated[
        str, typer.Option(help="fisher: over which answers: exact, sampled, empirical (the data's), or auto.")
    ] = "auto",
    device: common.Device = "cpu",
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of the arithmetic; all cores by default.")] = None,
    memory: common.Memory = "4GiB",
    only_plan: Annotated[bool, typer.Option("--plan", help="Say what it takes, and stop.")] = False,
    overwrite: common.Overwrite = False,
    quiet: common.Quiet = False,
    json: common.Json = False,
) -> None:
    """Pass data through a model and write its Fisher information, or the Gram matrices of its linear maps.

    Interrupted or killed, the same command goes on where it was. --memory bounds the sums of one pass: a model whose
    sums are larger is passed through several times, a group of tensors at a time.
    """
    with exit_codes():
        output = absolute(output)
    with exit_codes(kept=output.parent / f"{output.name}.partial"):
        from superpose import api

        task = task_flags.task_from(
            data, subset=subset, split=split, text=text, pair=pair, label=label, target=target, image=image,
            examples=examples, batch_size=batch_size, max_length=max_length, head=head, pooling=pooling, loader=loader,
            seed=seed,
        )  # fmt: skip

        def begin(request: Request) -> None:
            if not quiet or only_plan:
                for line in _lines(request):
                    typer.echo(line, err=not only_plan)

        request = api.compute_statistics(
            kind, model, task, output, labels=labels, device=device, threads=threads, memory=memory,
            overwrite=overwrite, only_plan=only_plan, begin=begin, report=_ignore if quiet else _progress(),
        )  # fmt: skip
        if json:
            typer.echo(dumps({"file": str(output), "memory": request.memory, **request.metadata}, indent=2))
        elif not only_plan:
            told = request.metadata
            typer.echo(
                f"{output}: {kind} of {len(request.statistic.shapes())} tensors from {told['examples']} examples,"
                f" {told['tokens']} tokens; {size(output.stat().st_size)}"
            )


def _lines(request: Request) -> list[str]:
    memory = request.memory
    labels = f", labels {request.metadata['labels']}" if "labels" in request.metadata else ""
    passes = len(request.groups)
    return [
        f"{request.metadata['examples']} of {request.metadata['data']['rows']} rows,"
        f" {request.metadata['tokens']} tokens, in {len(request.batches)} batches, {passes} pass(es){labels}",
        f"memory: model {size(memory['model'])}, sums of a pass {size(memory['statistics'])},"
        f" activations of the longest batch about {size(memory['activations'])}",
    ]


def _ignore(advance: Advance) -> None:
    del advance


def _progress() -> Callable[[Advance], None]:
    """Return what shows how far the passes have come: a bar's line in a terminal, plain lines elsewhere."""
    last = {"time": time.monotonic()}
    live = sys.stderr.isatty()

    def show(advance: Advance) -> None:
        now = time.monotonic()
        if now - last["time"] < (0.2 if live else SECONDS_BETWEEN_LINES):
            return
        last["time"] = now
        text = f"pass {advance.group}/{advance.groups}: {advance.done}/{advance.total} batches"
        print(f"\r{text}" if live else text, end="" if live else "\n", file=sys.stderr, flush=True)

    return show
