"""One tensor of the output: where it comes from, what happens to it, what it takes, what its bytes depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, Literal

import torch

from superpose.checkpoints.adapted import AdaptedTensor, files_of, identity
from superpose.checkpoints.architecture import Architecture
from superpose.checkpoints.headers import DTYPE_NAMES, TensorHeader
from superpose.checkpoints.names import fused_parts
from superpose.checkpoints.stamps import FileStamp, stamp
from superpose.kinds import MATRIX_KINDS, Kind
from superpose.own_code import code_digest
from superpose.planning.choices import ChosenMethods, acting_rule
from superpose.plug_ins import plug_in_digest
from superpose.recipe import Recipe
from superpose.registry import Cost, Method, find_method

CHUNK = 1 << 18
"""Entries of a tensor in flight at a time, where a method works entry by entry: small enough for the caches."""
SURVEY_CHUNK = 1 << 20
"""The same for surveys, whose counts cost a pass over all bins per chunk."""


@dataclass(frozen=True)
class Settings:
    """How a merge is run; nothing here changes a byte of the result, but for the device.

    Args:
        device: "cpu", "cuda", "cuda:N" or "auto".
        backend: name of a backend.
        workers: tensors at a time; None for one per core.
        memory: bytes in flight at most, over all workers.
        measure: whether to measure how well each task's features survive.
        overwrite: whether a finished output of that name is replaced.
        ray_address: of the cluster that the backend "ray" works on; None to start one on this machine.
        cache: folder in which costly results are kept from run to run, if any.
        cache_size: bytes of them at most.
        split_tensors: whether idle workers take part in another's tensor, where its method lets them.
        checksums: of each input file in the record: of a "sample" of its content, or of the "full" file.
    """

    device: str = "cpu"
    backend: str = "threads"
    workers: int | None = None
    memory: int = 4 * 2**30
    measure: bool = False
    overwrite: bool = False
    ray_address: str | None = None
    cache: str | None = None
    cache_size: int = 20 * 2**30
    split_tensors: bool = True
    checksums: str = "sample"


@dataclass(frozen=True)
class FactorOutput:
    """Where a tensor's update goes in an adapter, as two factors.

    Args:
        down: name of A in the adapter.
        up: name of B.
        transposed: whether the weight is stored in x out, so that the adapter holds the transposed update.
        kernel: sizes of a convolution's kernel, with which A ends.
        room: rank that there is room for.
        dtype: of the factors, as safetensors names it.
        rank: most directions kept; None for no limit.
        energy: share of the update's squared norm that the directions kept hold; 1 keeps all.
    """

    down: str
    up: str
    transposed: bool
    kernel: tuple[int, ...]
    room: int
    dtype: str = "F32"
    rank: int | None = None
    energy: float = 1.0

    @property
    def truncates(self) -> bool:
        """Whether directions can be left out."""
        return self.rank is not None or self.energy < 1

    def shapes(self, size: tuple[int, int], rank: int | None = None) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of A and B for an update of size out x in (kernels flattened)."""
        width = self.room if rank is None else rank
        return (width, size[1] // prod(self.kernel), *self.kernel), (size[0], width, *(1 for _ in self.kernel))


@dataclass(frozen=True)
class WorkItem:
    """One tensor of the output: where it comes from, what happens to it, where it goes.

    Args:
        name: in the output.
        kind: what it is in its network.
        kind_from: "module", "name" or "rule".
        action: "merge", or "copy" from the base.
        why: reason for a copy, "" for a merge.
        method: name of its method, "" for a copy.
        options: of the method.
        shape: its dimensions.
        dtype: of the output, as safetensors names it.
        compute: dtype of the arithmetic.
        base: the base's tensor.
        tuned: the tuned models' tensors, in the recipe's order; None where one does not have it.
        parts: axis and sizes of the maps that a fused projection is split into.
        names: under which the tensor is written; none where an adapter holds its update alone.
        factors: where its update goes in an adapter, if it goes there.
        in_factors: whether task matrices stay low-rank updates all the way.
        reads_base: whether the base's tensor is read.
        statistics: of each model on its data, for methods that need some; None where a model has none of the tensor.
        in_x_out: whether `statistics` are of a map that is stored in x out.
        learned: what was learned from data for the tensor, and which of its rows are the tuned models'.
        memory: bytes in flight while it is worked on.
        flops: floating point operations.
        key: digest of everything that its bytes depend on.
    """

    name: str
    kind: Kind
    kind_from: str
    action: Literal["merge", "copy"]
    why: str
    method: str
    options: Any
    shape: tuple[int, ...]
    dtype: str
    compute: torch.dtype
    base: TensorHeader
    tuned: tuple[TensorHeader | None, ...]
    parts: tuple[int, tuple[int, ...]] | None
    names: tuple[str, ...] = ()
    factors: FactorOutput | None = None
    in_factors: bool = False
    reads_base: bool = True
    statistics: tuple[TensorHeader | None, ...] = ()
    in_x_out: bool = False
    learned: tuple[TensorHeader, tuple[int, ...]] | None = None
    memory: int = 0
    flops: float = 0.0
    key: str = ""

    @property
    def numel(self) -> int:
        """Number of entries."""
        return prod(self.shape)

    @property
    def beside(self) -> Sequence[tuple[str, str, tuple[int, ...]]]:
        """Name, dtype and shape of each tensor that is written beside it."""
        beside = find_method(self.method).beside if self.action == "merge" else None
        return beside(self.name, self.numel, len(self.tuned)) if beside is not None else ()

    @property
    def size(self) -> tuple[int, int]:
        """Rows out and columns in of its update, kernels flattened."""
        flat = self.shape[0], prod(self.shape[1:])
        return (flat[1], flat[0]) if self.factors is not None and self.factors.transposed else flat

    @property
    def streams(self) -> bool:
        """Whether it can be merged piece by piece."""
        if self.factors is not None or self.in_factors:
            return False
        return self.action == "copy" or not find_method(self.method).sees_whole(self.kind)


def make_item(
    header: TensorHeader,
    kind: Kind,
    kind_from: str,
    sources: tuple[TensorHeader | None, ...],
    recipe: Recipe,
    chosen: ChosenMethods,
    architecture: Architecture,
) -> WorkItem:
    """Decide what happens to one tensor.

    Args:
        header: the base's tensor.
        kind: what it is in its network.
        kind_from: how that is known.
        sources: the tuned models' tensors.
        recipe: what was asked for.
        chosen: methods and options.
        architecture: for the groups of convolutions.

    Returns:
        The item, its cost and key still open.
    """
    rule = acting_rule(header.name, kind, recipe.rules)
    why, method_name, options = "", "", None
    statistics = header.name.endswith(("running_mean", "running_var"))
    if rule is not None and rule.keep:
        why, sources = f"rule {{{rule}}}", ()
    elif not header.is_float:
        why = "not a number that can be merged"
    elif kind is Kind.BUFFER and statistics and all(sources):
        # Task arithmetic on running variances can make them negative; their mean cannot.
        method_name, options = "average", find_method("average").options()
    elif kind is Kind.BUFFER:
        why = "buffer"
    else:
        method, options = chosen.of(rule if rule is not None and (rule.method or rule.options) else None)
        method_name = method.name
    dtypes = [header.dtype, *(source.dtype for source in sources if source)]
    dtype = header.dtype
    if recipe.dtype != "base" and header.is_float:
        dtype = DTYPE_NAMES[getattr(torch, recipe.dtype)]
    parts = fused_parts(header.name, header.shape)
    groups = architecture.groups.get(header.name, 1)
    if 1 < groups < header.shape[0] and header.shape[1] > 1:
        parts = 0, (header.shape[0] // groups,) * groups
    if kind is Kind.LINEAR and len(header.shape) == 3:
        parts = 0, (1,) * header.shape[0]  # experts: merged as they would be if each were stored by itself
    if method_name and _is_for_whole_tensors(find_method(method_name)):
        parts = None
    return WorkItem(
        name=header.name,
        kind=kind,
        kind_from=kind_from,
        action="merge" if method_name else "copy",
        why=why,
        method=method_name,
        options=options,
        shape=header.shape,
        dtype=dtype,
        compute=torch.float64 if "F64" in dtypes else torch.float32,
        base=header,
        tuned=sources,
        parts=parts if method_name else None,
        names=(header.name,),
    )


def _is_for_whole_tensors(method: Method) -> bool:
    """Whether maps of a fused projection make no difference: what lies beside a tensor is in the tensor's own order."""
    return method.beside is not None or method.statistics is not None or "learned" in method.wants


def with_common_dtype(items: Sequence[WorkItem]) -> list[WorkItem]:
    """Return the items with one dtype of arithmetic for all that a survey compares."""
    wide = {
        (item.method, item.options)
        for item in items
        if item.action == "merge" and find_method(item.method).survey and item.compute == torch.float64
    }
    return [replace(item, compute=torch.float64) if (item.method, item.options) in wide else item for item in items]


def with_cost(item: WorkItem, settings: Settings) -> WorkItem:
    """Return the item with what it takes in memory and arithmetic."""
    tasks, wide = len(item.tuned), item.compute.itemsize
    if item.action == "copy":
        return replace(item, memory=min(item.base.nbytes, CHUNK * 8), flops=float(item.numel))
    if item.in_factors:
        return _cost_in_factors(item, measures=settings.measure and item.kind in MATRIX_KINDS)
    method = find_method(item.method)
    measures = settings.measure and item.kind in MATRIX_KINDS
    counts = method.survey.memory(tasks, item.numel, item.compute) if method.survey else 0
    if item.streams and not measures:
        # Stacked task vectors, as much again for trimming, a few temporaries; surveys take larger pieces.
        piece = min(item.numel, SURVEY_CHUNK if method.survey else CHUNK)
        work = piece * wide * (2 * tasks + 4)
        if method.cost is not None and not method.whole_for:
            work = piece * wide * tasks + method.cost((piece,), tasks, item.options).memory
        memory = work + counts + _written_out(item)
        return replace(item, memory=memory, flops=20.0 * item.numel * tasks)
    share = prod(item.shape) if item.parts is None else prod(item.shape) // len(item.parts[1])
    shape = _part_shape(item)
    cost = method.cost(shape, tasks, item.options) if method.cost else Cost(3 * wide * share * (tasks + 1), 20.0)
    memory = cost.memory + counts + wide * share * (tasks + 3)
    if item.parts:  # copies of the pieces, and the result while it is put together
        memory += sum(header.nbytes for header in (item.base, *item.tuned) if header) + 3 * wide * item.numel
    if measures:
        memory += 8 * share * (tasks + 3)
    memory += _written_out(item)
    if item.factors is not None:  # what is merged, kept until it is decomposed, in float64 with its Gram matrix
        memory += 20 * item.numel + 32 * min(item.size) ** 2
    return replace(item, memory=memory, flops=cost.flops * (len(item.parts[1]) if item.parts else 1))


def _written_out(item: WorkItem) -> int:
    """Return the bytes of updates that are written out; DoRA's are made in float64."""
    adapted = [header for header in (item.base, *item.tuned) if isinstance(header, AdaptedTensor) and header.parts]
    whole = sum(item.compute.itemsize * (2 if header.onto is not None else 1) for header in adapted)
    return item.numel * (whole + (24 if any(header.magnitude is not None for header in adapted) else 0))


def _cost_in_factors(item: WorkItem, *, measures: bool) -> WorkItem:
    """Return the item with what it takes where task matrices stay factors: thin matrices, a system of their ranks."""
    ranks = [header.rank for header in item.tuned if isinstance(header, AdaptedTensor)]
    rank, (out, in_) = max(1, sum(ranks)), item.size
    memory = 8 * (6 * rank * (out + in_) + 8 * rank**2)
    survey = find_method(item.method).survey
    if survey is not None:  # aligned entries of every task, in the basis that all share
        memory += survey.memory(len(ranks), rank * in_, item.compute) + 8 * len(ranks) * rank * in_
    if item.names or measures:  # the update written out, and the base
        memory += 3 * item.compute.itemsize * item.numel
    return replace(item, memory=memory, flops=4.0 * rank**2 * (out + in_) + 40.0 * rank**3)


def _part_shape(item: WorkItem) -> tuple[int, ...]:
    if item.parts is None:
        return item.shape
    axis, sizes = item.parts
    return (*item.shape[:axis], max(sizes), *item.shape[axis + 1 :])


def stamps_of(items: Sequence[WorkItem]) -> dict[Path, FileStamp]:
    """Return what each file that the items read is now."""
    files = {file for item in items for header in sources_of(item) for file in files_of(header)}
    return {file: stamp(file) for file in sorted(files)}


def with_keys(
    items: Sequence[WorkItem],
    recipe: Recipe,
    weights: Sequence[float],
    settings: Settings,
    stamps: Mapping[Path, FileStamp],
) -> list[WorkItem]:
    """Name each item by everything that its bytes depend on, so that a restart knows what is done."""
    prints = {file: found.text for file, found in stamps.items()}
    common = [
        code_digest(), torch.__version__, settings.device, settings.measure, recipe.seed,
        list(weights), recipe.task_names, recipe.non_finite,
    ]  # fmt: skip

    def sources(item: WorkItem) -> list[Any]:
        return [identity(header, prints) for header in sources_of(item)]

    surveyed: dict[tuple[str, Any], str] = {}
    for item in items:
        group = (item.method, item.options)
        if item.action == "merge" and find_method(item.method).survey and group not in surveyed:
            members = [(other.name, sources(other)) for other in items if (other.method, other.options) == group]
            surveyed[group] = _digest(members)
    return [
        replace(
            item,
            key=_digest(
                [common, item.name, item.kind, item.action, item.method, item.options and asdict(item.options),
                 item.method and plug_in_digest(find_method(item.method).function.__module__),
                 item.dtype, str(item.compute), item.parts, sources(item), item.names, item.in_factors,
                 item.factors and asdict(item.factors), item.learned and item.learned[1],
                 surveyed.get((item.method, item.options))]
            ),
        )
        for item in items
    ]  # fmt: skip


def sources_of(item: WorkItem) -> tuple[TensorHeader | None, ...]:
    """Return the tensors that an item reads: the base's, if it does, each tuned model's, and what is known of them."""
    learned = (item.learned[0],) if item.learned is not None else ()
    return (item.base if item.reads_base else None, *item.tuned, *item.statistics, *learned)


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()
