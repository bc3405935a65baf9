"""Models in memory that read rows of real data: what statistics, learning and evaluation share.

    from superpose.inference import TaskData, encode_rows, batches, load_model
    live = load_model("model", task := TaskData(data="rows.jsonl", label="label"))
    examples, rows = encode_rows(live, task)
    for batch in batches(examples, 16):
        live.scores(batch)            # (examples, positions, classes)

Nothing is padded: a batch holds examples of one length. Padding therefore counts nowhere, whatever the model.
"""

from superpose.inference.encode import encode_rows
from superpose.inference.examples import IGNORED, Batch, Example, LiveModel, batches
from superpose.inference.load import find_function, load_model
from superpose.inference.rows import Row, Rows, read_rows
from superpose.task_data import TaskData

__all__ = [
    "IGNORED",
    "Batch",
    "Example",
    "LiveModel",
    "Row",
    "Rows",
    "TaskData",
    "batches",
    "encode_rows",
    "find_function",
    "load_model",
    "read_rows",
]
