"""Run a plan: survey passes, work items, sidecars, record, and the rename that makes the output appear."""

from __future__ import annotations

import contextlib
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from operator import iadd
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from superpose.adapter_folder import write_adapter
from superpose.backends import Backend, make_backend
from superpose.checkpoints.adapted import AdaptedTensor
from superpose.checkpoints.folder import Checkpoint
from superpose.checkpoints.headers import TORCH_DTYPES
from superpose.checkpoints.lora import Adapter
from superpose.checkpoints.sidecars import copy_sidecars
from superpose.checkpoints.stamps import file_digest, stamp
from superpose.checkpoints.writer import Layout, StreamWriter, as_bytes
from superpose.decompositions import open_cache
from superpose.elsewhere import MergeElsewhere, merge_elsewhere, with_inputs_checked
from superpose.errors import SuperposeError, raise_all
from superpose.free_memory import free_memory
from superpose.journal import Journal
from superpose.learning import STATE_FOLDER, learn_first
from superpose.merge_tensor import merge_item, survey_item
from superpose.output_folder import locked, make_partial, publish, remove_strangers, settle_replaced, write_record
from superpose.own_code import code_digest
from superpose.parts import Context
from superpose.planning import LEARNED_FILE, Plan, WorkItem, check_output
from superpose.plug_ins import plug_in_digest
from superpose.reading import close_readers, read_ahead
from superpose.records import RunRecord, TensorRecord
from superpose.registry import Cache, find_method
from superpose.relatedness import doubts
from superpose.report.card import model_card
from superpose.task_sets import write_tasks
from superpose.watch import Watch, watched

INDEX_FILE = "model.safetensors.index.json"


@dataclass(frozen=True)
class Progress:
    """How far a merge has come.

    Args:
        phase: "learn", "survey" or "merge".
        done: tensors done, in this phase; steps, where something is learned.
        total: tensors (or steps) to do, in this phase.
        bytes_done: bytes of the output, or read by the survey, done; steps, where something is learned.
        bytes_total: bytes to do.
    """

    phase: str
    done: int
    total: int
    bytes_done: int
    bytes_total: int


Report = Callable[[Progress], None]


def run_plan(plan: Plan, output: Path, report: Report | None = None, cache: Cache | None = None) -> RunRecord:
    """Run a plan.

    Args:
        plan: what to do.
        output: folder of the result; appears when all of it is written.
        report: called as the merge goes on.
        cache: of costly results; the one that the plan's settings name when not given.

    Returns:
        The record, which is also in the output.

    Raises:
        SuperposeError: the output exists already, another merge writes it, the disk is full, or an input holds NaN.
    """
    started = time.perf_counter()
    partial_folder = output.with_name(output.name + ".partial")
    settings = plan.settings
    if cache is None and settings.cache is not None:
        if partial_folder in (Path(settings.cache), *Path(settings.cache).parents):
            mend = "name a folder that is not the output's"
            raise SuperposeError(
                "the cache would become part of the output", where=f"--cache {settings.cache}", mend=mend
            )
        cache = open_cache(Path(settings.cache), settings.cache_size)
    with locked(partial_folder), contextlib.ExitStack() as ending:
        ending.callback(close_readers)
        settle_replaced(output)
        raise_all(check_output(plan.base, plan.tuned, output, overwrite=plan.settings.overwrite))
        make_partial(partial_folder)
        journal = Journal(partial_folder)
        remove_strangers(partial_folder, plan.layout, keep=(LEARNED_FILE, STATE_FOLDER))
        plan, learned = _learn(plan, partial_folder, report or (lambda _: None), cache)
        budget = _budget(plan)
        backend = make_backend(settings.backend, settings.workers, budget, settings.ray_address)
        ending.callback(backend.close)
        watch = Watch(plan.stamps)
        with watch.over(*plan.items):
            plan = replace(plan, notes=(*plan.notes, *doubts(plan.items, plan.recipe.task_names)))
        backend = watched(with_inputs_checked(backend, plan.items), watch)
        with contextlib.closing(StreamWriter(partial_folder, plan.layout)) as writer:
            finished = journal.finished(plan.items, writer)
            records = _merge_all(plan, backend, watch, journal, writer, finished, report or (lambda _: None), cache)
            writer.sync()
        if plan.recipe.output.form != "model":
            records = write_adapter(partial_folder, plan, records)
        watch.check_all()
        record = _make_record(plan, output, records, backend, len(finished), time.perf_counter() - started)
        record = replace(record, learned=learned)
        record = _write_sidecars(plan, partial_folder, record)
        raise_all(check_output(plan.base, plan.tuned, output, overwrite=plan.settings.overwrite))
        publish(partial_folder, output)
    return record


