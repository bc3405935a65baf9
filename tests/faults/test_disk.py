"""Disks that are full, read-only or forbidden: three lines, nothing under the final name, and it goes on."""

import os
import random
import re
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path

import pytest
from families import make_family

from faults.scenes import content, make_scene
from faults.tally import rounds
from superpose.checkpoints.writer import StreamWriter, lay_out, lay_out_beside
from superpose.planning.checks import check_room

NOBODY = 65534
ROOM = 4 << 20
WRITTEN = ["allocate", "write", "journal", "text", "copy", "open", "mkdir", "sync"]
"""Events after which something is written."""


def refused(outcome, *words):
    """Check that a command was refused in three lines, and return the first."""
    assert outcome.status == 2, outcome.text
    assert "Traceback" not in outcome.text, outcome.text
    lines = [line for line in outcome.text.splitlines() if line.strip()]
    assert [line.partition(":")[0] for line in lines] == ["error", "where", "mend"], outcome.text
    for word in words:
        assert word in outcome.text, outcome.text
    return lines[0]


@pytest.fixture(scope="module")
def disk(tmp_path_factory):
    """A disk of its own, small and in memory."""
    folder = tmp_path_factory.mktemp("disk")
    if os.geteuid():
        pytest.skip("mounting a small disk takes root")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={ROOM}", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"no disk can be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def remount(disk, options):
    subprocess.run(["mount", "-o", f"remount,{options}", str(disk)], check=True)


@pytest.fixture(scope="module")
def scene_on(tmp_path_factory, forks, disk):
    """Return the merge of a name, whose inputs are on another file system than its output."""
    made = {}

    def find(what, backend="serial"):
        if (what, backend) not in made:
            folder = tmp_path_factory.mktemp("full")
            made[what, backend] = make_scene(folder, what, backend, forks, root=disk / "work")
        assert made[what, backend].root.parent.stat().st_dev != Path(__file__).stat().st_dev
        return made[what, backend]

    return find


@pytest.mark.parametrize("backend", ["serial", "threads"])
@pytest.mark.parametrize("what", ["ties, sharded", "emr set", "model and adapter", "over an older output"])
def test_the_disk_is_full_from_an_event_on(scene_on, disk, tally, what, backend):
    scene = scene_on(what, backend)
    draw, ballast = random.Random(f"{what} {backend}"), disk / "ballast"
    kinds = [kind for kind in WRITTEN if kind in scene.events]
    for number in range(rounds(1)):
        event = kinds[(number + len(what)) % len(kinds)]
        with tally("Disk", "disk full from an event on", backend) as injection:
            scene.begin()
            left = draw.randrange(0, 5) * 4096
            count = draw.randint(1, scene.events[event])
            ended = scene.run(harm=["fill", str(ballast), left], event=event, count=count)
            if ended.status:
                refused(ended, "the disk is full: No space left on device", "run the same command again")
                assert "models" not in ended.text, "a file is named that was read, not written"
                assert not scene.is_complete()
            scene.nothing_lost()
            finished = scene.finished()
            ballast.unlink(missing_ok=True)
            assert scene.finish() >= finished or not ended.status
            injection.outcome = "refused, then went on, same bytes" if ended.status else "what was left was enough"


@pytest.mark.parametrize("what", ["ties, sharded", "emr set"])
def test_files_may_not_grow(scene_on, tally, what):
    scene = scene_on(what)
    draw = random.Random(what)
    largest = max(len(data) for data in scene.expected.values() if isinstance(data, bytes))
    for _ in range(rounds(2)):
        with tally("Disk", "limit on the size of files", "serial") as injection:
            scene.begin()
            ended = scene.run(limit=draw.randrange(300, largest))  # what the command says takes less
            refused(ended, "no file may become as large as this one", "ulimit -f")
            assert not scene.is_complete()
            scene.finish()
            injection.outcome = "refused, then went on, same bytes"


