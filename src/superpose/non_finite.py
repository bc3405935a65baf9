"""NaN and infinity in inputs: refused by name, or treated as the recipe says.

    zero: such an entry of a fine-tune counts as the base's, such an entry of the base as 0
    keep: merged as with zero; then entries of the result get what was not finite in any input, added up

So a NaN stays in its place: no norm, threshold, threshold's rank or decomposition ever sees it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from superpose.checkpoints.adapted import AdaptedTensor
from superpose.checkpoints.headers import TensorHeader
from superpose.errors import Problems, SuperposeError
from superpose.planning import SURVEY_CHUNK, WorkItem
from superpose.reading import read_tensor

MEND = "use a checkpoint without them, keep the base's tensor by a rule, or choose --non-finite zero or keep"


def refusal(item: WorkItem, task_names: Sequence[str]) -> SuperposeError:
    """Return an error that names every input of an item with NaN or infinity: model, file, tensor, count.

    Args:
        item: the item.
        task_names: one per tuned model.

    Returns:
        One problem for each input; one about differences where inputs are finite.
    """
    problems: list[SuperposeError] = [
        SuperposeError(
            f"{count} entries are NaN or infinite in model {model}",
            where=f"{header.file}, tensor {header.name}",
            mend=MEND,
        )
        for model, header, count in _found(item, task_names)
    ]
    if len(problems) > 1:
        return Problems(problems)
    if problems:
        return problems[0]
    return SuperposeError(
        "a difference of finite weights is infinite",
        where=f"{item.base.file}, tensor {item.name}",
        mend="the models differ by more than float32 can hold; check that they belong together",
    )


def warnings_of(item: WorkItem, task_names: Sequence[str], treatment: str) -> tuple[str, ...]:
    """Return what the user should know of NaN and infinity in an item's inputs.

    Args:
        item: the item.
        task_names: one per tuned model.
        treatment: "zero" or "keep".

    Returns:
        A warning for each input that has some.
    """
    done = {"zero": "taken for the base's, or for 0 in the base", "keep": "kept in the result"}[treatment]
    return tuple(
        f"{item.name}: {count} entries of {model} ({header.name}) are NaN or infinite: {done}"
        for model, header, count in _found(item, task_names)
    )


def count(tensor: Tensor) -> int:
    """Return how many entries of a tensor are NaN or infinite."""
    if not tensor.is_floating_point():
        return 0
    return sum(int((~torch.isfinite(piece)).sum()) for piece in tensor.reshape(-1).split(SURVEY_CHUNK))


def only_not_finite(tensor: Tensor) -> Tensor:
    """Return a tensor's NaN and infinities, and 0 in place of its finite entries."""
    return torch.where(torch.isfinite(tensor), torch.zeros_like(tensor), tensor)


def _found(item: WorkItem, task_names: Sequence[str]) -> Iterator[tuple[str, TensorHeader, int]]:
    """Yield model, tensor and count of each input with NaN or infinity in it."""
    for model, header in zip(("base", *task_names), (item.base if item.reads_base else None, *item.tuned), strict=True):
        parts = header.parts if isinstance(header, AdaptedTensor) else [header]
        for part in parts:
            if part is not None and (bad := count(read_tensor(part))):
                yield model, part, bad
