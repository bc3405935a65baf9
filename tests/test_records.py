"""The record of a merge and the model card made from it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import yaml
from families import make_family

import superpose
from superpose.records import RECORD_FILE, RunRecord, TensorRecord
from superpose.report.card import MOST_WARNINGS, model_card

TENSORS = (
    TensorRecord(
        name="layers.0.weight",
        kind="linear",
        kind_from="module",
        action="merge",
        method="stf",
        dtype="BF16",
        shape=(4, 3),
        parts=1,
        sha256="0" * 64,
        stats={"rank": 3, "residual": 1e-9, "solver": "cholesky"},
        measures={"untrimmed": {"mean": 0.9, "by_task": {"math": 0.8, "code": 1.0}}},
        warnings=("layers.0.weight: nearly singular (tasks: math)",),
        seconds=0.25,
    ),
    TensorRecord(
        name="scalar",
        kind="scalar",
        kind_from="name",
        action="copy",
        method="",
        dtype="F32",
        shape=(),
        parts=1,
        sha256="f" * 64,
    ),
)
RECORD = RunRecord(
    output="results/merged",
    recipe={
        "base": "org/base@v1",
        "models": [
            {"path": "org/math", "weight": 1.0, "name": "math"},
            {"path": "models/code", "weight": 1.0, "name": "code"},
        ],
        "method": "stf",
        "options": {"density": 0.2, "ridge": None},
        "rules": [{"kind": "norm", "keep": "base"}],
    },
    sources=(
        {"name": "base", "path": "org/base@v1", "revision": "a" * 40, "files": [{"name": "m", "bytes": 7}]},
        {"name": "math", "path": "org/math", "revision": "b" * 40, "files": []},
        {"name": "code", "path": "models/code", "revision": "", "files": []},
    ),
    versions={"superpose": "9.8.7", "code": "0123", "torch": "2.0", "python": "3.12"},
    settings={"device": "cpu", "workers": 2, "memory": 2**32},
    tensors=TENSORS,
    warnings=("kinds are told by names", "layers.0.weight: nearly singular (tasks: math)"),
    totals={"tensors": 2, "merged": 1, "copied": 1, "seconds": 1.5},
)


def header_of(card):
    """Return the YAML header that the hub reads."""
    first, header, rest = card.split("---\n", 2)
    assert first == ""
    assert rest.startswith("\n# ")
    return yaml.safe_load(header)


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    root = tmp_path_factory.mktemp("merged")
    folders = [str(folder) for folder in make_family(root, tasks=2)]
    recipe = {"base": folders[0], "models": folders[1:], "method": "ties", "options": {"density": 0.5}}
    return superpose.merge(recipe, root / "out", measure=True)


# Records.


def test_a_record_survives_being_written_and_read():
    assert RunRecord.from_json(RECORD.to_json()) == RECORD
    assert RunRecord.from_json(RECORD.to_json()).to_json() == RECORD.to_json()


def test_a_record_is_plain_json():
    content = json.loads(RECORD.to_json())
    assert content.keys() == {field.name for field in dataclasses.fields(RunRecord)}
    assert content["tensors"][0]["shape"] == [4, 3]
    assert content["tensors"][0]["stats"] == {"rank": 3, "residual": 1e-9, "solver": "cholesky"}
    assert RECORD.to_json().endswith("}\n")


def test_tensors_are_tuples_again_after_reading():
    found = RunRecord.from_json(RECORD.to_json())
    assert isinstance(found.tensors, tuple)
    assert found.tensors[0].shape == (4, 3)
    assert found.tensors[0].warnings == TENSORS[0].warnings
    assert found.tensors[1].shape == ()


def test_the_record_of_a_merge_is_in_its_folder(merged):
    assert RunRecord.load(merged.output) == merged
    assert RECORD_FILE == "run.json"


def test_numbers_of_a_merge_are_json_that_every_reader_takes(merged):
    """NaN and infinity are no JSON, though Python writes them."""

    def refuse(constant):
        raise AssertionError(constant)

    json.loads(merged.to_json(), parse_constant=refuse)


# Cards.


def test_card_has_the_hubs_header():
    """A path like models/code looks like a hub id; that it has no commit says that it is none."""
    assert header_of(model_card(RECORD, {"model_type": "llama"})) == {
        "base_model": ["org/base", "org/math"],
        "base_model_relation": "merge",
        "tags": ["merge", "superpose"],
        "library_name": "transformers",
    }


def test_card_of_a_local_merge_names_no_base_model(merged):
    header = header_of(model_card(merged, {}))
    assert header == {"base_model_relation": "merge", "tags": ["merge", "superpose"]}


def test_card_names_models_methods_and_recipe():
    card = model_card(RECORD, {})
    assert "# merged\n" in card
    assert "Merged by `stf` with superpose 9.8.7" in card
    assert f"| [org/base@v1](https://huggingface.co/org/base) | base | {'a' * 40} |" in card
    assert "| `code` | code | local |" in card
    assert "| linear | stf | 1 |" in card
    assert "| scalar | copied from the base | 1 |" in card
    assert "- layers.0.weight: nearly singular (tasks: math)" in card
    _, _, recipe = card.partition("```yaml\n")
    assert yaml.safe_load(recipe.partition("```")[0]) == RECORD.recipe


def test_card_shows_no_path_of_the_machine_in_its_table(merged):
    rows = [line for line in model_card(merged, {}).splitlines() if line.startswith("| ")]
    assert not any("/" in row for row in rows)


def test_card_without_warnings_has_no_section_for_them():
    card = model_card(dataclasses.replace(RECORD, warnings=()), {})
    assert "Warnings" not in card


def test_card_counts_the_warnings_that_it_does_not_show():
    warnings = tuple(f"warning {number}" for number in range(MOST_WARNINGS + 5))
    card = model_card(dataclasses.replace(RECORD, warnings=warnings), {})
    assert f"- warning {MOST_WARNINGS - 1}\n" in card
    assert f"- warning {MOST_WARNINGS}\n" not in card
    assert "- and 5 more, in `run.json`" in card


def test_the_same_record_gives_the_same_card():
    again = RunRecord.from_json(RECORD.to_json())
    assert model_card(again, {"model_type": "llama"}) == model_card(RECORD, {"model_type": "llama"})


def test_a_card_names_neither_time_nor_machine():
    later = dataclasses.replace(
        RECORD,
        settings={"device": "cuda", "workers": 64},
        totals={"seconds": 99.0},
        tensors=tuple(dataclasses.replace(tensor, seconds=7.0) for tensor in TENSORS),
        versions={**RECORD.versions, "python": "3.99", "torch": "9.9"},
    )
    assert model_card(later, {}) == model_card(RECORD, {})


def test_the_card_of_a_merge_is_in_its_folder(merged):
    card = (Path(merged.output) / "README.md").read_text(encoding="utf-8")
    assert card == model_card(merged, {})
    assert "| linear | ties | 4 |" in card
    assert yaml.safe_load(card.partition("```yaml\n")[2].partition("```")[0])["options"]["density"] == 0.5
