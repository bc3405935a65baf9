"""PEM composition, full-model form: a convex combination of task vectors; a negative weight negates one.

    merged = base + scaling_factor * sum_i c_i tau_i,   c_i = weight_i / (sum of the positive weights)

Addition is weights of one sign (1/T each by default), negation the weight -1, transfer the weights a, b, -b. The paper
composes the factors of adapters; on full models this form is a normalised task arithmetic. Where no weight is positive,
the sum of magnitudes divides.

Cost: one pass, piece by piece. Prefer it for task algebra: adding skills in shares, taking one away.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from jaxtyping import Float
from torch import Tensor

from superpose.maths.combine import weighted_mean
from superpose.options import Range
from superpose.registry import merge_method


@dataclass(frozen=True, kw_only=True)
class PemOptions:
    """Options of PEM composition."""

    scaling_factor: Annotated[float, Range(-10, 10)] = 1.0
    """Factor on the composition; 1 in the paper, and the strength of a negation."""


@merge_method(
    "pem",
    options=PemOptions,
    source="Zhang et al. 2023, arXiv:2306.14870, the operators; full-model form, in delta space",
    whole_for=(),
    breaks={"zero": "the shares add up to 1, and the base takes one of them"},
)
def pem(
    task_vectors: Float[Tensor, "tasks *shape"],
    options: PemOptions,
    *,
    weights: Float[Tensor, " tasks"] | None = None,
) -> Float[Tensor, "*shape"]:
    """Combine task vectors in shares.

    Args:
        task_vectors: tuned minus base.
        options: see `PemOptions`.
        weights: one per task, negative to negate it; equal when not given.

    Returns:
        The merged task vector.
    """
    given = torch.ones(len(task_vectors), dtype=torch.float64) if weights is None else weights.double()
    positive = given.clamp_min(0).sum()
    total = float(positive if positive > 0 else given.abs().sum())
    shares = (given / total if total else given).tolist()
    return weighted_mean(task_vectors, shares) * options.scaling_factor
