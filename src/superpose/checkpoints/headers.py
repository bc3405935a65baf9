"""What a weight file says about its tensors before any of them is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from superpose.errors import SuperposeError

# Names as in the safetensors format.
TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
"""Dtypes that are merged; tensors of others are copied from the base."""
MOST_TENSORS = 250_000
"""In one checkpoint: models of a trillion parameters have half of that; planning more would take minutes."""
LONGEST_NAME = 500
"""Characters; what a tensor is, is told by patterns that take long for names without end."""


def name_problem(name: str) -> str:
    """Return what is wrong with a tensor's name, "" if nothing is."""
    if len(name) > LONGEST_NAME:
        return f"tensor {name[:40]}... has a name of {len(name)} characters"
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return f"tensor {name!r} has a name that is no text"
    return ""


@dataclass(frozen=True)
class TensorHeader:
    """One tensor as its file declares it.

    Args:
        name: name in the file.
        dtype: name of the dtype as in safetensors, such as "BF16".
        shape: its dimensions.
        file: the file it lies in.
        offset: its first byte in the file; None where the format has no such place.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int | None = field(default=None, kw_only=True)

    @property
    def numel(self) -> int:
        """Number of entries."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's data."""
        return self.numel * TORCH_DTYPES[self.dtype].itemsize

    @property
    def is_float(self) -> bool:
        """Whether the tensor holds numbers that can be merged."""
        return self.dtype in FLOATS


@dataclass(frozen=True)
class TensorInMemory(TensorHeader):
    """A tensor that lies in memory; `file` is the name of the mapping it came in."""

    tensor: Tensor


@dataclass(frozen=True)
class FileHeaders:
    """What one weight file declares.

    Args:
        tensors: by name.
        aliases: other names of the same memory -> the name it is listed under.
        problems: what is wrong with the file; tensors that could be understood are listed all the same.
    """

    tensors: Mapping[str, TensorHeader]
    aliases: Mapping[str, str]
    problems: tuple[SuperposeError, ...]


class Reader(Protocol):
    """An open weight file. Tensors it returns may be views of the file and are never written to."""

    def read(self, name: str) -> Tensor:
        """Return a tensor, without copying where the format allows."""
        ...


class Format(Protocol):
    """A format of weight files."""

    suffixes: tuple[str, ...]

    def headers(self, file: Path) -> FileHeaders:
        """Return what the file declares, reading no tensor data."""
        ...

    def open(self, file: Path) -> Reader:
        """Open the file for reading."""
        ...
