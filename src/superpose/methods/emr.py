"""EMR-Merging: one unified vector, and per task a mask of one bit an entry and one scale.

    g       = sign(sum_i tau_i)
    uni     = g * max_i { |tau_i| : sign(tau_i) = g }
    mask_i  = 1[ sign(tau_i) = g, g not 0 ]
    scale_i = sum |tau_i| / sum |mask_i o uni|,   sums over the whole model
    task i  = base + scale_i * mask_i o uni;      the model written is base + uni

The output is a model with `tasks/` beside it: `superpose rebuild OUT --task NAME` makes the model of any task from it.
Which task is meant must be known when the model is used. Where the sum cancels exactly, g is 0 and the entry stays at
the base (the authors' code takes -1). Elsewhere an entry of base + uni is, up to float32's rounding, one of some
fine-tune, so that storing it in the models' dtype loses nothing. A task of zeros has scale 1 and an empty mask.

Cost: one streaming pass for the scales, and the merge, piece by piece; one bit per entry and task on the disk.
Prefer it when tasks are told apart in use, and one model plus small masks can replace T models.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from superpose.maths.bits import pack, packed_bytes
from superpose.maths.signs import elect_signs
from superpose.maths.streaming import TensorChunks
from superpose.registry import Merged, merge_method


@dataclass(frozen=True, kw_only=True)
class EmrOptions:
    """EMR-Merging has no options."""


@dataclass(frozen=True)
class Scales:
    """One scale per task; the same for every tensor."""

    by_task: tuple[float, ...]

    def within(self, start: int, stop: int) -> Scales:
        """Return the same: nothing depends on the place."""
        del start, stop
        return self


class EmrSurvey:
    """Two sums per task over the whole model: of its magnitudes, and of the unified vector's under its mask."""

    def memory(self, tasks: int, entries: int, dtype: torch.dtype) -> int:
        """Return the bytes of the sums."""
        del entries, dtype
        return 16 * tasks

    def passes(self, options: EmrOptions, dtype: torch.dtype) -> int:
        """Return the number of passes: one."""
        del options, dtype
        return 1

    def measure(self, step: int, name: str, chunks: TensorChunks, state, options) -> Float[Tensor, "2 tasks"]:
        """Return one tensor's sums."""
        del step, name, state, options
        total = torch.zeros(2, chunks.tasks, dtype=torch.float64)
        for _, chunk in chunks:
            total += _sums(chunk)
        return total

    def finish(self, step: int, total: Float[Tensor, "2 tasks"], state, options, dtype) -> Scales:
        """Return the scales."""
        del step, state, options, dtype
        return _scales(total)

    def for_tensor(self, name: str, chunks: TensorChunks, state: Scales, options) -> Scales:
        """Return the scales."""
        del name, chunks, options
        return state


def mask_names(name: str, numel: int, tasks: int) -> list[tuple[str, str, tuple[int, ...]]]:
    """Return what is written beside a tensor: name, dtype and shape of each task's mask."""
    return [(mask_name(name, task), "U8", (packed_bytes(numel),)) for task in range(tasks)]


def mask_name(name: str, task: int) -> str:
    """Return what a task's mask of a tensor is called."""
    return f"{task}:{name}"


@merge_method(
    "emr",
    options=EmrOptions,
    source="Huang et al. 2024, arXiv:2405.17461, elect, mask, rescale; sums over the whole model",
    whole_for=(),
    survey=EmrSurvey(),
    beside=mask_names,
)
def emr(task_vectors: Float[Tensor, "tasks *shape"], options: EmrOptions, *, survey: Scales | None = None) -> Merged:
    """Elect the unified vector, with each task's mask and scale.

    Args:
        task_vectors: tuned minus base.
        options: none.
        survey: the scales; when not given, the tensor is taken for the whole model.

    Returns:
        The unified vector, in `beside` the packed mask of each task, and in the numbers the scales.
    """
    del options
    unified, masks = elect(task_vectors)
    scales = survey or _scales(_sums(task_vectors))
    packed = tuple(pack(mask) for mask in masks)
    return Merged(unified, {"scales": list(scales.by_task)}, beside=packed)


def elect(task_vectors: Float[Tensor, "tasks *shape"]) -> tuple[Float[Tensor, "*shape"], Bool[Tensor, "tasks *shape"]]:
    """Return the unified vector and each task's mask."""
    signs = elect_signs(task_vectors)
    masks = (task_vectors.sign() == signs) & (signs != 0)
    largest = torch.where(masks, task_vectors.abs(), 0.0).amax(dim=0)
    return signs * largest, masks


def task_vector_of(
    unified: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"], scale: float
) -> Float[Tensor, "*shape"]:
    """Return a task's vector, rebuilt from the unified one."""
    return torch.where(mask, scale * unified, 0.0)


def _sums(task_vectors: Float[Tensor, "tasks *shape"]) -> Float[Tensor, "2 tasks"]:
    unified, masks = elect(task_vectors)
    exact = unified.double().abs()
    own = [row.double().abs().sum() for row in task_vectors]
    shared = [torch.where(mask, exact, 0.0).sum() for mask in masks]
    return torch.stack([torch.stack(own), torch.stack(shared)]).cpu()


def _scales(sums: Float[Tensor, "2 tasks"]) -> Scales:
    own, shared = sums.tolist()
    return Scales(tuple(a / b if b > 0 else 1.0 for a, b in zip(own, shared, strict=True)))