def test_no_more_files_can_be_made(scene_on, disk, tally):
    scene = scene_on("emr set")
    for spare in random.Random(0).sample(range(16), min(rounds(3), 16)):
        with tally("Disk", "no inodes left", "serial") as injection:
            scene.begin()
            try:
                remount(disk, f"nr_inodes={_inodes(disk) + spare}")
                ended = scene.run()
            finally:
                remount(disk, "nr_inodes=100000")
            if ended.status:
                refused(ended, "No space left on device", "free some space")
                assert not scene.is_complete()
            scene.finish()
            injection.outcome = "refused, then went on, same bytes" if ended.status else "what was left was enough"


def _inodes(disk):
    status = os.statvfs(disk)
    return status.f_files - status.f_ffree


def test_room_is_checked_before_the_start_and_what_is_missing_is_told(scene_on, disk, tally):
    from faults.harms import fill

    scene, ballast = scene_on("ties, sharded"), disk / "ballast"
    needed = sum(len(scene.expected[name]) for name in scene.expected if name.endswith(".safetensors"))
    for left in (0, 4096, needed // 4096 * 4096 - 4096):
        with tally("Disk", "disk too full before the start", "serial") as injection:
            scene.begin()
            fill(str(ballast), left)
            ended = scene.run()
            line = refused(ended, "not enough room", str(scene.root))
            told = [
                float(number) * {"B": 1, "KiB": 1024}[unit] for number, unit in re.findall(r"([\d.]+) (B|KiB)", line)
            ]
            assert told == pytest.approx([needed, left, needed - left], abs=10)
            assert not scene.partial.exists(), "nothing was begun"
            assert not ended.events.get("item")
            ballast.unlink()
            injection.outcome = "refused at once"


@pytest.mark.parametrize("what", ["ties, sharded", "emr set", "model and adapter"])
def test_what_an_earlier_run_takes_is_room(scene_on, disk, tally, what):
    """A disk with room for one output: the run that is killed takes it all, and is gone on with."""
    from faults.harms import fill

    scene, ballast = scene_on(what), disk / "ballast"
    with tally("Disk", "disk full of the run before", "serial") as injection:
        scene.begin()
        ended = scene.run(signal=int(signal.SIGKILL), event="text", count=2)
        assert ended.status == -signal.SIGKILL
        fill(str(ballast), 6 * 4096)
        resumed = scene.finish()
        ballast.unlink()
        assert resumed == ended.events["item"]
        injection.outcome = "went on, same bytes"


def test_what_an_earlier_run_takes_is_counted_as_far_as_the_disk_has_it(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1 << 30, 1 << 30, 0))
    layout = lay_out_beside(lay_out([("a", "F32", (5000,))], 10**9), "tasks/masks.safetensors", [("m", "U8", (50000,))])
    [problem] = check_room(layout, tmp_path / "out")
    assert "0 B are free, 68.56 KiB are missing" in problem.what
    (tmp_path / "out.partial").mkdir()
    StreamWriter(tmp_path / "out.partial", layout).close()
    assert check_room(layout, tmp_path / "out") == []
    masks = tmp_path / "out.partial" / "tasks" / "masks.safetensors"
    size = masks.stat().st_size
    masks.write_bytes(b"")
    os.truncate(masks, size)  # of full size, and nothing of it on the disk
    [problem] = check_room(layout, tmp_path / "out")
    assert "are missing" in problem.what


def test_a_full_cache_is_done_without(scene_on, disk, tally, forks, tmp_path):
    from faults.harms import fill

    scene, ballast, cache = scene_on("stf"), disk / "ballast", disk / "cache"
    cache.mkdir()
    for left in (0, 4096, 16384):
        with tally("Disk", "disk of the cache full", "serial") as injection:
            fill(str(ballast), left)
            arguments = [tmp_path / f"out{left}" if one == scene.output else one for one in scene.arguments]
            done = forks.run([*arguments, "--cache", cache], tmp_path)
            ballast.unlink()
            assert done.status == 0, done.text
            assert "cannot be written: No space left on device" in done.text
            found = content(tmp_path / f"out{left}")
            assert found["model.safetensors"] == scene.expected["model.safetensors"]
            injection.outcome = "merged without it, with a warning"
    shutil.rmtree(cache)


