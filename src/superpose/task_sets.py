"""Sets of task models: a merged model with masks and scales beside it, and any task's model rebuilt from it.

`superpose merge --method emr` writes OUT with `tasks/masks.safetensors` (a bit an entry and task) and
`tasks/tasks.json` (names and scales). OUT's own weights are base + unified vector. Where a sign was
elected an entry of it is, up to float32's rounding, an entry of some fine-tune: the models' dtype loses nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from superpose.checkpoints.files import formats, read_json
from superpose.checkpoints.folder import Checkpoint, open_checkpoint
from superpose.checkpoints.headers import TORCH_DTYPES, TensorHeader
from superpose.checkpoints.sidecars import copy_sidecars
from superpose.checkpoints.writer import Layout, StreamWriter, as_bytes, lay_out
from superpose.errors import SuperposeError, nearest, raise_all
from superpose.maths.bits import packed_bytes, unpack
from superpose.methods.emr import mask_name, task_vector_of
from superpose.output_folder import locked, make_partial, publish, remove_strangers, settle_replaced, write_record
from superpose.planning import CHUNK, MASKS_FILE, check_output
from superpose.records import RECORD_FILE, RunRecord, TensorRecord

TASKS_FILE = "tasks/tasks.json"
INDEX_FILE = "model.safetensors.index.json"
MAKE_AGAIN = "give the output of superpose merge --method emr, or make it again"
OTHER_BASE = "name the base that the set was made from with --base"


@dataclass(frozen=True)
class TaskSet:
    """The models of several tasks in the memory of one, and a bit an entry for each.

    Args:
        merged: the model's tensors, base + unified vector.
        masks: packed, under the names of `superpose.methods.emr.mask_name`.
        scales: one per task.
        names: of the tasks.
        tied: names of tensors that are the same memory as another, to that one's name.
    """

    merged: Mapping[str, Tensor]
    masks: Mapping[str, Tensor]
    scales: tuple[float, ...]
    names: tuple[str, ...]
    tied: Mapping[str, str]

    def model(self, name: str, base: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors of one task's model.

        Args:
            name: of the task.
            base: the tensors of the base that the set was made from.

        Returns:
            New tensors under the base's names, in its dtypes.

        Raises:
            SuperposeError: the set has no such task.
        """
        task = find_task(self.names, name, "the set")
        rebuilt = {}
        for key, merged in self.merged.items():
            packed = self.masks.get(mask_name(key, task))
            mask = None if packed is None else unpack(packed, merged.numel()).reshape(merged.shape)
            rebuilt[key] = rebuild_piece(base[key], merged, mask, self.scales[task])
        return {key: rebuilt[self.tied.get(key, key)] for key in base}


