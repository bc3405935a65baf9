"""Where an item's result goes: into a model, into an adapter, or into both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from superpose.factor_sink import FactorSink
from superpose.maths.low_rank import LowRank
from superpose.planning import WorkItem
from superpose.sink import Sink, Write

if TYPE_CHECKING:
    from superpose.parts import Part


class Outputs:
    """Takes an item's result as its method makes it, and hands it on as weights, as factors, or as both.

    Args:
        item: what is merged.
        write: takes bytes of tensors.
    """

    def __init__(self, item: WorkItem, write: Write) -> None:
        self._item = item
        self._weights = Sink(item, write)
        self._factors = FactorSink(item, item.factors, write) if item.factors is not None else None

    def add(
        self,
        merged: Tensor,
        base: Tensor,
        acts_on: Literal["task_vectors", "weights"],
        not_finite: Tensor | None = None,
    ) -> None:
        """Take the next entries of what a method made, with the base's, whose memory may be used.

        Args:
            merged: the entries.
            base: the base's.
            acts_on: whether `merged` are weights, or what is added to the base's.
            not_finite: NaN and infinities that take the place of entries, 0 elsewhere; None for none.
        """
        if self._factors is not None:
            self._factors.add(merged - base if acts_on == "weights" else merged.clone())
        if self._item.names:
            self._weights.add(merged if acts_on == "weights" else base.add_(merged), not_finite)

    def add_factors(self, update: LowRank, part: Part) -> None:
        """Take the next part's merged update by its factors."""
        if self._factors is not None:
            self._factors.add(update)
        if self._item.names:
            base = part.base.to(update.left.device, update.left.dtype).reshape(update.shape)
            self._weights.add(base + update.matrix() if update.rank else base)

    def copy(self, entries: Tensor) -> None:
        """Take the next entries of the base."""
        self._weights.add(entries)

    def add_beside(self, pieces: Sequence[Tensor]) -> None:
        """Take the next entries of what is written beside the tensor."""
        self._weights.add_beside(pieces)

    @property
    def beside(self) -> dict[str, str]:
        """Digests of what was written beside the tensor, by name."""
        return self._weights.beside

    def finish(self) -> tuple[str, dict[str, str], dict[str, Any]]:
        """Write what is left.

        Returns:
            The digest of the weights ("" where none are written), those of the factors by name, and numbers about them.
        """
        sha256 = self._weights.finish() if self._item.names else ""
        factors, stats = self._factors.finish() if self._factors is not None else ({}, {})
        return sha256, factors, stats
