"""A task: which data a model reads for it, which columns, and what answers with the model's output."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from superpose.errors import SuperposeError, nearest, raise_all


def _text(value: object) -> object:
    return str(value) if isinstance(value, Path) else value


class TaskData(BaseModel):
    """Data of one task, and how a model reads it.

    Args:
        data: a JSON Lines file (.jsonl), a table with a header (.csv, .tsv), a folder of a Hugging Face dataset, or the
            name of one on the hub.
        subset: configuration of a Hugging Face dataset.
        split: of a Hugging Face dataset; what is recorded as seen.
        text: column with the text; the prompt where `target` is given.
        pair: column with a second text.
        label: column with the class, as its number or its name.
        target: column with the text to be written after (or from) the first.
        image: column with the path of an image, beside or under the data's folder.
        examples: how many rows, drawn at random with `seed`; all where not given.
        batch_size: examples at a time, of one length each, so that nothing is padded.
        max_length: tokens of a text that are read.
        seed: of the choice of rows, and of sampled labels.
        head: file of a linear layer (`weight`, `bias`) that turns the model's features into classes.
        pooling: features for `head`: the mean of the last hidden states, the first of them, or the model's own.
        loader: `module:function` or `file.py:function` that makes the model (see `superpose.inference.LiveModel`).
        model: folder of a model with the task's head, where it is not the fine-tune's own.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: Annotated[str, BeforeValidator(_text)]
    subset: str = ""
    split: str = ""
    text: str = "text"
    pair: str = ""
    label: str = ""
    target: str = ""
    image: str = ""
    examples: Annotated[int | None, Field(ge=1)] = None
    batch_size: Annotated[int, Field(ge=1)] = 16
    max_length: Annotated[int, Field(ge=1)] = 128
    seed: int = 0
    head: Annotated[str, BeforeValidator(_text)] = ""
    pooling: Literal["mean", "first", "pooler"] = "mean"
    loader: str = ""
    model: Annotated[str, BeforeValidator(_text)] = ""

    def columns(self) -> dict[str, str]:
        """Return the columns that are read: what for, and their names."""
        named = {"image": self.image} if self.image else {"text": self.text, "pair": self.pair, "target": self.target}
        return {use: name for use, name in {**named, "label": self.label}.items() if name}

    def hashes(self) -> dict[str, str]:
        """Return the sha256 of the files that the model is made with: of its head, of its loader's code."""
        named = {"head": self.head, "loader": self.loader.rpartition(":")[0]}
        files = {use: Path(name).expanduser() for use, name in named.items() if name}
        return {
            f"{use}_sha256": hashlib.sha256(file.read_bytes()).hexdigest()
            for use, file in files.items()
            if file.is_file()
        }

    def provenance(self) -> dict[str, Any]:
        """Return what a record says of it: all that is not at its default, and the path."""
        return self.model_dump(mode="json", exclude_defaults=True)


def make_task(given: Mapping[str, Any], *, where: str) -> TaskData:
    """Return a task of what a user gave.

    Args:
        given: fields of `TaskData`.
        where: who gave it, for errors.

    Returns:
        The task.

    Raises:
        SuperposeError: a field is missing, unknown, or holds what it cannot.
        Problems: several do.
    """
    problems = []
    try:
        return TaskData.model_validate(dict(given))
    except ValidationError as error:
        for found in error.errors():
            name = str(found["loc"][0]) if found["loc"] else "data"
            if found["type"] == "extra_forbidden":
                what, mend = f"a task's data has no '{name}'", nearest(name, TaskData.model_fields)
            elif found["type"] == "missing":
                what, mend = f"'{name}' is missing", "name the file or dataset"
            else:
                what = f"{name}={found['input']} is not allowed"
                mend = f"{found['msg'][:1].lower()}{found['msg'][1:]}"
            problems.append(SuperposeError(what, where=where, mend=mend))
    raise_all(problems)
    raise AssertionError("a validation error tells at least one problem")
