"""Rows of data: JSON Lines, tables with a header, Hugging Face datasets; the columns that a task reads, checked."""

from __future__ import annotations

import csv
import hashlib
import json
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from superpose.errors import SuperposeError, nearest
from superpose.task_data import TaskData

TABLES = {".csv": ",", ".tsv": "\t"}
LINES = (".jsonl", ".ndjson")
SAVED = ("state.json", "dataset_dict.json")
"""Files by which a dataset written by `save_to_disk` is known."""


@dataclass(frozen=True)
class Row:
    """One row of data.

    Args:
        values: by column, those that the task reads.
        where: the file and the line, or the dataset and the row.
    """

    values: Mapping[str, Any]
    where: str

    def text(self, column: str) -> str:
        """Return a column's text; an error names the row where it holds something else."""
        value = self.values[column]
        if not isinstance(value, str):
            what = f"column '{column}' holds {type(value).__name__}, not a text"
            raise SuperposeError(what, where=self.where, mend="name a column of texts, or mend the row")
        return value


@dataclass(frozen=True)
class Rows:
    """The rows of a task that were chosen, in the order of the data.

    Args:
        rows: the rows.
        total: how many the data has.
        digest: sha256 of the columns that are read, over the rows chosen.
        folder: that the data lies in, if it is a file.
    """

    rows: Sequence[Row]
    total: int
    digest: str
    folder: Path | None


def read_rows(task: TaskData, columns: Sequence[str]) -> Rows:
    """Return the rows that a task reads.

    Args:
        task: names the data, and how many rows are drawn.
        columns: which of its columns are read.

    Returns:
        The rows, in the order of the data.

    Raises:
        SuperposeError: there is no such data, a row cannot be read, or a column is missing.
    """
    place = Path(task.data).expanduser()
    chosen: list[tuple[int, Row]] = []
    draw = random.Random(task.seed)
    total = 0
    for number, row in enumerate(_rows(task, place)):
        total += 1
        _check_columns(row, columns)
        if task.examples is None or len(chosen) < task.examples:
            chosen.append((number, row))
        elif (slot := draw.randrange(total)) < task.examples:  # every row is kept with the same chance
            chosen[slot] = (number, row)
    if not total:
        raise SuperposeError("the data holds no rows", where=task.data, mend="give data with at least one row")
    rows = [
        Row({column: row.values[column] for column in columns}, row.where) for _, row in sorted(chosen, key=_number)
    ]
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row.values, sort_keys=True, default=_stable).encode() + b"\n")
    return Rows(rows, total, digest.hexdigest(), place.parent if place.is_file() else None)


def _number(entry: tuple[int, Row]) -> int:
    return entry[0]


def _stable(value: Any) -> str:
    """Return a text for what JSON does not know, such as an image."""
    raw = value.tobytes() if hasattr(value, "tobytes") else repr(value).encode()
    return hashlib.sha256(raw).hexdigest()


def _check_columns(row: Row, columns: Sequence[str]) -> None:
    for column in columns:
        if row.values.get(column) is None:
            there = [name for name in row.values if name is not None]
            what = f"there is no column '{column}'" if column not in row.values else f"column '{column}' is empty"
            mend = nearest(column, there) if column not in row.values else "fill it, or leave the row out"
            raise SuperposeError(what, where=row.where, mend=mend)


def _rows(task: TaskData, place: Path) -> Iterator[Row]:
    if place.is_file() and place.suffix in LINES:
        return _json_lines(place)
    if place.is_file() and place.suffix in TABLES:
        return _table(place)
    if place.is_file():
        known = ", ".join([*LINES, *TABLES])
        raise SuperposeError(f"'{place.suffix}' is no format of data", where=task.data, mend=f"give one of {known}")
    return _dataset(task, place)


def _json_lines(file: Path) -> Iterator[Row]:
    with file.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            where = f"{file}, line {number}"
            try:
                values = json.loads(line)
            except (ValueError, RecursionError) as error:
                mend = "write one JSON object on each line"
                raise SuperposeError(f"no readable JSON: {error}", where=where, mend=mend) from error
            if not isinstance(values, dict):
                mend = 'write one JSON object on each line, such as {"text": "...", "label": 1}'
                raise SuperposeError("the line is no JSON object", where=where, mend=mend)
            yield Row(values, where)


def _table(file: Path) -> Iterator[Row]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream, delimiter=TABLES[file.suffix], strict=True)
            for values in reader:
                where = f"{file}, line {reader.line_num}"
                # A row that is too long has its rest under None, one that is too short has None for values.
                if None in values or any(value is None for value in values.values()):
                    what = f"the row has not the {len(reader.fieldnames or ())} fields of the header"
                    raise SuperposeError(what, where=where, mend="mend the row, or quote fields that hold separators")
                yield Row(values, where)
    except (UnicodeDecodeError, csv.Error) as error:
        mend = "save the table as UTF-8, fields with separators or line ends in double quotes"
        raise SuperposeError(f"the table cannot be read: {error}", where=str(file), mend=mend) from error


def _dataset(task: TaskData, place: Path) -> Iterator[Row]:
    if not place.is_dir() and not _looks_like_a_name(task.data):
        known = [entry.name for entry in place.parent.iterdir()] if place.parent.is_dir() else []
        raise SuperposeError(f"there is no data at '{task.data}'", where="data", mend=nearest(place.name, known))
    try:
        import datasets
    except ImportError as error:
        what = "Hugging Face datasets are read by the package datasets, which is not installed"
        mend = "pip install 'superpose[eval]', or give a .jsonl or .csv file"
        raise SuperposeError(what, where=task.data, mend=mend) from error
    found: Any  # a dataset or a mapping of splits to datasets
    try:
        if place.is_dir() and any((place / name).is_file() for name in SAVED):
            found = datasets.load_from_disk(str(place))
        else:
            found = datasets.load_dataset(str(place) if place.is_dir() else task.data, task.subset or None)
    except Exception as error:  # a library of many readers fails in many ways; its text says how
        what = f"the dataset cannot be read: {str(error).strip().partition(chr(10))[0]}"
        raise SuperposeError(what, where=task.data, mend="check the folder or name, and --subset") from error
    if hasattr(found, "keys"):
        splits = [str(split) for split in found]
        if not task.split and len(splits) > 1:
            what, mend = f"the dataset has {len(splits)} splits", f"choose one of {', '.join(splits)} by --split"
            raise SuperposeError(what, where=task.data, mend=mend)
        split = task.split or splits[0]
        if split not in splits:
            raise SuperposeError(f"there is no split '{split}'", where=task.data, mend=nearest(split, splits))
        found = found[split]
    return (Row(values, f"{task.data}, row {number}") for number, values in enumerate(found))


def _looks_like_a_name(text: str) -> bool:
    return text.count("/") <= 1 and not text.startswith((".", "/", "~")) and not Path(text).suffix
