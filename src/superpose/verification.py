"""A finished merge, looked at again: files, tensors and inputs against the record, and tensors computed once more."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from superpose.backends import make_backend
from superpose.checkpoints.files import headers_of
from superpose.checkpoints.folder import open_checkpoint
from superpose.checkpoints.headers import TensorHeader
from superpose.checkpoints.stamps import PIECE, content_sample, file_digest
from superpose.checkpoints.writer import as_bytes
from superpose.errors import SuperposeError, raise_all
from superpose.merge_tensor import merge_item
from superpose.own_code import code_digest
from superpose.parts import Context
from superpose.planning import LEARNED_FILE, MASKS_FILE, Plan, Settings, WorkItem, check_device, make_plan
from superpose.reading import close_readers
from superpose.recipe import load_recipe
from superpose.records import RECORD_FILE, RunRecord, TensorRecord
from superpose.run import device_of, survey_all

MERGE_AGAIN = "merge again, with --overwrite"
Advance = Callable[[int, int], None]
"""(bytes or tensors done, all of them)."""


@dataclass(frozen=True)
class Verification:
    """What was found of a finished merge.

    Args:
        output: its folder.
        tensors: how many tensors have the bytes that the record tells of.
        bytes: of these tensors.
        files: how many files beside the weights have their bytes.
        inputs: how many input files are what they were; by a sample of their content, or by all of it where the record
            has that.
        recomputed: tensors that were computed once more, with the same bytes.
        problems: what is not as the record says.
        notes: what could not be looked at, and why.
    """

    output: str
    tensors: int
    bytes: int
    files: int
    inputs: int
    recomputed: tuple[str, ...]
    problems: tuple[SuperposeError, ...]
    notes: tuple[str, ...]

    @property
    def is_sound(self) -> bool:
        """Whether everything that was looked at is as the record says."""
        return not self.problems


@dataclass
class _Findings:
    problems: list[SuperposeError] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def problem(self, what: str, where: object, mend: str = MERGE_AGAIN) -> None:
        self.problems.append(SuperposeError(what, where=str(where), mend=mend))


def verify(
    output: Path, *, recompute: int = 0, seed: int = 0, device: str | None = None, report: Advance = lambda *_: None
) -> Verification:
    """Look at a finished merge again.

    Args:
        output: its folder.
        recompute: how many tensors, drawn at random, are computed once more from the inputs.
        seed: of the draw.
        device: where they are computed; where the merge was, if None.
        report: called with bytes digested and bytes in all.

    Returns:
        What was found.

    Raises:
        SuperposeError: the folder is no output of superpose, or its record cannot be read.
    """
    record = _read_record(output)
    findings = _Findings()
    found = _weights(output, record, findings)
    tensors, nbytes = _check_tensors(found, _expected(record), findings, report)
    files = _check_files(output, record, findings)
    inputs = _check_inputs(record, findings)
    recomputed = _recompute(output, record, found, min(recompute, len(record.tensors)), seed, device, findings)
    return Verification(
        str(output), tensors, nbytes, files, inputs, recomputed, tuple(findings.problems), tuple(findings.notes)
    )


def _read_record(output: Path) -> RunRecord:
    file = output / RECORD_FILE
    if not file.is_file():
        mend = "give the folder that superpose merge wrote; a merge that is not finished is resumed by its own command"
        raise SuperposeError("no finished merge: there is no record", where=str(file), mend=mend)
    try:
        record = RunRecord.load(output)
        _ = [(tensor.name, tensor.sha256, tensor.beside, tensor.factors) for tensor in record.tensors]
        _ = record.recipe["models"], record.recipe["output"]["form"], record.versions["code"]
        _ = [(source["place"], [entry["name"] for entry in source["files"]]) for source in record.sources]
        return record
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        mend = "merge again: nothing else tells what the output should be"
        raise SuperposeError(f"the record cannot be read: {error}", where=str(file), mend=mend) from error


def _expected(record: RunRecord) -> dict[str, str]:
    """Return the digest of every tensor in the output's files."""
    found: dict[str, str] = {}
    for tensor in record.tensors:
        if tensor.sha256:
            found |= dict.fromkeys(tensor.written or (tensor.name,), tensor.sha256)
        found |= {**tensor.beside, **tensor.factors}
    return found


