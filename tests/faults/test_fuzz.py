"""The targets of the fuzzer, in every run of the tests: structured changes of valid files, and bytes of any sort."""

from __future__ import annotations

import io
import json
import random
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from faults.fuzz.mutations import mutated
from faults.fuzz.targets import TARGETS, Crash, Target, attempt, folder_for
from faults.tally import rounds
from superpose.checkpoints import torch_pickle

GROUP = "Hostile inputs"


@pytest.fixture(scope="module", params=TARGETS)
def prepared(request):
    """A target, and its folder."""
    target = TARGETS[request.param]
    with folder_for(target) as folder:
        yield target, Path(folder)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_seeds_are_read_and_what_was_found_is_mended(prepared, tally):
    target, folder = prepared
    outcomes = []
    for seed in target.seeds:
        with tally(GROUP, "fuzz: seeds", target.name) as injection:
            injection.outcome = attempt(target, folder, seed, measure=True)
            outcomes.append(injection.outcome)
    assert outcomes[0] == "read"


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_changed_files_are_read_or_refused(prepared, tally):
    target, folder = prepared
    for number in range(rounds(150)):
        draw = random.Random(f"{target.name} {number}")
        content = mutated(draw.choice(target.seeds), target.seeds, draw, target.name)
        with tally(GROUP, "fuzz: changed files", target.name) as injection:
            injection.outcome = attempt(target, folder, content, measure=number % 10 == 0)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_bytes_of_any_sort_are_read_or_refused(prepared, tally):
    target, folder = prepared

    @given(content=st.binary(max_size=300) | st.text(max_size=100).map(lambda text: text.encode("utf-8", "replace")))
    @settings(max_examples=rounds(60), deadline=None, database=None)
    def one(content: bytes) -> None:
        with tally(GROUP, "fuzz: any bytes", target.name) as injection:
            injection.outcome = attempt(target, folder, content)

    one()


NAMES = (
    "base", "models", "path", "rules", "match", "kind", "weight_map", "r", "lora_alpha", "rank_pattern", "peft_type",
    "LORA", "model-00001-of-00002.safetensors", "../x", "*", "output", "task", "data", "a.weight",
)  # fmt: skip
WORDS = st.sampled_from(NAMES) | st.text(max_size=5)
PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | WORDS
VALUES = st.recursive(PLAIN, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(WORDS, inner, max_size=4))
"""JSON of any shape, with words that mean something to what reads it."""


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", ["index", "recipe", "adapter"])
def test_json_of_any_shape_is_read_or_refused(name, tally):
    target = TARGETS[name]
    with folder_for(target) as folder:

        @given(content=st.dictionaries(WORDS, VALUES, max_size=6))
        @settings(max_examples=rounds(60), deadline=None, database=None)
        def one(content: dict) -> None:
            with tally(GROUP, "fuzz: any JSON", name) as injection:
                injection.outcome = attempt(target, Path(folder), json.dumps(content).encode())

        one()


# That the harness sees what it is to see.


def test_a_target_that_fails_is_seen():
    for run in (
        lambda folder: 1 / 0,
        lambda folder: bytearray(100_000_000),
        lambda folder: Path("/etc/passwd").read_text(),
        lambda folder: (folder.parent / "outside").open("w").close(),
        lambda folder: subprocess.run([sys.executable, "-V"], check=True),
    ):
        target = Target("broken", "file", run)
        with folder_for(target) as folder, pytest.raises((Crash, ZeroDivisionError)):
            attempt(target, Path(folder), b"", measure=True)
    (Path(folder).parent / "outside").unlink()


def test_a_defence_that_is_taken_away_is_missed(monkeypatch):
    """Without the look at the zip, an entry that is packed takes memory beyond the bound."""
    target, stream = TARGETS["pickle"], io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("m/data.pkl", bytes(200_000_000))
        archive.writestr("m/version", b"3\n")
    with folder_for(target) as folder:
        assert attempt(target, Path(folder), stream.getvalue(), measure=True) == "refused"
        monkeypatch.setattr(torch_pickle, "check_zip", lambda file: None)
        with pytest.raises(Crash, match="bytes of memory"):
            attempt(target, Path(folder), stream.getvalue(), measure=True)


def test_the_fuzzer_runs_and_counts(tmp_path):
    """With atheris where it is installed, at random elsewhere."""
    command = [sys.executable, "-m", "faults.fuzz", "safetensors", "--runs", "300", "--out", tmp_path / "counts.json"]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "safetensors: 300 executions, 0 crashes" in done.stdout
    assert '"executions": 300' in (tmp_path / "counts.json").read_text()
