"""Flags that say which data a model reads for a task, the same for every verb that reads data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from superpose.errors import SuperposeError

if TYPE_CHECKING:
    from superpose.task_data import TaskData

Data = Annotated[
    str | None,
    typer.Option(help="A .jsonl, .csv or .tsv file, a folder of a Hugging Face dataset, or the name of one."),
]
Subset = Annotated[str | None, typer.Option(help="Configuration of a Hugging Face dataset.")]
Split = Annotated[str | None, typer.Option(help="Split of a Hugging Face dataset.")]
Text = Annotated[str | None, typer.Option(help="Column with the text, or the prompt (default text).")]
Pair = Annotated[str | None, typer.Option(help="Column with a second text.")]
Label = Annotated[str | None, typer.Option(help="Column with the class, as its number or its name.")]
Target = Annotated[str | None, typer.Option(help="Column with the text to be written after (or from) the first.")]
Image = Annotated[str | None, typer.Option(help="Column with the path of an image, relative to the data's folder.")]
Examples = Annotated[int | None, typer.Option(help="Rows, drawn at random with --seed; all where not given.")]
BatchSize = Annotated[int | None, typer.Option(help="Examples at a time.")]
MaxLength = Annotated[int | None, typer.Option(help="Tokens of a text that are read.")]
HeadFile = Annotated[
    str | None, typer.Option("--head", help="Linear layer (weight, bias) that makes classes of a body's features.")
]
Pooling = Annotated[
    str | None, typer.Option(help="Features for --head: mean (default) or first of the last states, or pooler.")
]
Loader = Annotated[
    str | None, typer.Option(help="module:function or file.py:function that makes the model; its code is run.")
]
DataSeed = Annotated[int | None, typer.Option("--seed", help="Seed of the choice of rows.")]


def task_from(data: str | None, **given: Any) -> TaskData:
    """Return the task that flags describe.

    Args:
        data: the data; an error where none is named.
        **given: the other fields of `TaskData`; None where a flag was not given.

    Returns:
        The task.

    Raises:
        SuperposeError: no data is named.
        Problems: several values are not allowed.
    """
    from superpose.task_data import make_task

    if data is None:
        mend = "name a .jsonl or .csv file, or a dataset: --data FILE"
        raise SuperposeError("no data is named", where="command line", mend=mend)
    return make_task(said(data=data, **given), where="command line")


def said(**given: Any) -> dict[str, Any]:
    """Return what flags say: those that were given."""
    return {name: value for name, value in given.items() if value is not None}
