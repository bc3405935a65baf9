"""`superpose statistics`: the file, its provenance, what interrupts it, and what a merge says of a bad one."""

import hashlib
import json
import os
import pickle
import signal
import subprocess
import sys
import time

import pytest
import torch
from families import superpose
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_models import classified, family, save_sharded, write_rows
from typer.testing import CliRunner

from superpose import Problems, SuperposeError
from superpose.api import compute_statistics
from superpose.cli import app
from superpose.statistics import passes


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("files")


@pytest.fixture(scope="module")
def folders(root):
    return family(root / "family")


@pytest.fixture(scope="module")
def texts(root):
    return classified(root / "texts.jsonl", 30)


@pytest.fixture(scope="module")
def made(root, folders, texts):
    """A file of each kind for each fine-tune."""
    found = {}
    for kind in ("fisher", "gram"):
        for folder in folders[1:]:
            file = root / f"{folder.name}.{kind}.safetensors"
            compute_statistics(kind, folder, {"data": texts, "examples": 6}, file, threads=1)
            found[kind, folder.name] = file
    return found


def run(*arguments):
    return CliRunner().invoke(app, [*map(str, arguments)])


def told_by(file):
    with safe_open(str(file), framework="pt") as opened:
        return json.loads(opened.metadata()["superpose"])


@pytest.mark.parametrize("kind", ["fisher", "gram"])
def test_the_file_tells_where_it_comes_from(root, folders, texts, kind):
    out = root / f"told.{kind}.safetensors"
    done = run(
        "statistics", kind, folders[1], "-o", out, "--data", texts, "--label", "label", "--examples", 8, "--seed", 5,
        "--threads", 1, "--json", "--quiet",
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    told = told_by(out)
    assert told == {key: value for key, value in json.loads(done.stdout).items() if key not in ("file", "memory")}
    weights = (folders[1] / "model.safetensors").read_bytes()
    assert told["statistics"] == kind
    assert told["model"] == {
        "path": str(folders[1]), "sha256": hashlib.sha256(weights).hexdigest(),
        "files": [{"name": "model.safetensors", "bytes": len(weights)}],
    }  # fmt: skip
    assert (told["examples"], told["data"]["rows"], told["seed"]) == (8, 30, 5)
    assert told["data"]["data"] == texts
    assert len(told["data"]["sha256"]) == 64
    assert told["tokens"] > 8 * 2
    assert told["versions"]["threads"] == 1
    assert told.get("labels") == ("exact" if kind == "fisher" else None)
    assert not out.with_name(f"{out.name}.partial").exists()


def test_another_seed_reads_other_rows(root, folders, texts):
    found = [
        compute_statistics(
            "gram",
            folders[1],
            {"data": texts, "examples": 8, "seed": seed},
            root / "unused.safetensors",
            only_plan=True,
        ).metadata["data"]["sha256"]
        for seed in (0, 0, 1)
    ]
    assert found[0] == found[1] != found[2]
    assert not (root / "unused.safetensors").exists()


def test_the_plan_says_what_it_takes(root, folders, texts):
    done = run("statistics", "fisher", folders[1], "-o", root / "plan.safetensors", "--data", texts, "--plan",
               "--memory", "20KB")  # fmt: skip
    assert done.exit_code == 0, done.stderr
    assert "30 of 30 rows" in done.stdout
    assert "pass(es), labels exact" in done.stdout
    assert "memory: model" in done.stdout
    assert not (root / "plan.safetensors").exists()


@pytest.mark.parametrize("kind", ["fisher", "gram"])
def test_shards_and_their_order_do_not_matter(root, folders, texts, made, kind):
    sharded = save_sharded(folders[1], root / f"sharded-{kind}")
    out = root / f"sharded.{kind}.safetensors"
    compute_statistics(kind, sharded, {"data": texts, "examples": 6}, out, threads=1)
    one, other = load_file(made[kind, "task1"]), load_file(out)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], tensor) for name, tensor in other.items())


