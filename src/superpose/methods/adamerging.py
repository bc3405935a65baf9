"""AdaMerging: task arithmetic whose coefficients are learned, so that the merged model is sure of its predictions.

    merged^t = base^t + sum_i l_i^t tau_i^t                  one l per task, and per tensor t (`granularity: layer`)
    l        = argmin sum over tasks of the mean entropy of softmax(logits(x)), x unlabelled inputs of the task
    plus_plus: tau_i is what TIES keeps of it: the largest 20%, without the entries against the elected sign

Learned by Adam from batches of each task's data. The gradient takes one backward pass through the merged model:
dL/dl_i^t = <dL/dmerged^t, tau_i^t>. It adapts to the inputs that it sees: learn from a split of its own, and say so
where it was the test split (the record names it). Classification only, as published; each task's head stays its own.

Cost: learning holds one model, a gradient of each, and as many task vectors as `--memory` allows; steps x T passes of
a batch. The merge is one pass. Prefer it where unlabelled inputs of every task are at hand and the model stays one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from superpose.maths.signs import elect_signs
from superpose.maths.sparsify import Cuts, apply_cuts, keep_largest
from superpose.maths.streaming import Trim
from superpose.maths.trim_survey import TrimSurvey
from superpose.options import Range
from superpose.registry import merge_method


@dataclass(frozen=True, kw_only=True)
class AdamergingOptions:
    """Options of AdaMerging."""

    granularity: Literal["layer", "task"] = "layer"
    """Whether every tensor has coefficients of its own, or the whole model one per task."""
    plus_plus: bool = False
    """Whether task vectors are processed as TIES does first (AdaMerging++)."""
    initial: Annotated[float, Range(-10, 10)] = 0.3
    """Coefficients to begin with."""
    steps: Annotated[int, Range(0, 1_000_000)] = 500
    """Steps of learning, each with a batch of every task; 0 is task arithmetic."""
    learning_rate: Annotated[float, Range(0, 1)] = 1e-3
    """Of Adam, whose other settings are 0.9 and 0.999."""
    clamp: bool = True
    """Whether coefficients act as if they were in [0, 1] (the authors' code)."""
    ties_density: Annotated[float, Range(0, 1)] = 0.2
    """Fraction of each task vector's entries that is kept, with `plus_plus`."""
    density_scope: Literal["model", "tensor"] = "model"
    """Whether those entries are counted over the whole model or in each tensor."""

    def trim(self) -> Trim:
        """Return how the task vectors are trimmed."""
        return Trim(self.ties_density if self.plus_plus else 1.0, self.density_scope)


@merge_method(
    "adamerging",
    options=AdamergingOptions,
    source="Yang et al. 2023, arXiv:2310.02575, task-wise, layer-wise and ++",
    whole_for=(),
    survey=TrimSurvey(),
    learns=lambda options: options.steps > 0,
    plain={"initial": 1.0, "steps": 0},
    breaks={"same": "T identical tasks add up to the sum of their coefficients times the task, until they are learned"},
)
def adamerging(
    task_vectors: Float[Tensor, "tasks *shape"],
    options: AdamergingOptions,
    *,
    survey: Cuts | None = None,
    learned: Float[Tensor, " tasks"] | None = None,
) -> Float[Tensor, "*shape"]:
    """Add up the task vectors, each times its coefficient.

    Args:
        task_vectors: tuned minus base.
        options: see `AdamergingOptions`.
        survey: this tensor's cuts for `plus_plus`; when not given, the tensor is taken for the whole model.
        learned: the coefficients; `initial` when not given.

    Returns:
        The merged task vector.
    """
    processed = process(task_vectors, options, survey)
    coefficients = [options.initial] * len(task_vectors) if learned is None else learned.tolist()
    if options.clamp:
        coefficients = [min(max(coefficient, 0.0), 1.0) for coefficient in coefficients]
    merged = coefficients[0] * processed[0]
    for coefficient, task_vector in zip(coefficients[1:], processed[1:], strict=True):
        merged += coefficient * task_vector
    return merged


def process(
    task_vectors: Float[Tensor, "tasks *shape"], options: AdamergingOptions, survey: Cuts | None
) -> Float[Tensor, "tasks *shape"]:
    """Return the task vectors as they are added up: as they are, or what TIES keeps of them.

    Args:
        task_vectors: tuned minus base.
        options: see `AdamergingOptions`.
        survey: this tensor's cuts.

    Returns:
        One per task.
    """
    if not options.plus_plus:
        return task_vectors
    trimmed = apply_cuts(task_vectors, survey) if survey else keep_largest(task_vectors, options.ties_density)
    return torch.where(trimmed.sign() == elect_signs(trimmed), trimmed, 0.0)
