"""`superpose methods`: what there is to merge with."""

from __future__ import annotations

from json import dumps
from typing import TYPE_CHECKING, Annotated, Any

import typer

from superpose.cli import common
from superpose.cli.common import exit_codes, print_table
from superpose.kinds import Kind
from superpose.options import option_specs

if TYPE_CHECKING:
    from superpose.registry import Method


def methods(
    name: Annotated[str | None, typer.Argument(help="One method: its formula, options and source.")] = None,
    json: common.Json = False,
) -> None:
    """List the merge methods, or describe one: formula, options with ranges and defaults, source, what it needs."""
    with exit_codes():
        from superpose import api
        from superpose.registry import find_method

        chosen = api.list_methods()
        if name is not None:
            chosen = [find_method(name, where="superpose methods")]
        if json:
            typer.echo(dumps([_as_json(method) for method in chosen], indent=2))
        elif name is None:
            rows = [(method.name, method.summary, _needs(method)) for method in chosen]
            print_table(["method", "what it does", "needs"], rows)
        else:
            _describe(chosen[0])


def _describe(method: Method) -> None:
    typer.echo(f"{method.name}\n\n{method.description}\n")
    specs = option_specs(method.options)
    if specs:
        rows = [(f"--{spec.name.replace('_', '-')}", spec.default, spec.allowed, spec.help) for spec in specs]
        print_table(["option", "default", "allowed", "meaning"], rows)
    else:
        typer.echo("It has no options.")
    weights = "taken into account" if "weights" in method.wants else "not used: leave them at 1"
    typer.echo(f"\nneeds: {_needs(method)}\nweights of models: {weights}")
    for law, breach in method.breaks.items():
        kinds = "" if breach.kinds == frozenset(Kind) else f" for {', '.join(sorted(map(str, breach.kinds)))}"
        typer.echo(f"breaks '{law}'{kinds}: {breach.why}")
    typer.echo(f"source: {method.source}")
    if " o " in method.description:
        typer.echo("(o is the entrywise product, tau_i = tuned_i - base)")


def _needs(method: Method) -> str:
    fewest, most = method.models
    tuned = (
        f"{fewest} to {most} fine-tunes" if most else "fine-tunes" if fewest == 1 else f"{fewest} fine-tunes or more"
    )
    passes = _passes(method)
    beforehand = {0: "", 1: "; one pass beforehand"}.get(passes, f"; {passes} passes beforehand")
    return ", ".join(["base", tuned, *sorted(method.needs)]) + beforehand


def _passes(method: Method) -> int:
    """Return the survey passes of the default options."""
    import torch

    return method.reads(method.options(), torch.float32)


def _as_json(method: Method) -> dict[str, Any]:
    options = [
        {
            "name": spec.name,
            "default": spec.default,
            "allowed": spec.allowed,
            "range": [spec.range.low, spec.range.high] if spec.range else None,
            "choices": list(spec.choices),
            "help": spec.help,
        }
        for spec in option_specs(method.options)
    ]
    return {
        "name": method.name,
        "summary": method.summary,
        "description": method.description,
        "source": method.source,
        "needs": sorted(method.needs),
        "acts_on": method.acts_on,
        "breaks": {law: breach.why for law, breach in method.breaks.items()},
        "options": options,
    }