def _weights(output: Path, record: RunRecord, findings: _Findings) -> dict[str, TensorHeader]:
    """Return all tensors of the output by name, from the model's files, the adapter's, and those beside them."""
    found: dict[str, TensorHeader] = {}
    form = record.recipe["output"]["form"]
    if form != "adapter":
        try:
            model = open_checkpoint(str(output))
            findings.problems += model.problems
            found |= model.tensors
        except SuperposeError as problem:
            findings.problems.append(problem)
    adapter = output if form == "adapter" else output / "adapter"
    known = {header.file for header in found.values()} | {output / LEARNED_FILE}
    for file in sorted({*adapter.glob("*.safetensors"), output / MASKS_FILE} - known):
        if file.is_file() and (form != "model" or file.name == Path(MASKS_FILE).name):
            headers = headers_of(file)
            findings.problems += headers.problems
            found |= headers.tensors
            known.add(file)
    for file in sorted(output.rglob("*")):
        if file.suffix in (".safetensors", ".bin", ".pt", ".pth") and file not in known:
            mend = "delete it: a loader could mix it in"
            findings.problem("a weight file that the merge did not write", file, mend)
    return found


def _check_tensors(
    found: Mapping[str, TensorHeader], expected: Mapping[str, str], findings: _Findings, report: Advance
) -> tuple[int, int]:
    """Compare every tensor's bytes with the record's digest; return how many agree, and their bytes."""
    for name in sorted(expected.keys() - found.keys()):
        findings.problem("a tensor is missing", f"tensor {name}")
    total, done, sound, nbytes = sum(header.nbytes for header in found.values()), 0, 0, 0
    for name, header in sorted(found.items(), key=lambda pair: (pair[1].file, pair[1].offset or 0)):
        where = f"{header.file}, tensor {name}"
        if name not in expected:
            findings.problem("a tensor that the record does not have", where)
            continue
        digest = hashlib.sha256()
        for piece in _bytes_of(header):
            digest.update(piece)
            done += len(piece)
            report(done, total)
        if digest.hexdigest() == expected[name]:
            sound, nbytes = sound + 1, nbytes + header.nbytes
        else:
            findings.problem("the tensor's bytes are not those that were written", where)
    return sound, nbytes


def _bytes_of(header: TensorHeader) -> Iterator[bytes]:
    assert header.offset is not None, "outputs are safetensors"
    with header.file.open("rb") as stream:
        stream.seek(header.offset)
        left = header.nbytes
        while left and (piece := stream.read(min(PIECE, left))):
            yield piece
            left -= len(piece)


def _check_files(output: Path, record: RunRecord, findings: _Findings) -> int:
    """Compare files beside the weights with the record; return how many agree."""
    sound = 0
    for name, sha256 in record.files.items():
        file = output / name
        if ".." in Path(name).parts or Path(name).is_absolute() or not file.is_file():
            findings.problem("a file is missing", file)
        elif file_digest(file) != sha256:
            mend = f"put the old one back, or {MERGE_AGAIN}; edited by hand on purpose, it may stay"
            findings.problem("the file is not the one that was written", file, mend)
        else:
            sound += 1
    return sound


def _check_inputs(record: RunRecord, findings: _Findings) -> int:
    """Compare the inputs with the record; return how many files agree. What is not there is noted."""
    sound = 0
    for source in record.sources:
        for entry in source["files"]:
            if "path" not in entry or "sample" not in entry:
                findings.notes.append(
                    f"{source['name']}: {entry['name']} was not looked at: the record does not mark it"
                )
                continue
            file = Path(entry["path"])
            if not file.is_file():
                findings.notes.append(f"{source['name']}: {file} is not there any more")
            elif not _is_the_same(file, entry):
                mend = f"put the old one back, or {MERGE_AGAIN}"
                findings.problem("an input has changed since the merge", file, mend)
            else:
                sound += 1
    return sound


