"""Power cuts: whatever a disk may then hold, nothing under the final name is incomplete, and the merge goes on."""

import os
import random
import shutil
from pathlib import Path

import pytest
import torch

from faults.power import CUT
from faults.scenes import SCENES
from faults.tally import rounds


def cut(scene, event, seed):
    """Cut the power at an event, and put what the disk holds in the place of what was there."""
    scene.begin()
    ended = scene.run(power={"event": event, "seed": seed})
    assert ended.status == CUT, ended.text
    shutil.rmtree(scene.root)
    scene.root.with_name("after").rename(scene.root)


@pytest.mark.parametrize("backend", ["serial", "threads"])
@pytest.mark.parametrize("what", sorted(SCENES))
def test_after_a_power_cut_it_goes_on_to_the_same_bytes(scene_of, tally, what, backend):
    scene = scene_of(what, backend)
    total = sum(scene.events.values())
    draw = random.Random(f"{what} {backend}")
    first_late = ["serial", "threads"].index(backend)
    for number in range(first_late, first_late + rounds(1)):
        with tally("Death", "power cut", backend) as injection:
            # Half of them in the last steps, in which the output gets its name.
            first = total - 60 if number % 2 else 1
            event = draw.randint(first, total - (backend == "threads"))
            cut(scene, event, f"{what} {backend} {number}")
            complete = scene.is_complete()
            scene.nothing_lost()
            scene.finish()
            injection.outcome = "was complete" if complete else "went on, same bytes"


@pytest.mark.parametrize("what", sorted(SCENES))
def test_what_was_told_to_be_done_outlasts_a_power_cut(scene_of, tally, what):
    scene = scene_of(what, "serial")
    for number in range(rounds(1)):
        with tally("Death", "power cut right after the end", "serial") as injection:
            cut(scene, 0, f"{what} {number}")
            assert scene.is_complete(), "the command had ended well"
            injection.outcome = "was complete"


def test_a_name_never_outlasts_what_it_was_given_to(tmp_path, monkeypatch, tally):
    """State that is replaced as a whole is synced before it gets its name; zeros would pass for sums."""
    from superpose.learning.learn import _write
    from superpose.learning.setting import Learned, State
    from superpose.statistics.passes import _replace

    synced, real, renamed = set(), os.fsync, []

    def fsync(descriptor):
        real(descriptor)
        synced.add(os.fstat(descriptor).st_ino)

    def replace(path, target):
        renamed.append((path.stat().st_ino, target.name))
        return path.rename(target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", replace)
    tensors = {"sum": torch.ones(3)}
    _replace(tmp_path / "progress.json", Path.touch)
    State(tmp_path / "state", "key").save("steps", tensors, {})
    _write(tmp_path / "learned.safetensors", Learned(tensors, {}), {})
    for inode, name in renamed:
        with tally("Death", "power cut", f"{name.partition('.')[0]} of learning and statistics") as injection:
            assert inode in synced
            injection.outcome = "synced before it has its name"
    assert len(renamed) == 3
