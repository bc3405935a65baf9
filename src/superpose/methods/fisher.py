"""Fisher merging: a mean of the tuned models in which each weight counts as much as its model's data depends on it.

    F_i    = (1/N) sum_n E_{y ~ p_i(.|x_n)} [ (d log p_i(y|x_n) / d theta)^2 ]        by `superpose statistics fisher`
    merged = sum_i w_i max(F_i / ||F_i||, floor) o tuned_i / sum_i w_i max(F_i / ||F_i||, floor)

The norm is over the whole model (`normalise: false` leaves it out, and tasks of large gradients lead). Where no model's
data depends on an entry, all are at the floor, and it is the weighted average; `favor_target` gives those entries to
the first model, as the authors' code does. The paper tunes the weights w_i (the recipe's) on validation data.

Cost: a pass over the statistics and the merge, piece by piece, reading the statistics beside the models. Prefer it to
the average whenever a few hundred examples of each task are at hand, labelled or not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from jaxtyping import Float
from torch import Tensor

from superpose.maths.combine import weighted_mean
from superpose.maths.streaming import TensorChunks
from superpose.options import Range
from superpose.registry import merge_method


@dataclass(frozen=True, kw_only=True)
class FisherOptions:
    """Options of Fisher merging."""

    normalise: bool = True
    """Whether each model's Fisher information is scaled to norm 1 over the model (the authors' code)."""
    floor: Annotated[float, Range(0, 1)] = 1e-6
    """Least an entry counts, after scaling (the authors' code)."""
    favor_target: bool = False
    """Whether the floor is for the first model alone, which then has what no data depends on (the authors' code)."""


@dataclass(frozen=True)
class Norms:
    """The norm of each model's Fisher information; the same for every tensor."""

    by_task: tuple[float, ...]

    def within(self, start: int, stop: int) -> Norms:
        """Return the same: nothing depends on the place."""
        del start, stop
        return self


class NormSurvey:
    """One pass over the statistics: squared norms over the whole model."""

    def memory(self, tasks: int, entries: int, dtype: torch.dtype) -> int:
        """Return the bytes of the sums."""
        del entries, dtype
        return 8 * tasks

    def passes(self, options: FisherOptions, dtype: torch.dtype) -> int:
        """Return the number of passes: one, or none where nothing is scaled."""
        del dtype
        return int(options.normalise)

    def measure(self, step: int, name: str, chunks: TensorChunks, state, options) -> Float[Tensor, " tasks"]:
        """Return one tensor's squared norms."""
        del step, name, state, options
        total = torch.zeros(chunks.tasks, dtype=torch.float64)
        if chunks.statistics is None:
            return total
        for start in range(0, chunks.numel, chunks.size):
            rows = chunks.statistics(start, min(start + chunks.size, chunks.numel))
            total += torch.stack([row.double().square().sum() for row in rows]).cpu()
        return total

    def finish(self, step: int, total: Float[Tensor, " tasks"], state, options, dtype) -> Norms:
        """Return the norms."""
        del step, state, options, dtype
        return Norms(tuple(total.sqrt().tolist()))

    def for_tensor(self, name: str, chunks: TensorChunks, state: Norms | None, options) -> Norms | None:
        """Return the norms."""
        del name, chunks, options
        return state


@merge_method(
    "fisher",
    options=FisherOptions,
    source="Matena and Raffel 2021, arXiv:2111.09832, the diagonal approximation",
    acts_on="weights",
    whole_for=(),
    survey=NormSurvey(),
    statistics="fisher",
    breaks={"zero": "the base counts as another model, like in an average: each update shrinks"},
)
def fisher(
    tuned: Float[Tensor, "tasks *shape"],
    options: FisherOptions,
    *,
    statistics: Float[Tensor, "tasks *shape"] | None = None,
    survey: Norms | None = None,
    weights: Float[Tensor, " tasks"] | None = None,
) -> Float[Tensor, "*shape"]:
    """Average the tuned weights, each entry by its Fisher information.

    Args:
        tuned: the tuned models' weights.
        options: see `FisherOptions`.
        statistics: Fisher information of each model; equal for all when not given.
        survey: its norms over the model; when not given, the tensor is taken for the whole model.
        weights: one factor per model, not negative; 1 when not given.

    Returns:
        The mean, bit for bit the input where all models agree.
    """
    factors = torch.ones(len(tuned), dtype=torch.float64) if weights is None else weights
    if statistics is None:
        return weighted_mean(tuned, (factors / factors.sum()).tolist())
    counted = _counted(statistics, options, survey) * _as_column(factors, tuned)
    # Fractions of float64: information spans twenty orders of magnitude.
    total = counted.sum(dim=0)
    equal = _as_column(factors / factors.sum(), tuned).expand(counted.shape)
    shares = torch.where(total > 0, counted / total.clamp_min(torch.finfo(torch.float64).tiny), equal)
    merged = tuned[0].clone()
    for row, share in zip(tuned[1:], shares[1:], strict=True):
        merged += (share * (row - tuned[0])).to(merged.dtype)
    return merged


def _counted(
    statistics: Float[Tensor, "tasks *shape"], options: FisherOptions, survey: Norms | None
) -> Float[Tensor, "tasks *shape"]:
    """Return how much each entry of each model counts, before the recipe's weights."""
    information = statistics.double()
    if options.normalise:
        norms = survey.by_task if survey is not None else tuple(row.norm().item() for row in information)
        scales = torch.tensor([1 / norm if norm > 0 else 0.0 for norm in norms], dtype=torch.float64)
        information = information * _as_column(scales, information)
    if options.favor_target:
        return torch.cat([information[:1].clamp_min(options.floor), information[1:]])
    return information.clamp_min(options.floor)


def _as_column(values: Float[Tensor, " tasks"], like: Float[Tensor, "tasks *shape"]) -> Float[Tensor, "tasks *ones"]:
    return values.to(like.device, torch.float64).reshape(-1, *[1] * (like.ndim - 1))