SLOW = """
import time
from superpose.inference import load_model

def slow(folder, task):
    live = load_model(str(folder), task.model_copy(update={"loader": ""}))
    forward = live.forward

    def waiting(inputs):
        time.sleep(0.02)
        return forward(inputs)

    return type(live)(**{**vars(live), "forward": waiting})
"""

START = """
import sys
from superpose.cli import main
from superpose.statistics import passes
passes.SECONDS_BETWEEN_SAVES = 0.0
main()
"""


@pytest.mark.parametrize(
    ("kind", "moment"),
    [
        ("gram", "sums are kept"),
        pytest.param("gram", "a group is finished", marks=pytest.mark.slow),
        pytest.param("fisher", "sums are kept", marks=pytest.mark.slow),
        pytest.param("fisher", "a group is finished", marks=pytest.mark.slow),
    ],
)
def test_killed_it_goes_on_to_the_same_bytes(tmp_path, folders, texts, kind, moment):
    (tmp_path / "slow.py").write_text(SLOW)
    arguments = ["statistics", kind, str(folders[1]), "--data", texts, "--loader", f"{tmp_path / 'slow.py'}:slow",
                 "--batch-size", "4", "--threads", "1", "--memory", "64KB" if kind == "gram" else "128KB"]  # fmt: skip
    whole = tmp_path / "whole.safetensors"
    assert run(*arguments, "-o", whole, "--quiet").exit_code == 0
    out, partial = tmp_path / "out.safetensors", tmp_path / "out.safetensors.partial"
    command = [sys.executable, "-c", START, *arguments, "-o", str(out)]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    sign = partial / (passes.PROGRESS if moment == "a group is finished" else passes.SUMS)
    until = time.monotonic() + 60
    while process.poll() is None and not sign.exists() and time.monotonic() < until:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL
    assert partial.exists()
    assert not out.exists()
    done = run(*arguments, "-o", out)
    assert done.exit_code == 0, done.stderr
    assert out.read_bytes() == whole.read_bytes()
    assert not partial.exists()


def interrupted(request_of, monkeypatch, after):
    """Stop passes after so many batches, with sums kept after each."""
    count = []

    def report(advance):
        count.append(advance)
        if len(count) > after:
            raise KeyboardInterrupt

    monkeypatch.setattr(passes, "SECONDS_BETWEEN_SAVES", -1.0)
    with pytest.raises(KeyboardInterrupt):
        request_of(report)
    return count


@pytest.mark.parametrize("after", [1, 3, 6, 11])
@pytest.mark.parametrize("harm", ["none", "torn sums", "torn progress", "lost bytes", "sums of another"])
def test_whatever_a_crash_leaves_the_result_is_the_same(tmp_path, folders, texts, monkeypatch, after, harm):
    task, out = {"data": texts, "batch_size": 8}, tmp_path / "out.safetensors"
    compute_statistics("gram", folders[1], task, tmp_path / "whole.safetensors", memory="64KB", threads=1)
    interrupted(
        lambda report: compute_statistics(
            "gram", folders[1], task, out, memory="64KB", threads=1, report=report
        ),
        monkeypatch, after,
    )  # fmt: skip
    partial = tmp_path / "out.safetensors.partial"
    sums, progress, file = (partial / name for name in (passes.SUMS, passes.PROGRESS, passes.FILE))
    if harm == "torn sums" and sums.exists():
        sums.write_bytes(sums.read_bytes()[:-7])
    elif harm == "torn progress" and progress.exists():
        progress.write_text(progress.read_text()[:-7])
    elif harm == "lost bytes":
        content = bytearray(file.read_bytes())
        content[-4000:] = bytes(4000)
        file.write_bytes(content)
    elif harm == "sums of another" and sums.exists():
        save_file({name: tensor * 0 for name, tensor in load_file(sums).items()}, sums, {"key": "x", "group": "1"})
    compute_statistics("gram", folders[1], task, out, memory="64KB", threads=1)
    assert out.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


