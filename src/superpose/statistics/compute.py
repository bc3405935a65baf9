"""Statistics of a model on data, from the model's folder to the finished file."""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from superpose.checkpoints.models import open_model
from superpose.checkpoints.statistics_files import content_digest
from superpose.errors import SuperposeError
from superpose.inference import Batch, LiveModel, TaskData, batches, encode_rows, load_model
from superpose.output_folder import locked, make_partial
from superpose.own_code import code_digest
from superpose.statistics.fisher import MOST_EXACT, Fisher
from superpose.statistics.gram import Gram
from superpose.statistics.passes import Advance, Statistic, group_tensors, publish_file, run_passes


@dataclass(frozen=True)
class Request:
    """What is to be computed, understood: model loaded, rows read, nothing passed through yet.

    Args:
        statistic: what is added up.
        batches: of the data.
        groups: of tensors, each taken in a pass of its own.
        metadata: of the file, which tells where it comes from.
        memory: bytes: of the model, of the largest group's sums, and of one batch's activations.
    """

    statistic: Statistic
    batches: Sequence[Batch]
    groups: Sequence[tuple[str, ...]]
    metadata: Mapping[str, Any]
    memory: Mapping[str, int]


def prepare(
    kind: str,
    model: str,
    task: TaskData,
    *,
    labels: str = "auto",
    memory: int = 4 << 30,
    device: torch.device | None = None,
) -> Request:
    """Load a model, read its data, and say what the passes take; nothing is added up.

    Args:
        kind: "fisher" or "gram".
        model: folder, hub id, or MODEL+ADAPTER.
        task: the data.
        labels: for "fisher": "exact", "sampled", "empirical", or "auto".
        memory: bytes that the sums of one group take at most.
        device: where it is done.

    Returns:
        What is to be computed.

    Raises:
        SuperposeError: the model, the data or a row is not as it should be.
    """
    if kind not in ("fisher", "gram"):
        raise SuperposeError(f"there are no statistics '{kind}'", where="statistics", mend="choose fisher or gram")
    live = load_model(model, task, device)
    if kind == "fisher" and live.answers == "features":
        mend = "give a model with a head, or its own by --head FILE, or make it by --loader"
        raise SuperposeError("Fisher information needs predictions, and the model has no head", where=model, mend=mend)
    if kind == "fisher" and not any(parameter.requires_grad for parameter in live.module.parameters()):
        mend = "let what was fine-tuned require gradients: requires_grad_(True) in the loader"
        raise SuperposeError("all parameters are frozen: none has Fisher information", where=model, mend=mend)
    examples, rows = encode_rows(live, task, labelled=labels == "empirical")
    made = batches(examples, task.batch_size)
    first = made[0].to(device or torch.device("cpu"))
    chosen = _labels(labels, live, first) if kind == "fisher" else ""
    statistic: Statistic = Fisher(live, chosen, task.seed) if chosen else Gram(live, first)  # type: ignore[arg-type]
    groups = group_tensors(statistic, memory)
    metadata = {
        "statistics": kind,
        "model": {"path": model, **_fingerprint(model)},
        "data": {**task.provenance(), **task.hashes(), "rows": rows.total, "sha256": rows.digest},
        "examples": len(examples),
        "tokens": sum(batch.tokens for batch in made),
        "seed": task.seed,
        **({"labels": chosen} if chosen else {}),
        **_shared(statistic, live),
        "versions": {
            "superpose": version("superpose"), "code": code_digest(), "torch": torch.__version__,
            "python": platform.python_version(), "threads": torch.get_num_threads(), "device": str(device or "cpu"),
        },
    }  # fmt: skip
    return Request(statistic, made, groups, metadata, _memory(statistic, live, first, groups, kind))


def compute(
    request: Request,
    output: Path,
    *,
    overwrite: bool = False,
    device: torch.device | None = None,
    report: Callable[[Advance], None] = lambda _: None,
) -> Path:
    """Pass the data through the model and write the file; interrupted, the same call goes on.

    Args:
        request: from `prepare`.
        output: the file, which appears when it is complete.
        overwrite: whether one of that name is replaced.
        device: where it is done.
        report: called as the passes go on.

    Returns:
        The file.

    Raises:
        SuperposeError: the output exists, or cannot be written.
    """
    check_output_file(output, overwrite=overwrite)
    partial = output.with_name(output.name + ".partial")
    with locked(partial):
        make_partial(partial)
        finished = run_passes(
            request.statistic, request.batches, request.groups, partial, request.metadata,
            device or torch.device("cpu"), report,
        )  # fmt: skip
        publish_file(finished, output)
    return output


