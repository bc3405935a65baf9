"""Merges that are interrupted: killed, stopped by hand, or out of room; run again, they go on."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from families import load, make_family, save, superpose, weights
from safetensors import safe_open
from safetensors.torch import save_file

import superpose as library
from superpose import SuperposeError
from superpose.records import RunRecord


def start(folders, out, *options):
    command = [sys.executable, "-m", "superpose", "merge", *map(str, folders), "-o", str(out), "--quiet", *options]
    return subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        # A shell starts what it puts in the background with SIGINT ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def recipe(folders, **more):
    return {"base": str(folders[0]), "models": [str(folder) for folder in folders[1:]], **more}


def wait_for_journal(partial, lines, process):
    journal = partial / "journal.jsonl"
    until = time.monotonic() + 60
    while time.monotonic() < until and process.poll() is None:
        if journal.exists() and journal.read_bytes().count(b"\n") >= lines:
            return
        time.sleep(0.002)


@pytest.mark.slow
def test_killed_ten_times_the_result_is_the_same_and_never_incomplete(tmp_path):
    folders = make_family(tmp_path, layers=24, width=96)
    undisturbed, out = tmp_path / "undisturbed", tmp_path / "out"
    library.merge(recipe(folders, method="stf"), undisturbed)
    total = len(load(folders[0]))
    moments = sorted(random.Random(0).randint(1, total - 8) for _ in range(10))
    kills = 0
    for moment in moments:
        process = start(folders, out, "--method", "stf")
        wait_for_journal(tmp_path / "out.partial", moment, process)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
        assert not out.exists()
    assert kills == 10
    process = start(folders, out, "--method", "stf")
    while process.poll() is None:
        if out.exists():  # from the first moment that the name is there, the whole model is
            assert weights(out) == weights(undisturbed)
            assert (out / "run.json").exists()
        time.sleep(0.005)
    assert process.returncode == 0, process.stderr.read()
    process.communicate()
    assert weights(out) == weights(undisturbed)
    assert RunRecord.load(out).totals["resumed"] >= moments[-1]
    assert not (tmp_path / "out.partial").exists()


def test_finished_tensors_are_not_merged_again(tmp_path, monkeypatch):
    folders = make_family(tmp_path, layers=3)
    whole = library.merge(recipe(folders, method="ties"), tmp_path / "whole")
    merged = []
    real = library.api.merge.__globals__["run_plan"].__globals__["merge_item"]

    def failing(item, *arguments, **more):
        if len(merged) == 5:
            raise KeyboardInterrupt
        merged.append(item.name)
        return real(item, *arguments, **more)

    monkeypatch.setattr("superpose.run.merge_item", failing)
    with pytest.raises(KeyboardInterrupt):
        library.merge(recipe(folders, method="ties"), tmp_path / "out", backend="serial")
    assert not (tmp_path / "out").exists()
    again = []
    monkeypatch.setattr(
        "superpose.run.merge_item", lambda item, *a, **m: again.append(item.name) or real(item, *a, **m)
    )
    record = library.merge(recipe(folders, method="ties"), tmp_path / "out", backend="serial")
    assert record.totals["resumed"] == 5
    assert not set(again) & set(merged)
    assert len(again) + len(merged) == whole.totals["tensors"]
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")


@pytest.fixture
def stopped(tmp_path, monkeypatch):
    """A merge that stopped after five tensors; the folders and the output's name."""
    folders = make_family(tmp_path, layers=3)
    count = []
    from superpose import run

    real = run.merge_item

    def failing(item, *arguments, **more):
        if len(count) == 5:
            raise KeyboardInterrupt
        count.append(item.name)
        return real(item, *arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(run, "merge_item", failing)
        with pytest.raises(KeyboardInterrupt):
            library.merge(recipe(folders, method="task_arithmetic"), tmp_path / "out", backend="serial")
    return folders, tmp_path / "out"


def test_a_torn_journal_line_is_work_not_done(stopped, tmp_path):
    folders, out = stopped
    journal = tmp_path / "out.partial" / "journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-40])
    record = library.merge(recipe(folders, method="task_arithmetic"), out)
    assert record.totals["resumed"] == 4
    library.merge(recipe(folders, method="task_arithmetic"), tmp_path / "whole")
    assert weights(out) == weights(tmp_path / "whole")


def test_bytes_that_got_lost_are_made_again(stopped, tmp_path):
    folders, out = stopped
    file = tmp_path / "out.partial" / "model.safetensors"
    with file.open("r+b") as stream:
        stream.seek(file.stat().st_size // 2)
        stream.write(b"\xff" * (file.stat().st_size // 2))
    record = library.merge(recipe(folders, method="task_arithmetic"), out)
    assert record.totals["resumed"] < 5
    library.merge(recipe(folders, method="task_arithmetic"), tmp_path / "whole")
    assert weights(out) == weights(tmp_path / "whole")


@pytest.mark.parametrize("change", ["input", "option", "method"])
def test_what_was_finished_under_other_circumstances_is_not_used(stopped, tmp_path, change):
    folders, out = stopped
    options, method = {}, "task_arithmetic"
    if change == "input":
        tensors = {name: tensor * 2 for name, tensor in load(folders[1]).items()}
        save_file(tensors, folders[1] / "model.safetensors")
    elif change == "option":
        options = {"scaling_factor": 0.7}
    else:
        method = "average"
    record = library.merge(recipe(folders, method=method, options=options), out)
    assert record.totals["resumed"] == 0
    library.merge(recipe(folders, method=method, options=options), tmp_path / "whole")
    assert weights(out) == weights(tmp_path / "whole")


def test_a_folder_that_is_not_ours_is_not_touched(tmp_path):
    folders = make_family(tmp_path)
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.txt").write_text("five years")
    with pytest.raises(SuperposeError, match="in the way"):
        library.merge(recipe(folders), tmp_path / "out")
    assert (tmp_path / "out.partial" / "thesis.txt").read_text() == "five years"


@pytest.mark.parametrize("moment", ["sync", "rename"])
def test_killed_in_the_last_moments_a_merge_goes_on(tmp_path, monkeypatch, moment):
    folders = make_family(tmp_path)
    from superpose import output_folder

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if moment == "sync":
            real = output_folder.sync
            patch.setattr(output_folder, "sync", lambda path: stop() if path.name == "run.json" else real(path))
        else:
            patch.setattr(type(tmp_path), "rename", stop)
        with pytest.raises(KeyboardInterrupt):
            library.merge(recipe(folders), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    library.merge(recipe(folders), tmp_path / "out")
    library.merge(recipe(folders), tmp_path / "whole")
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names == {file.name for file in (tmp_path / "whole").iterdir()}
    assert not (tmp_path / "out.partial").exists()


def test_killed_while_an_output_is_replaced_nothing_is_lost_or_left(tmp_path, monkeypatch):
    folders = make_family(tmp_path)
    library.merge(recipe(folders, method="average"), tmp_path / "out")
    first = weights(tmp_path / "out")
    from superpose import output_folder

    real, renames = type(tmp_path).rename, []

    def none_after_the_first(path, target):
        renames.append(path)
        if len(renames) > 1:
            raise KeyboardInterrupt
        return real(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(type(tmp_path), "rename", none_after_the_first)
        with pytest.raises(KeyboardInterrupt):
            library.merge(recipe(folders, method="stf"), tmp_path / "out", overwrite=True)
    assert weights(tmp_path / ".out.superpose-replaced") == first
    output_folder.settle_replaced(tmp_path / "out")
    assert weights(tmp_path / "out") == first
    library.merge(recipe(folders, method="stf"), tmp_path / "out", overwrite=True)
    assert weights(tmp_path / "out") != first
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(("out.", ".out"))]


def test_folders_that_merely_sound_like_ours_are_left_alone(tmp_path):
    folders = make_family(tmp_path)
    library.merge(recipe(folders, method="average"), tmp_path / "out.replaced")
    first = weights(tmp_path / "out.replaced")
    with pytest.raises(SuperposeError, match="merges under way"):
        library.merge(recipe(folders), tmp_path / "out.partial")
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "run.json").write_text('{"experiment": 7}')
    with pytest.raises(SuperposeError, match="in the way"):
        library.merge(recipe(folders), tmp_path / "out")
    (tmp_path / "out.partial" / "run.json").rename(tmp_path / "run.json")
    library.merge(recipe(folders, method="stf"), tmp_path / "out")
    library.merge(recipe(folders, method="stf"), tmp_path / "out", overwrite=True)
    assert weights(tmp_path / "out.replaced") == first
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "run.json").write_text('{"experiment": 7}')
    with pytest.raises(SuperposeError, match="no output of superpose"):
        library.merge(recipe(folders), tmp_path / "other", overwrite=True)


def test_two_merges_do_not_write_one_output(tmp_path):
    folders = make_family(tmp_path)
    from superpose.output_folder import locked

    with locked(tmp_path / "out.partial"), pytest.raises(SuperposeError, match="another merge"):
        library.merge(recipe(folders), tmp_path / "out")


def test_ctrl_c_keeps_what_is_finished_and_says_how_to_go_on(tmp_path):
    folders = make_family(tmp_path, layers=40, width=192)
    process = start(folders, tmp_path / "out", "--method", "stf", "--backend", "serial")
    wait_for_journal(tmp_path / "out.partial", 5, process)
    process.send_signal(signal.SIGINT)
    _, text = process.communicate(timeout=60)
    assert process.returncode == 130, text
    assert "run the same command again" in text
    assert "Traceback" not in text
    assert not (tmp_path / "out").exists()
    superpose("merge", *folders, "-o", tmp_path / "out", "--method", "stf", "--quiet")
    assert RunRecord.load(tmp_path / "out").totals["resumed"] >= 5


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk takes root")
def test_a_full_disk_leaves_nothing_under_the_final_name(tmp_path):
    folders = make_family(tmp_path, layers=20, width=64)
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.decode().strip()}")
    try:
        done = superpose("merge", *folders, "-o", disk / "out", "--method", "average", check=False)
        assert done.returncode == 2
        assert "not enough room" in done.stderr
        # Room that goes away after the plan was made.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("superpose.planning.plan.check_room", lambda *_: [])
            with pytest.raises(SuperposeError, match="disk is full"):
                library.merge(recipe(folders, method="average"), disk / "out")
        assert not (disk / "out").exists()
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        library.merge(recipe(folders, method="average"), disk / "out")
        assert load(disk / "out").keys() == load(folders[0]).keys()
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_sharded_output_appears_whole(tmp_path):
    folders = make_family(tmp_path, layers=3)
    library.merge(recipe(folders, method="average", output={"shard_size": 4000}), tmp_path / "out")
    names = set()
    for file in (tmp_path / "out").glob("*.safetensors"):
        with safe_open(file, "pt") as stream:
            names |= set(stream.keys())
    assert names == load(folders[0]).keys()
    assert (tmp_path / "out" / "model.safetensors.index.json").exists()
    again = save(tmp_path / "again", load(tmp_path / "out"))
    assert all(torch.equal(load(again)[name], tensor) for name, tensor in load(tmp_path / "out").items())


@pytest.mark.parametrize("phase", ["survey", "merge"])
def test_an_interruption_between_two_tensors_waits_for_those_in_flight(tmp_path, monkeypatch, phase):
    from superpose import run

    name = {"survey": "survey_item", "merge": "merge_item"}[phase]
    of_one, begun, ended = getattr(run, name), [], []

    def slow(item, *rest, **more):
        begun.append(item.name)
        if len(begun) > 1:
            time.sleep(0.5)
        found = of_one(item, *rest, **more)
        ended.append(item.name)
        return found

    def interrupt(now):
        if now.phase == phase and now.done and len(begun) > 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(run, name, slow)
    folders = make_family(tmp_path)
    with pytest.raises(KeyboardInterrupt) as caught:
        library.merge(recipe(folders, method="ties"), tmp_path / "out", workers=2, report=interrupt)
    # While the error and its frames are held: whoever reports it has not let go of them either.
    assert caught.tb is not None
    assert sorted(ended) == sorted(begun)
    assert len(begun) > 1
