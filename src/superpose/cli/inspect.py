"""`superpose inspect`: what a checkpoint holds."""

from __future__ import annotations

import re
from collections import Counter
from json import dumps
from typing import TYPE_CHECKING, Annotated, Any

import typer

from superpose.cli import common
from superpose.cli.common import exit_codes, print_table, size
from superpose.errors import raise_all

if TYPE_CHECKING:
    from superpose.api import Inspection


def inspect(
    path: Annotated[str, typer.Argument(help="Folder, weight file, or hub id org/name[@revision].")],
    every: Annotated[bool, typer.Option("--every", help="A line per tensor, layers not drawn together.")] = False,
    json: common.Json = False,
) -> None:
    """Show a checkpoint's tensors: kinds, dtypes, shapes, sizes, shards. No tensor is read."""
    with exit_codes():
        from superpose import api

        found = api.inspect(path)
        if json:
            typer.echo(dumps(_as_json(found), indent=2))
        else:
            _print(found, every)
        raise_all(found.checkpoint.problems)


def _print(found: Inspection, every: bool) -> None:
    rows: Counter[tuple] = Counter()
    sizes: Counter[tuple] = Counter()
    for name, header in found.checkpoint.tensors.items():
        kind, known_by = found.kinds[name]
        shown = name if every else re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
        row = (shown, str(kind), known_by, "x".join(map(str, header.shape)) or "scalar", header.dtype)
        rows[row] += 1
        sizes[row] += header.nbytes
    print_table(
        ["tensor", "number", "kind", "known by", "shape", "dtype", "size"],
        [(row[0], count, *row[1:], size(sizes[row])) for row, count in rows.items()],
        right=["number", "size"],
    )
    for alias, owner in sorted(found.tied.items()):
        typer.echo(f"tied: {alias} is {owner}")
    headers = found.checkpoint.tensors.values()
    typer.echo(
        f"{len(headers)} tensors, {sum(header.numel for header in headers) / 1e6:.1f}M entries,"
        f" {size(sum(header.nbytes for header in headers))} in {len(found.checkpoint.files)} file(s)"
    )


def _as_json(found: Inspection) -> dict[str, Any]:
    return {
        "path": found.checkpoint.name,
        "revision": found.checkpoint.revision,
        "files": [str(file) for file in found.checkpoint.files],
        "tied": dict(found.tied),
        "problems": [str(problem) for problem in found.checkpoint.problems],
        "tensors": [
            {
                "name": name,
                "kind": str(found.kinds[name][0]),
                "kind_from": found.kinds[name][1],
                "dtype": header.dtype,
                "shape": list(header.shape),
                "bytes": header.nbytes,
                "file": header.file.name,
            }
            for name, header in sorted(found.checkpoint.tensors.items())
        ],
    }
