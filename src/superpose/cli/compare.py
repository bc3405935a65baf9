"""`superpose compare`: fine-tunes against each other, before merging."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from json import dumps
from typing import TYPE_CHECKING, Annotated

import typer

from superpose.cli import common
from superpose.cli.common import exit_codes, print_table
from superpose.errors import printable

if TYPE_CHECKING:
    from superpose.comparison import Comparison, Group, Pair

MOST_PAIRS = 10


def compare(
    base: Annotated[str, typer.Argument(help="Folder, weight file, or hub id org/name[@revision].")],
    tuned: Annotated[list[str], typer.Argument(metavar="TUNED...", help="The fine-tunes, in the same forms.")],
    quick: Annotated[bool, typer.Option("--quick", help="No spectra: norms, cosines and signs alone.")] = False,
    device: common.Device = "cpu",
    backend: common.BackendName = "threads",
    ray_address: common.RayAddress = None,
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
            ray_address=ray_address,
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
    labels = {task.name: str(number) for number, task in enumerate(whole.tasks, 1)}
    typer.echo("Task vectors\n")
    rows = [
        (f"{labels[task.name]} {task.name}", _number(task.norm), _share(task.unchanged), _share(task.lost_in_bfloat16),
         _number(task.largest), _share(task.effective_rank))
        for task in whole.tasks
    ]  # fmt: skip
    columns = ["norm", "un-\nchanged", "same in\nbf16", "largest\nentry", "eff.\nrank"]
    print_table(["fine-tune", *columns], rows, right=columns)
    if whole.pairs:
        _print_pairs(whole.pairs, labels)
    typer.echo("\nLayer groups (norms: smallest to largest; the rest: means over fine-tunes or pairs)\n")
    columns = ["n", "norms", "same in\nbf16", "eff.\nrank", "cosine", "sign\nconfl.", "overlap\nleft right", "STF"]
    for kind in dict.fromkeys(group.kind for group in found.groups):
        groups = [group for group in found.groups if group.kind == kind]
        print_table([kind, *columns], [_group(group) for group in groups], right=columns)
        typer.echo("")
    for note in found.notes:
        typer.echo(f"note: {printable(note)}")
    typer.echo(f"{whole.tensors} tensors, {whole.entries / 1e6:.3g}M entries compared, {found.left_out} left out.")
    if whole.condition is not None:
        typer.echo(
            "Eff. rank: of the smaller side. Overlap: of up to 16 leading singular directions (an\n"
            "eighth of the smaller side at most), in brackets what chance gives. STF: condition of\n"
            "its system over the 64 strongest features of each untrimmed task matrix, median and\n"
            "largest; the full system's is at least that."
        )
    typer.echo("\nSuggestions\n")
    for text in found.suggestions or ("nothing stands out",):
        typer.echo(f"- {printable(text)}")


def _print_pairs(pairs: Sequence[Pair], labels: Mapping[str, str]) -> None:
    """Print all pairs, or of many the closest and the furthest."""
    ordered = sorted(pairs, key=lambda pair: -pair.cosine) if len(pairs) > MOST_PAIRS else list(pairs)
    half = MOST_PAIRS // 2
    shown = ordered if len(ordered) <= MOST_PAIRS else [*ordered[:half], *ordered[-half:]]
    more = f", the {half} closest and the {half} furthest of {len(pairs)}; --json has all" if shown != ordered else ""
    typer.echo(f"\nPairs{more}\n")
    columns = ["cosine", "sign\nconfl.", "left\noverlap", "right\noverlap"]
    rows = [(f"{labels[pair.first]}, {labels[pair.second]}", *_pair(pair)) for pair in shown]
    print_table(["pair", *columns], rows, right=columns)


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
    norms = sorted(task.norm for task in group.tasks)
    return (
        group.name,
        str(group.tensors),
        _number(norms[0]) if len(norms) == 1 else f"{_number(norms[0])} {_number(norms[-1])}",
        _share(_mean([task.lost_in_bfloat16 for task in group.tasks])),
        _share(_mean(ranks)) if ranks else "-",
        f"{_mean([pair.cosine for pair in pairs]):.3f}" if pairs else "-",
        _share(_mean([pair.sign_conflicts for pair in pairs])) if pairs else "-",
        overlaps,
        "-" if group.condition is None or not pairs else f"{group.condition:.3g} {group.worst_condition:.3g}",
    )


def _mean(numbers: list[float]) -> float:
    return sum(numbers) / max(len(numbers), 1)


def _number(value: float) -> str:
    return f"{value:.3g}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


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
