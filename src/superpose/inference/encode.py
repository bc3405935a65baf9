"""The rows of a task as examples of a model."""

from __future__ import annotations

from superpose.errors import SuperposeError
from superpose.inference.examples import Example, LiveModel
from superpose.inference.rows import Rows, read_rows
from superpose.task_data import TaskData


def encode_rows(live: LiveModel, task: TaskData, *, labelled: bool = False) -> tuple[list[Example], Rows]:
    """Read a task's rows and make examples of them.

    Args:
        live: the model.
        task: the data and its columns.
        labelled: whether every row needs its answer.

    Returns:
        The examples, in the order of the rows, and the rows.

    Raises:
        SuperposeError: the data, a row or a label is not as it should be.
    """
    if labelled and live.answers == "classes" and not task.label:
        mend = "name the column that holds the class: --label"
        raise SuperposeError("answers are needed, and no column of labels is named", where=task.data, mend=mend)
    columns = task.columns()
    if live.answers == "tokens":
        columns.pop("label", None)
    rows = read_rows(task, list(columns.values()))
    return [live.encode(row) for row in rows.rows], rows