def merge_in_memory(items: Sequence[WorkItem], context: Context) -> tuple[dict[str, Tensor], dict[str, TensorRecord]]:
    """Merge tensors that are in memory, by the same passes and per-tensor code as files.

    Args:
        items: one per tensor.
        context: what all items share.

    Returns:
        The merged tensors by name, with those beside them, and each tensor's record.
    """
    outputs = [(item.name, item.dtype, item.shape) for item in items]
    outputs += [tensor for item in items for tensor in item.beside]
    merged = {name: torch.empty(shape, dtype=TORCH_DTYPES[dtype]) for name, dtype, shape in outputs}

    def write(name: str, start: int, piece: Tensor) -> memoryview:
        data, target = as_bytes(piece), as_bytes(merged[name])
        target[start : start + len(data)] = data
        return data

    backend = make_backend("serial", None, 0)
    surveys = survey_all(items, items, backend, context, lambda _: None)
    work = partial(merge_item, surveys=surveys, context=context, write=write)
    records = {record.name: record for _, record in backend.map(work, items, [item.memory for item in items])}
    return merged, records


def _learn(plan: Plan, folder: Path, report: Report, cache: Cache | None) -> tuple[Plan, Mapping[str, Any]]:
    """Learn what the method learns from data, on this machine, before anything is merged."""
    context = _context(plan, cache)

    def tell(done: int, total: int) -> None:
        report(Progress("learn", done, total, done, total))

    def surveys(items: Sequence[WorkItem], of: Context) -> Mapping[Any, Any]:
        backend = make_backend("threads", plan.settings.workers, plan.settings.memory)
        try:
            return survey_all(items, items, backend, of, report)
        finally:
            backend.close()

    return learn_first(plan, folder, context, surveys, tell)


def _budget(plan: Plan) -> int:
    """Return the bytes in flight that are asked for, or fewer where there are not as many.

    Args:
        plan: of the merge.

    Returns:
        Bytes.

    Raises:
        SuperposeError: a tensor needs more by itself.
    """
    asked = plan.settings.memory
    if plan.settings.backend == "ray":  # on other machines; Ray is told what each item needs
        return asked
    room = free_memory(mapped=sum(known.size for known in plan.stamps.values()))
    largest = max(plan.items, key=lambda item: item.memory, default=None)
    if room is None or largest is None:
        return asked
    if largest.memory > room.bytes:
        need, left = largest.memory / 2**30, room.bytes / 2**30
        what = f"not enough memory: {need:.2f} GiB are needed for one tensor, {left:.2f} GiB can be had"
        mend = f"raise that limit ({room.limit}), or give such tensors a method that needs less by a rule"
        raise SuperposeError(what, where=f"tensor {largest.name}, method {largest.method}", mend=mend)
    return min(asked, room.bytes)


def _context(plan: Plan, cache: Cache | None) -> Context:
    return Context(
        plan.recipe.task_names,
        plan.weights,
        torch.device(device_of(plan.settings.device)),
        plan.settings.measure,
        plan.recipe.seed,
        cache,
        plan.settings.split_tensors,
        plan.recipe.non_finite,
    )


