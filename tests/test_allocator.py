"""Settings of the process belong to the command line."""

import subprocess
import sys
from pathlib import Path

import pytest

from superpose import allocator

PROGRAM = """
import resource, sys
{setting}
import torch
sizes = [10 << 20, 12 << 20]  # beyond the 32 MiB up to which glibc adapts by itself
def rounds(count):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(count):
        for size in sizes:
            torch.zeros(size).add(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
rounds(4)  # by then the heap is as large as it gets
print(rounds(8))
"""


def faults(setting):
    done = subprocess.run([sys.executable, "-c", PROGRAM.format(setting=setting)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.skipif(not Path("/lib64/ld-linux-x86-64.so.2").exists(), reason="glibc's")
def test_freed_memory_is_used_again_without_page_faults():
    kept = faults("from superpose.allocator import keep_freed_memory; assert keep_freed_memory()")
    assert kept < faults("") / 2


@pytest.mark.parametrize("platform", ["darwin", "win32"])
def test_elsewhere_nothing_is_done(monkeypatch, platform):
    monkeypatch.setattr(allocator.sys, "platform", platform)
    assert not allocator.keep_freed_memory()


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(allocator.sys, "platform", "linux")
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda _: object())
    assert not allocator.keep_freed_memory()


def test_importing_the_library_changes_no_setting():
    program = (
        "import ctypes, gc\n"
        "before = gc.get_threshold()\n"
        "import superpose, superpose.api, superpose.cli\n"
        "import sys\n"
        "assert gc.get_threshold() == before\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
