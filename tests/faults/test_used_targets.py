"""Targets that are in use, were used before, or are used by two at once; and what is known of models that changed."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from families import generator, load, make_family, weights
from safetensors.torch import load_file, save_file

from faults.scenes import SCENES, content
from faults.tally import rounds
from superpose.output_folder import locked

STOP = {"signal": int(signal.SIGSTOP)}


def refused(outcome, *words):
    """Check that a command was refused in three lines."""
    assert outcome.status == 2, outcome.text
    lines = [line for line in outcome.text.splitlines() if line.strip()]
    assert [line.partition(":")[0] for line in lines] == ["error", "where", "mend"], outcome.text
    for word in words:
        assert word in outcome.text, outcome.text


def merge(forks, folder, models, output, *more, **fault):
    command = ["merge", *models, "-o", output, "--quiet", "--backend", "serial", *more]
    return forks.run(command, folder, **fault)


def test_an_output_that_exists_is_replaced_only_if_asked_and_only_by_a_complete_one(tmp_path, forks, tally):
    models, out = make_family(tmp_path / "models", layers=1, width=8), tmp_path / "out"
    assert merge(forks, tmp_path, models, out, "--method", "average").status == 0
    old = content(out)
    with tally("Used targets", "output exists", "without --overwrite") as injection:
        refused(merge(forks, tmp_path, models, out, "--method", "stf"), "the output exists already", "--overwrite")
        assert content(out) == old
        injection.outcome = "refused at once"
    with tally("Used targets", "output exists, and the new merge fails in the middle", "--overwrite") as injection:
        sound = (models[2] / "model.safetensors").read_bytes()
        tensors = load(models[2])
        tensors["norm.weight"][3] = float("nan")
        save_file(tensors, models[2] / "model.safetensors")
        ended = merge(forks, tmp_path, models, out, "--method", "stf", "--overwrite")
        refused(ended, "NaN", "norm.weight")
        assert ended.events["journal"] > 0, "it had begun"
        assert content(out) == old
        injection.outcome = "the old one stays"
    (models[2] / "model.safetensors").write_bytes(sound)
    with tally("Used targets", "output exists", "--overwrite") as injection:
        assert merge(forks, tmp_path, models, out, "--method", "stf", "--overwrite").status == 0
        assert merge(forks, tmp_path, models, tmp_path / "fresh", "--method", "stf").status == 0
        assert weights(out) == weights(tmp_path / "fresh")
        assert {path.name for path in tmp_path.iterdir()} == {"models", "out", "fresh"}
        injection.outcome = "replaced"
    for what in ("a file", "a folder"):
        with tally("Used targets", f"{what} of somebody else's has the name", "--overwrite") as injection:
            place = tmp_path / what
            file = place if what == "a file" else place / "thesis.txt"
            file.parent.mkdir(exist_ok=True)
            file.write_text("five years")
            refused(merge(forks, tmp_path, models, place, "--overwrite"), "is no output of superpose")
            assert file.read_text() == "five years"
            injection.outcome = "refused at once"


@pytest.mark.parametrize("what", sorted(SCENES))
def test_what_another_recipe_left_is_never_mixed_in(scene_of, tally, what):
    scene = scene_of(what, "serial")
    draw = random.Random(what)
    for _ in range(rounds(1)):
        other = scene_of(draw.choice([name for name in SCENES if name != what]), "serial")
        with tally("Used targets", "what another recipe left", "serial") as injection:
            scene.begin()
            event = draw.choice(["text", "journal", "rename"])
            count = draw.randint(1, other.events[event])
            arguments = [scene.output if one == other.output else one for one in other.arguments]
            ended = scene.forks.run(arguments, scene.root, signal=int(signal.SIGKILL), event=event, count=count)
            done = scene.run()
            if ended.status == -signal.SIGKILL and "--overwrite" not in scene.arguments and scene.output.exists():
                assert done.status in (0, 2), done.text  # the other was complete but for cleaning up
            if done.status:
                assert "the output exists already" in done.text
                assert content(scene.output)["model.safetensors"] == other.expected["model.safetensors"]
            else:
                assert scene.is_complete()
            injection.outcome = "not mixed"


@pytest.mark.parametrize("what", ["emr set", "model and adapter", "adapter"])
def test_strange_files_in_an_unfinished_merge_are_not_taken_over(scene_of, tally, what):
    scene = scene_of(what, "serial")
    with tally("Used targets", "strange files in an unfinished merge", "at every depth") as injection:
        scene.begin()
        ended = scene.run(signal=int(signal.SIGKILL), event="journal", count=4)
        assert ended.status == -signal.SIGKILL, ended.text
        for folder in ["", *(path.name for path in scene.partial.iterdir() if path.is_dir())]:
            (scene.partial / folder / "optimizer.pt").write_bytes(b"of an older version")
            (scene.partial / folder / "more").mkdir()
            (scene.partial / folder / "more" / "weights.safetensors").write_bytes(b"of an older version")
        assert scene.finish() == 3
        injection.outcome = "went on without them, same bytes"


@pytest.mark.parametrize("second", ["merge", "extract", "rebuild"])
def test_two_processes_want_one_target(tmp_path, forks, scene_of, tally, second):
    scene = scene_of("emr set", "serial")
    models = scene.root.parent / "models"
    scene.begin()
    target = scene.output
    command = {
        "merge": [*scene.arguments[:-2], "--method", "average"],
        "extract": ["extract", models / "base", models / "ft1", "-o", target, "--quiet"],
        "rebuild": ["rebuild", tmp_path / "set", "--task", "ft1", "-o", target],
    }
    if second == "rebuild":
        done = forks.run([tmp_path / "set" if one == target else one for one in scene.arguments], scene.root)
        assert done.status == 0, done.text
    with tally("Used targets", "two processes at once", f"merge, then {second}") as injection:
        first = scene.run(event="item", count=4, **STOP)
        assert first.status == -signal.SIGSTOP, first.text
        held = content(scene.root)
        try:
            ended = forks.run(command[second], scene.root)
            assert content(scene.root) == held, "the first one's files were touched"
        finally:
            first = forks.go_on(first)
        who = f"another merge is writing this output: process {first.process} on {socket.gethostname()}, since "
        refused(ended, who + time.strftime("%Y-"), "wait for it")
        assert first.status == 0, first.text
        assert scene.is_complete()
        injection.outcome = "one refused, with the other's process and host"


def test_two_real_processes_start_at_the_same_moment(tmp_path, forks, tally):
    folders = make_family(tmp_path / "models", layers=4, width=64)
    command = [sys.executable, "-m", "superpose", "merge", *map(str, folders), "-o", str(tmp_path / "out"), "-q"]
    with tally("Used targets", "two real processes at once", "threads") as injection:
        both = [
            subprocess.Popen([*command, "--method", "ties"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            for _ in range(2)
        ]
        texts = [process.communicate(timeout=120)[1] for process in both]
        assert sorted(process.returncode for process in both) == [0, 2], texts
        assert any("another merge is writing" in text or "exists already" in text for text in texts)
        assert merge(forks, tmp_path, folders, tmp_path / "whole", "--method", "ties").status == 0
        assert weights(tmp_path / "out") == weights(tmp_path / "whole")
        assert {path.name for path in tmp_path.iterdir()} == {"models", "out", "whole"}
        injection.outcome = "one refused, the other complete"


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (b"", ""),
        (b"\0" * 80, ""),
        (b'{"process": 1', ""),
        (b"[1, 2]", ""),
        (b'{"process": "many", "host": "here", "since": "today"}', ""),
        ({"process": 2**22 + 1, "since": "1999"}, ""),  # nobody's number: the one who has it now has not said so yet
        ({"process": 2**80, "since": "1999"}, ""),
        (
            {"process": 4711, "host": "another-machine", "since": "1999"},
            ": process 4711 on another-machine, since 1999",
        ),
    ],
)
def test_stale_words_in_a_lock_confuse_nobody(scene_of, tally, found, said):
    scene = scene_of("stf", "serial")
    scene.begin()
    lock = scene.root / "out.partial.lock"
    text = found if isinstance(found, bytes) else json.dumps({"host": socket.gethostname(), **found}).encode()
    with tally("Used targets", "stale words in a lock", "held") as injection, locked(scene.partial):
        lock.write_bytes(text)
        ended = scene.run()
        refused(ended, f"another merge is writing this output{said}\n")
        injection.outcome = "refused"
    with tally("Used targets", "stale words in a lock", "held by nobody") as injection:
        lock.write_bytes(text)
        scene.finish()
        injection.outcome = "taken no notice of"


def test_a_cache_knows_models_by_their_content(tmp_path, forks, tally):
    models, cache = make_family(tmp_path / "models", layers=1, width=8), tmp_path / "cache"
    assert merge(forks, tmp_path, models, tmp_path / "first", "--method", "stf", "--cache", cache).status == 0
    entries = len(list(cache.iterdir()))
    assert entries
    with tally("Used targets", "cache of a model that changed", "same name, size and date") as injection:
        file = models[1] / "model.safetensors"
        before = file.stat()
        save_file({name: 1.5 * tensor for name, tensor in load(models[1]).items()}, file, {"format": "pt"})
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert file.stat().st_size == before.st_size
        assert merge(forks, tmp_path, models, tmp_path / "cached", "--method", "stf", "--cache", cache).status == 0
        assert merge(forks, tmp_path, models, tmp_path / "fresh", "--method", "stf").status == 0
        assert weights(tmp_path / "cached") == weights(tmp_path / "fresh") != weights(tmp_path / "first")
        injection.outcome = "computed anew"
    with tally("Used targets", "cache of models that moved", "other names") as injection:
        (tmp_path / "models").rename(tmp_path / "moved")
        models = [tmp_path / "moved" / model.name for model in models]
        entries = len(list(cache.iterdir()))
        assert merge(forks, tmp_path, models, tmp_path / "again", "--method", "stf", "--cache", cache).status == 0
        assert weights(tmp_path / "again") == weights(tmp_path / "fresh")
        assert len(list(cache.iterdir())) == entries
        injection.outcome = "taken from the cache"
    for damage in ("torn", "zeros", "bit"):
        with tally("Used targets", "damaged cache", damage) as injection:
            for entry in cache.iterdir():
                data = bytearray(entry.read_bytes())
                data[len(data) // 2] ^= 1
                kept = {"torn": data[: len(data) // 2], "zeros": bytes(len(data)), "bit": data}[damage]
                entry.write_bytes(kept)
            done = merge(forks, tmp_path, models, tmp_path / damage, "--method", "stf", "--cache", cache)
            assert done.status == 0, done.text
            assert "is damaged and is computed anew" in done.text
            assert weights(tmp_path / damage) == weights(tmp_path / "fresh")
            injection.outcome = "computed anew, with a warning"


@pytest.fixture
def with_statistics(tmp_path):
    """Models, and a file of Fisher information for each tuned one, as `superpose statistics` writes them."""
    from superpose.checkpoints.statistics_files import content_digest

    models = make_family(tmp_path / "models", layers=1, width=8, tasks=2)
    files = []
    for model in models[1:]:
        weight = model / "model.safetensors"
        told = {
            "statistics": "fisher",
            "model": {
                "path": str(model),
                "files": [{"name": weight.name, "bytes": weight.stat().st_size}],
                "sha256": content_digest([weight]),
            },
        }
        information = {
            name: torch.rand(tensor.shape, generator=generator(str(model), name))
            for name, tensor in load(model).items()
        }
        files.append(tmp_path / f"{model.name}.safetensors")
        save_file(information, files[-1], {"superpose": json.dumps(told)})
    return models, files


def test_statistics_know_models_by_their_content(tmp_path, forks, tally, with_statistics):
    models, files = with_statistics

    def run(name, *statistics):
        return merge(
            forks, tmp_path, models, tmp_path / name, "--method", "fisher", "--statistics", ",".join(statistics)
        )

    right = [str(file) for file in files]
    assert run("right", *right).status == 0
    with tally("Used targets", "statistics of another model", "in another order") as injection:
        ended = run("swapped", *right[::-1])
        assert ended.status == 2, ended.text
        assert "the statistics of model ft1 were made from other weights than it has" in ended.text
        assert "they are those of model ft2: name the files in the order of the models" in ended.text
        assert "Traceback" not in ended.text
        injection.outcome = "refused at once"
    with tally("Used targets", "statistics of another model", "the model moved") as injection:
        models[1] = models[1].rename(tmp_path / "models" / "moved")
        assert run("moved", *right).status == 0
        assert weights(tmp_path / "moved") == weights(tmp_path / "right")
        injection.outcome = "used: its content is the same"
    with tally("Used targets", "statistics of another model", "the model was trained on") as injection:
        file = models[1] / "model.safetensors"
        before = file.stat()
        save_file({name: 1.5 * tensor for name, tensor in load_file(file).items()}, file, {"format": "pt"})
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
        refused(run("trained", *right), "the statistics of model moved were made from other weights", "make them again")
        injection.outcome = "refused at once"
    with tally("Used targets", "statistics of another model", "saved in other files") as injection:
        save_file(load_file(file), file, {"format": "pt", "saved": "again"})
        ended = run("saved", *right)
        assert ended.status == 0, ended.text
        assert "differ in name or size from those of model moved" in ended.text
        injection.outcome = "used, with a warning"