def _merge_all(
    plan: Plan,
    backend: Backend,
    watch: Watch,
    journal: Journal,
    writer: StreamWriter,
    finished: Mapping[str, TensorRecord],
    report: Report,
    cache: Cache | None,
) -> list[TensorRecord]:
    """Merge what is not finished, largest first, and return all records by name."""
    context = _context(plan, cache)
    waiting = [item for item in plan.items if item.name not in finished]
    surveys = survey_all(plan.items, waiting, backend, context, report)
    waiting.sort(key=lambda item: (-item.memory, -item.flops, item.name))
    sizes = {item.name: _bytes_written(item, plan.layout) for item in plan.items}
    records = dict(finished)
    total = sum(sizes.values())

    following = dict(zip((item.name for item in waiting), waiting[backend.workers :], strict=False))

    def work(item: WorkItem) -> TensorRecord:
        if item.name in following:
            read_ahead(following[item.name])
        with watch.over(item):
            record = merge_item(item, surveys, context, writer.write)
        journal.add(item, record)  # by the worker: what is done is noted even if the caller stops waiting
        return record

    def tell() -> None:
        report(Progress("merge", len(records), len(plan.items), sum(sizes[name] for name in records), total))

    tell()
    if backend.in_process:
        results = backend.map(work, waiting, [item.memory for item in waiting])
    else:
        results = merge_elsewhere(
            waiting, MergeElsewhere(surveys, context, plan.layout, writer.folder), backend, journal, writer
        )
    # Interrupted between two records, it waits for tensors in flight here, where a second signal ends the wait.
    with contextlib.closing(results):
        for _, record in results:
            records[record.name] = record
            tell()
    return [records[name] for name in sorted(records)]


def _bytes_written(item: WorkItem, layout: Layout) -> int:
    factors = (item.factors.down, item.factors.up) if item.factors is not None else ()
    return sum(layout.slots[name].nbytes for name in (*item.names, *factors))


def survey_all(
    items: Sequence[WorkItem], waiting: Sequence[WorkItem], backend: Backend, context: Context, report: Report
) -> dict[Any, Any]:
    """Run the survey passes of every method (and options) that an unfinished item needs.

    Args:
        items: all of the model's.
        waiting: those that are not finished.
        backend: where it is done.
        context: what all items share.
        report: called as the passes go on.

    Returns:
        (method name, options) -> what the survey ended with.
    """
    groups: dict[Any, list[WorkItem]] = {}
    for item in waiting:
        if item.action == "merge" and find_method(item.method).survey is not None:
            groups.setdefault((item.method, item.options), [])
    for item in items:  # over all of the model, finished or not
        if item.action == "merge" and (item.method, item.options) in groups:
            groups[item.method, item.options].append(item)
    states: dict[Any, Any] = {}
    for (name, options), members in groups.items():
        survey = find_method(name).survey
        assert survey is not None
        # One dtype for all tensors: thresholds are compared across them.
        dtype = torch.float64 if any(item.compute == torch.float64 for item in members) else torch.float32
        passes, state = survey.passes(options, dtype), None
        numel = sum(item.numel for item in members)
        for step in range(passes):
            values = backend.map(
                partial(survey_item, step=step, state=state, context=context),
                members,
                [item.memory for item in members],
            )
            with contextlib.closing(values):
                total = _add_in_order(values, members, numel, step, passes, report)
            state = survey.finish(step, total, state, options, dtype)
        if passes:
            states[name, options] = state
    return states


def _add_in_order(values, items: Sequence[WorkItem], numel: int, step: int, passes: int, report: Report) -> Any:
    """Add values up in the order of the plan, whichever comes first."""
    total, following, early, seen = None, 0, {}, 0
    for index, value in values:
        early[index] = value
        seen += items[index].numel
        while following in early:
            value = early.pop(following)
            total = value if total is None else iadd(total, value)  # in place where values can: tables are large
            following += 1
        done = step * len(items) + following + len(early)
        report(Progress("survey", done, passes * len(items), step * numel + seen, passes * numel))
    return total


