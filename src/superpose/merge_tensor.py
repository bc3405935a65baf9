"""One work item: read, stack, subtract the base, merge, add the base, cast, write. Only here do files meet methods."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import reduce
from operator import iadd
from typing import Any

import torch
from torch import Tensor

import superpose.methods  # noqa: F401 - registers them, also in a process that begins by unpickling a function here
from superpose.checkpoints.adapted import AdaptedTensor
from superpose.checkpoints.headers import TensorHeader
from superpose.checkpoints.writer import as_bytes
from superpose.errors import SuperposeError
from superpose.kinds import MATRIX_KINDS, Kind
from superpose.maths.measures import Preservation, feature_preservation
from superpose.maths.randomness import Generator
from superpose.maths.side_by_side import alone
from superpose.maths.sparsify import Cuts, apply_cuts
from superpose.maths.svd import thin_svd
from superpose.non_finite import count, warnings_of
from superpose.outputs import Outputs
from superpose.parts import Context, Part, parts_of
from superpose.planning import CHUNK, SURVEY_CHUNK, WorkItem
from superpose.reading import read_tensor
from superpose.records import TensorRecord
from superpose.registry import Grams, Merged, MergedFactors, Method, find_method
from superpose.sink import Write


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
    sink = Outputs(item, write)
    outcomes: list[Outcome] = []
    if item.action == "copy":
        outcomes.append(_copy(item, context, sink))
    else:
        method = find_method(item.method)
        for part in parts_of(item, context):
            in_pieces = item.streams and not (context.measure and item.kind in MATRIX_KINDS)
            inputs = None if in_pieces or item.in_factors else part.read(0, part.base.numel())
            survey = None
            if method.survey is not None:
                state = surveys.get((item.method, item.options))
                survey = method.survey.for_tensor(part.name, part.chunks(SURVEY_CHUNK, inputs), state, item.options)
            try:
                with nullcontext() if context.split_tensors else alone():
                    if item.in_factors:
                        outcomes.append(_merge_in_factors(part, method, survey, sink))
                    elif inputs is None:
                        outcomes.append(_merge_in_pieces(part, method, survey, sink))
                    else:
                        outcomes.append(_merge_whole(part, *inputs, method, survey, sink))
            except torch.linalg.LinAlgError as error:  # pyright: ignore[reportPrivateImportUsage]
                what = f"{item.method} cannot decompose it: {str(error).partition(chr(10))[0]}"
                mend = "look at the values with superpose compare, or give it another method by a rule"
                raise SuperposeError(what, where=f"tensor {part.name}", mend=mend) from error
    with nullcontext() if context.split_tensors else alone():
        sha256, factors, numbers = sink.finish()
    outcome = _together(outcomes)
    troubles = tuple(context.cache.problems()) if context.cache else ()
    if item.action == "merge" and context.non_finite != "refuse":
        troubles += warnings_of(item, context.task_names, context.non_finite)
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
        stats={**outcome.stats, **numbers},
        measures=outcome.measures,
        warnings=outcome.warnings + troubles,
        seconds=round(time.perf_counter() - started, 4),
        beside=sink.beside,
        factors=factors,
        written=item.names if item.names != (item.name,) else (),
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


@dataclass(frozen=True)
class Outcome:
    """Numbers and warnings of one part."""

    stats: Mapping[str, Any] = field(default_factory=dict)
    measures: Mapping[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


def _merge_in_pieces(part: Part, method: Method, survey: Any, sink: Outputs) -> Outcome:
    """Merge a part entry by entry, a cacheful at a time."""
    warnings: tuple[str, ...] = ()
    stats: dict[str, Any] = {}
    digest = hashlib.sha256()
    numel = part.base.numel()
    for start in range(0, numel, CHUNK):
        stop = min(start + CHUNK, numel)
        stacked, base = part.read(start, stop)
        within = survey.within(start, stop) if survey is not None else None
        known = part.statistics(start, stop), part.learned(start, stop)
        merged = _call(method, part, stacked, base, within, part.generator.within(start), known)
        sink.add(merged.tensor, base, method.acts_on, part.not_finite(start, stop))
        sink.add_beside(merged.beside)
        warnings += _warnings(merged, part)
        stats = dict(merged.stats)  # a method that takes pieces has numbers of the whole model, or none
        if method.beside is not None:
            digest.update(as_bytes(part.base.reshape(-1)[start:stop]))
    if method.beside is not None:
        stats["base_sha256"] = digest.hexdigest()
    return Outcome(stats, warnings=tuple(dict.fromkeys(warnings)))


def _merge_whole(part: Part, stacked: Tensor, base: Tensor, method: Method, survey: Any, sink: Outputs) -> Outcome:
    """Merge a part that its method has to see as a whole; measure it if that is asked for."""
    shape = part.base.shape
    stacked, base = stacked.reshape(len(part.tuned), *shape), base.reshape(shape)
    statistics, learned = part.statistics(0, base.numel()), part.learned(0, base.numel())
    if isinstance(statistics, Tensor):
        statistics = statistics.reshape(stacked.shape)
    if learned is not None and learned.dtype == torch.bool:
        learned = learned.reshape(stacked.shape)
    known = statistics, learned
    merged = _call(method, part, stacked, base, survey, part.generator, known)
    measures: Mapping[str, Any] = {}
    if part.context.measure and part.item.kind in MATRIX_KINDS:
        measures = _measure(part, method, stacked, base, survey, known)
    sink.add(merged.tensor, base, method.acts_on, part.not_finite(0, base.numel()))
    sink.add_beside(merged.beside)
    stats = dict(merged.stats)
    if method.beside is not None:
        stats["base_sha256"] = hashlib.sha256(as_bytes(part.base)).hexdigest()
    return Outcome(stats, measures, _warnings(merged, part))


def _merge_in_factors(part: Part, method: Method, survey: Any, sink: Outputs) -> Outcome:
    """Merge a part whose task matrices are low-rank updates, by their factors."""
    merged = _call_in_factors(method, part, survey)
    measures: Mapping[str, Any] = {}
    if part.context.measure and part.item.kind in MATRIX_KINDS:
        unscaled = _call_in_factors(method, part, survey, **_unscaled(part)).update.matrix()
        kept = feature_preservation(unscaled, [task.features() for task in part.factors])
        measures = {"untrimmed": _as_record(kept, part)}
    sink.add_factors(merged.update, part)
    return Outcome(dict(merged.stats), measures, _warnings(merged, part))


def _call_in_factors(method: Method, part: Part, survey: Any, **changed: Any) -> MergedFactors:
    assert method.factored is not None, f"{method.name} merges no factors"
    return method.factored(
        part.factors, replace(part.item.options, **changed), kind=part.item.kind, survey=survey,
        generator=part.generator, weights=torch.tensor(part.context.weights, dtype=torch.float64),
        learned=part.learned(0, 0),
    )  # fmt: skip


def _unscaled(part: Part) -> dict[str, float]:
    """Return what turns the options into those of a merge without its final scaling."""
    return {"scaling_factor": 1.0} if hasattr(part.item.options, "scaling_factor") else {}


def _call(
    method: Method,
    part: Part,
    stacked: Tensor,
    base: Tensor,
    survey: Any,
    generator: Generator,
    known: tuple[Tensor | Grams | None, Tensor | None],
    **changed: Any,
) -> Merged:
    options = replace(part.item.options, **changed) if changed else part.item.options
    # Running statistics are averaged whatever the models weigh: a weighted variance can be negative.
    equal = part.item.kind is Kind.BUFFER
    weights = None if equal else torch.tensor(part.context.weights, dtype=torch.float64)
    return method(
        stacked, options, kind=part.item.kind, weights=weights, base=base, survey=survey, generator=generator,
        cache=part.context.cache, statistics=known[0], learned=known[1],
    )  # fmt: skip


def _measure(
    part: Part,
    method: Method,
    stacked: Tensor,
    base: Tensor,
    survey: Any,
    known: tuple[Tensor | Grams | None, Tensor | None],
) -> dict[str, Any]:
    """Measure how well the merged matrix, before scaling, answers the features of the task matrices."""
    if part.item.kind is Kind.LINEAR and len(part.base.shape) != 2:
        return {}  # a stack of maps: no single matrix
    merged = _call(method, part, stacked, base, survey, part.generator, known, **_unscaled(part)).tensor
    task_vectors = stacked
    if method.acts_on == "weights":
        merged, task_vectors = merged - base, stacked - base
    found = {"untrimmed": task_vectors.flatten(2)}
    cuts = survey if isinstance(survey, Cuts) else getattr(survey, "cuts", None)
    # Cuts of a random method are those of what it drew, not of the task vectors.
    if isinstance(cuts, Cuts) and "generator" not in method.wants:
        found["trimmed"] = apply_cuts(task_vectors, cuts).flatten(2)
    return {
        reference: _as_record(feature_preservation(merged.flatten(1), [thin_svd(matrix) for matrix in matrices]), part)
        for reference, matrices in found.items()
    }


def _as_record(kept: Preservation, part: Part) -> dict[str, Any]:
    by_task = dict(zip(part.context.task_names, kept.by_task, strict=True))
    return {"mean": kept.mean, "relative": kept.relative, "by_task": by_task, "features": kept.features}


def _copy(item: WorkItem, context: Context, sink: Outputs) -> Outcome:
    """Take a tensor over from the base; say so where the tuned models have another."""
    base = read_tensor(item.base).reshape(-1)
    for start in range(0, base.numel(), CHUNK):
        sink.copy(base[start : start + CHUNK])
    warnings: tuple[str, ...] = ()
    if item.kind is not Kind.BUFFER and (bad := count(base)):  # a buffer may well be a mask of -inf
        warnings = (f"{item.name}: {bad} entries of the base are NaN or infinite, and copied as they are",)
    other = [
        task
        for task, header in zip(context.task_names, item.tuned, strict=bool(item.tuned))
        if header is not None and _differs(header, base)
    ]
    if other:
        warnings += (f"{item.name}: {item.why}, copied from the base; {', '.join(other)} differ from it",)
    return Outcome(warnings=warnings)


def _differs(header: TensorHeader, base: Tensor) -> bool:
    if isinstance(header, AdaptedTensor) and header.onto is None:
        return bool(header.parts)  # what an adapter does not mention is the base's
    return not torch.equal(read_tensor(header).reshape(-1), base)


def _warnings(merged: Merged | MergedFactors, part: Part) -> tuple[str, ...]:
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
