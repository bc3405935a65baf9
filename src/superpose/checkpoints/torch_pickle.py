"""PyTorch's own files (.bin, .pt, .pth): read with `weights_only`, so that no pickle is executed.

What a file would make of memory and time is checked beforehand, in torch_zip.py and pickles.py.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from superpose.checkpoints.headers import DTYPE_NAMES, MOST_TENSORS, FileHeaders, TensorHeader, name_problem
from superpose.checkpoints.torch_zip import SUFFIXES, check_zip
from superpose.errors import SuperposeError

MOST_REPEATED = 2**24
"""Bytes that a tensor may have beyond what the file holds of it, by repeating entries."""
MOST_VIEWS = 16
"""How often the file's bytes may be declared by all tensors together; those of one block of memory overlap."""
FETCH_AGAIN = "fetch or save the file again; files of PyTorch before 1.6 must be saved anew by a newer one"


class TorchPickleReader:
    """An open file; its tensors are views of the mapped file."""

    def __init__(self, file: Path) -> None:
        self._tensors = _state_dict(_load(file))

    def read(self, name: str) -> Tensor:
        """Return a tensor as a view of the file, contiguous."""
        return self._tensors[name].detach().contiguous()


class TorchPickleFormat:
    """The zip files that `torch.save` writes, holding tensors alone."""

    suffixes = SUFFIXES

    def open(self, file: Path) -> TorchPickleReader:
        """Open a file whose headers were found sound."""
        return TorchPickleReader(file)

    def headers(self, file: Path) -> FileHeaders:
        """Return what a file declares; no tensor data is read, and nothing in it is executed."""
        try:
            tensors = _state_dict(_load(file))
        except SuperposeError as problem:
            return FileHeaders({}, {}, (problem,))
        headers: dict[str, TensorHeader] = {}
        aliases: dict[str, str] = {}
        problems: list[SuperposeError] = []
        seen: dict[tuple, str] = {}
        if not tensors:
            what, mend = "no tensors by name in the file", "save a state dict: torch.save(model.state_dict(), ...)"
            problems.append(SuperposeError(what, where=str(file), mend=mend))
        if len(tensors) > MOST_TENSORS:
            what = f"{len(tensors)} tensors in one file, more than {MOST_TENSORS}"
            return FileHeaders({}, {}, (SuperposeError(what, where=str(file), mend="do not use this file"),))
        declared = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values() if not tensor.is_meta)
        if declared > MOST_VIEWS * file.stat().st_size + MOST_REPEATED:
            what = f"its tensors repeat their entries: they declare {declared} bytes, more than the file holds"
            problem = SuperposeError(what, where=str(file), mend="save them with .contiguous()")
            return FileHeaders({}, {}, (problem,))
        for name, tensor in tensors.items():
            if said := name_problem(name):
                problems.append(SuperposeError(said, where=str(file), mend="rename the tensor"))
                continue
            if name == "__metadata__" or tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
                what = f"tensor {name} is nothing that safetensors can hold"
                mend = "save it as a plain tensor under another name, or leave it out"
                problems.append(SuperposeError(what, where=str(file), mend=mend))
                continue
            if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes() + MOST_REPEATED:
                what = f"tensor {name} repeats its entries: it declares more than the file holds"
                mend = "save it with .contiguous()"
                problems.append(SuperposeError(what, where=str(file), mend=mend))
                continue
            place = (
                tensor.untyped_storage().data_ptr(),
                tensor.storage_offset(),
                tensor.shape,
                tensor.stride(),
            )
            if tensor.numel() and place in seen:
                aliases[name] = seen[place]
                continue
            seen[place] = name
            if tensor.dtype not in DTYPE_NAMES:
                what = f"tensor {name} has the dtype {tensor.dtype}, which safetensors cannot hold"
                problems.append(SuperposeError(what, where=str(file), mend="convert the tensor before merging"))
                continue
            headers[name] = TensorHeader(name, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), file)
        return FileHeaders(headers, aliases, tuple(problems))


FORMAT = TorchPickleFormat()


def _load(file: Path) -> Any:
    """Return what the file holds, mapped into memory.

    Args:
        file: the file.

    Returns:
        The unpickled object: tensors, and containers of them.

    Raises:
        SuperposeError: it is damaged, or holds objects that would have to be executed.
    """
    try:
        check_zip(file)
    except ValueError as error:
        raise SuperposeError(
            f"cannot be read as a file of torch.save: {error}", where=str(file), mend=FETCH_AGAIN
        ) from error
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a pickle is a program: a damaged one fails in any way that a program can
        unsafe = _names_of_globals(file)
        if isinstance(error, pickle.UnpicklingError) and unsafe:
            raise SuperposeError(
                f"refused: the file holds more than tensors ({unsafe})",
                where=str(file),
                mend="convert it to safetensors on a machine where you trust it; superpose executes no pickle",
            ) from error
        raise SuperposeError(
            f"cannot be read as a file of torch.save: {_first_line(error)}",
            where=str(file),
            mend=FETCH_AGAIN,
        ) from error


def _state_dict(loaded: Any) -> dict[str, Tensor]:
    """Return the tensors by name, from a state dict or a mapping that holds one."""
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
            break
    if not isinstance(loaded, Mapping):
        return {}
    # What is no text names no tensor of a model, and may be beyond writing out.
    return {name: value for name, value in loaded.items() if isinstance(value, Tensor) and isinstance(name, str)}


def _names_of_globals(file: Path) -> str:
    try:
        return ", ".join(torch.serialization.get_unsafe_globals_in_checkpoint(str(file)))
    except Exception:  # the file is worse than unsafe: unreadable, which the caller says
        return ""


def _first_line(error: Exception) -> str:
    """Return what a library says, in one line and without its advice to trust the file."""
    line = str(error).strip().partition("\n")[0][:200]
    return type(error).__name__ if not line or "weights_only" in line else line