def test_a_read_only_disk(scene_on, disk, tally, forks, tmp_path):
    scene = scene_on("emr set")
    scene.begin()
    merged = [tmp_path / "set" if one == scene.output else one for one in scene.arguments]
    assert forks.run(merged, tmp_path).status == 0
    commands = {
        "merge": scene.arguments,
        "rebuild": ["rebuild", tmp_path / "set", "--task", "ft1", "-o", scene.output],
    }
    for verb, command in commands.items():
        with tally("Disk", "read-only file system", verb) as injection:
            remount(disk, "ro")
            try:
                ended = forks.run(command, scene.root)
            finally:
                remount(disk, "rw")
            refused(ended, "Read-only file system")
            assert not ended.events.get("item")
            injection.outcome = "refused at once"
    scene.finish()


@pytest.fixture
def open_folder():
    """A folder that everybody may look into, with models."""
    folder = Path(tempfile.mkdtemp(prefix="superpose-faults-"))
    folder.chmod(0o755)
    for model in make_family(folder / "models", layers=1, width=8):
        (model / "model.safetensors").chmod(0o644)
    yield folder
    for entry in folder.rglob("*"):
        if entry.is_dir():
            entry.chmod(0o755)
    shutil.rmtree(folder)


@pytest.mark.parametrize("what", ["parent not writable", "parent not to be looked into", "a run of somebody else's"])
def test_no_permission(open_folder, forks, tally, what):
    if os.geteuid() and "else's" in what:
        pytest.skip("being two users takes root")
    user = {} if os.geteuid() else {"user": NOBODY}
    if user and not all(folder.stat().st_mode & 0o001 for folder in Path(__file__).parents):
        pytest.skip("the other user cannot reach this repository: a folder above it is root's alone")
    models = [open_folder / "models" / name for name in ("base", "ft1", "ft2")]
    parent = open_folder / "outputs"
    parent.mkdir()
    command = ["merge", *models, "-o", parent / "out", "--quiet", "--method", "average", "--backend", "serial"]
    if "else's" in what:
        parent.chmod(0o777)
        ended = forks.run(command, parent, signal=int(signal.SIGKILL), event="item", count=3)
        assert ended.status == -signal.SIGKILL
        (parent / "out.partial.lock").unlink()
    else:
        parent.chmod(0o555 if "writable" in what else 0o600)
    with tally("Disk", f"no permission: {what}", "") as injection:
        ended = forks.run(command, parent, **user)
        refused(ended, "Permission denied", str(parent))
        assert not ended.events.get("item")
        injection.outcome = "refused at once"
    parent.chmod(0o755)
    assert forks.run(command, parent).status == 0


@pytest.mark.parametrize("kind", ["a disk", "a folder"])
@pytest.mark.parametrize("verb", ["merge", "extract"])
def test_a_mount_point_cannot_be_the_output(tmp_path, disk, forks, tally, kind, verb):
    models = make_family(tmp_path / "models", layers=1, width=8)
    place = tmp_path / "out put"  # a blank: the system's list of mounts writes it otherwise
    place.mkdir()
    (tmp_path / "elsewhere").mkdir()
    source = ["-t", "tmpfs", "tmpfs"] if kind == "a disk" else ["--bind", str(tmp_path / "elsewhere")]
    subprocess.run(["mount", *source, str(place)], check=True)
    try:
        with tally("Disk", "output is a mount point", f"{verb}, {kind}") as injection:
            ended = forks.run([verb, *models[:2], "-o", place, "--quiet"], tmp_path)
            refused(ended, "the output is a mount point", f"mend: name a folder in it: {place}/merged")
            assert not ended.events.get("item"), "nothing was computed"
            assert not any(place.iterdir())
            injection.outcome = "refused at once"
    finally:
        subprocess.run(["umount", str(place)], check=True)


def merge_to(forks, tmp_path, output, *more):
    models = [tmp_path / "models" / name for name in ("base", "ft1", "ft2")]
    if not models[0].exists():
        make_family(tmp_path / "models", tasks=2, layers=1, width=8)
    command = ["merge", *models, "-o", output, "--quiet", "--method", "average", "--backend", "serial"]
    return forks.run([*command, *more], tmp_path)


