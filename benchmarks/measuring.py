"""What the benchmarks share: what a command takes, measurements that are kept, and reports.

Memory is RssAnon, what a process holds beyond mapped files, over all processes of a command, sampled while they run.
CPU seconds are user and system time of all of them. Linux only.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from superpose.own_code import code_digest

MIB = 2**20
SECONDS_BETWEEN_SAMPLES = 0.02
SHARE_OF_SAMPLING = 0.05
"""Of the time, at most: a cluster has hundreds of threads to ask."""


@dataclass(frozen=True)
class Run:
    """What one run took: seconds, seconds, MiB; and what else there is to say of it."""

    wall: float
    cpu: float
    memory: float
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{_seconds(self.wall)} / {_seconds(self.cpu)} / {self.memory:.0f}"


def _seconds(count: float) -> str:
    return f"{count:.1f}" if count >= 1 else f"{count:.3f}"


def processes_of(root: int) -> list[int]:
    """Return a process and all below it."""
    found = [root]
    for process in found:
        for thread in Path(f"/proc/{process}/task").glob("*"):
            try:
                found += map(int, (thread / "children").read_text().split())
            except (FileNotFoundError, ProcessLookupError):  # it has ended
                continue
    return found


def anonymous_memory(process: int) -> int:
    """Return the anonymous memory of a process in bytes, 0 when it is gone."""
    try:
        for line in Path(f"/proc/{process}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    except (FileNotFoundError, ProcessLookupError):
        pass
    return 0


def cpu_seconds(process: int) -> float:
    """Return the CPU seconds of a process, without its children's, 0 when it is gone."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(command: Sequence[str], **environment: str) -> Run:
    """Run a command to its end; what it prints is in the facts.

    Raises:
        RuntimeError: it failed.
    """
    before, start, peak, seconds = os.times(), time.perf_counter(), 0, {}
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", **environment}
    with tempfile.TemporaryFile() as printed, tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(command, stdout=printed, stderr=errors, env=environment)
        try:
            while process.poll() is None:
                sampled = time.perf_counter()
                processes = processes_of(process.pid)
                peak = max(peak, sum(map(anonymous_memory, processes)))
                seconds |= {number: cpu for number in processes if (cpu := cpu_seconds(number))}
                time.sleep(max(SECONDS_BETWEEN_SAMPLES, (time.perf_counter() - sampled) / SHARE_OF_SAMPLING))
        finally:
            process.kill()
            process.wait()
        wall = time.perf_counter() - start
        printed.seek(0)
        errors.seek(0)
        if process.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{errors.read().decode(errors='replace')}")
        facts = {"printed": printed.read().decode(errors="replace")}
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    # Ray's workers are nobody's children in the end; others end between two samples.
    return Run(wall, max(cpu, sum(seconds.values())), peak / MIB, facts)


@cache
def know_architecture(base: Path) -> None:
    """Have superpose ask transformers about a config, which it does once, so that no measurement has it in it."""
    measure(superpose("plan", base, base))


def superpose(*arguments: object) -> list[str]:
    """Return a command line of superpose."""
    return [sys.executable, "-m", "superpose", *map(str, arguments)]


def merge(models: Sequence[Path], scratch: Path, *options: str, output: str = "out", **environment: str) -> Run:
    """Merge by the command line into a scratch folder, which is removed; digests of the weights are in the facts."""
    know_architecture(models[0])
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    run = measure(superpose("merge", *models, "-o", scratch / output, "-q", *options), **environment)
    digests = {folder.name: weights_digest(folder) for folder in sorted(scratch.iterdir())}
    shutil.rmtree(scratch)
    return Run(run.wall, run.cpu, run.memory, {"digests": digests})


