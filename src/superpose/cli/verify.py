"""`superpose verify`: a finished merge against its record, and tensors of it computed once more."""

from __future__ import annotations

from dataclasses import asdict
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from superpose.cli import common
from superpose.cli.common import BAD_INPUT, exit_codes, size
from superpose.cli.progress import bytes_done
from superpose.errors import printable

if TYPE_CHECKING:
    from superpose.verification import Verification


def verify(
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Folder that superpose merge wrote.")],
    recompute: Annotated[
        int, typer.Option(min=0, help="Tensors, drawn at random, to compute once more from the inputs.")
    ] = 0,
    seed: Annotated[int, typer.Option(help="Seed of the draw.")] = 0,
    device: Annotated[str | None, typer.Option(help="Where they are computed; where the merge was by default.")] = None,
    quiet: common.Quiet = False,
    json: common.Json = False,
) -> None:
    """Look at a finished merge again: structure, every tensor's checksum, files beside them, and the inputs.

    Exit code 0 when all of it is as run.json has it, 2 with a list of what is not.
    """
    with exit_codes():
        from superpose import api

        found = api.verify(output, recompute=recompute, seed=seed, device=device, report=bytes_done("verify", quiet))
        if json:
            problems = [{"what": p.what, "where": p.where, "mend": p.mend} for p in found.problems]
            typer.echo(dumps({**asdict(found), "problems": problems, "sound": found.is_sound}, indent=2))
        else:
            _show(found)
    if not found.is_sound:
        raise typer.Exit(BAD_INPUT)


def _show(found: Verification) -> None:
    for problem in found.problems:
        typer.echo(f"error: {problem}\n", err=True)
    for note in found.notes:
        typer.echo(f"note: {printable(note)}", err=True)
    typer.echo(
        f"{printable(found.output)}: {'sound' if found.is_sound else f'{len(found.problems)} problems'};"
        f" {found.tensors} tensors ({size(found.bytes)}), {found.files} files beside them and"
        f" {found.inputs} input files are as recorded; {len(found.recomputed)} tensors recomputed with the same bytes"
    )
