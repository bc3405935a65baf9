"""Too little memory, too few file handles, too little patience: refused beforehand, or slower, never killed."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from families import generator, load, make_family, save, superpose, tuned_tensors, weights

import superpose as library
from faults.waiting import method_that_waits, wait_for
from superpose import SuperposeError
from superpose.free_memory import SLACK, Room, free_memory, is_shortage

MIB = 2**20
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="/proc and control groups are Linux's")


def large_family(root: Path) -> list[Path]:
    """Write a base and two fine-tunes with a matrix that takes STF some hundred MiB."""
    base = {f"layers.{layer}.weight": torch.randn(1024, 1024, generator=generator(layer)) for layer in range(2)}
    return [save(root / "base", base), *(save(root / f"ft{i}", tuned_tensors(base, i)) for i in (1, 2))]


def merge_under(limits: dict[int, int], *arguments: object) -> subprocess.CompletedProcess:
    """Run a merge in a process with these limits."""

    def limit() -> None:
        for which, most in limits.items():
            resource.setrlimit(which, (most, resource.getrlimit(which)[1]))

    return subprocess.run(
        [sys.executable, "-m", "superpose", "merge", *map(str, arguments), "--quiet"],
        preexec_fn=limit, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


@LINUX
@pytest.mark.slow
def test_a_limit_on_addresses_is_met_or_the_merge_refused(tmp_path, tally):
    folders = large_family(tmp_path)
    options = ("--method", "stf", "--backend", "serial")
    library.merge(
        {"base": str(folders[0]), "models": [str(folder) for folder in folders[1:]], "method": "stf"},
        tmp_path / "whole",
    )
    code = "import superpose.api; print(open('/proc/self/status').read())"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    start = int(told.partition("VmPeak:")[2].split()[0]) * 1024
    outcomes = []
    for room in (60 * MIB, 250 * MIB, 600 * MIB, 4096 * MIB):
        with tally("Resources", "ulimit -v below and above the plan's need", "serial") as injection:
            out = tmp_path / f"out{room}"
            done = merge_under({resource.RLIMIT_AS: start + room}, *folders, "-o", out, *options)
            assert "Traceback" not in done.stderr, done.stderr
            assert done.returncode in (0, 2), (done.returncode, done.stderr)
            if done.returncode == 0:
                assert weights(out) == weights(tmp_path / "whole")
            else:
                assert "memory" in done.stderr
                assert not out.exists()
            outcomes.append(done.returncode)
            injection.outcome = "same bytes" if done.returncode == 0 else "refused"
    assert outcomes[0] == 2
    assert outcomes[-1] == 0


@LINUX
@pytest.mark.slow
def test_a_control_group_with_little_memory_does_not_kill(tmp_path, tally):
    home = next((place for place in (Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")) if place.is_dir()), None)
    group = home / f"superpose-test-{os.getpid()}" if home is not None else None
    if group is None or os.geteuid() != 0:
        pytest.skip("making a control group takes root")
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made here: {error.strerror}")
    file = next(
        (group / name for name in ("memory.limit_in_bytes", "memory.max") if (group / name).exists()), group / "none"
    )
    try:
        folders = large_family(tmp_path)
        outcomes = []
        for limit in (330 * MIB, 8192 * MIB):
            with tally("Resources", "control group's limit below and above the plan's need") as injection:
                try:
                    file.write_text(str(limit))
                except OSError as error:
                    pytest.skip(f"no limit can be set here: {error.strerror}")
                out = tmp_path / f"out{limit}"
                code = (
                    f"import os, sys; open({str(group / 'cgroup.procs')!r}, 'w').write(str(os.getpid()));"
                    "sys.argv = sys.argv[1:]; import superpose.cli; superpose.cli.main()"
                )
                done = subprocess.run(
                    [sys.executable, "-c", code, "superpose", "merge", *map(str, folders), "-o", str(out), "-q"],
                    capture_output=True, text=True, timeout=300,
                )  # fmt: skip
                assert done.returncode in (0, 2), (done.returncode, done.stderr)
                assert "Traceback" not in done.stderr
                assert out.exists() == (done.returncode == 0)
                assert done.returncode == 0 or "control group" in done.stderr
                outcomes.append(done.returncode)
                injection.outcome = "went through" if done.returncode == 0 else "refused"
        assert outcomes == [2, 0]
    finally:
        group.rmdir()


def fake_system(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("files", "room", "limit"),
    [
        ({"proc/meminfo": "MemTotal: 900 kB\nMemAvailable: 500000 kB\nSwapFree: 1000 kB\n"}, 501_000 * 1024, "machine"),
        (
            {
                "proc/meminfo": "MemAvailable: 9000000 kB\n",
                "proc/self/cgroup": "0::/work/job\n",
                "sys/fs/cgroup/work/memory.max": "1000000000\n",
                "sys/fs/cgroup/work/memory.current": "400000000\n",
                "sys/fs/cgroup/work/memory.stat": "anon 1\ninactive_file 100000000\nactive_file 50000000\n",
                "sys/fs/cgroup/work/job/memory.max": "max\n",
                "sys/fs/cgroup/work/job/memory.current": "400000000\n",
            },
            750_000_000,
            "control group",
        ),
        (
            {
                "proc/self/cgroup": "9:cpu:/x\n8:memory,hugetlb:/docker/abc\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "800000000\n",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": "300000000\n",
                "sys/fs/cgroup/memory/memory.stat": "total_inactive_file 7\ntotal_active_file 3\n",
            },
            500_000_010,
            "control group",
        ),
        (
            {
                "proc/meminfo": "MemAvailable: 500000 kB\n",
                "proc/self/cgroup": "8:memory:/\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": "300000000\n",
            },
            500_000 * 1024,
            "machine",
        ),
    ],
)
def test_the_tightest_limit_counts(tmp_path, files, room, limit):
    found = free_memory(root=fake_system(tmp_path, files))
    assert found is not None
    assert found.bytes == room - SLACK
    assert limit in found.limit


def test_a_tensor_larger_than_memory_is_refused_before_anything_is_computed(tmp_path, monkeypatch, tally):
    folders = make_family(tmp_path)
    monkeypatch.setattr("superpose.run.free_memory", lambda mapped: Room(10_000, "ulimit -v"))
    recipe = {"base": str(folders[0]), "models": [str(folder) for folder in folders[1:]], "method": "stf"}
    with tally("Resources", "less memory than one tensor needs") as injection:
        with pytest.raises(SuperposeError, match="not enough memory") as caught:
            library.merge(recipe, tmp_path / "out")
        assert "ulimit -v" in caught.value.mend
        assert "tensor " in caught.value.where
        assert not (tmp_path / "out").exists()
        injection.outcome = "refused"


def test_less_memory_than_asked_for_means_fewer_tensors_at_a_time(tmp_path, monkeypatch):
    folders = make_family(tmp_path)
    recipe = {"base": str(folders[0]), "models": [str(folder) for folder in folders[1:]], "method": "average"}
    plan = library.plan(recipe)
    most = max(item.memory for item in plan.items)
    budgets = []
    real = library.merge.__globals__["run_plan"].__globals__["make_backend"]
    monkeypatch.setattr("superpose.run.free_memory", lambda mapped: Room(most + 10, "the machine's free memory"))
    monkeypatch.setattr(
        "superpose.run.make_backend", lambda n, w, budget, a=None: budgets.append(budget) or real(n, w, budget, a)
    )
    library.merge(recipe, tmp_path / "out")
    assert budgets == [most + 10]


@pytest.mark.parametrize(
    ("error", "short"),
    [
        (MemoryError(), True),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
            True,
        ),
        (RuntimeError("can't start new thread"), True),
        (OSError(12, "Cannot allocate memory"), True),
        (RuntimeError("shapes differ"), False),
        (OSError(28, "No space left on device"), False),
    ],
)
def test_shortage_of_memory_is_told_from_other_errors(error, short):
    assert is_shortage(error) is short


@LINUX
@pytest.mark.slow
def test_a_thousand_models_with_few_file_handles(tmp_path, tally):
    base = {"a.weight": torch.randn(8, 8), "b.norm.weight": torch.ones(8)}
    folders = [save(tmp_path / "base", base, shards=2)]
    folders += [save(tmp_path / f"m{number}", tuned_tensors(base, number), shards=2) for number in range(1000)]
    for method in ("average", "task_arithmetic"):
        with tally("Resources", "1,000 models, 64 file handles", method) as injection:
            out = tmp_path / method
            done = merge_under({resource.RLIMIT_NOFILE: 64}, *folders, "-o", out, "--method", method)
            assert done.returncode == 0, done.stderr
            injection.outcome = "merged"
    mean = torch.stack([load(folder)["a.weight"] for folder in folders[1:]]).double().mean(dim=0)
    torch.testing.assert_close(
        load(tmp_path / "average")["a.weight"].double(), mean, rtol=0, atol=1e-5
    )  # a thousand roundings


@pytest.mark.parametrize(
    ("first", "second", "code"),
    [
        (signal.SIGINT, signal.SIGINT, 130),
        (signal.SIGTERM, signal.SIGINT, 130),
        (signal.SIGINT, signal.SIGTERM, 143),
        (signal.SIGTERM, None, 143),
    ],
)
def test_whoever_asks_twice_or_has_waited_long_enough_need_not_wait(tmp_path, tally, first, second, code):
    folders = make_family(tmp_path, layers=1, width=32)
    plug_in = method_that_waits(tmp_path / "methods")
    arguments = ["merge", *map(str, folders), "-o", str(tmp_path / "out"), "--method", "waiting", "--workers", "2"]
    name = f"{first.name}, then {second.name}" if second else f"{first.name} while a tensor takes for ever"
    with tally("Resources", name) as injection:
        process = subprocess.Popen(
            [sys.executable, "-m", "superpose", *arguments],
            env={**os.environ, "SUPERPOSE_METHODS": str(plug_in)},
            stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
            preexec_fn=lambda: [signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGTERM)],
        )  # fmt: skip
        wait_for(plug_in / "begun", process)
        journal = tmp_path / "out.partial" / "journal.jsonl"
        wait_for(journal, process)
        process.send_signal(first)
        began = time.monotonic()
        if second is not None:
            time.sleep(0.5)  # the first is being answered: the worker does not end
            assert process.poll() is None
            process.send_signal(second)
        _, said = process.communicate(timeout=60)
        assert process.returncode == code, said
        assert "stopped at once" in said
        assert "Traceback" not in said
        assert time.monotonic() - began < (3 if second is not None else 15)
        assert not (tmp_path / "out").exists()
        (plug_in / "wait").unlink()
        superpose(*arguments, "--quiet", SUPERPOSE_METHODS=str(plug_in))
        assert load(tmp_path / "out").keys() == load(folders[0]).keys()
        injection.outcome = "ended at once; went on"