def weights_digest(folder: Path) -> str:
    """Return a digest of the weight files of a model, byte by byte."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            while block := stream.read(16 * MIB):
                digest.update(block)
    return digest.hexdigest()


def median(runs: Sequence[Run]) -> Run:
    """Return the medians, number by number; the facts are those of the first run.

    Raises:
        RuntimeError: the runs wrote different bytes.
    """
    if any(run.facts.get("digests") != runs[0].facts.get("digests") for run in runs):
        raise RuntimeError("the same merge wrote other bytes when it was run again")
    numbers = (statistics.median(getattr(run, name) for run in runs) for name in ("wall", "cpu", "memory"))
    return Run(*numbers, facts=runs[0].facts)


@dataclass(frozen=True)
class Kept:
    """Measurements in a folder, one file each, so that an interrupted benchmark goes on; of this code and torch only.

    Args:
        folder: of the benchmark.
    """

    folder: Path

    def file(self, name: str) -> Path:
        """Return where the measurement of a name is kept."""
        words = "".join(letter if letter.isalnum() else "-" for letter in name)
        mark = hashlib.sha256(name.encode()).hexdigest()[:8]
        return self.folder / "measured" / f"{code_digest()}-{torch.__version__}" / f"{words[:100]}-{mark}.json"

    def run(self, name: str, take: Callable[[], Run]) -> Run:
        """Return the measurement of a name, taken now if it is not there."""
        file = self.file(name)
        if not file.exists():
            run = take()
            file.parent.mkdir(parents=True, exist_ok=True)
            partial = file.with_suffix(".partial")
            partial.write_text(json.dumps({"name": name, "load": os.getloadavg()[0], **asdict(run)}, indent=2))
            partial.replace(file)
        content = json.loads(file.read_text())
        return Run(content["wall"], content["cpu"], content["memory"], content["facts"])

    def in_turns(self, takes: Mapping[str, Callable[[], Run]], runs: int) -> dict[str, Run]:
        """Return the median of each of several measurements; in turns, so that the machine's moods fall on all."""
        taken: dict[str, list[Run]] = {name: [] for name in takes}
        for number in range(1, runs + 1):
            for name, take in takes.items():
                taken[name].append(self.run(f"{name}, run {number}", take))
                print(f"  {name}, run {number}: {taken[name][-1]}", file=sys.stderr, flush=True)
        return {name: median(of_one) for name, of_one in taken.items()}


@dataclass(frozen=True)
class Report:
    """Lines that are printed as they come and written in the end.

    Args:
        file: that gets them too, if any.
    """

    file: Path | None
    lines: list[str] = field(default_factory=list)

    def say(self, *lines: str) -> None:
        """Print lines and keep them."""
        self.lines.extend(lines)
        print("\n".join(lines), flush=True)

    def row(self, *cells: object) -> None:
        """Add a row to a table."""
        self.say(f"| {' | '.join(map(str, cells))} |")

    def table(self, *columns: str) -> None:
        """Begin a table."""
        self.say("")
        self.row(*columns)
        self.say("|" + "---|" * len(columns))

    def write(self) -> None:
        """Write the file."""
        if self.file is not None:
            self.file.write_text("\n".join([*self.lines, ""]), encoding="utf-8")


def publish(about: str, columns: Sequence[str], rows: Sequence[Sequence[object]], file: Path | None) -> None:
    """Print one table and what it is about, and write them to a file, if any."""
    report = Report(file)
    report.say(about)
    report.table(*columns)
    for cells in rows:
        report.row(*cells)
    report.write()


def machine() -> str:
    """Return what a benchmark ran on."""
    return (
        f"{_processor()}, {len(os.sched_getaffinity(0))} cores, load average {os.getloadavg()[0]:.1f};"
        f" Python {platform.python_version()}, torch {torch.__version__},"
        f" superpose {version('superpose')} (code {code_digest()})"
    )


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def need_room(folder: Path, needed: int) -> None:
    """End the program if a disk has no room for what is to be written.

    Raises:
        SystemExit: it has not.
    """
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < needed:
        missing = f"{(needed - free) / 1e9:.1f} GB are missing: {needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} free"
        raise SystemExit(f"{folder}: {missing}")


def arguments_parser(description: str | None, out: str) -> argparse.ArgumentParser:
    """Return a parser with what every benchmark takes.

    Args:
        description: the benchmark's docstring.
        out: what is in the folder of --out.
    """
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help=f"folder, outside the repository, of {out}")
    parser.add_argument("--runs", type=int, default=3, help="of each measurement; the table has medians")
    parser.add_argument("--quick", action="store_true", help="one run of something small, to try the benchmark")
    parser.add_argument("--report", type=Path, help="file that gets the table too")
    return parser
