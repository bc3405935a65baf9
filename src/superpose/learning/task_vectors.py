"""Base weights and task vectors of the merged tensors: read whenever asked for, kept in memory if there is room."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from superpose.parts import Context, Part, parts_of
from superpose.planning import SURVEY_CHUNK, WorkItem
from superpose.registry import find_method

Process = Callable[[Tensor, Any, Any], Tensor]


def _as_they_are(task_vectors: Tensor, options: Any, survey: Any) -> Tensor:
    del options, survey
    return task_vectors


class TaskVectors:
    """The stacked task vectors of each merged tensor, and the base's weights, in float32.

    Args:
        items: of the tensors.
        context: of the merge.
        room: bytes that may be kept.
        process: (task vectors, options, what the survey says of the tensor) -> task vectors.
        surveys: what surveys ended with.
    """

    def __init__(
        self,
        items: Sequence[WorkItem],
        context: Context,
        *,
        room: int,
        process: Process = _as_they_are,
        surveys: Mapping[Any, Any] | None = None,
    ) -> None:
        self._items = {item.name: item for item in items}
        self._context, self._room, self._process = context, room, process
        self._surveys = surveys or {}
        self._kept: dict[str, tuple[Tensor, Tensor]] = {}

    @property
    def names(self) -> list[str]:
        """The tensors, by name."""
        return sorted(self._items)

    def read(self, name: str) -> tuple[Tensor, Tensor]:
        """Return a tensor's task vectors, shape (tasks, *shape), and the base's weights; not to be written to."""
        if name in self._kept:
            return self._kept[name]
        item = self._items[name]
        (part,) = parts_of(item, self._context)
        stacked, base = part.read(0, item.numel)
        stacked = self._process(stacked.reshape(-1, *item.shape), item.options, self._survey(part, stacked, base))
        found = stacked.float(), base.reshape(item.shape).float()
        size = sum(tensor.nbytes for tensor in found)
        if size <= self._room:
            self._room -= size
            self._kept[name] = found
        return found

    def mean(self, name: str) -> Tensor:
        """Return the mean of the tuned weights, of an item whose method acts on weights."""
        (part,) = parts_of(self._items[name], self._context)
        return part.read(0, self._items[name].numel)[0].mean(dim=0)

    def _survey(self, part: Part, stacked: Tensor, base: Tensor) -> Any:
        item = part.item
        survey = find_method(item.method).survey
        if survey is None:
            return None
        state = self._surveys.get((item.method, item.options))
        return survey.for_tensor(part.name, part.chunks(SURVEY_CHUNK, (stacked, base)), state, item.options)
