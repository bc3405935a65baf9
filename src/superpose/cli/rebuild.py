"""`superpose rebuild`: one task's model out of a set that EMR made."""

from __future__ import annotations

from json import dumps
from pathlib import Path
from typing import Annotated

import typer

from superpose.cli import common
from superpose.cli.common import exit_codes, size
from superpose.errors import printable
from superpose.places import absolute


def rebuild(
    location: Annotated[str, typer.Argument(metavar="SET", help="Output of superpose merge --method emr.")],
    task: Annotated[str, typer.Option("--task", "-t", help="Name of the task.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the task's model.")],
    base: Annotated[str | None, typer.Option(help="Where the base lies now; where it lay, if not given.")] = None,
    overwrite: common.Overwrite = False,
    json: common.Json = False,
) -> None:
    """Write the model of one task of a set: base + scale * mask o unified vector."""
    with exit_codes():
        output = absolute(output)
    with exit_codes():
        from superpose import api

        written = api.rebuild(location, task, output, base=base, overwrite=overwrite)
        nbytes = sum(header.nbytes for header in written)
        if json:
            typer.echo(dumps({"output": str(output), "task": task, "tensors": len(written), "bytes": nbytes}))
        else:
            typer.echo(f"{output}: the model of task {printable(task)}, {len(written)} tensors, {size(nbytes)}")
