"""A merge method that waits until it is let go: for what has to happen in the middle of a merge."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

_METHOD = '''"""Average that waits while a file is there."""

import time
from dataclasses import dataclass
from pathlib import Path

from superpose.registry import merge_method

HERE = Path(__file__).parent


@dataclass(frozen=True, kw_only=True)
class WaitingOptions:
    """None."""


@merge_method("waiting", options=WaitingOptions, source="a test", whole_for=())
def waiting(task_vectors, options):
    """Wait, then average."""
    if task_vectors.shape[1:].numel() > 1000:
        (HERE / "begun").touch()
        while (HERE / "wait").exists():
            time.sleep(0.01)
    return task_vectors.mean(dim=0)
'''


def method_that_waits(folder: Path) -> Path:
    """Make a folder of plug-ins with the method "waiting": it averages, large tensors only once `wait` is removed."""
    folder.mkdir()
    (folder / "waiting.py").write_text(_METHOD)
    (folder / "wait").touch()
    return folder


def wait_for(file: Path, process: subprocess.Popen) -> None:
    until = time.monotonic() + 60
    while not file.exists() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
    assert file.exists(), process.communicate()[1]
