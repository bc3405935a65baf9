"""`superpose inspect`: what a checkpoint or an adapter holds."""

from __future__ import annotations

import re
from collections import Counter
from json import dumps
from typing import TYPE_CHECKING, Annotated, Any

import typer

from superpose.cli import common
from superpose.cli.common import exit_codes, print_table, size
from superpose.errors import printable, raise_all

if TYPE_CHECKING:
    from superpose.api import Inspection
    from superpose.checkpoints.lora import Adapter


def inspect(
    path: Annotated[str, typer.Argument(help="Folder, weight file, or hub id org/name[@revision].")],
    every: Annotated[bool, typer.Option("--every", help="A line per tensor, layers not drawn together.")] = False,
    json: common.Json = False,
) -> None:
    """Show a checkpoint's tensors: kinds, dtypes, shapes, sizes, shards; an adapter's ranks and scales.

    No tensor is read.
    """
    with exit_codes():
        from superpose import api

        found = api.inspect(path)
        adapter = None if isinstance(found, api.Inspection) else found
        if adapter is not None:
            typer.echo(dumps(_adapter_as_json(adapter), indent=2)) if json else _print_adapter(adapter, every)
            raise_all(adapter.problems)
        elif isinstance(found, api.Inspection):
            typer.echo(dumps(_as_json(found), indent=2)) if json else _print(found, every)
            raise_all(found.checkpoint.problems)


def _print_adapter(adapter: Adapter, every: bool) -> None:
    rows: Counter[tuple] = Counter()
    for path, module in adapter.modules.items():
        shown = path if every else _drawn_together(path)
        out, in_ = module.size
        kind = "DoRA" if module.magnitude is not None else "LoRA"
        rows[shown, kind, f"{out}x{in_}", module.up.shape[1], f"{module.scale:g}", module.down.dtype] += 1
    for name, header in adapter.full.items():
        shown = name if every else _drawn_together(name)
        rows[shown, "whole", "x".join(map(str, header.shape)) or "scalar", "", "", header.dtype] += 1
    print_table(
        ["module", "number", "holds", "shape", "rank", "scale", "dtype"],
        [(row[0], count, *row[1:]) for row, count in rows.items()],
        right=["number", "rank", "scale"],
    )
    nbytes = sum(file.stat().st_size for file in adapter.files)
    typer.echo(
        f"an adapter of {printable(adapter.base) or 'a base that it does not name'}: {len(adapter.modules)} updates,"
        f" {len(adapter.full)} whole tensors, {size(nbytes)}"
    )


def _adapter_as_json(adapter: Adapter) -> dict[str, Any]:
    return {
        "path": adapter.name,
        "revision": adapter.revision,
        "base": adapter.base,
        "files": [str(file) for file in adapter.files],
        "problems": [str(problem) for problem in adapter.problems],
        "modules": [
            {
                "path": path,
                "rank": module.up.shape[1],
                "scale": module.scale,
                "shape": list(module.size),
                "dtype": module.down.dtype,
                "dora": module.magnitude is not None,
            }
            for path, module in sorted(adapter.modules.items())
        ],
        "whole": [{"name": name, "shape": list(header.shape)} for name, header in sorted(adapter.full.items())],
    }


def _drawn_together(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def _print(found: Inspection, every: bool) -> None:
    rows: Counter[tuple] = Counter()
    sizes: Counter[tuple] = Counter()
    for name, header in found.checkpoint.tensors.items():
        kind, known_by = found.kinds[name]
        shown = name if every else _drawn_together(name)
        row = (shown, str(kind), known_by, "x".join(map(str, header.shape)) or "scalar", header.dtype)
        rows[row] += 1
        sizes[row] += header.nbytes
    print_table(
        ["tensor", "number", "kind", "known by", "shape", "dtype", "size"],
        [(row[0], count, *row[1:], size(sizes[row])) for row, count in rows.items()],
        right=["number", "size"],
    )
    for alias, owner in sorted(found.tied.items()):
        typer.echo(printable(f"tied: {alias} is {owner}"))
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
