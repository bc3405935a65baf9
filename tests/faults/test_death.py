"""Merges that are killed or told to stop, at any point: nothing incomplete, nothing lost, little done twice."""

import os
import random
import signal
from pathlib import Path

import pytest

from faults.scenes import SCENES, make_scene
from faults.tally import rounds

WORKERS = {"serial": 1, "threads": 2}
TOLD = {"SIGINT": 130, "SIGTERM": 143}
"""Signals that a merge ends upon in good order, and its exit code."""


def events_of(events, count, *key):
    """Return events at which to inject: of each kind in turn, one at random."""
    draw = random.Random(repr(key))
    kinds = sorted(events)
    draw.shuffle(kinds)
    chosen = [kinds[place % len(kinds)] for place in range(count)]
    return [{"event": kind, "count": draw.randint(1, events[kind])} for kind in chosen]


def moments_of(count, *key):
    """Return seconds after which to inject: a merge takes some 0.1 of them."""
    draw = random.Random(repr(key))
    return [{"after": draw.uniform(0.005, 0.15)} for _ in range(count)]


def check_end(scene, ended, workers):
    """Check what a merge left that has ended before its time; finish it, and return what came of it."""
    complete = scene.is_complete()
    scene.nothing_lost()
    finished, begun = scene.finished(), ended.events.get("item", 0)
    resumed = scene.finish()
    if complete:
        return "was complete"
    assert resumed >= finished, "what was finished is done again"
    assert resumed >= begun - workers, "more is done again than was under way"
    return "went on, same bytes"


@pytest.mark.parametrize("backend", sorted(WORKERS))
@pytest.mark.parametrize("what", sorted(SCENES))
def test_killed_at_an_event_it_goes_on_to_the_same_bytes(scene_of, tally, what, backend):
    scene = scene_of(what, backend)
    for event in events_of(scene.events, rounds(2), what, backend):
        with tally("Death", "SIGKILL at an event", backend) as injection:
            scene.begin()
            ended = scene.run(signal=int(signal.SIGKILL), **event)
            # With threads there can be fewer events of a kind than there were undisturbed.
            assert ended.status == -signal.SIGKILL or (ended.status == 0 and backend == "threads"), ended.text
            injection.outcome = check_end(scene, ended, WORKERS[backend])


@pytest.mark.parametrize("name", ["SIGKILL", *TOLD])
@pytest.mark.parametrize("backend", sorted(WORKERS))
def test_ended_at_any_time_it_goes_on_to_the_same_bytes(scene_of, tally, backend, name):
    scene = scene_of("ties, sharded", backend)
    for moment in moments_of(rounds(2), backend, name):
        with tally("Death", f"{name} at any time", backend) as injection:
            scene.begin()
            ended = scene.run(signal=int(signal.Signals[name]), **moment)
            # Before its first line and after its last, a program ends upon a signal as any other does.
            assert ended.status in (0, 1, -signal.Signals[name], TOLD.get(name)), ended.text
            assert "Traceback" not in ended.text
            injection.outcome = check_end(scene, ended, WORKERS[backend])


@pytest.mark.parametrize("name", sorted(TOLD))
@pytest.mark.parametrize("backend", sorted(WORKERS))
@pytest.mark.parametrize("what", ["emr set", "over an older output", "pcb"])
def test_told_to_stop_at_an_event_it_says_how_to_go_on(scene_of, tally, what, backend, name):
    scene = scene_of(what, backend)
    for event in events_of(scene.events, rounds(1), what, backend, name):
        with tally("Death", f"{name} at an event", backend) as injection:
            scene.begin()
            ended = scene.run(signal=int(signal.Signals[name]), **event)
            assert ended.status == TOLD[name] or (ended.status == 0 and scene.is_complete()), (event, ended)
            assert "Traceback" not in ended.text
            assert scene.is_complete() or not scene.partial.exists() or "run the same command again" in ended.text
            injection.outcome = check_end(scene, ended, WORKERS[backend])


@pytest.mark.parametrize("name", sorted(TOLD))
@pytest.mark.parametrize("backend", sorted(WORKERS))
def test_told_to_stop_twice_it_ends_at_once(scene_of, tally, backend, name):
    scene = scene_of("stf", backend)
    for event in events_of({"item": scene.events["item"] - 2}, rounds(1), backend, name):
        with tally("Death", f"{name}, and once more", backend) as injection:
            scene.begin()
            ended = scene.run(signal=int(signal.Signals[name]), again=True, **event)
            assert ended.status == TOLD[name], ended.text
            assert "stopped at once" in ended.text
            assert "Traceback" not in ended.text
            injection.outcome = check_end(scene, ended, WORKERS[backend])


def test_killed_again_and_again_it_comes_to_an_end(scene_of, tally):
    scene = scene_of("ties, sharded", "threads")
    scene.begin()
    total = scene.events["item"]
    deaths = 0
    while not scene.is_complete():
        with tally("Death", "SIGKILL of every run, after two items more", "threads") as injection:
            before = scene.finished()
            ended = scene.run(signal=int(signal.SIGKILL), event="item", count=3)
            assert ended.status in (0, -signal.SIGKILL), ended.text
            assert scene.finished() > before or scene.is_complete(), "it makes no headway"
            deaths += 1
            injection.outcome = "went on, same bytes"
            assert deaths <= total
    assert deaths > 2
    assert {path.name for path in scene.root.iterdir()} == {"out"}


def test_what_was_deleted_in_part_is_no_output_and_in_nobodys_way(scene_of, tally):
    scene = scene_of("over an older output", "serial")
    counts = range(1, scene.events["unlink"] + 1)
    for count in random.Random(0).sample(counts, min(rounds(3), len(counts))):
        with tally("Death", "SIGKILL while the replaced output is deleted", "serial") as injection:
            scene.begin()
            ended = scene.run(signal=int(signal.SIGKILL), event="unlink", count=count)
            assert ended.status == -signal.SIGKILL, ended.text
            scene.nothing_lost()
            if scene.is_complete():  # the user throws it away: what was replaced must not come back in part
                for file in sorted(scene.output.rglob("*"), reverse=True):
                    file.rmdir() if file.is_dir() else file.unlink()
                scene.output.rmdir()
            scene.finish()
            injection.outcome = "went on, same bytes"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGKILL", "SIGINT"])
def test_with_ray_the_driver_is_ended_at_an_event(tmp_path, forks, tally, monkeypatch, name):
    ray = pytest.importorskip("ray")
    plain = {
        "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2] / "src"), os.environ.get("PYTHONPATH", "")]),
    }  # fmt: skip
    for key, value in plain.items():
        monkeypatch.setenv(key, value)
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        scene = make_scene(
            tmp_path, "ties, sharded", "ray", forks, ["--ray-address", ray.get_runtime_context().gcs_address]
        )
        kinds = [kind for kind in scene.events if kind in ("journal", "sync", "text", "rename", "allocate", "mkdir")]
        draw = random.Random(name)
        for _ in range(min(rounds(4), 20)):
            with tally("Death", f"{name} of the driver at an event", "ray") as injection:
                event = draw.choice(kinds)
                scene.begin()
                fault = {"signal": int(signal.Signals[name]), "event": event}
                ended = scene.run(count=draw.randint(1, scene.events[event]), **fault)
                assert ended.status in (-signal.SIGKILL, 130, 0), ended.text
                # Tensors that a worker was at count from where the driver heard of them.
                injection.outcome = check_end(scene, ended, scene.events["journal"])
    finally:
        ray.shutdown()
