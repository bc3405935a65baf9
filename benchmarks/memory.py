"""Peak anonymous memory of whole merges, sampled while they run.

    python benchmarks/memory.py --family FOLDER [--methods task_arithmetic ties] [--runs 3]

Merges base and fine-tunes of a folder that llama_family.py made, by the command line, and prints for each method the
peak of RssAnon (what the process holds beyond mapped files), wall and CPU seconds. Linux only.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch


def anonymous_memory(process: int) -> int:
    """Return the anonymous memory of a process in bytes, 0 when it is gone."""
    try:
        for line in Path(f"/proc/{process}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    except (FileNotFoundError, ProcessLookupError):
        pass
    return 0


def measure(command: list[str]) -> tuple[float, float, int]:
    """Run a command; return wall seconds, CPU seconds and peak anonymous memory in bytes.

    Raises:
        RuntimeError: it failed.
    """
    before, start, peak = os.times(), time.perf_counter(), 0
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)
        while process.poll() is None:
            peak = max(peak, anonymous_memory(process.pid))
            time.sleep(0.01)
        errors.seek(0)
        if process.returncode:
            raise RuntimeError(errors.read().decode())
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return time.perf_counter() - start, cpu, peak


def merge_command(family: Path, method: str, out: Path) -> list[str]:
    """Return the command that merges a family."""
    models = [str(folder) for folder in [family / "base", *sorted(family.glob("ft*"))]]
    return [sys.executable, "-m", "superpose", "merge", *models, "-o", str(out), "--method", method, "--quiet"]


def main() -> None:
    """Read the command line, measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--family", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", default=["task_arithmetic", "ties"])
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    print(f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; torch {torch.__version__}")
    print(f"{'method':18}{'peak RssAnon MiB':>18}{'wall s':>10}{'CPU s':>10}   medians of {arguments.runs}")
    for method in arguments.methods:
        runs = []
        for _ in range(arguments.runs):
            scratch = Path(tempfile.mkdtemp(dir=arguments.family))
            runs.append(measure(merge_command(arguments.family, method, scratch / "out")))
            shutil.rmtree(scratch)
        wall, cpu, peak = (statistics.median(column) for column in zip(*runs, strict=True))
        print(f"{method:18}{peak / 2**20:18.0f}{wall:10.1f}{cpu:10.1f}", flush=True)


if __name__ == "__main__":
    main()
