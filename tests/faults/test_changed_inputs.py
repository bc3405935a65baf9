"""Inputs that change while a merge reads them: refused, whatever the way they change; nothing is mixed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from families import load, make_family, weights
from safetensors.torch import save_file

import superpose
from faults.waiting import method_that_waits, wait_for
from superpose import SuperposeError, run
from superpose.checkpoints.stamps import BLOCK, BLOCKS, HEAD, content_sample


def other(file: Path) -> None:
    """Write other numbers of the same sizes."""
    tensors = {name: tensor + 1 for name, tensor in load(file.parent).items()}
    save_file(tensors, file.with_suffix(".new"), {"format": "pt"})


def rewritten(file: Path) -> None:
    other(file)
    file.write_bytes(file.with_suffix(".new").read_bytes())


def rewritten_with_its_old_date(file: Path) -> None:
    status = file.stat()
    rewritten(file)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


def replaced_with_the_same_date(file: Path) -> None:
    status = file.stat()
    other(file)
    file.with_suffix(".new").replace(file)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


def made_longer(file: Path) -> None:
    with file.open("ab") as stream:
        stream.write(b"\0" * 8)


def replaced_by_a_part(file: Path) -> None:
    file.with_suffix(".new").write_bytes(file.read_bytes()[:-100])
    file.with_suffix(".new").replace(file)


def replaced_by_nonsense(file: Path) -> None:
    file.with_suffix(".new").write_bytes(b"\xff" * 5000)
    file.with_suffix(".new").replace(file)


def touched(file: Path) -> None:
    os.utime(file)


def removed(file: Path) -> None:
    file.unlink()


CHANGES = [
    rewritten,
    rewritten_with_its_old_date,
    replaced_with_the_same_date,
    made_longer,
    replaced_by_a_part,
    replaced_by_nonsense,
    touched,
    removed,
]


def interrupted_by(change: Callable[[Path], None], file: Path, where: str, patch: pytest.MonkeyPatch) -> None:
    """Let a change happen before the third item, or the third survey of one."""
    name = "survey_item" if where == "survey" else "merge_item"
    real, calls = getattr(run, name), []

    def changing(*arguments, **more):
        calls.append(1)
        if len(calls) == 3:
            change(file)
        return real(*arguments, **more)

    patch.setattr(run, name, changing)


@pytest.mark.parametrize("where", ["survey", "item"])
@pytest.mark.parametrize("backend", ["serial", "threads"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_changed_input_is_refused_and_nothing_is_mixed(tmp_path, monkeypatch, tally, change, backend, where):
    folders = make_family(tmp_path)
    recipe = {
        "base": str(folders[0]), "models": [str(folder) for folder in folders[1:]], "method": "ties",
        "options": {"density_scope": "model"},
    }  # fmt: skip
    superpose.merge(recipe, tmp_path / "whole")
    shutil.copytree(folders[2], tmp_path / "saved")
    file = folders[2] / "model.safetensors"
    with tally("Disk", f"input {change.__name__.replace('_', ' ')} between plan and read", backend) as injection:
        with monkeypatch.context() as patch:
            interrupted_by(change, file, where, patch)
            with pytest.raises(SuperposeError) as caught:
                superpose.merge(recipe, tmp_path / "out", backend=backend)
        assert str(file) in caught.value.where
        assert "since" in caught.value.what
        assert not (tmp_path / "out").exists()
        file.unlink(missing_ok=True)
        shutil.copy(tmp_path / "saved" / "model.safetensors", file)
        superpose.merge(recipe, tmp_path / "out", backend=backend)
        assert weights(tmp_path / "out") == weights(tmp_path / "whole")
        injection.outcome = "refused by name; put back, same bytes"


def test_a_new_link_to_an_input_is_no_change(tmp_path, monkeypatch):
    folders = make_family(tmp_path)
    recipe = {"base": str(folders[0]), "models": [str(folder) for folder in folders[1:]], "method": "average"}
    file = folders[1] / "model.safetensors"
    interrupted_by(lambda file: os.link(file, tmp_path / "link"), file, "item", monkeypatch)
    superpose.merge(recipe, tmp_path / "out", backend="serial")
    assert (tmp_path / "link").exists()
    assert (tmp_path / "out").exists()


def test_a_change_in_the_last_moment_is_seen_before_the_output_appears(tmp_path, monkeypatch):
    folders = make_family(tmp_path)
    recipe = {"base": str(folders[0]), "models": [str(folder) for folder in folders[1:]], "method": "average"}
    real = run.StreamWriter.sync

    def sync(writer):
        rewritten(folders[3] / "model.safetensors")
        real(writer)

    monkeypatch.setattr(run.StreamWriter, "sync", sync)
    with pytest.raises(SuperposeError, match="has changed since the plan"):
        superpose.merge(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="what becomes of a file cut short under a mapping is Linux's")
def test_cut_short_while_it_is_mapped_a_file_ends_the_process_and_leaves_nothing(tmp_path, tally):
    folders = make_family(tmp_path, layers=2, width=64)
    plug_in = method_that_waits(tmp_path / "methods")
    file = folders[2] / "model.safetensors"
    content = file.read_bytes()
    command = [sys.executable, "-m", "superpose", "merge", *map(str, folders), "-o", str(tmp_path / "out")]
    command += ["--method", "waiting", "--backend", "serial", "--quiet"]
    environment = {**os.environ, "SUPERPOSE_METHODS": str(plug_in)}
    with tally("Disk", "input cut short in its place while it is mapped", "serial") as injection:
        process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        wait_for(plug_in / "begun", process)
        os.truncate(file, 1000)
        (plug_in / "wait").unlink()
        _, said = process.communicate(timeout=60)
        assert process.returncode in (2, -signal.SIGBUS), said
        assert not (tmp_path / "out").exists()
        again = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        assert again.returncode == 2
        assert str(file) in again.stderr
        file.write_bytes(content)
        assert subprocess.run(command, env=environment, timeout=60).returncode == 0
        superpose.merge(
            {"base": str(folders[0]), "models": [str(folder) for folder in folders[1:]], "method": "average"},
            tmp_path / "whole",
        )
        for name, tensor in load(tmp_path / "whole").items():
            assert (load(tmp_path / "out")[name] - tensor).abs().max() < 1e-6
        injection.outcome = "refused by name" if process.returncode == 2 else "ended by SIGBUS; then refused by name"


@pytest.mark.parametrize("place", [0, HEAD - 1, HEAD + BLOCK + 7, -BLOCK, -1])
def test_the_sample_has_the_head_and_blocks_to_the_end(tmp_path, place):
    content = bytearray(HEAD + 2 * BLOCKS * BLOCK)
    (tmp_path / "a").write_bytes(content)
    before = content_sample(tmp_path / "a")
    content[place] = 1
    (tmp_path / "a").write_bytes(content)
    assert content_sample(tmp_path / "a") != before


def test_a_small_file_is_in_its_sample_as_a_whole(tmp_path):
    content = bytearray(HEAD + BLOCKS * BLOCK)
    (tmp_path / "a").write_bytes(content)
    seen = {content_sample(tmp_path / "a")}
    for place in range(0, len(content), 99_991):
        content[place] ^= 1
        (tmp_path / "a").write_bytes(content)
        seen.add(content_sample(tmp_path / "a"))
    assert len(seen) == 1 + len(range(0, len(content), 99_991))
