"""`superpose evaluate`: models in, numbers out, a row for each."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from superpose.cli import common, task_flags
from superpose.cli.common import exit_codes, print_table, split_arguments
from superpose.errors import SuperposeError
from superpose.options import option_specs

if TYPE_CHECKING:
    from superpose.evaluators import Evaluation, Evaluator, Report
    from superpose.task_data import TaskData

MOST_COLUMNS = 6
"""Metrics that a table has columns for; of more, each has a row."""
SECONDS_BETWEEN_LINES = 10.0


def evaluate(
    models: Annotated[
        list[str] | None,
        typer.Argument(metavar="MODEL...", help="Folders, hub ids org/name[@revision], or MODEL+ADAPTER."),
    ] = None,
    evaluator: Annotated[
        str | None, typer.Option("--with", "-w", help="Evaluator; its options follow as --OPTION VALUE.")
    ] = None,
    listed: Annotated[
        bool, typer.Option("--list", help="List the evaluators; with --with, describe that one.")
    ] = False,
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
    device: common.Device = "cpu",
    quiet: common.Quiet = False,
    json: common.Json = False,
) -> None:
    """Measure models: accuracy, perplexity, multiple choice, generated text, the harness's tasks, your own program.

    {model} in --head stands for the model's path: --head '{model}/../head.safetensors'.
    """
    with exit_codes():
        from superpose.evaluators import find_evaluator, registered_evaluators

        if listed or (evaluator is None and not models):
            _describe(find_evaluator(evaluator, where="--with")) if evaluator else _list(registered_evaluators(), json)
            return
        names = [one.name for one in registered_evaluators()]
        if evaluator is None:
            mend = f"choose one: --with {' | '.join(names)}"
            raise SuperposeError("no evaluator is named", where="command line", mend=mend)
        by = find_evaluator(evaluator, where="--with")
        flags = task_flags.said(
            data=data, subset=subset, split=split, text=text, pair=pair, label=label, target=target, image=image,
            examples=examples, batch_size=batch_size, max_length=max_length, head=head, pooling=pooling,
            loader=loader, seed=seed,
        )  # fmt: skip
        switches = {spec.name for spec in option_specs(by.options) if spec.type is bool}
        paths, options = split_arguments(models or [], switches)
        if not paths:
            mend = f"superpose evaluate MODEL --with {by.name}"
            raise SuperposeError("no model is named", where="command line", mend=mend)
        task, options = _task(by, flags, options)
        _run(paths, by, task, options, device, quiet, json)


def _task(by: Evaluator, flags: dict[str, Any], options: dict[str, Any]) -> tuple[TaskData | None, dict[str, Any]]:
    """Return the task that the flags describe, or the options that an evaluator without data has by their names."""
    if by.reads_data:
        return task_flags.task_from(flags.pop("data", None), **flags), options
    own = {spec.name for spec in option_specs(by.options)}
    for name in flags:
        if name not in own:
            flag = f"--{name.replace('_', '-')}"
            mend = f"leave {flag} out"
            raise SuperposeError(f"{by.name} does not read {flag}", where="command line", mend=mend)
    return None, {**options, **flags}


def _run(
    paths: Sequence[str], by: Evaluator, task: TaskData | None, options: dict[str, Any], device: str, quiet: bool,
    json: bool,
) -> None:  # fmt: skip
    from superpose import api

    found: list[Evaluation] = []
    try:
        for path in paths:
            with _progress(path, quiet) as report:
                found.append(api.evaluate(path, by.name, data=task, device=device, report=report, **options))
    finally:
        # What was measured before a model that cannot be is shown too.
        if json and found:
            typer.echo(dumps([asdict(one) for one in found], indent=2))
        elif found:
            _print(found)


def _print(found: Sequence[Evaluation]) -> None:
    ways = {name: way for one in found for name, way in one.better.items()}
    cells = [[_number(one.metrics.get(name)) for name in ways] for one in found]
    if len(ways) <= MOST_COLUMNS:
        columns = [f"{name}\n({way} is better)" for name, way in ways.items()]
        rows = [(one.model, *line) for one, line in zip(found, cells, strict=True)]
        print_table(["model", *columns], rows, right=columns)
    else:
        rows = [(name, way, *line) for (name, way), line in zip(ways.items(), zip(*cells, strict=True), strict=True)]
        print_table(["metric", "better", *(one.model for one in found)], rows, right=[one.model for one in found])
    facts = found[0].facts
    if "rows" in facts:
        share = "" if facts["rows"] == facts["rows_in_data"] else f" of {facts['rows_in_data']}"
        typer.echo(f"\n{found[0].evaluator}: {facts['rows']}{share} rows of {facts['data']['data']}")


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if abs(value) < 1000 else f"{value:.6g}"


def _list(evaluators: Sequence[Evaluator], json: bool) -> None:
    if json:
        typer.echo(dumps([{"name": one.name, "summary": one.summary, "better": one.better} for one in evaluators]))
    else:
        print_table(["evaluator", "what it measures"], [(one.name, one.summary) for one in evaluators])
        typer.echo("\nsuperpose evaluate --list --with NAME describes one: what it reads, and its options.")


def _describe(by: Evaluator) -> None:
    typer.echo(f"{by.name}\n\n{by.description}\n")
    if by.reads_data:
        flags = [f"--{name}{' (needed)' if name in by.needs else ''}" for name in by.reads]
        defaults = "".join(f"; --{name.replace('_', '-')} is {value}" for name, value in by.data_defaults.items())
        typer.echo(f"reads: --data, {', '.join(flags)}{defaults}")
    specs = option_specs(by.options)
    rows = [(f"--{spec.name.replace('_', '-')}", spec.default, spec.allowed, spec.help) for spec in specs]
    if rows:
        print_table(["option", "default", "allowed", "meaning"], rows)


@contextlib.contextmanager
def _progress(model: str, quiet: bool) -> Iterator[Report]:
    """Yield a function that shows on stderr how much is done: a bar in a terminal, plain lines elsewhere."""
    from superpose.evaluators import silent

    if quiet:
        yield silent
    elif sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import Progress

        with Progress(console=Console(stderr=True), transient=True) as bar:
            line = bar.add_task(Path(model).name, total=None)
            yield lambda done, total: bar.update(line, completed=done, total=total)
    else:
        last = time.monotonic()

        def show(done: int, total: int) -> None:
            nonlocal last
            if time.monotonic() - last > SECONDS_BETWEEN_LINES:
                last = time.monotonic()
                print(f"evaluate {model}: {done}/{total}", file=sys.stderr, flush=True)

        yield show
