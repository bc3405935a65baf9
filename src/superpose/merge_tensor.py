"""One work item: read, stack, subtract the base, merge, add the base, cast, write. Only here do files meet methods."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, reduce
from operator import iadd
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from superpose.checkpoints.folder import formats
from superpose.checkpoints.headers import TORCH_DTYPES, Reader, TensorHeader, TensorInMemory
from superpose.checkpoints.writer import as_bytes
from superpose.errors import SuperposeError
from superpose.kinds import MATRIX_KINDS, Kind
from superpose.maths.measures import feature_preservation
from superpose.maths.randomness import Generator
from superpose.maths.sparsify import Cuts, apply_cuts
from superpose.maths.streaming import TensorChunks
from superpose.maths.svd import thin_svd
from superpose.planning import CHUNK, SURVEY_CHUNK, WorkItem
from superpose.records import TensorRecord
from superpose.registry import Merged, Method, find_method

Write = Callable[[str, int, Tensor], memoryview]
"""(tensor name, first byte within the tensor, piece in the output's dtype) -> the bytes written."""


@dataclass(frozen=True)
class Context:
    """What all items of a merge share.

    Args:
        task_names: one per tuned model.
        weights: one per tuned model.
        device: where the arithmetic is done.
        measure: whether to measure how well each task's features survive.
        seed: of random numbers.
    """

    task_names: tuple[str, ...]
    weights: tuple[float, ...]
    device: torch.device
    measure: bool
    seed: int = 0


@dataclass(frozen=True)
class Part:
    """One map of a tensor (the whole of it, or one of a fused projection), as contiguous views of the files."""

    item: WorkItem
    context: Context
    name: str
    base: Tensor
    tuned: tuple[Tensor, ...]

    def chunks(self, size: int) -> TensorChunks:
        """Return the part's task vectors (or weights, if its method acts on them), read in pieces."""
        return TensorChunks(
            len(self.tuned), self.base.numel(), size, self.stacked, self.context.weights,
            tuple(self.base.shape), self.item.kind, self.generator,
        )  # fmt: skip

    @property
    def generator(self) -> Generator:
        """The part's random numbers."""
        return Generator(self.context.seed, self.name, self.context.task_names)

    def stacked(self, start: int, stop: int) -> Tensor:
        """Return entries start..stop of the flattened task vectors (or weights).

        Args:
            start: first entry.
            stop: one past the last entry.

        Returns:
            New memory, shape (tasks, entries).

        Raises:
            SuperposeError: an input holds NaN or infinity.
        """
        on_weights = find_method(self.item.method).acts_on == "weights"
        base = None if on_weights else self.base_piece(start, stop)
        # New memory, never a view of a file: what a method does to it cannot reach the inputs.
        stacked = torch.empty((len(self.tuned), stop - start), dtype=self.item.compute, device=self.context.device)
        for row, tensor in zip(stacked, self.tuned, strict=True):
            row.copy_(tensor.reshape(-1)[start:stop])
            if base is not None:
                row -= base
        if not _is_finite(stacked) or (base is None and not _is_finite(self.base_piece(start, stop))):
            raise self._not_finite(start, stop)
        return stacked

    def base_piece(self, start: int, stop: int) -> Tensor:
        """Return entries start..stop of the flattened base, in the dtype and on the device of the arithmetic."""
        return self.base.reshape(-1)[start:stop].to(self.context.device, self.item.compute)

    def _not_finite(self, start: int, stop: int) -> SuperposeError:
        """Return an error that names the input with NaN or infinity in it."""
        for header, tensor in zip((self.item.base, *self.item.tuned), (self.base, *self.tuned), strict=True):
            bad = int((~torch.isfinite(tensor.reshape(-1)[start:stop])).sum())
            if bad and header is not None:
                return SuperposeError(
                    f"{bad} entries are NaN or infinite",
                    where=f"{header.file}, tensor {header.name}",
                    mend="use a checkpoint without them, or keep the base's tensor by a rule",
                )
        return SuperposeError(
            "a difference of finite weights is infinite",
            where=f"{self.item.base.file}, tensor {self.item.name}",
            mend="the models differ by more than float32 can hold; check that they belong together",
        )


class _Sink:
    """Takes an item's result piece by piece, in order, and writes it at its place."""

    def __init__(self, item: WorkItem, write: Write) -> None:
        self._item, self._write = item, write
        self._digest, self._position = hashlib.sha256(), 0
        self._beside = [(name, hashlib.sha256()) for name, _, _ in item.beside]
        self._beside_position = 0
        self._pending: list[Tensor] = []
        # Parts that are columns lie scattered over the tensor: they are put together first.
        self._scattered = item.parts is not None and item.parts[0] != 0

    def add(self, piece: Tensor) -> None:
        """Take the next entries of the flattened result, in the dtype of the arithmetic."""
        cast = piece.reshape(-1).to(TORCH_DTYPES[self._item.dtype])
        if self._item.action == "merge" and not _is_finite(cast):
            raise SuperposeError(
                f"the merged tensor is too large for {self._item.dtype}",
                where=f"tensor {self._item.name}",
                mend="choose a wider --dtype, such as float32, or a smaller scaling factor",
            )
        if self._scattered:
            self._pending.append(cast)
        else:
            self._put(cast)

    def add_beside(self, pieces: Sequence[Tensor]) -> None:
        """Take the next entries of what is written beside the tensor."""
        written = 0
        for (name, digest), piece in zip(self._beside, pieces, strict=True):
            data = self._write(name, self._beside_position, piece)
            digest.update(data)
            written = len(data)
        self._beside_position += written

    @property
    def beside(self) -> dict[str, str]:
        """Digests of what was written beside the tensor, by name."""
        return {name: digest.hexdigest() for name, digest in self._beside}

    def finish(self) -> str:
        """Write what is left and return the digest of everything written."""
        if self._scattered and self._item.parts is not None:
            axis, sizes = self._item.parts
            shape = self._item.shape
            flat = torch.cat(self._pending)
            lengths = [flat.numel() // sum(sizes) * size for size in sizes]
            blocks = [
                block.reshape(*shape[:axis], size, *shape[axis + 1 :])
                for block, size in zip(flat.split(lengths), sizes, strict=True)
            ]
            self._put(torch.cat(blocks, dim=axis).reshape(-1))
        return self._digest.hexdigest()

    def _put(self, cast: Tensor) -> None:
        data = self._write(self._item.name, self._position, cast)
        self._digest.update(data)
        self._position += len(data)


def merge_item(item: WorkItem, surveys: Mapping[Any, Any], context: Context, write: Write) -> TensorRecord:
    """Compute one tensor of the output and write it.

    Args:
        item: what to do.
        surveys: (method name, options) -> what the survey ended with.
        context: what all items share.
        write: takes the result, piece by piece.

    Returns:
        The tensor's record.

    Raises:
        SuperposeError: an input holds NaN or infinity.
    """
    started = time.perf_counter()
    sink = _Sink(item, write)
    outcomes: list[Outcome] = []
    if item.action == "copy":
        outcomes.append(_copy(item, context, sink))
    else:
        method = find_method(item.method)
        for part in parts_of(item, context):
            survey = None
            if method.survey is not None:
                state = surveys.get((item.method, item.options))
                survey = method.survey.for_tensor(part.name, part.chunks(SURVEY_CHUNK), state, item.options)
            in_pieces = item.streams and not (context.measure and item.kind in MATRIX_KINDS)
            merge = _merge_in_pieces if in_pieces else _merge_whole
            try:
                outcomes.append(merge(part, method, survey, sink))
            except torch.linalg.LinAlgError as error:  # pyright: ignore[reportPrivateImportUsage]
                what = f"{item.method} cannot decompose it: {str(error).partition(chr(10))[0]}"
                mend = "look at the values with superpose compare, or give it another method by a rule"
                raise SuperposeError(what, where=f"tensor {part.name}", mend=mend) from error
    sha256 = sink.finish()
    outcome = _together(outcomes)
    return TensorRecord(
        name=item.name,
        kind=str(item.kind),
        kind_from=item.kind_from,
        action=item.action,
        method=item.method,
        dtype=item.dtype,
        shape=item.shape,
        parts=len(item.parts[1]) if item.parts else 1,
        sha256=sha256,
        stats=outcome.stats,
        measures=outcome.measures,
        warnings=outcome.warnings,
        seconds=round(time.perf_counter() - started, 4),
        beside=sink.beside,
    )


def survey_item(item: WorkItem, step: int, state: Any, context: Context) -> Any:
    """Return one tensor's value for one pass of its method's survey."""
    survey = find_method(item.method).survey
    assert survey is not None, f"method {item.method} has no survey"
    return reduce(
        iadd,
        (
            survey.measure(step, part.name, part.chunks(SURVEY_CHUNK), state, item.options)
            for part in parts_of(item, context)
        ),
    )


def close_readers() -> None:
    """Close all input files that were kept open."""
    _reader.cache_clear()


@dataclass(frozen=True)
class Outcome:
    """Numbers and warnings of one part."""

    stats: Mapping[str, Any] = field(default_factory=dict)
    measures: Mapping[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


def _merge_in_pieces(part: Part, method: Method, survey: Any, sink: _Sink) -> Outcome:
    """Merge a part entry by entry, a cacheful at a time."""
    warnings: tuple[str, ...] = ()
    stats: dict[str, Any] = {}
    digest = hashlib.sha256()
    for start, stacked in part.chunks(CHUNK):
        stop = start + stacked.shape[1]
        within = survey.within(start, stop) if survey is not None else None
        base = part.base_piece(start, stop)
        merged = _call(method, part, stacked, base, within, part.generator.within(start))
        sink.add(merged.tensor if method.acts_on == "weights" else merged.tensor + base)
        sink.add_beside(merged.beside)
        warnings += _warnings(merged, part)
        stats = dict(merged.stats)  # a method that takes pieces has numbers of the whole model, or none
        if method.beside is not None:
            digest.update(as_bytes(part.base.reshape(-1)[start:stop]))
    if method.beside is not None:
        stats["base_sha256"] = digest.hexdigest()
    return Outcome(stats, warnings=tuple(dict.fromkeys(warnings)))


def _merge_whole(part: Part, method: Method, survey: Any, sink: _Sink) -> Outcome:
    """Merge a part that its method has to see as a whole; measure it if that is asked for."""
    shape, numel = part.base.shape, part.base.numel()
    stacked = part.stacked(0, numel).reshape(len(part.tuned), *shape)
    base = part.base_piece(0, numel).reshape(shape)
    merged = _call(method, part, stacked, base, survey, part.generator)
    measures: Mapping[str, Any] = {}
    if part.context.measure and part.item.kind in MATRIX_KINDS:
        measures = _measure(part, method, stacked, base, survey)
    sink.add(merged.tensor if method.acts_on == "weights" else merged.tensor + base)
    sink.add_beside(merged.beside)
    stats = dict(merged.stats)
    if method.beside is not None:
        stats["base_sha256"] = hashlib.sha256(as_bytes(part.base)).hexdigest()
    return Outcome(stats, measures, _warnings(merged, part))


def _call(
    method: Method, part: Part, stacked: Tensor, base: Tensor, survey: Any, generator: Generator, **changed: Any
) -> Merged:
    options = replace(part.item.options, **changed) if changed else part.item.options
    # Running statistics are averaged whatever the models weigh: a weighted variance can be negative.
    equal = part.item.kind is Kind.BUFFER
    weights = None if equal else torch.tensor(part.context.weights, dtype=torch.float64)
    return method(stacked, options, kind=part.item.kind, weights=weights, base=base, survey=survey, generator=generator)


def _measure(part: Part, method: Method, stacked: Tensor, base: Tensor, survey: Any) -> dict[str, Any]:
    """Measure how well the merged matrix, before scaling, answers the features of the task matrices."""
    if part.item.kind is Kind.LINEAR and len(part.base.shape) != 2:
        return {}  # a stack of maps: no single matrix
    scales = hasattr(part.item.options, "scaling_factor")
    unscaled = {"scaling_factor": 1.0} if scales else {}
    merged = _call(method, part, stacked, base, survey, part.generator, **unscaled).tensor
    task_vectors = stacked
    if method.acts_on == "weights":
        merged, task_vectors = merged - base, stacked - base
    found = {"untrimmed": task_vectors.flatten(2)}
    cuts = survey if isinstance(survey, Cuts) else getattr(survey, "cuts", None)
    # Cuts of a random method are those of what it drew, not of the task vectors.
    if isinstance(cuts, Cuts) and "generator" not in method.wants:
        found["trimmed"] = apply_cuts(task_vectors, cuts).flatten(2)
    measures = {}
    for reference, matrices in found.items():
        kept = feature_preservation(merged.flatten(1), [thin_svd(matrix) for matrix in matrices])
        by_task = dict(zip(part.context.task_names, kept.by_task, strict=True))
        measures[reference] = {
            "mean": kept.mean, "relative": kept.relative, "by_task": by_task, "features": kept.features
        }  # fmt: skip
    return measures


def _copy(item: WorkItem, context: Context, sink: _Sink) -> Outcome:
    """Take a tensor over from the base; say so where the tuned models have another."""
    base = _read(item.base).reshape(-1)
    for start in range(0, base.numel(), CHUNK):
        sink.add(base[start : start + CHUNK])
    other = [
        task
        for task, header in zip(context.task_names, item.tuned, strict=bool(item.tuned))
        if header is not None and not torch.equal(_read(header).reshape(-1), base)
    ]
    if not other:
        return Outcome()
    return Outcome(warnings=(f"{item.name}: {item.why}, copied from the base; {', '.join(other)} differ from it",))


def parts_of(item: WorkItem, context: Context) -> Iterator[Part]:
    """Yield the maps that a tensor holds: itself, or each of a fused projection."""
    tensors = [_read(header) for header in (item.base, *item.tuned) if header is not None]
    if item.parts is None:
        yield Part(item, context, item.name, tensors[0], tuple(tensors[1:]))
        return
    axis, sizes = item.parts
    blocks = [tensor.split(list(sizes), dim=axis) for tensor in tensors]
    for number, (base, *tuned) in enumerate(zip(*blocks, strict=True)):
        name = f"{item.name}#{number}"
        yield Part(item, context, name, base.contiguous(), tuple(tensor.contiguous() for tensor in tuned))


def _read(header: TensorHeader) -> Tensor:
    if isinstance(header, TensorInMemory):
        return header.tensor
    status = header.file.stat()
    return _reader(header.file, status.st_size, status.st_mtime_ns).read(header.name)


@lru_cache(maxsize=1024)
def _reader(file: Path, size: int, changed: int) -> Reader:
    """Open a file once; again if it was written anew."""
    del size, changed
    return formats()[file.suffix].open(file)


def _is_finite(tensor: Tensor) -> bool:
    # One sum is a fourth of the cost of asking every entry; only a sum that is not finite needs the answer.
    return math.isfinite(float(tensor.sum())) or bool(torch.isfinite(tensor).all())


def _warnings(merged: Merged, part: Part) -> tuple[str, ...]:
    names = part.context.task_names
    return tuple(
        f"{part.name}: {caution.text}"
        + (f" (tasks: {', '.join(names[task] for task in caution.tasks)})" if caution.tasks else "")
        for caution in merged.cautions
    )


def _together(outcomes: Sequence[Outcome]) -> Outcome:
    """Return one tensor's outcome from those of its parts, numbered where there are several."""
    warnings = tuple(dict.fromkeys(warning for outcome in outcomes for warning in outcome.warnings))
    if len(outcomes) == 1:
        return Outcome(outcomes[0].stats, outcomes[0].measures, warnings)
    numbered = list(enumerate(outcomes))
    stats = {f"part {number}": outcome.stats for number, outcome in numbered if outcome.stats}
    measures = {f"part {number}": outcome.measures for number, outcome in numbered if outcome.measures}
    return Outcome(stats, measures, warnings)
