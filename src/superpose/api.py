"""One function per verb of the command line."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import superpose.methods  # noqa: F401 - registers the methods
from superpose import task_sets, verification
from superpose.backends import make_backend
from superpose.checkpoints.architecture import read_architecture
from superpose.checkpoints.folder import Checkpoint
from superpose.checkpoints.headers import TensorHeader
from superpose.checkpoints.lora import Adapter
from superpose.checkpoints.models import open_model
from superpose.checkpoints.names import kind_of
from superpose.comparison import Comparison, compare_items, group_tensors, suggestions
from superpose.decompositions import open_cache
from superpose.elsewhere import with_inputs_checked
from superpose.errors import SuperposeError, raise_all
from superpose.evaluators import Evaluation, evaluate_model, find_evaluator, silent
from superpose.kinds import Kind
from superpose.parts import Context
from superpose.places import absolute
from superpose.planning import Plan, Settings, make_plan
from superpose.planning.checks import check_device
from superpose.reading import close_readers
from superpose.recipe import Recipe, load_recipe, parse_bytes
from superpose.records import RunRecord
from superpose.registry import Method, registered
from superpose.run import Report, device_of, run_plan
from superpose.statistics import Advance, Request, check_output_file, compute, prepare
from superpose.task_data import TaskData, make_task
from superpose.verification import Verification

FACTOR = "{scaling_factor}"
"""Stands for the scaling factor in the name of an output."""


def merge(
    recipe: Recipe | Mapping[str, Any] | str | Path,
    output: str | Path,
    *,
    device: str = "cpu",
    backend: str = "threads",
    workers: int | None = None,
    memory: int | str = "4GiB",
    measure: bool = False,
    overwrite: bool = False,
    ray_address: str | None = None,
    cache: str | Path | None = None,
    cache_size: int | str = "20GiB",
    split_tensors: bool = True,
    checksums: str = "sample",
    report: Report | None = None,
) -> RunRecord:
    """Merge checkpoints into a folder.

    Interrupted, it goes on where it was when called again; the folder appears when it is complete.

    Args:
        recipe: a recipe, a mapping like it, or the path of a YAML file.
        output: folder of the result.
        device: "cpu", "cuda", "cuda:N" or "auto".
        backend: "threads", "serial" or "ray"; the bytes are the same.
        workers: tensors at a time; None for one per core.
        memory: bytes in flight at most, such as "4GiB".
        measure: whether to measure how well each task's features survive (in the record).
        overwrite: whether an output of that name is replaced.
        ray_address: of the cluster for the backend "ray": "auto" or host:port; None to start one on this machine.
        cache: folder in which decompositions and merged matrices are kept, for this merge and others that need them.
        cache_size: bytes of them at most; the least recently used go first.
        split_tensors: whether idle workers take part in another's tensor (STF, Iso-Share); the bytes are the same.
        checksums: of each input file in the record: of a "sample" of its content, or of the "full" file.
        report: called with `Progress` as the merge goes on.

    Returns:
        The record, which is also in the folder as run.json.

    Raises:
        SuperposeError: the recipe, a file or a tensor is not as it should be.
        Problems: several of them are not.
    """
    settings = Settings(
        device, backend, workers, _bytes(memory), measure, overwrite, ray_address,
        None if cache is None else str(absolute(cache)), _bytes(cache_size, "--cache-size"), split_tensors,
        checksums,
    )  # fmt: skip
    output = absolute(output)
    return run_plan(make_plan(load_recipe(recipe), settings, output), output, report)


def merge_scaled(
    recipe: Recipe | Mapping[str, Any] | str | Path,
    output: str | Path,
    scaling_factors: Sequence[float],
    *,
    memory: int | str = "4GiB",
    cache: str | Path | None = None,
    cache_size: int | str = "20GiB",
    report: Report | None = None,
    **settings: Any,
) -> list[RunRecord]:
    """Merge checkpoints into several folders, one for each scaling factor; what is costly is done once.

    Without `cache`, merged matrices are kept beside the outputs until all are made: room for one more model in float32.

    Args:
        recipe: as for `merge`.
        output: folder of each result, with {scaling_factor} where its factor goes.
        scaling_factors: one for each output.
        memory: as for `merge`.
        cache: as for `merge`.
        cache_size: as for `merge`.
        report: as for `merge`.
        **settings: device, backend, workers, measure, overwrite, ray_address, split_tensors, checksums: see `merge`.

    Returns:
        The records, in the order of the factors.

    Raises:
        SuperposeError: as for `merge`; or the name of the output is the same for two factors.
        Problems: several things are not as they should be.
    """
    names = [str(factor).removesuffix(".0") for factor in scaling_factors]
    if FACTOR not in str(output) or not names or len(set(names)) < len(names):
        mend = f"put {FACTOR} into the name, and name each factor once"
        raise SuperposeError("scaling factors need a folder each", where=f"output {output}", mend=mend)
    outputs = [absolute(str(output).replace(FACTOR, name)) for name in names]
    asked = load_recipe(recipe)
    kept_in = None if cache is None else str(absolute(cache))
    limit = _bytes(cache_size, "--cache-size")
    made = Settings(memory=_bytes(memory), cache=kept_in, cache_size=limit, **settings)
    plans = [
        make_plan(
            load_recipe(asked.model_dump(mode="json") | {"options": {**asked.options, "scaling_factor": factor}}),
            made,
            place,
        )
        for factor, place in zip(scaling_factors, outputs, strict=True)
    ]
    if cache is not None:
        return [run_plan(plan, place, report) for plan, place in zip(plans, outputs, strict=True)]
    # Kept under a name that a second run finds again, and that is no result's.
    between = absolute(f"{str(output).replace(FACTOR, 'all-factors')}.partial")
    kept = open_cache(between, sys.maxsize, keep_steps=False)
    records = [run_plan(plan, place, report, kept) for plan, place in zip(plans, outputs, strict=True)]
    shutil.rmtree(between)
    return records


def extract(
    base: str | Path,
    tuned: str | Path,
    output: str | Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    per_layer_rank: bool = False,
    rest: str = "drop",
    dtype: str = "base",
    device: str = "cpu",
    backend: str = "threads",
    workers: int | None = None,
    memory: int | str = "4GiB",
    overwrite: bool = False,
    ray_address: str | None = None,
    report: Report | None = None,
) -> RunRecord:
    """Write a fine-tune as a LoRA adapter of its base.

    Args:
        base: the base: folder, weight file, hub id, or MODEL+ADAPTER.
        tuned: its fine-tune; or an adapter of it, to give that a smaller rank.
        output: folder of the adapter.
        rank: most directions of every module.
        energy: share of every update's squared norm that is kept; 0.99 where neither it nor `rank` is given.
        per_layer_rank: whether every module has its own rank; one for all otherwise, as engines read it.
        rest: what happens to norms, biases, embeddings and what else no low-rank update holds: "save" it in the adapter
            as it is, "drop" it with a warning, or "refuse".
        dtype: of the adapter; "base" is float32, which is exact.
        device: as for `merge`.
        backend: as for `merge`.
        workers: as for `merge`.
        memory: as for `merge`.
        overwrite: as for `merge`.
        ray_address: as for `merge`.
        report: as for `merge`.

    Returns:
        The record; `totals["truncation_error"]` is the share of the updates' norm that the adapter does not hold.

    Raises:
        SuperposeError: a file or a tensor is not as it should be.
        Problems: several of them are not.
    """
    if rank is None and energy is None:
        energy = 0.99
    recipe = {
        "base": str(base),
        "models": [{"path": str(tuned)}],
        "method": "task_arithmetic",
        "options": {"scaling_factor": 1.0},
        "dtype": dtype,
        "output": {
            "form": "adapter", "rank": rank, "energy": energy, "per_layer_rank": per_layer_rank, "rest": rest,
        },
    }  # fmt: skip
    return merge(
        recipe, output, device=device, backend=backend, workers=workers, memory=memory, overwrite=overwrite,
        ray_address=ray_address, report=report,
    )  # fmt: skip


def plan(
    recipe: Recipe | Mapping[str, Any] | str | Path,
    output: str | Path | None = None,
    *,
    device: str = "cpu",
    backend: str = "threads",
    workers: int | None = None,
    memory: int | str = "4GiB",
    measure: bool = False,
    overwrite: bool = False,
    ray_address: str | None = None,
) -> Plan:
    """Plan a merge and read no tensor: every decision, or every problem at once.

    Args:
        recipe: a recipe, a mapping like it, or the path of a YAML file.
        output: folder of the result, to check for room; may be left out.
        device: as for `merge`.
        backend: as for `merge`.
        workers: as for `merge`.
        memory: as for `merge`.
        measure: as for `merge`.
        overwrite: as for `merge`.
        ray_address: as for `merge`.

    Returns:
        The plan.

    Raises:
        SuperposeError: the recipe or a file is not as it should be.
        Problems: several of them are not.
    """
    settings = Settings(device, backend, workers, _bytes(memory), measure, overwrite, ray_address)
    return make_plan(load_recipe(recipe), settings, absolute(output) if output is not None else None)


def rebuild(
    location: str | Path, task: str, output: str | Path, *, base: str | Path | None = None, overwrite: bool = False
) -> list[TensorHeader]:
    """Write the model of one task of a set that `merge` with method emr made.

    Args:
        location: folder of the set.
        task: name of the task.
        output: folder of the model; appears when it is complete.
        base: where the base lies now; where it lay when the set was made, if None.
        overwrite: whether an output of that name is replaced.

    Returns:
        The tensors that were written.

    Raises:
        SuperposeError: it is no set, has no such task, the base is another one, or the output exists.
    """
    place = None if base is None else str(base)
    return task_sets.rebuild(location, task, absolute(output), base=place, overwrite=overwrite)


def compare(
    base: str | Path,
    tuned: Sequence[str | Path],
    *,
    names: Sequence[str] | None = None,
    spectra: bool = True,
    device: str = "cpu",
    backend: str = "threads",
    workers: int | None = None,
    memory: int | str = "4GiB",
    ray_address: str | None = None,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Comparison:
    """Compare fine-tunes before merging them, in one streaming pass.

    Args:
        base: the base: folder, weight file, or hub id.
        tuned: the fine-tunes.
        names: one per fine-tune, for the tables; the last parts of the paths when not given.
        spectra: whether task matrices are decomposed, which takes most of the time.
        device: "cpu", "cuda", "cuda:N" or "auto".
        backend: "threads", "serial" or "ray".
        workers: tensors at a time; None for one per core.
        memory: bytes in flight at most, such as "4GiB".
        ray_address: as for `merge`.
        report: called with the number of tensors done, and of all.

    Returns:
        Norms, cosines, conflicts, shared directions, conditioning, and what they suggest.

    Raises:
        SuperposeError: a file or a tensor is not as it should be.
        Problems: several of them are not.
    """
    called = names if names is not None else [""] * len(tuned)
    if len(called) != len(tuned):
        raise SuperposeError(f"{len(called)} names for {len(tuned)} models", where="names", mend="give one per model")
    models = [{"path": str(path), "name": name} for path, name in zip(tuned, called, strict=True)]
    settings = Settings(device, backend, workers, _bytes(memory), ray_address=ray_address)
    made = make_plan(load_recipe({"base": str(base), "models": models, "method": "stf"}), settings)
    items = [item for item in made.items if item.action == "merge" and item.method == "stf"]
    task_names = made.recipe.task_names
    context = Context(task_names, made.weights, torch.device(device_of(device)), measure=False)
    runner = make_backend(settings.backend, settings.workers, settings.memory, settings.ray_address)
    runner = with_inputs_checked(runner, items)
    try:
        tensors = compare_items(items, context, runner, spectra=spectra, report=report)
    finally:
        runner.close()
        close_readers()
    if not tensors:
        raise SuperposeError("nothing to compare", where=str(base), mend="give checkpoints with weights")
    notes = tuple(note for note in made.notes if "--memory" not in note)
    whole, groups = group_tensors(tensors, task_names)
    found = Comparison(str(base), whole, groups, len(made.items) - len(items), notes)
    return replace(found, suggestions=suggestions(found))


def evaluate(
    model: str | Path,
    evaluator: str,
    *,
    data: TaskData | Mapping[str, Any] | None = None,
    device: str = "cpu",
    report: Callable[[int, int], None] = silent,
    **options: Any,
) -> Evaluation:
    """Measure a model.

    Args:
        model: folder, hub id, or MODEL+ADAPTER.
        evaluator: its name; `superpose evaluate --list` has them all.
        data: the data and its columns, for evaluators that read data: a `TaskData`, or a mapping of its fields.
        device: "cpu", "cuda", "cuda:N" or "auto".
        report: called with how much is done, and of how much.
        **options: of the evaluator.

    Returns:
        The metrics, which way each is better, and what they were measured on.

    Raises:
        SuperposeError: the model, the data or an option is not as it should be.
        Problems: several of them are not.
    """
    by = find_evaluator(evaluator, where="evaluator")
    task = data if data is None or isinstance(data, TaskData) else make_task(data, where="data")
    raise_all(check_device(Settings(device)))
    place = torch.device(device_of(device))
    return evaluate_model(str(model), by, task=task, options=options, device=place, report=report)


def compute_statistics(
    kind: str,
    model: str | Path,
    task: TaskData | Mapping[str, Any],
    output: str | Path,
    *,
    labels: str = "auto",
    device: str = "cpu",
    threads: int | None = None,
    memory: int | str = "4GiB",
    overwrite: bool = False,
    only_plan: bool = False,
    begin: Callable[[Request], None] = lambda request: None,
    report: Callable[[Advance], None] = lambda advance: None,
) -> Request:
    """Pass data through a model and write what Fisher merging or RegMean needs of it.

    Args:
        kind: "fisher" or "gram".
        model: folder, hub id, or MODEL+ADAPTER.
        task: the data, and how the model reads it; a mapping as in a recipe.
        output: the file, which appears when it is complete.
        labels: for "fisher", over which answers squared gradients are taken: "exact" (a classifier's classes),
            "sampled" (one drawn from the model's predictions), "empirical" (the data's own), or "auto", the first or
            second.
        device: "cpu", "cuda", "cuda:N" or "auto".
        threads: of the arithmetic; all cores when not given. Another number can change last digits; the file tells it.
        memory: bytes of one pass's sums at most, such as "4GiB"; more passes where a model's are larger.
        overwrite: whether a file of that name is replaced.
        only_plan: whether to stop before any data is passed through.
        begin: called when model and data are read, before they are used.
        report: called as the passes go on.

    Returns:
        What was computed, with its provenance in `metadata`.

    Raises:
        SuperposeError: the model, the data or a row is not as it should be, or the output exists.
    """
    place = absolute(output)
    raise_all(check_device(Settings(device=device)))
    if not only_plan:
        check_output_file(place, overwrite=overwrite)
    where, before = torch.device(device_of(device)), torch.get_num_threads()
    torch.set_num_threads(threads or os.cpu_count() or 1)
    try:
        made = task if isinstance(task, TaskData) else make_task(task, where="task")
        request = prepare(kind, str(model), made, labels=labels, memory=_bytes(memory), device=where)
        begin(request)
        if not only_plan:
            compute(request, place, overwrite=overwrite, device=where, report=report)
    finally:
        torch.set_num_threads(before)
    return request


def verify(
    output: str | Path,
    *,
    recompute: int = 0,
    seed: int = 0,
    device: str | None = None,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Verification:
    """Look at a finished merge again: structure, every tensor's bytes, files beside them, and the inputs.

    Args:
        output: folder of the merge.
        recompute: how many tensors, drawn at random, are computed once more from the inputs.
        seed: of the draw.
        device: where they are computed; where the merge was, if None.
        report: called with bytes digested, and bytes in all.

    Returns:
        What was found; `is_sound` says whether all of it is as the record has it.

    Raises:
        SuperposeError: the folder is no output of superpose, or its record cannot be read.
    """
    return verification.verify(absolute(output), recompute=recompute, seed=seed, device=device, report=report)


def list_methods() -> list[Method]:
    """Return every method there is, by name."""
    return registered()


@dataclass(frozen=True)
class Inspection:
    """What a checkpoint holds: the checkpoint, and each tensor's kind and how it is known."""

    checkpoint: Checkpoint
    kinds: Mapping[str, tuple[Kind, str]]
    tied: Mapping[str, str]


def inspect(location: str | Path) -> Inspection | Adapter:
    """Look at the headers of a checkpoint or an adapter.

    Args:
        location: folder, weight file, or hub id; or MODEL+ADAPTER.

    Returns:
        What it holds; an adapter as it is.

    Raises:
        SuperposeError: there is nothing of that name, or no weights in it.
    """
    checkpoint = open_model(str(location))
    if isinstance(checkpoint, Adapter):
        return checkpoint
    architecture = read_architecture(checkpoint.folder, checkpoint.config, len(checkpoint.tensors))
    kinds = {}
    for name, header in checkpoint.tensors.items():
        known = architecture.kinds.get(name) if header.is_float else None
        told = kind_of(name, header.shape, is_float=header.is_float)
        kinds[name] = (known, "module") if known is not None else (told, "name")
    return Inspection(checkpoint, kinds, {**architecture.tied, **checkpoint.aliases})


def _bytes(size: int | str, where: str = "--memory") -> int:
    try:
        return parse_bytes(size)
    except ValueError as error:
        raise SuperposeError(str(error), where=where, mend="write a size such as 4GiB") from error
