"""`superpose compare`: fine-tunes against each other, before merging."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from json import dumps
from typing import TYPE_CHECKING, Annotated

import typer

from superpose.cli import common
from superpose.cli.common import exit_codes, print_table

if TYPE_CHECKING:
    from superpose.comparison import Comparison, Group, Pair


def compare(
    base: Annotated[str, typer.Argument(help="Folder, weight file, or hub id org/name[@revision].")],
    tuned: Annotated[list[str], typer.Argument(metavar="TUNED...", help="The fine-tunes, in the same forms.")],
    quick: Annotated[bool, typer.Option("--quick", help="No spectra: norms, cosines and signs alone.")] = False,
    device: common.Device = "cpu",
    backend: common.BackendName = "threads",
    workers: common.Workers = None,
    memory: common.Memory = "4GiB",
    quiet: common.Quiet = False,
    json: common.Json = False,
) -> None:
    """Compare fine-tunes before merging: norms, cosines, sign conflicts, shared directions, STF's conditioning.

    One streaming pass over the models; task matrices are decomposed unless --quick.
    """
    with exit_codes():
        from superpose import api

        found = api.compare(
            base,
            tuned,
            spectra=not quick,
            device=device,
            backend=backend,
            workers=workers,
            memory=memory,
            report=(lambda done, total: None) if quiet else _lines(),
        )
        if json:
            typer.echo(dumps(asdict(found), indent=2))
        else:
            _print(found)


def _print(found: Comparison) -> None:
    whole = found.whole
    typer.echo("Task vectors\n")
    print_table(
        ["fine-tune", "norm", "same in bf16", "largest entry", "effective rank"],
        [(t.name, _number(t.norm), _share(t.lost_in_bfloat16), _number(t.largest), _share(t.effective_rank))
         for t in whole.tasks],
        right=["norm", "same in bf16", "largest entry", "effective rank"],
    )  # fmt: skip
    if whole.pairs:
        typer.echo("\nPairs\n")
        columns = ["cosine", "sign conflicts", "left overlap", "right overlap"]
        print_table(["pair", *columns], [(f"{p.first}, {p.second}", *_pair(p)) for p in whole.pairs], right=columns)
    typer.echo("\nLayer groups (norms in the order of the fine-tunes; cosine and conflicts: mean over pairs)\n")
    columns = ["tensors", "norms", "same in bf16", "effective rank", "cosine", "sign conflicts", "overlap l/r", "STF"]
    print_table(["group", "kind", *columns], [_group(group) for group in found.groups], right=columns)
    for note in found.notes:
        typer.echo(f"note: {note}")
    typer.echo(
        f"\n{whole.tensors} tensors, {whole.entries / 1e6:.1f}M entries compared, {found.left_out} left out. Effective"
        " rank: share of the smaller side.\nOverlap: of the 16 leading singular directions, in brackets what chance"
        " gives. STF: condition of its system over the 64\nstrongest features of each task, untrimmed: median and"
        " largest; the full system's is at least that."
    )
    typer.echo("\nSuggestions\n")
    for text in found.suggestions or ("nothing stands out",):
        typer.echo(f"- {text}")


def _pair(pair: Pair) -> tuple[str, ...]:
    return (
        f"{pair.cosine:.3f}",
        _share(pair.sign_conflicts),
        _overlap(pair.left_overlap, pair.left_chance),
        _overlap(pair.right_overlap, pair.right_chance),
    )


def _group(group: Group) -> tuple[str, ...]:
    pairs = group.pairs
    overlaps = "-"
    if pairs and pairs[0].left_overlap is not None:
        left, right = (_mean([getattr(p, f"{side}_overlap") for p in pairs]) for side in ("left", "right"))
        overlaps = f"{left:.2f} {right:.2f}"
    ranks = [task.effective_rank for task in group.tasks if task.effective_rank is not None]
    return (
        group.name,
        group.kind,
        str(group.tensors),
        " ".join(_number(task.norm) for task in group.tasks),
        _share(_mean([task.lost_in_bfloat16 for task in group.tasks])),
        _share(_mean(ranks)) if ranks else "-",
        f"{_mean([pair.cosine for pair in pairs]):.3f}" if pairs else "-",
        _share(_mean([pair.sign_conflicts for pair in pairs])) if pairs else "-",
        overlaps,
        "-" if group.condition is None else f"{group.condition:.3g} {group.worst_condition:.3g}",
    )


def _mean(numbers: list[float]) -> float:
    return sum(numbers) / max(len(numbers), 1)


def _number(value: float) -> str:
    return f"{value:.3g}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _overlap(value: float | None, chance: float | None) -> str:
    return "-" if value is None or chance is None else f"{value:.3f} ({chance:.3f})"


def _lines() -> Callable[[int, int], None]:
    last = time.monotonic()

    def show(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last > 10:
            last = time.monotonic()
            print(f"compare: {done}/{total} tensors", file=sys.stderr, flush=True)

    return show
