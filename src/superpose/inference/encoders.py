"""Rows to examples: texts by the model's tokenizer, images by its image processor, labels by their number or name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from superpose.errors import SuperposeError, nearest
from superpose.inference.examples import IGNORED, Example
from superpose.inference.library import quietly
from superpose.inference.rows import Row
from superpose.task_data import TaskData

Encoder = Callable[[Row], Example]


def class_encoder(library: Any, folder: Path, task: TaskData, classes: Sequence[str], count: int) -> Encoder:
    """Return what makes examples of a classifier: a text (or two), or an image, and a class if the data has one."""
    read = _image_reader(library, folder, task) if task.image else _text_reader(library, folder, task)

    def encode(row: Row) -> Example:
        inputs, tokens = read(row)
        target = torch.tensor([class_of(row, task.label, classes, count)]) if task.label else None
        return Example(inputs, target, tokens)

    return encode


def causal_encoder(tokenizer: Any, task: TaskData) -> Encoder:
    """Return what makes examples of a language model: a text, or a prompt and the text that is to follow it."""

    def encode(row: Row) -> Example:
        ids = tokenizer(row.text(task.text))["input_ids"]
        known = 0
        if task.target:
            wanted = tokenizer(row.text(task.target), add_special_tokens=False)["input_ids"]
            wanted += [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
            wanted = wanted[: task.max_length - 1]
            ids = ids[: task.max_length - len(wanted)]  # the prompt gives way
            known = len(ids)
            ids = ids + wanted
        ids = ids[: task.max_length]
        if not ids:
            raise SuperposeError("the text has no tokens", where=row.where, mend="leave the row out")
        # Position p answers which token comes at p + 1; the last has no answer, a prompt's are not asked for.
        target = [IGNORED if place + 1 < known else token for place, token in enumerate(ids[1:])] + [IGNORED]
        inputs = torch.tensor(ids)
        return Example({"input_ids": inputs, "attention_mask": torch.ones_like(inputs)}, torch.tensor(target), len(ids))

    return encode


def seq2seq_encoder(tokenizer: Any, folder: Path, task: TaskData, module: Any) -> Encoder:
    """Return what makes examples of an encoder-decoder: a text and the text to be written from it."""
    if not task.target:
        mend = "name the column with the text to be written: --target"
        raise SuperposeError("an encoder-decoder reads two texts", where=str(folder), mend=mend)

    def encode(row: Row) -> Example:
        read = tokenizer(row.text(task.text), truncation=True, max_length=task.max_length)["input_ids"]
        wanted = tokenizer(text_target=row.text(task.target), truncation=True, max_length=task.max_length)["input_ids"]
        if not read or not wanted:
            raise SuperposeError("a text has no tokens", where=row.where, mend="leave the row out")
        target, inputs = torch.tensor(wanted), torch.tensor(read)
        shifted = decoder_inputs(module, target)
        taken = {"input_ids": inputs, "attention_mask": torch.ones_like(inputs), "decoder_input_ids": shifted}
        return Example(taken, target, len(read) + len(wanted))

    return encode


def decoder_inputs(module: Any, wanted: Int[Tensor, " positions"]) -> Int[Tensor, " positions"]:
    """Return what a decoder reads when it is to write `wanted`: a start token, and all but the last of it."""
    prepare = getattr(module, "prepare_decoder_input_ids_from_labels", None)
    if prepare is not None:  # not every class of transformers has it; some begin in their own way
        return prepare(wanted[None])[0]
    return torch.cat([wanted.new_tensor([module.config.decoder_start_token_id]), wanted[:-1]])


def class_of(row: Row, column: str, classes: Sequence[str], count: int) -> int:
    """Return the number of a row's class.

    Args:
        row: the row.
        column: that holds the class, by number or name.
        classes: names, as far as the model has any.
        count: number of classes; 0 where anything goes.

    Returns:
        The number.

    Raises:
        SuperposeError: the model has no such class.
    """
    value = row.values[column]
    if isinstance(value, str) and value in classes:
        return classes.index(value)
    try:
        number = int(value) if not isinstance(value, (bool, float)) or float(value).is_integer() else -1
    except (TypeError, ValueError):
        number = -1
    if number >= 0 and (not count or number < count):
        return number
    known = f"the model has {count} classes: " + (", ".join(classes[:20]) if classes else f"0 to {count - 1}")
    mend = nearest(str(value), classes) if classes else "number the classes from 0, or name them in the head's file"
    what = f"label {value!r} in column '{column}' is no class; {known}"
    raise SuperposeError(what, where=row.where, mend=mend)


def _text_reader(library: Any, folder: Path, task: TaskData) -> Callable[[Row], tuple[dict[str, Tensor], int]]:
    tokenizer = read_tokenizer(library, folder)

    def read(row: Row) -> tuple[dict[str, Tensor], int]:
        pair = row.text(task.pair) if task.pair else None
        taken = tokenizer(row.text(task.text), pair, truncation=True, max_length=task.max_length)
        inputs = {name: torch.tensor(taken[name]) for name in tokenizer.model_input_names if name in taken}
        if not len(inputs["input_ids"]):
            raise SuperposeError("the text has no tokens", where=row.where, mend="leave the row out")
        return inputs, len(inputs["input_ids"])

    return read


def _image_reader(library: Any, folder: Path, task: TaskData) -> Callable[[Row], tuple[dict[str, Tensor], int]]:
    try:
        from PIL import Image
    except ImportError as error:
        mend = "pip install 'superpose[eval]'"
        raise SuperposeError(
            "images are read by Pillow, which is not installed", where=str(folder), mend=mend
        ) from error
    try:
        with quietly():
            processor = library.AutoImageProcessor.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False, use_fast=False
            )
    except Exception as error:  # the library fails in many ways; its text says how
        what = f"no image processor: {str(error).strip().partition(chr(10))[0]}"
        raise SuperposeError(what, where=str(folder), mend="copy preprocessor_config.json into the folder") from error
    home = Path(task.data).expanduser().resolve().parent

    def read(row: Row) -> tuple[dict[str, Tensor], int]:
        image = row.values[task.image]
        if isinstance(image, str):
            place = (home / image).resolve()
            if home not in place.parents:
                mend = f"name images under {home}"
                raise SuperposeError(f"image {image!r} leads out of the data's folder", where=row.where, mend=mend)
            try:
                with Image.open(place) as opened:
                    image = opened.convert("RGB")
            except (OSError, ValueError, Image.DecompressionBombError) as error:
                mend = "mend the file, or leave the row out"
                raise SuperposeError(f"no readable image: {error}", where=f"{row.where}, {place}", mend=mend) from error
        pixels = processor(images=image.convert("RGB"), return_tensors="pt")["pixel_values"][0]
        return {"pixel_values": pixels}, 1

    return read


def read_tokenizer(library: Any, folder: Path) -> Any:
    """Return a folder's tokenizer.

    Args:
        library: transformers.
        folder: of the model.

    Returns:
        The tokenizer.

    Raises:
        SuperposeError: the folder has none that can be read.
    """
    try:
        return library.AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the library fails in many ways; its text says how
        what = f"no tokenizer: {str(error).strip().partition(chr(10))[0]}"
        raise SuperposeError(what, where=str(folder), mend="copy the tokenizer's files into the folder") from error