def check_output_file(output: Path, *, overwrite: bool) -> None:
    """Check that a file of statistics may be written.

    Args:
        output: the file.
        overwrite: whether one of that name is replaced.

    Raises:
        SuperposeError: it may not.
    """
    if output.suffix != ".safetensors":
        mend = f"name it {output.name}.safetensors"
        raise SuperposeError("statistics are safetensors files", where=str(output), mend=mend)
    if output.is_dir() or (output.exists() and not overwrite):
        raise SuperposeError("the output exists already", where=str(output), mend="choose another name, or --overwrite")


def tensors_of(request: Request) -> dict[str, Tensor]:
    """Return the statistics in memory, by the checkpoint's names: for small models, and tests."""
    names = tuple(request.statistic.shapes())
    sums = request.statistic.sums(names, torch.device("cpu"))
    with request.statistic.adding(sums, request.batches[0]) as add:
        for batch in request.batches:
            add(batch)
    examples = sum(map(len, request.batches))
    means = {name: request.statistic.mean(name, sums, examples) for name in names}
    return means | {name: means[owner] for name, owner in request.metadata.get("same", {}).items()}


def _labels(asked: str, live: LiveModel, batch: Batch) -> str:
    if asked not in ("auto", "exact", "sampled", "empirical"):
        mend = "choose auto, exact, sampled or empirical"
        raise SuperposeError(f"there are no labels '{asked}'", where="--labels", mend=mend)
    if asked == "exact" and live.answers == "tokens":
        mend = "choose sampled: one token is drawn at every position"
        raise SuperposeError("the answers of a language model are too many to be exact", where="--labels", mend=mend)
    if asked != "auto":
        return asked
    if live.answers == "tokens":
        return "sampled"
    with torch.no_grad():
        classes = live.scores(batch.part(0, 1)).shape[-1]
    return "exact" if classes <= MOST_EXACT else "sampled"


def _shared(statistic: Statistic, live: LiveModel) -> dict[str, Any]:
    """Return what tells which maps share a Gram matrix, and which are stored in x out."""
    if not isinstance(statistic, Gram):
        return {}
    owners = statistic.owners
    same = {name: owner for name, owner in sorted(owners.items()) if name != owner}
    return {"same": same, "in_x_out": sorted(live.in_x_out & set(owners))}


def _memory(
    statistic: Statistic, live: LiveModel, first: Batch, groups: Sequence[tuple[str, ...]], kind: str
) -> dict[str, int]:
    shapes = statistic.shapes()
    largest = max(sum(statistic.width * prod(shapes[name]) for name in group) for group in groups)
    model = sum(parameter.numel() * parameter.element_size() for parameter in live.module.parameters())
    return {"model": model, "statistics": largest, "activations": _activations(live, first, kind == "fisher")}


def _activations(live: LiveModel, batch: Batch, gradients: bool) -> int:
    """Return the bytes that a forward pass of the longest batch keeps for the way back, or at once."""
    own = {parameter.untyped_storage().data_ptr() for parameter in live.module.parameters()}
    seen: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    if not gradients:
        return sum(tensor.nbytes for tensor in batch.inputs.values()) + 4 * batch.tokens * _widest(live)
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        scores = live.scores(batch)  # noqa: F841 - alive, so that storages are told apart
    return sum(seen.values())


def _widest(live: LiveModel) -> int:
    """Return the most inputs or outputs of a linear map."""
    maps = [part for part in live.module.modules() if isinstance(part, nn.Linear) or type(part).__name__ == "Conv1D"]
    return max((size for part in maps if isinstance(part.weight, Tensor) for size in part.weight.shape), default=1)


def _fingerprint(model: str) -> dict[str, Any]:
    """Return the model's files with sizes, and the sha256 of their bytes, file by file in order of name."""
    files: list[Path] = []
    with contextlib.suppress(SuperposeError):  # a loader may read what is no checkpoint of ours
        files = list(open_model(model).files)
    return {
        "files": [{"name": file.name, "bytes": file.stat().st_size} for file in sorted(files)],
        "sha256": content_digest(files),
    }
