"""The update of one work item as an adapter holds it: two factors, truncated if asked for, padded to their room."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from superpose.checkpoints.headers import TORCH_DTYPES
from superpose.errors import SuperposeError
from superpose.maths.finite import is_finite
from superpose.maths.low_rank import LowRank, of_features, side_by_side, total
from superpose.maths.svd import Features, leading, leading_by_energy, leading_svd, thin_svd
from superpose.planning import FactorOutput, WorkItem

Write = Callable[[str, int, Tensor], memoryview]


class FactorSink:
    """Takes an item's merged update part by part, in order, and writes it as two factors.

    Args:
        item: what is merged; it has a place for factors.
        output: that place.
        write: takes each factor, in the output's dtype.
    """

    def __init__(self, item: WorkItem, output: FactorOutput, write: Write) -> None:
        self._item, self._output, self._write = item, output, write
        self._blocks: list[LowRank | Tensor] = []

    def add(self, update: LowRank | Tensor) -> None:
        """Take the next part's update: factors, or all its entries."""
        self._blocks.append(update)

    def finish(self) -> tuple[dict[str, str], dict[str, Any]]:
        """Write the factors; return the digest of each by name, and numbers about them."""
        update, stats = self._truncated()
        return self._put(update.T if self._output.transposed else update), stats

    def _truncated(self) -> tuple[LowRank, dict[str, Any]]:
        output = self._output
        whole = self._together()
        if isinstance(whole, LowRank):
            norm = whole.norm()
            if not output.truncates and whole.rank <= output.room:
                return whole, {"adapter_rank": whole.rank, "update_norm": norm, "truncation_error": 0.0}
            features = whole.features()
            kept = leading(features, output.rank, output.energy)
            lost = math.sqrt(float(features.s[kept.count :].double().square().sum()))
        else:
            norm = float(torch.linalg.vector_norm(whole, dtype=torch.float64))
            kept = _leading(whole, output)
            lost = math.sqrt(max(0.0, norm**2 - float(kept.s.double().square().sum())))
        stats = {"adapter_rank": kept.count, "update_norm": norm, "truncation_error": lost / norm if norm else 0.0}
        return of_features(kept), stats

    def _together(self) -> LowRank | Tensor:
        """Return the update of the whole tensor, rows by all the rest."""
        shape = self._item.shape
        flat = shape[0], math.prod(shape[1:])
        if all(isinstance(block, LowRank) for block in self._blocks):
            blocks = [block for block in self._blocks if isinstance(block, LowRank)]
            return blocks[0] if len(blocks) == 1 else side_by_side(blocks, self._axis())
        blocks = [block for block in self._blocks if isinstance(block, Tensor)]
        if len(blocks) == 1:
            return blocks[0].reshape(flat)
        assert self._item.parts is not None
        axis, sizes = self._item.parts
        whole = [
            block.reshape(*shape[:axis], size, *shape[axis + 1 :]) for block, size in zip(blocks, sizes, strict=True)
        ]
        return torch.cat(whole, dim=axis).reshape(flat)

    def _axis(self) -> int:
        return self._item.parts[0] if self._item.parts is not None else 0

    def _put(self, update: LowRank) -> dict[str, str]:
        output, room = self._output, self._output.room
        if update.rank < room:  # engines want one rank for all modules: directions of length 0 fill it up
            rest = room - update.rank
            padding = LowRank(
                update.left.new_zeros(update.shape[0], rest), update.right.new_zeros(rest, update.shape[1])
            )
            update = total([update, padding])
        down, up = output.shapes(update.shape)
        return {
            output.down: self._write_one(output.down, update.right.reshape(down)),
            output.up: self._write_one(output.up, update.left.reshape(up)),
        }

    def _write_one(self, name: str, factor: Tensor) -> str:
        cast = factor.to(TORCH_DTYPES[self._output.dtype]).contiguous()
        if not is_finite(cast.reshape(-1)):
            raise SuperposeError(
                f"a factor of the merged update is too large for {self._output.dtype}",
                where=f"tensor {self._item.name}",
                mend="choose a wider --dtype, such as float32, or a smaller scaling factor",
            )
        return hashlib.sha256(self._write(name, 0, cast)).hexdigest()


def _leading(matrix: Tensor, output: FactorOutput) -> Features:
    """Return the directions of a matrix that are kept, by the fastest route."""
    if output.energy < 1:
        found = leading_by_energy(matrix, output.energy)
        return found.take(0, min(found.count, output.rank or found.count))
    if output.rank is not None:
        return leading_svd(matrix, output.rank)
    return thin_svd(matrix)
