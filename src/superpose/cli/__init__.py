"""The command line: one file per verb. Nothing here imports torch before a command runs."""

from __future__ import annotations

import gc
import signal
from typing import Annotated

import typer

from superpose.allocator import keep_freed_memory
from superpose.cli import compare, demo, evaluate, extract, inspect, merge, methods, plan, rebuild, statistics, verify
from superpose.cli.common import INTERRUPTED, TERMINATED, leave_when_swallowed

app = typer.Typer(
    name="superpose",
    help="Merge fine-tuned neural networks: one base, several fine-tunes, one model that keeps what each could do.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

# A method's or an evaluator's options are not known here: they pass through, and are checked against it.
_PASS_THROUGH = {"allow_extra_args": True, "ignore_unknown_options": True}

app.command("merge", context_settings=_PASS_THROUGH)(merge.merge)
app.command("plan", context_settings=_PASS_THROUGH)(plan.plan)
app.command("methods")(methods.methods)
app.command("inspect")(inspect.inspect)
app.command("compare")(compare.compare)
app.command("extract")(extract.extract)
app.command("rebuild")(rebuild.rebuild)
app.command("verify")(verify.verify)
app.command("evaluate", context_settings=_PASS_THROUGH)(evaluate.evaluate)
app.command("statistics")(statistics.statistics)
app.command("demo")(demo.demo)


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"superpose {version('superpose')}")
        raise typer.Exit()


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and stop.", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    del version  # its callback has done it
    # Imports make a million objects that stay: looking through them for garbage every 700 costs half a second.
    gc.set_threshold(100_000)
    keep_freed_memory()


def main() -> None:
    """Run the command line."""
    leave_when_swallowed()
    try:
        app()
    except SystemExit as ended:
        if ended.code in (INTERRUPTED, TERMINATED):
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C once more, while the process ends: without a word
        raise