def test_links_as_outputs(tmp_path, forks, tally):
    link = tmp_path / "link"
    with tally("Disk", "output is a dangling link", "") as injection:
        link.symlink_to(tmp_path / "there")
        assert merge_to(forks, tmp_path, link).status == 0
        assert link.is_symlink()
        assert (tmp_path / "there" / "model.safetensors").exists()
        injection.outcome = "written where it points to"
    with tally("Disk", "output is a link to an output", "") as injection:
        refused(merge_to(forks, tmp_path, link), "the output exists already")
        assert merge_to(forks, tmp_path, link, "--overwrite").status == 0
        assert link.is_symlink()
        assert {path.name for path in tmp_path.iterdir()} == {"models", "link", "there"}
        injection.outcome = "refused; with --overwrite, replaced where it points to"
    with tally("Disk", "output is a link to a file", "") as injection:
        (tmp_path / "thesis.txt").write_text("five years")
        (tmp_path / "other").symlink_to(tmp_path / "thesis.txt")
        refused(merge_to(forks, tmp_path, tmp_path / "other"), "the output exists already")
        refused(merge_to(forks, tmp_path, tmp_path / "other", "--overwrite"), "is no output of superpose")
        assert (tmp_path / "thesis.txt").read_text() == "five years"
        injection.outcome = "refused at once"
    with tally("Disk", "output is a link to an empty folder", "") as injection:
        (tmp_path / "empty").mkdir()
        (tmp_path / "third").symlink_to(tmp_path / "empty")
        assert merge_to(forks, tmp_path, tmp_path / "third").status == 0
        assert (tmp_path / "empty" / "model.safetensors").exists()
        injection.outcome = "written where it points to"


@pytest.mark.parametrize(
    ("what", "output"),
    [
        ("name too long", "x" * 240),
        ("path too long", "/".join(["x" * 200] * 25)),
        ("a part of the path too long", "x" * 300 + "/out"),
        ("parent is a file", "models/base/model.safetensors/out"),
        ("a link to itself", "circle/out"),
        ("a link to itself", "circle"),
        ("inside an input", "models/base/out"),
        ("holds an input", "models"),
        ("is an input", "models/ft1"),
        ("name of a merge under way", "out.partial"),
        ("the user of another home", "~no-such-user/out"),
    ],
)
def test_no_place_for_an_output(tmp_path, forks, tally, what, output):
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    make_family(tmp_path / "models", tasks=2, layers=1, width=8)
    before = content(tmp_path / "models")
    with tally("Disk", f"output: {what}", "") as injection:
        place = output if output.startswith("~") else tmp_path / output
        ended = merge_to(forks, tmp_path, place)
        refused(ended)
        assert not ended.events.get("item")
        injection.outcome = "refused at once"
    assert content(tmp_path / "models") == before
    assert {path.name for path in tmp_path.iterdir()} == {"models", "circle"}


def test_somebody_takes_the_name_while_the_merge_runs(scene_on, tally):
    scene = scene_on("stf")
    for event, count in (("item", 1), ("journal", 3), ("text", 1), ("rename", 1), ("rename", 2)):
        with tally("Disk", "somebody takes the output's name", event) as injection:
            scene.begin()
            ended = scene.run(harm=["occupy", str(scene.output)], event=event, count=count)
            refused(ended)
            assert (scene.output / "thesis.txt").read_text() == "five years"
            shutil.rmtree(scene.output)
            finished = ended.events["item"] if event != "item" else 0
            assert scene.finish() >= finished
            injection.outcome = "refused, then went on, same bytes"


@pytest.mark.parametrize("backend", ["serial", "threads"])
def test_an_input_vanishes(tmp_path, forks, tally, backend):
    scene = make_scene(tmp_path, "ties, sharded", backend, forks)
    place, kept = tmp_path / "models" / "ft2", tmp_path / "kept"
    shutil.copytree(place, kept)
    draw = random.Random(backend)
    for _ in range(rounds(2)):
        with tally("Disk", "an input vanishes", backend) as injection:
            scene.begin()
            event = draw.choice(["item", "survey", "journal"])
            ended = scene.run(harm=["remove", str(place)], event=event, count=draw.randint(1, scene.events[event]))
            if ended.status:
                refused(ended, "gone", str(place))
                assert not scene.is_complete()
            shutil.copytree(kept, place, dirs_exist_ok=True)
            scene.finish()
            injection.outcome = "refused, then went on, same bytes" if ended.status else "had been read"