def _is_the_same(file: Path, entry: Mapping[str, Any]) -> bool:
    """Whether a file is the one that a record tells of, by the most that it tells."""
    if file.stat().st_size != entry["bytes"] or content_sample(file) != entry["sample"]:
        return False
    return "sha256" not in entry or file_digest(file) == entry["sha256"]


def _recompute(
    output: Path,
    record: RunRecord,
    found: Mapping[str, TensorHeader],
    count: int,
    seed: int,
    device: str | None,
    findings: _Findings,
) -> tuple[str, ...]:
    """Compute tensors once more; return those that came out with the same bytes."""
    if not count:
        return ()
    if "rebuilt" in record.recipe:
        findings.notes.append("nothing was recomputed: superpose rebuild made it from a set, and makes it again")
        return ()
    other = [
        f"{name} {record.versions.get(name)}, now {now}"
        for name, now in (("code", code_digest()), ("torch", torch.__version__))
        if record.versions.get(name) != now
    ]
    if other:
        findings.notes.append(f"recomputed by other versions than the merge was made by: {'; '.join(other)}")
    try:
        plan = _plan_again(output, record, device)
    except SuperposeError as problem:
        findings.problem(f"nothing could be recomputed: {problem.what}", problem.where, problem.mend)
        return ()
    known = {tensor.name: tensor for tensor in record.tensors}
    drawn = sorted(random.Random(seed).sample(range(len(plan.items)), min(count, len(plan.items))))
    chosen = [plan.items[number] for number in drawn]
    context = Context(
        plan.recipe.task_names, plan.weights, torch.device(device_of(plan.settings.device)), plan.settings.measure,
        plan.recipe.seed, None, plan.settings.split_tensors, plan.recipe.non_finite,
    )  # fmt: skip
    backend = make_backend(plan.settings.backend, plan.settings.workers, plan.settings.memory)
    same = []
    try:
        surveys = survey_all(plan.items, chosen, backend, context, lambda _: None)
        for item in chosen:
            again = _merge_again(item, surveys, context, found)
            if item.name in known and _same(again, known[item.name]):
                same.append(item.name)
            else:
                mend = f"{MERGE_AGAIN}; other versions of superpose or torch may round otherwise"
                findings.problem("recomputed from the inputs, the tensor has other bytes", f"tensor {item.name}", mend)
    except SuperposeError as problem:
        findings.problem(f"a tensor could not be recomputed: {problem.what}", problem.where, problem.mend)
    finally:
        backend.close()
        close_readers()
    return tuple(same)


def _plan_again(output: Path, record: RunRecord, device: str | None) -> Plan:
    """Return the plan of a finished merge, from its record."""
    recipe: dict[str, Any] = {**record.recipe, "base": record.sources[0]["place"]}
    recipe["models"] = [
        {**entry, "path": source["place"], "name": source["name"]}
        for entry, source in zip(record.recipe["models"], record.sources[1:], strict=True)
    ]
    if (output / LEARNED_FILE).is_file():
        recipe["learned"] = str(output)
    settings = Settings(
        device=device or str(record.settings.get("device", "cpu")),
        measure=bool(record.settings.get("measure", False)),
    )
    raise_all(check_device(settings))
    return make_plan(load_recipe(recipe), settings)


def _merge_again(
    item: WorkItem, surveys: Mapping[Any, Any], context: Context, found: Mapping[str, TensorHeader]
) -> dict[str, str]:
    """Merge an item, keep its digests alone; factors cut to the rank that they have in the output."""
    cut: dict[str, str] = {}

    def write(name: str, start: int, piece: Tensor) -> memoryview:
        if item.factors is not None and name in (item.factors.down, item.factors.up) and name in found:
            shape = found[name].shape
            kept = piece[: shape[0], : shape[1]].contiguous()
            cut[name] = hashlib.sha256(as_bytes(kept)).hexdigest()
        del start
        return as_bytes(piece)

    record = merge_item(item, surveys, context, write)
    return {"": record.sha256, **record.beside, **record.factors, **cut}


def _same(again: Mapping[str, str], record: TensorRecord) -> bool:
    return dict(again) == {"": record.sha256, **record.beside, **record.factors}