def device_of(name: str) -> str:
    """Return the device that a name stands for: "auto" is the GPU where there is one."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return name


def _write_sidecars(plan: Plan, folder: Path, record: RunRecord) -> RunRecord:
    """Write what lies beside the weights, the record last; return it with the digests of all the rest."""
    if plan.recipe.output.form == "adapter":
        copy_sidecars(plan.base.folder, {}, folder, None)  # the tokenizer; a config.json would make it a model
    else:
        _write_model_config(plan, folder)
    index = plan.layout.index()
    if index is not None:
        (folder / INDEX_FILE).write_text(index, encoding="utf-8")
    (folder / "README.md").write_text(model_card(record, plan.base.config), encoding="utf-8", errors="backslashreplace")
    write_tasks(folder, record, plan.recipe.task_names)
    return write_record(folder, plan.layout, record)


def _write_model_config(plan: Plan, folder: Path) -> None:
    dtype = None if plan.recipe.dtype == "base" else next((i.dtype for i in plan.items if i.base.is_float), None)
    copy_sidecars(plan.base.folder, plan.base.config, folder, dtype)


def _truncation(records: Sequence[TensorRecord]) -> dict[str, float]:
    """Return how far the adapter is from the merged update over all tensors, relative to the update's norm."""
    found = [record.stats for record in records if record.factors]
    if not found:
        return {}
    whole = sum(stats["update_norm"] ** 2 for stats in found)
    lost = sum((stats["update_norm"] * stats["truncation_error"]) ** 2 for stats in found)
    return {"truncation_error": (lost / whole) ** 0.5 if whole else 0.0}


def _plug_ins(plan: Plan) -> dict[str, str]:
    """Return the digest of each plug-in whose method merged something."""
    used = {item.method: find_method(item.method).function.__module__ for item in plan.items if item.method}
    return {f"method {name}": digest for name, module in sorted(used.items()) if (digest := plug_in_digest(module))}


def _place(checkpoint: Checkpoint | Adapter) -> str:
    """Return where a checkpoint can be found from any folder."""
    if "+" in checkpoint.name and any(isinstance(header, AdaptedTensor) for header in checkpoint.tensors.values()):
        return checkpoint.name  # MODEL+ADAPTER: two places
    if checkpoint.revision:
        return f"{checkpoint.name.partition('@')[0]}@{checkpoint.revision}"
    if not checkpoint.folder and not checkpoint.files:
        return checkpoint.name  # a base that was not opened
    return str((checkpoint.folder or checkpoint.files[0]).resolve())


def _marked(file: Path, plan: Plan) -> dict[str, Any]:
    """Return what a record says of an input file, by which it can be told from another."""
    known = plan.stamps.get(file) or stamp(file)
    found = {"name": file.name, "bytes": known.size, "path": str(file.absolute()), "sample": known.sample}
    return {**found, "sha256": file_digest(file)} if plan.settings.checksums == "full" else found


def _make_record(
    plan: Plan, output: Path, records: Sequence[TensorRecord], backend: Backend, resumed: int, seconds: float
) -> RunRecord:
    recipe = plan.recipe.model_dump(mode="json")
    recipe["options"] = asdict(plan.options)
    sources = tuple(
        {
            "name": name,
            "path": checkpoint.name,
            "place": _place(checkpoint),
            "revision": checkpoint.revision,
            "files": [_marked(file, plan) for file in checkpoint.files],
            **({"statistics": dict(statistics)} if statistics else {}),
        }
        for name, checkpoint, statistics in zip(
            ("base", *plan.recipe.task_names),
            (plan.base, *plan.tuned),
            ({}, *(plan.statistics or [{}] * len(plan.tuned))),
            strict=True,
        )
    )
    warnings = tuple(plan.notes) + tuple(warning for record in records for warning in record.warnings)
    return RunRecord(
        output=str(output),
        recipe=recipe,
        sources=sources,
        versions={
            "superpose": version("superpose"),
            "code": code_digest(),
            "torch": torch.__version__,
            "python": platform.python_version(),
            **_plug_ins(plan),
        },
        settings={**asdict(plan.settings), **backend.facts(), "arithmetic_threads_per_worker": 1},
        tensors=tuple(records),
        warnings=warnings,
        totals={
            "tensors": len(records),
            "merged": sum(record.action == "merge" for record in records),
            "copied": sum(record.action == "copy" for record in records),
            "resumed": resumed,
            "bytes_read": plan.bytes_read,
            "bytes_written": plan.layout.file_bytes,
            "seconds": round(seconds, 3),
            **_truncation(records),
        },
    )