def rebuild_piece(base: Tensor, merged: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Return a piece of a task's model; the merged piece where the tensor has no masks."""
    if mask is None:
        return merged.clone()
    compute = torch.float64 if torch.float64 in (base.dtype, merged.dtype) else torch.float32
    exact = base.to(compute)
    unified = merged.to(compute) - exact
    return (exact + task_vector_of(unified, mask, scale)).to(base.dtype)


def find_task(names: Sequence[str], name: str, where: str) -> int:
    """Return the index of a task, or say which there are."""
    if name not in names:
        raise SuperposeError(f"the set has no task '{name}'", where=where, mend=nearest(name, names))
    return list(names).index(name)


def write_tasks(folder: Path, record: RunRecord, names: Sequence[str]) -> None:
    """Write names and scales beside the masks, if the merge made any; from the record, whoever merged what.

    Args:
        folder: of the output, under way.
        record: of the merge.
        names: of the tasks.
    """
    emr = [tensor for tensor in record.tensors if tensor.beside]
    if not emr:
        return
    scales = next((tensor.stats["scales"] for tensor in emr if "scales" in tensor.stats), [1.0] * len(names))
    tasks = [{"name": name, "scale": scale} for name, scale in zip(names, scales, strict=True)]
    content = {"tasks": tasks}
    (folder / TASKS_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def rebuild(
    location: str | Path, task: str, output: Path, *, base: str | None = None, overwrite: bool = False
) -> list[TensorHeader]:
    """Write the model of one task of a set.

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
    folder = Path(location).expanduser()
    record = _read_record(folder)
    names, scales = _read_tasks(folder, len(record.sources) - 1)
    number = find_task(names, task, str(folder))
    merged = open_checkpoint(str(folder))
    original = _open_base(base or str(record.sources[0]["place"]))
    raise_all([*merged.problems, *original.problems])
    masks = formats()[".safetensors"].headers(folder / MASKS_FILE)
    raise_all(masks.problems)
    raise_all(_other_base(original, record) or _misfits(original, merged, masks.tensors, number, record))
    raise_all(check_output(original, (merged,), output, overwrite=overwrite))
    headers = [original.tensors[name] for name in sorted(merged.tensors)]
    layout = lay_out([(header.name, header.dtype, header.shape) for header in headers], 5 * 10**9)
    known = {tensor.name: tensor.sha256 for tensor in record.tensors}
    known |= {mask: sha256 for tensor in record.tensors for mask, sha256 in tensor.beside.items()}
    known |= {f"base {tensor.name}": tensor.stats.get("base_sha256", "") for tensor in record.tensors}
    partial = output.with_name(output.name + ".partial")
    with locked(partial):
        settle_replaced(output)
        raise_all(check_output(original, (merged,), output, overwrite=overwrite))  # another may have made it meanwhile
        make_partial(partial)
        remove_strangers(partial, layout)
        with contextlib.closing(StreamWriter(partial, layout)) as writer:
            for header in headers:
                packed = masks.tensors.get(mask_name(header.name, number))
                _rebuild_tensor(header, merged.tensors[header.name], packed, scales[number], writer, known)
            writer.sync()
            digests = {header.name: writer.digest(header.name) for header in headers}
        _write_sidecars(partial, original, layout, _record(record, folder, task, output, headers, digests))
        publish(partial, output)
    return headers


def _rebuild_tensor(
    base: TensorHeader,
    merged: TensorHeader,
    packed: TensorHeader | None,
    scale: float,
    writer: StreamWriter,
    known: Mapping[str, str],
) -> None:
    first = _read(base) if packed is None else _read_sound(base, known[f"base {base.name}"], OTHER_BASE)
    second = _read_sound(merged, known.get(merged.name), MAKE_AGAIN)
    bits = _read_sound(packed, known.get(packed.name), MAKE_AGAIN) if packed else None
    for start in range(0, base.numel, CHUNK):  # a multiple of 8: pieces begin with a byte of the mask
        stop = min(start + CHUNK, base.numel)
        mask = None if bits is None else unpack(bits[start // 8 : packed_bytes(stop)], stop - start)
        piece = rebuild_piece(first[start:stop], second[start:stop], mask, scale).to(TORCH_DTYPES[base.dtype])
        writer.write(base.name, start * piece.itemsize, piece)


def _read(header: TensorHeader) -> Tensor:
    return formats()[header.file.suffix].open(header.file).read(header.name).reshape(-1)


def _read_sound(header: TensorHeader, sha256: str | None, mend: str) -> Tensor:
    """Return a flattened tensor whose bytes are those that the record tells of."""
    tensor = _read(header)
    if hashlib.sha256(as_bytes(tensor)).hexdigest() != sha256:
        where = f"{header.file}, tensor {header.name}"
        raise SuperposeError("its bytes are not those that the set's record tells of", where=where, mend=mend)
    return tensor


def _read_record(folder: Path) -> RunRecord:
    if not (folder / TASKS_FILE).is_file() or not (folder / MASKS_FILE).is_file():
        missing = MASKS_FILE if (folder / TASKS_FILE).is_file() else TASKS_FILE
        raise SuperposeError(f"no set of task models: {missing} is missing", where=str(folder), mend=MAKE_AGAIN)
    try:
        record = RunRecord.load(folder)
        _ = record.sources[0]["files"], record.sources[0]["place"], [tensor.beside for tensor in record.tensors]
        return record
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        what = f"the record cannot be read: {error}"
        raise SuperposeError(what, where=str(folder / RECORD_FILE), mend=MAKE_AGAIN) from error


def _read_tasks(folder: Path, count: int) -> tuple[list[str], list[float]]:
    """Return names and scales of the tasks."""
    content = read_json(folder / TASKS_FILE)
    try:
        names, scales = [], []
        for task in content["tasks"]:
            names.append(task["name"])
            scales.append(float(task["scale"]))
        sound = all(isinstance(name, str) for name in names) and len(set(names)) == len(names) == count
        if not sound or not all(math.isfinite(scale) and scale >= 0 for scale in scales):
            raise ValueError(f"{count} distinct names with a finite scale each are needed")
        return names, scales
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        what = f"the tasks have no sound names and scales: {error}"
        raise SuperposeError(what, where=str(folder / TASKS_FILE), mend=MAKE_AGAIN) from error


def _open_base(place: str) -> Checkpoint:
    try:
        return open_checkpoint(place, where="the set's base")
    except SuperposeError as error:
        raise SuperposeError(error.what, where=error.where, mend=OTHER_BASE) from error


def _other_base(base: Checkpoint, record: RunRecord) -> list[SuperposeError]:
    """Return what shows that a base is not the one of a record: its files' names and sizes."""
    known = {(file["name"], file["bytes"]) for file in record.sources[0]["files"]}
    if known == {(file.name, file.stat().st_size) for file in base.files}:
        return []
    return [
        SuperposeError("the base's files are not those that the set was made from", where=base.name, mend=OTHER_BASE)
    ]


def _misfits(
    base: Checkpoint, merged: Checkpoint, masks: Mapping[str, TensorHeader], task: int, record: RunRecord
) -> list[SuperposeError]:
    """Return what shows that the base is not the one that the set was made from, or that masks are damaged."""
    promised = {mask for tensor in record.tensors for mask in tensor.beside}
    missing = sorted(promised - set(masks))
    if missing:
        what = f"{len(missing)} masks are missing"
        return [SuperposeError(what, where=f"{MASKS_FILE}, tensor {missing[0]}", mend=MAKE_AGAIN)]
    problems = []
    for name, header in sorted(merged.tensors.items()):
        known = base.tensors.get(name)
        if known is None or known.shape != header.shape:
            what = "the base has no such tensor" if known is None else f"the base's has shape {list(known.shape)}"
            problems.append(SuperposeError(what, where=f"{base.name}, tensor {name}", mend=OTHER_BASE))
        mask = masks.get(mask_name(name, task))
        if mask is not None and (mask.dtype, mask.shape) != ("U8", (packed_bytes(header.numel),)):
            what = f"the mask of task {task} has {mask.nbytes} bytes, the tensor needs {packed_bytes(header.numel)}"
            problems.append(SuperposeError(what, where=f"{mask.file}, tensor {name}", mend=MAKE_AGAIN))
    return problems


def _record(
    record: RunRecord,
    folder: Path,
    task: str,
    output: Path,
    headers: Sequence[TensorHeader],
    digests: Mapping[str, str],
) -> RunRecord:
    kinds = {tensor.name: tensor for tensor in record.tensors}
    tensors = tuple(
        TensorRecord(
            name=header.name,
            kind=kinds[header.name].kind,
            kind_from=kinds[header.name].kind_from,
            action=kinds[header.name].action,
            method="emr" if kinds[header.name].beside else kinds[header.name].method,
            dtype=header.dtype,
            shape=header.shape,
            parts=1,
            sha256=digests[header.name],
        )
        for header in headers
    )
    recipe: dict[str, Any] = {**record.recipe, "rebuilt": {"set": str(folder), "task": task}}
    totals = {**record.totals, "tensors": len(tensors)}
    return RunRecord(
        str(output), recipe, record.sources, record.versions, record.settings, tensors, record.warnings, totals
    )


def _write_sidecars(folder: Path, base: Checkpoint, layout: Layout, record: RunRecord) -> None:
    copy_sidecars(base.folder, base.config, folder, None)
    index = layout.index()
    if index is not None:
        (folder / INDEX_FILE).write_text(index, encoding="utf-8")
    write_record(folder, layout, record)