def test_what_was_begun_with_other_data_or_another_model_is_not_used(tmp_path, folders, texts, monkeypatch):
    out, whole = tmp_path / "out.safetensors", tmp_path / "whole.safetensors"
    other = classified(tmp_path / "other.jsonl", 30, seed=9)
    for model, data in ((folders[2], texts), (folders[1], other)):
        interrupted(
            lambda report, model=model, data=data: compute_statistics(
                "fisher", model, {"data": data, "batch_size": 4}, out, threads=1, report=report
            ),
            monkeypatch, 4,
        )  # fmt: skip
    compute_statistics("fisher", folders[1], {"data": texts, "batch_size": 4}, out, threads=1)
    compute_statistics("fisher", folders[1], {"data": texts, "batch_size": 4}, whole, threads=1)
    assert out.read_bytes() == whole.read_bytes()


def test_a_head_that_changed_is_another_model(tmp_path, folders, texts, monkeypatch):
    """The head's file is part of the provenance, and what was begun with another one is not used."""
    head, out = tmp_path / "head.safetensors", tmp_path / "out.safetensors"
    task = {"data": texts, "head": str(head), "batch_size": 4}

    def write(seed):
        draw = torch.Generator().manual_seed(seed)
        save_file({"weight": torch.randn(3, 32, generator=draw)}, head)

    write(0)
    interrupted(
        lambda report: compute_statistics("fisher", folders[1], task, out, threads=1, report=report), monkeypatch, 5
    )
    write(1)
    compute_statistics("fisher", folders[1], task, out, threads=1)
    compute_statistics("fisher", folders[1], task, tmp_path / "whole.safetensors", threads=1)
    assert out.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    assert told_by(out)["data"]["head_sha256"] == hashlib.sha256(head.read_bytes()).hexdigest()


def test_an_output_is_replaced_only_if_asked_for(tmp_path, folders, texts):
    out = tmp_path / "out.safetensors"
    out.write_bytes(b"mine")
    arguments = ["statistics", "gram", folders[1], "--data", texts, "--examples", 2, "-o", out]
    done = run(*arguments)
    assert (done.exit_code, out.read_bytes()) == (2, b"mine")
    assert "exists already" in done.stderr
    assert run(*arguments, "--overwrite").exit_code == 0
    assert told_by(out)["examples"] == 2


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"label": "labels"}, ["there is no column 'labels'", "label"]),
        ({"text": "txt"}, ["there is no column 'txt'", "line 1"]),
        ({"data": "nowhere.jsonl"}, ["nowhere.jsonl"]),
        ({"loader": "nothing:here"}, ["cannot be imported"]),
        ({"max_length": 0}, ["max_length"]),
    ],
)
def test_errors_name_what_is_wrong(folders, texts, root, change, error):
    with pytest.raises((SuperposeError, Problems)) as found:
        compute_statistics("fisher", folders[1], {"data": texts, **change}, root / "never.safetensors", labels="auto")
    assert all(part in str(found.value) for part in error)
    assert not (root / "never.safetensors").exists()


def test_a_wrong_label_is_named_with_its_row(tmp_path, folders):
    file = write_rows(tmp_path / "rows.jsonl", [{"text": "red", "label": 0}, {"text": "blue", "label": 7}])
    done = run("statistics", "fisher", folders[1], "--data", file, "--label", "label", "-o", tmp_path / "x.safetensors")
    assert done.exit_code == 2
    assert "label 7 in column 'label' is no class" in done.stderr
    assert "rows.jsonl, line 2" in done.stderr.replace("\n", "")


def test_labels_that_do_not_fit_the_model(tmp_path, folders, texts):
    out = tmp_path / "x.safetensors"
    with pytest.raises(SuperposeError, match="no column of labels is named"):
        compute_statistics("fisher", folders[1], {"data": texts}, out, labels="empirical")
    with pytest.raises(SuperposeError, match="there are no labels 'gold'"):
        compute_statistics("fisher", folders[1], {"data": texts}, out, labels="gold")
    with pytest.raises(SuperposeError, match="there are no statistics 'hessian'"):
        compute_statistics("hessian", folders[1], {"data": texts}, out)


