"""Files that superpose itself writes and reads, broken: statistics, what was learned, and sets of task models."""

from __future__ import annotations

import json

import pytest
import torch
from families import base_tensors, load, save, tuned_tensors
from safetensors.torch import save_file

import superpose as library
from faults.damage import MERGED, NAME, POINTER, REFUSED, assert_says, merge_refused, small_base, small_family
from superpose import SuperposeError

GROUP = "Broken inputs"


def fisher(file, told=None, change=lambda tensors: tensors):
    tensors = {name: torch.rand(tensor.shape) + 0.1 for name, tensor in small_base().items()}
    metadata = {"statistics": "fisher", "data": {}, "examples": 1} if told is None else told
    text = metadata if isinstance(metadata, str) else json.dumps(metadata)
    save_file(change(tensors), file, {"superpose": text})
    return file


STATISTICS = {
    "of another kind": {"told": {"statistics": "gram"}},
    "says nothing": {"told": "{}"},
    "says no JSON": {"told": "fisher"},
    "says a list": {"told": "[1]"},
    "says lists without end": {"told": "[" * 100_000},
    "shares what is not there": {"told": {"statistics": "fisher", "same": {NAME: "nowhere"}}},
    "shares a list": {"told": {"statistics": "fisher", "same": [NAME]}},
    "no tensor": {"change": lambda tensors: {}},
    "a tensor less": {"change": lambda tensors: {k: v for k, v in tensors.items() if k != NAME}},
    "a tensor of another shape": {"change": lambda tensors: {**tensors, NAME: torch.ones(8, 24)}},
    "float64": {"change": lambda tensors: {name: value.double() for name, value in tensors.items()}},
}


@pytest.mark.parametrize("fault", STATISTICS)
def test_broken_statistics_are_named(tmp_path, tally, fault):
    base, file = small_family(tmp_path)
    made = fisher(tmp_path / "made.safetensors", **STATISTICS[fault])
    with tally(GROUP, f"statistics: {fault}") as injection:
        models = [{"path": str(file.parent), "statistics": str(made)}]
        injection.outcome = refused_with(tmp_path, base, models, "fisher", ["made.safetensors"])


@pytest.mark.parametrize("fault", ["cut off", "empty", "git-lfs pointer", "a folder", "nothing"])
def test_statistics_that_are_no_file_of_theirs_are_named(tmp_path, tally, fault):
    base, file = small_family(tmp_path)
    made = fisher(tmp_path / "made.safetensors")
    content = {
        "cut off": made.read_bytes()[:-3], "empty": b"", "git-lfs pointer": POINTER,
    }.get(fault)  # fmt: skip
    made.unlink()
    if content is not None:
        made.write_bytes(content)
    elif fault == "a folder":
        made.mkdir()
    with tally(GROUP, f"statistics: {fault}") as injection:
        models = [{"path": str(file.parent), "statistics": str(made)}]
        injection.outcome = refused_with(tmp_path, base, models, "fisher", ["made.safetensors"])


@pytest.mark.parametrize(
    "told",
    [
        {"statistics": "fisher"},
        {"statistics": "fisher", "data": None, "examples": "many"},
        {"statistics": "fisher", "data": {"data": 7, "split": [1]}, "examples": {}},
        {"statistics": "fisher", "model": {"files": [{"name": 1}], "sha256": 3}, "data": {}, "examples": 1},
    ],
    ids=["nothing of its data", "no data", "odd data", "odd model"],
)
def test_statistics_of_other_programs_are_used_or_refused(tmp_path, tally, told):
    base, file = small_family(tmp_path)
    made = fisher(tmp_path / "made.safetensors", told)
    with tally(GROUP, "statistics: odd provenance") as injection:
        models = [{"path": str(file.parent), "statistics": str(made)}]
        recipe = {"base": str(base), "models": models, "method": "fisher"}
        try:
            library.merge(recipe, tmp_path / "out", backend="serial")
            injection.outcome = MERGED
        except SuperposeError as error:
            assert_says(str(error), ["made.safetensors"])
            injection.outcome = REFUSED


def refused_with(tmp_path, base, models, method, names, **more):
    with pytest.raises(SuperposeError) as caught:
        library.merge({"base": str(base), "models": models, "method": method, **more}, tmp_path / "out")
    assert_says(str(caught.value), names)
    assert not (tmp_path / "out").exists()
    return REFUSED


LEARNED = {
    "says nothing": "{}",
    "says no JSON": "adamerging",
    "says a list": "[]",
    "says lists without end": "[" * 100_000,
    "of another method": json.dumps({"learned": "lorahub", "task_names": ["tuned"]}),
    "of other models": json.dumps({"learned": "adamerging", "task_names": ["other"]}),
    "names that are numbers": json.dumps({"learned": "adamerging", "task_names": 7}),
}


@pytest.mark.parametrize("fault", [*LEARNED, "a row too many", "cut off"])
def test_what_was_learned_and_is_broken_is_named(tmp_path, tally, fault):
    base, file = small_family(tmp_path)
    sound = json.dumps({"learned": "adamerging", "task_names": ["tuned"]})
    made = tmp_path / "learned.safetensors"
    rows = 2 if fault == "a row too many" else 1
    save_file({"*": torch.ones(rows, dtype=torch.float64)}, made, {"superpose": LEARNED.get(fault, sound)})
    if fault == "cut off":
        made.write_bytes(made.read_bytes()[:-1])
    with tally(GROUP, f"learned: {fault}") as injection:
        injection.outcome = refused_with(
            tmp_path, base, [str(file.parent)], "adamerging", ["learned"], learned=str(made)
        )


def test_the_command_line_names_broken_statistics(tmp_path, tally, forks):
    base, file = small_family(tmp_path)
    made = fisher(tmp_path / "made.safetensors", "fisher")
    with tally(GROUP, "statistics: says no JSON", "command line") as injection:
        wanted = ["was not written by superpose statistics"]
        injection.outcome = merge_refused(
            forks, tmp_path, base, file.parent, "-m", "fisher", "--statistics", made, names=wanted
        )


@pytest.mark.parametrize("fault", ["cut off", "empty", "a list", "no mapping of tensors", "lists without end"])
def test_a_broken_set_of_task_models_is_named(tmp_path, tally, fault):
    folders = [save(tmp_path / "base", base_tensors(layers=1, width=8))]
    folders += [save(tmp_path / f"ft{number}", tuned_tensors(load(folders[0]), number)) for number in (1, 2)]
    library.merge(
        {"base": str(folders[0]), "models": [str(folder) for folder in folders[1:]], "method": "emr"},
        tmp_path / "set",
        backend="serial",
    )
    file = next((tmp_path / "set" / "tasks").glob("*.json"))
    text = file.read_text()
    broken = {
        "cut off": text[: len(text) // 2], "empty": "", "a list": "[]", "no mapping of tensors": "{}",
        "lists without end": "[" * 100_000,
    }  # fmt: skip
    file.write_text(broken[fault])
    with tally(GROUP, f"tasks.json: {fault}", "rebuild") as injection:
        with pytest.raises(SuperposeError) as caught:
            library.rebuild(tmp_path / "set", "ft1", tmp_path / "out")
        assert_says(str(caught.value), [str(tmp_path / "set")])
        assert not (tmp_path / "out").exists()
        injection.outcome = REFUSED
