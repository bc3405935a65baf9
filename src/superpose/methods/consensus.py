"""Consensus merging: keep of a multi-task vector what several tasks rely on (TALL masks).

    tau    = sum_i tau_i, or TIES' sum of the agreeing entries (`over: ties`)
    mask_i = 1[ |tau_i| > threshold * |tau - tau_i| ]
    merged = base + scaling_factor * 1[ sum_i mask_i >= agreement ] o tau

An entry that no task relies on, or one task alone, is left at the base (`agreement: 2`); 1 drops the former only, 0
nothing. Asked for more tasks than there are, all of them have to agree. Tasks that are alike erase each other: with T
of them a task stands against T - 1, and its mask holds only while 1 > threshold (T - 1).

Cost: one pass, piece by piece; one pass more for `over: ties`. Prefer it for many different tasks, where entries that
serve one task alone hurt the others. With two or three tasks it drops a lot.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from superpose.maths.signs import disjoint_merge, elect_signs
from superpose.maths.sparsify import Cuts, apply_cuts, keep_largest
from superpose.maths.streaming import Trim
from superpose.maths.trim_survey import TrimSurvey
from superpose.options import Range
from superpose.registry import Breach, Caution, Merged, merge_method


@dataclass(frozen=True, kw_only=True)
class ConsensusOptions:
    """Options of consensus merging."""

    over: Literal["task_arithmetic", "ties"] = "task_arithmetic"
    """The multi-task vector that is masked: the sum of all task vectors, or what TIES makes of them."""
    threshold: Annotated[float, Range(0, 10)] = 0.4
    """How strong a task's entry is to be against the rest (lambda; tuned in {0.2, ..., 0.6} in the paper)."""
    agreement: Annotated[int, Range(0, 1000)] = 2
    """Tasks that have to rely on an entry (k in the paper, 2 there)."""
    scaling_factor: Annotated[float, Range(-10, 10)] = 0.3
    """Factor on the masked multi-task vector (alpha; tuned in the paper, 0.3 as in task arithmetic without data)."""
    ties_density: Annotated[float, Range(0, 1)] = 0.2
    """Fraction of each task vector's entries that TIES keeps, for `over: ties` (the authors' code)."""
    density_scope: Literal["model", "tensor"] = "model"
    """Whether TIES counts the kept entries over the whole model (the authors' code) or in each tensor."""

    def trim(self) -> Trim:
        """Return how the task vectors are trimmed for the multi-task vector."""
        return Trim(self.ties_density if self.over == "ties" else 1.0, self.density_scope)


def consensus_notes(options: ConsensusOptions, tasks: int) -> list[str]:
    """Return what to tell the user about these options before anything is computed."""
    if options.agreement <= tasks:
        return []
    return [f"consensus: agreement {options.agreement} is more than the {tasks} fine-tunes: all have to agree"]


@merge_method(
    "consensus",
    options=ConsensusOptions,
    source="Wang et al. 2024, arXiv:2405.07813, TALL masks and Consensus TA",
    whole_for=(),
    survey=TrimSurvey(),
    notes=consensus_notes,
    breaks={
        "same": "T identical tasks give T times the task while 1 > threshold (T - 1), and nothing beyond",
        "zero": Breach("of one task and the base, two have to agree: nothing is left; agreement 1 keeps it", tasks=1),
    },
)
def consensus(
    task_vectors: Float[Tensor, "tasks *shape"], options: ConsensusOptions, *, survey: Cuts | None = None
) -> Merged:
    """Mask the multi-task vector by how many tasks rely on each entry.

    Args:
        task_vectors: tuned minus base.
        options: see `ConsensusOptions`.
        survey: this tensor's cuts for `over: ties`; when not given, the tensor is taken for the whole model.

    Returns:
        The merged task vector; with a warning where tasks differ from the base and nothing of it is left.
    """
    multi_task = _multi_task_vector(task_vectors, options, survey)
    relying = torch.zeros(multi_task.shape, dtype=torch.int16, device=multi_task.device)
    for task_vector in task_vectors:
        relying += task_vector.abs() > options.threshold * (multi_task - task_vector).abs()
    asked = min(options.agreement, len(task_vectors))
    agreed = relying >= asked
    merged = torch.where(agreed, options.scaling_factor * multi_task, 0.0)
    return Merged(merged, cautions=_cautions(task_vectors, agreed, asked))


def _multi_task_vector(
    task_vectors: Float[Tensor, "tasks *shape"], options: ConsensusOptions, survey: Cuts | None
) -> Float[Tensor, "*shape"]:
    if options.over == "task_arithmetic":
        return task_vectors.sum(dim=0)
    trimmed = apply_cuts(task_vectors, survey) if survey else keep_largest(task_vectors, options.ties_density)
    return disjoint_merge(trimmed, elect_signs(trimmed), aggregate="sum")


def _cautions(task_vectors: Tensor, agreed: Tensor, asked: int) -> Sequence[Caution]:
    if bool(agreed.any()) or not bool(task_vectors.any()):
        return ()
    return (Caution(f"no entry of (a part of) the tensor is relied on by {asked} tasks: the base stays"),)
