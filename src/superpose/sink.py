"""The output of one work item: pieces of the result, cast, checked, written at their place and digested."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from superpose.checkpoints.headers import TORCH_DTYPES
from superpose.errors import SuperposeError
from superpose.maths.finite import is_finite
from superpose.planning import WorkItem

Write = Callable[[str, int, Tensor], memoryview]
"""(tensor name, first byte within the tensor, piece in the output's dtype) -> the bytes written."""


class Sink:
    """Takes an item's result piece by piece, in order, and writes it at its place."""

    def __init__(self, item: WorkItem, write: Write) -> None:
        self._item, self._write = item, write
        self._digest, self._position = hashlib.sha256(), 0
        self._beside = [(name, hashlib.sha256()) for name, _, _ in item.beside]
        self._beside_position = 0
        self._pending: list[Tensor] = []
        # Parts that are columns lie scattered over the tensor: they are put together first.
        self._scattered = item.parts is not None and item.parts[0] != 0

    def add(self, piece: Tensor, not_finite: Tensor | None = None) -> None:
        """Take the next entries of the flattened result, in the dtype of the arithmetic.

        Args:
            piece: the entries.
            not_finite: NaN and infinities that take the place of entries, 0 elsewhere; None for none.
        """
        cast = piece.reshape(-1).to(TORCH_DTYPES[self._item.dtype])
        if self._item.action == "merge" and not is_finite(cast):
            raise SuperposeError(
                f"the merged tensor is too large for {self._item.dtype}",
                where=f"tensor {self._item.name}",
                mend="choose a wider --dtype, such as float32, or a smaller scaling factor",
            )
        if not_finite is not None:
            cast = torch.where(not_finite != 0, not_finite.to(cast), cast)
        if self._scattered:
            self._pending.append(cast)
        else:
            self._put(cast)

    def add_beside(self, pieces: Sequence[Tensor]) -> None:
        """Take the next entries of what is written beside the tensor."""
        written = 0
        for (name, digest), piece in zip(self._beside, pieces, strict=True):
            data = self._write(name, self._beside_position, piece)
            digest.update(data)
            written = len(data)
        self._beside_position += written

    @property
    def beside(self) -> dict[str, str]:
        """Digests of what was written beside the tensor, by name."""
        return {name: digest.hexdigest() for name, digest in self._beside}

    def finish(self) -> str:
        """Write what is left and return the digest of everything written."""
        if self._scattered and self._item.parts is not None:
            axis, sizes = self._item.parts
            shape = self._item.shape
            flat = torch.cat(self._pending)
            lengths = [flat.numel() // sum(sizes) * size for size in sizes]
            blocks = [
                block.reshape(*shape[:axis], size, *shape[axis + 1 :])
                for block, size in zip(flat.split(lengths), sizes, strict=True)
            ]
            self._put(torch.cat(blocks, dim=axis).reshape(-1))
        return self._digest.hexdigest()

    def _put(self, cast: Tensor) -> None:
        data = memoryview(b"")
        for name in self._item.names:
            data = self._write(name, self._position, cast)
        self._digest.update(data)
        self._position += len(data)
