"""KnOTS: turn all task matrices into one shared basis, and merge there.

    [M_1 ... M_T] = U diag(s) [W_1 ... W_T]        one thin SVD of the task matrices side by side
    merged        = U merge( diag(s) W_1, ..., diag(s) W_T ),   diag(s) W_i = U^T M_i

The merger in the aligned space is TIES (default), task arithmetic, or DARE with TIES. TIES' threshold is one per task
over the aligned entries of the whole model. Directions of numerical rank only. `weight_by_sigma: false` merges the W_i
and applies U diag(s) after, as in the paper's text; the authors' code does as here. What is no matrix (norms, biases,
embeddings, heads, depthwise kernels) is merged as it is, and counts among the entries. Experts of a stack are aligned
one by one.

Cost: one decomposition of T matrices side by side, out^2 x T in, repeated in each of the two streaming passes of the
threshold (`density_scope: tensor` or density 1 needs none). Prefer it for adapters and other low-rank updates, whose
entries do not line up; with task arithmetic inside it changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from superpose.kinds import MATRIX_KINDS, Kind
from superpose.maths.low_rank import LowRank, total
from superpose.maths.matrices import acts_as_matrix, as_matrices
from superpose.maths.randomness import Generator
from superpose.maths.streaming import TensorChunks, search_is_over
from superpose.maths.svd import Features, thin_svd
from superpose.methods.dare_ties import DareTiesOptions, DareTiesSurvey, dare_ties
from superpose.methods.task_arithmetic import TaskArithmeticOptions, task_arithmetic
from superpose.methods.ties import TiesNumbers
from superpose.options import Range
from superpose.registry import Cost, Factored, Merged, MergedFactors, merge_method


@dataclass(frozen=True, kw_only=True)
class KnotsOptions:
    """Options of KnOTS."""

    merger: Literal["ties", "task_arithmetic", "dare_ties"] = "ties"
    """What merges in the aligned space (the paper's KnOTS-TIES, its control, KnOTS-DARE-TIES)."""
    density: Annotated[float, Range(0, 1)] = 0.2
    """Fraction of each task's aligned entries that TIES keeps (the authors' vision setting; 1 for LLMs)."""
    scaling_factor: Annotated[float, Range(-10, 10)] = 0.6
    """Factor on the merged task vector (the authors' 0.6 vision, 0.7 with DARE, 0.5 Llama-3)."""
    density_scope: Literal["model", "tensor"] = "model"
    """Whether TIES counts the kept entries over the whole model (the authors' code) or in each tensor."""
    dare_density: Annotated[float, Range(0.001, 1)] = 0.9
    """Probability of an aligned entry to be kept by DARE, for `merger: dare_ties` (the authors' p = 0.1)."""
    weight_by_sigma: bool = True
    """Whether aligned entries carry their direction's strength when they are trimmed (the authors' code)."""

    def of_merger(self) -> DareTiesOptions:
        """Return the options of TIES in the aligned space, after DARE if it is asked for."""
        return DareTiesOptions(
            density=self.dare_density if self.merger == "dare_ties" else 1.0,
            ties_density=1.0 if self.merger == "task_arithmetic" else self.density,
            scaling_factor=self.scaling_factor,
            density_scope=self.density_scope,
        )


@dataclass(frozen=True)
class Alignment:
    """One tensor in the shared basis, and where to cut it: what merging it takes from the survey.

    Args:
        bases: one shared basis per map of the tensor; none for what is no matrix.
        entries: the aligned entries of every task; the task vectors' own where there is no basis.
        cuts: TIES' numbers for the entries; None where nothing is trimmed.
    """

    bases: tuple[Features, ...]
    entries: Float[Tensor, "tasks entries"] | None
    cuts: TiesNumbers | None

    def within(self, start: int, stop: int) -> Alignment:
        """Return the same for the entries start..stop of a tensor that is no matrix."""
        return Alignment((), None, self.cuts.within(start, stop) if self.cuts else None)


class KnotsSurvey:
    """The survey of the merger, over aligned entries."""

    def __init__(self) -> None:
        self.merger = DareTiesSurvey()

    def memory(self, tasks: int, entries: int, dtype: torch.dtype) -> int:
        """Return the bytes that one tensor's counts take at most."""
        return self.merger.memory(tasks, entries, dtype)

    def passes(self, options: KnotsOptions, dtype: torch.dtype) -> int:
        """Return the passes for the thresholds."""
        return self.merger.passes(options.of_merger(), dtype)

    def reads(self, options: KnotsOptions, dtype: torch.dtype) -> int:
        """Return how often the model is read as a rule: to align its matrices takes as long for a sample of them."""
        rest = self.merger.reads(options.of_merger(), dtype)
        return rest + (rest > 0)

    def measure(self, step: int, name: str, chunks: TensorChunks, state, options: KnotsOptions) -> Any:
        """Return the counts of one tensor's aligned entries."""
        entries = chunks if search_is_over(state) else _aligned(chunks, options)
        return self.merger.measure(step, name, entries, state, options.of_merger())

    def finish(self, step: int, total: Any, state, options: KnotsOptions, dtype: torch.dtype) -> Any:
        """Return the state of the search."""
        return self.merger.finish(step, total, state, options.of_merger(), dtype)

    def for_tensor(self, name: str, chunks: TensorChunks, state, options: KnotsOptions) -> Alignment | None:
        """Return one tensor's alignment, so that merging does not decompose again; None where nothing is trimmed."""
        if options.merger == "task_arithmetic" or options.density == 1:
            return None
        kind = chunks.kind
        if kind is None or not acts_as_matrix(kind, chunks.shape) or not chunks.numel:
            return Alignment((), None, self.merger.for_tensor(name, chunks, state, options.of_merger()))
        bases, entries = _align_chunks(chunks, kind, options)
        cuts = self.merger.for_tensor(name, _as_chunks(entries, chunks), state, options.of_merger())
        return Alignment(bases, entries, cuts)


def _in_factors(
    tasks: Sequence[LowRank],
    options: KnotsOptions,
    generator: Generator,
    weights: Float[Tensor, " tasks"],
    survey: Alignment | None,
) -> MergedFactors:
    if options.merger == "task_arithmetic":
        return MergedFactors(total(tasks, (weights * options.scaling_factor).tolist()))
    if survey is not None and survey.entries is not None:
        basis, entries = survey.bases[0], survey.entries
    else:
        basis, entries = _align_factors(tasks, options)
    merged = _merge(entries, options, generator, weights, survey.cuts if survey else None)
    left = basis.u if options.weight_by_sigma else basis.u * basis.s
    return MergedFactors(LowRank(left, merged.reshape(basis.count, tasks[0].shape[1])), {"rank": basis.count})


def knots_cost(shape: Sequence[int], tasks: int, options: KnotsOptions) -> Cost:
    """Return what one matrix takes: the task matrices side by side in float64, their Gram matrix, aligned entries."""
    del options
    out, wide = shape[0], tasks * prod(shape[1:])
    small = min(out, wide)
    return Cost(8 * (2 * out * wide + 4 * small**2) + 12 * small * wide, 2.0 * out * wide * small + 12.0 * small**3)


@merge_method(
    "knots",
    options=KnotsOptions,
    source="Stoica et al. 2024, arXiv:2410.19735, KnOTS-TIES; Sigma V merged, as in the authors' code",
    whole_for=MATRIX_KINDS,
    survey=KnotsSurvey(),
    cost=knots_cost,
    factored=Factored(_in_factors, lambda options, kind: kind in MATRIX_KINDS),
)
def knots(
    task_vectors: Float[Tensor, "tasks *shape"],
    options: KnotsOptions,
    *,
    kind: Kind,
    generator: Generator | None = None,
    weights: Float[Tensor, " tasks"] | None = None,
    survey: Alignment | None = None,
) -> Merged:
    """Align task matrices by one shared SVD, merge what is aligned, and turn it back.

    Args:
        task_vectors: tuned minus base.
        options: see `KnotsOptions`.
        kind: only linear maps and convolutions are aligned.
        generator: the tensor's random numbers; needed for `merger: dare_ties` alone.
        weights: one factor per task, as in the merger.
        survey: this tensor's alignment and cuts; when not given, the tensor is taken for the whole model.

    Returns:
        The merged task vector; for matrices with the rank of the shared basis.
    """
    if not acts_as_matrix(kind, task_vectors.shape[1:]) or not task_vectors.numel():
        return Merged(_merge(task_vectors, options, generator, weights, survey.cuts if survey else None))
    if survey is not None and survey.entries is not None:
        bases, entries = survey.bases, survey.entries
    else:
        bases, entries = _align(task_vectors, kind, options)
    merged = _merge(entries, options, generator, weights, survey.cuts if survey else None)
    rank = sum(basis.count for basis in bases)
    return Merged(_turned_back(merged, bases, task_vectors.shape[1:], options), {"rank": rank})


def _merge(
    entries: Float[Tensor, "tasks *shape"],
    options: KnotsOptions,
    generator: Generator | None,
    weights: Float[Tensor, " tasks"] | None,
    cuts: TiesNumbers | None,
) -> Float[Tensor, "*shape"]:
    if options.merger == "task_arithmetic":
        return task_arithmetic(entries, TaskArithmeticOptions(scaling_factor=options.scaling_factor), weights=weights)
    drawn = generator or Generator(0, "", tuple(map(str, range(len(entries)))))
    return dare_ties(entries, options.of_merger(), generator=drawn, weights=weights, survey=cuts)


def _shared_basis(matrices: Float[Tensor, "tasks out in_"]) -> Features:
    """Return the features of the task matrices side by side: one left basis for all."""
    return thin_svd(torch.cat(tuple(matrices), dim=1))


def _align(
    task_vectors: Float[Tensor, "tasks *shape"], kind: Kind, options: KnotsOptions
) -> tuple[tuple[Features, ...], Float[Tensor, "tasks entries"]]:
    """Return the shared basis of each map, and each task's matrices in them, flattened, one map after the other."""
    bases, maps = [], []
    for matrices in as_matrices(task_vectors, kind):
        basis = _shared_basis(matrices)
        aligned = basis.u.T @ matrices
        maps.append((aligned if options.weight_by_sigma else aligned / basis.s[:, None]).flatten(1))
        bases.append(basis)
    return tuple(bases), torch.cat(maps, dim=1)


def _turned_back(
    merged: Float[Tensor, " entries"], bases: Sequence[Features], shape: torch.Size, options: KnotsOptions
) -> Float[Tensor, "*shape"]:
    in_ = prod(shape) // (len(bases) * bases[0].u.shape[0])
    parts = merged.split([basis.count * in_ for basis in bases])
    turned = []
    for part, basis in zip(parts, bases, strict=True):
        left = basis.u if options.weight_by_sigma else basis.u * basis.s
        turned.append(left @ part.reshape(basis.count, in_))
    return torch.stack(turned).reshape(shape)


def _aligned(chunks: TensorChunks, options: KnotsOptions) -> TensorChunks:
    """Return the aligned entries of a tensor as chunks; the entries themselves of what is no matrix."""
    kind = chunks.kind
    if kind is None or not acts_as_matrix(kind, chunks.shape) or not chunks.numel:
        return chunks
    return _as_chunks(_align_chunks(chunks, kind, options)[1], chunks)


def _align_chunks(
    chunks: TensorChunks, kind: Kind, options: KnotsOptions
) -> tuple[tuple[Features, ...], Float[Tensor, "tasks entries"]]:
    """Return what `_align` does, of factors where the chunks have them."""
    if chunks.factors is not None:
        basis, entries = _align_factors(chunks.factors, options)
        return (basis,), entries
    return _align(chunks.whole(), kind, options)


def _align_factors(tasks: Sequence[LowRank], options: KnotsOptions) -> tuple[Features, Float[Tensor, "tasks entries"]]:
    """Return the shared basis of task matrices known by factors, and each in it, flattened; none is written out."""
    # right_i = R_i^T Q_i^T with orthonormal Q_i, which leave the left directions and strengths of [M_1 ... M_T] be.
    left = torch.cat([task.left for task in tasks], dim=1)
    cores = [torch.linalg.qr(task.right.T, mode="r")[1].T for task in tasks]
    basis = LowRank(left, torch.block_diag(*cores)).features()
    aligned = torch.stack([(basis.u.T @ task.left) @ task.right for task in tasks])
    entries = (aligned if options.weight_by_sigma else aligned / basis.s[:, None]).flatten(1)
    return basis, entries


def _as_chunks(entries: Float[Tensor, "tasks entries"], chunks: TensorChunks) -> TensorChunks:
    numel = entries.shape[1]
    return replace(chunks, numel=numel, shape=(numel,), read=lambda start, stop: entries[:, start:stop])