def changed(made, kind, change, tmp_path):
    """Return a file of statistics with something wrong."""
    file = tmp_path / "bad.safetensors"
    tensors, told = load_file(made[kind, "task2"]), told_by(made[kind, "task2"])
    name = "bert.encoder.layer.1.output.dense.weight"
    if change == "truncated":
        file.write_bytes(made[kind, "task2"].read_bytes()[:-100])
        return file
    if change == "pickle":
        with file.open("wb") as stream:
            pickle.dump({"weight": [1.0]}, stream)
        return file
    if change == "not ours":
        save_file(tensors, file)
        return file
    if change == "other kind":
        return made["gram" if kind == "fisher" else "fisher", "task2"]
    if change == "none":
        return file
    if change == "lacks":
        del tensors[name]
    elif change == "shape":
        tensors[name] = tensors[name][:-1].clone()
    elif change == "nan":
        tensors[name][1, 2] = float("nan")
    elif change == "infinite":
        tensors[name][1, 2] = float("inf")
    elif change == "dtype":
        tensors[name] = tensors[name].half()
    save_file(tensors, file, {"superpose": json.dumps(told)})
    return file


ERRORS = {
    "truncated": ["bad.safetensors"],
    "pickle": ["bad.safetensors"],
    "not ours": ["it was not written by superpose statistics"],
    "other kind": ["it holds statistics of kind"],
    "none": ["there is no file"],
    "lacks": ["the statistics lack a tensor that is merged", "bert.encoder.layer.1.output.dense.weight"],
    "shape": ["its shape is", "bert.encoder.layer.1.output.dense.weight", "bad.safetensors"],
    "nan": ["statistics hold NaN or infinity", "bert.encoder.layer.1.output.dense.weight", "bad.safetensors"],
    "infinite": ["statistics hold NaN or infinity", "bert.encoder.layer.1.output.dense.weight"],
    "dtype": ["is F16, not F32"],
}


@pytest.mark.parametrize("kind", ["fisher", "gram"])
@pytest.mark.parametrize("change", ERRORS)
def test_a_bad_file_stops_the_merge_and_says_why(tmp_path, folders, made, kind, change):
    if (kind, change) == ("gram", "lacks"):
        pytest.skip("a map without a Gram matrix is averaged")
    file = changed(made, kind, change, tmp_path)
    method = {"fisher": "fisher", "gram": "regmean"}[kind]
    done = run("merge", *folders, "-o", tmp_path / "out", "--method", method, "--quiet", "--statistics",
               f"{made[kind, 'task1']},{file}")  # fmt: skip
    assert done.exit_code == 2, done.stdout
    text = " ".join(done.stderr.split())
    assert all(part in text for part in ERRORS[change]), text
    assert "Traceback" not in text
    assert not (tmp_path / "out").exists()


def test_a_map_without_a_gram_matrix_is_averaged_and_the_plan_says_so(tmp_path, folders, made):
    file = changed(made, "gram", "lacks", tmp_path)
    done = run("plan", *folders, "--method", "regmean", "--statistics", f"{made['gram', 'task1']},{file}")
    assert done.exit_code == 0, done.stderr
    assert "matrices without Gram matrices are averaged: 3 embedding, 1 linear" in " ".join(
        (done.stdout + done.stderr).split()
    )


def test_statistics_of_another_model_are_noticed(tmp_path, root, folders, made):
    other = tmp_path / "task1"
    save_sharded(folders[1], other)
    done = run("plan", folders[0], other, folders[2], "--method", "fisher", "--statistics",
               f"{made['fisher', 'task1']},{made['fisher', 'task2']}")  # fmt: skip
    assert done.exit_code == 0, done.stderr
    assert "differ in name or size from those of model task1" in " ".join((done.stdout + done.stderr).split())


def test_the_command_line_in_a_process_of_its_own(tmp_path, folders, texts):
    done = superpose("statistics", "gram", folders[1], "--data", texts, "-o", tmp_path / "x.safetensors")
    assert "gram of" in done.stdout
    assert "30 of 30 rows" in done.stderr
