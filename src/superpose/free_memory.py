"""How much memory this process may still take: of the machine, of its control group, and by its own limits."""

from __future__ import annotations

import errno
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SLACK = 64 * 2**20
"""Bytes left alone: for threads' stacks, and what libraries load late."""
_UNLIMITED = 2**60
"""Control groups of the first version write a number beyond any memory for no limit."""


@dataclass(frozen=True)
class Room:
    """Bytes that can still be taken, and what sets that limit."""

    bytes: int
    limit: str


def free_memory(mapped: int = 0, root: Path = Path("/")) -> Room | None:
    """Return how much more memory this process can take.

    Args:
        mapped: bytes of files that will be mapped; limits on addresses count them, the memory itself does not.
        root: where /proc and /sys are.

    Returns:
        The tightest of all limits; None on systems that do not tell.
    """
    found = [*_machine(root), *_control_groups(root), *_own_limits(mapped)]
    if not found:
        return None
    tightest = min(found, key=lambda room: room.bytes)
    return Room(max(0, tightest.bytes - SLACK), tightest.limit)


def is_shortage(error: BaseException) -> bool:
    """Whether an error says that memory ran out, in any library's words."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    words = ("allocate memory", "out of memory", "not enough memory", "start new thread", "os error 12")
    return isinstance(error, Exception) and any(word in str(error).lower() for word in words)


def _machine(root: Path) -> Iterator[Room]:
    told = _numbers(root / "proc/meminfo")
    if "MemAvailable" in told:
        free = (told["MemAvailable"] + told.get("SwapFree", 0)) * 1024
        yield Room(free, "the machine's free memory")


def _control_groups(root: Path) -> Iterator[Room]:
    """Yield the room in each control group that this process is in, of either version."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            home, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file", "active_file")
        elif "memory" in controllers.split(","):
            home = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file", "total_active_file")
        else:
            continue
        group = home / path.lstrip("/")
        # In a container the group's own path may not be there: its root is what the container has.
        for place in (group, *group.parents) if home in (group, *group.parents) else (home,):
            limit, used = _text(place / names[0]).strip(), _text(place / names[1]).strip()
            if limit.isdigit() and used.isdigit() and int(limit) < _UNLIMITED:
                told = _numbers(place / "memory.stat")
                files = told.get(names[2], 0) + told.get(names[3], 0)  # given up when memory is short
                yield Room(int(limit) - int(used) + min(files, int(used)), f"the control group's limit ({place})")
            if place == home:
                break


def _own_limits(mapped: int) -> Iterator[Room]:
    """Yield the room under this process's own limits, which `ulimit` sets."""
    if sys.platform != "linux":
        return
    import resource

    told = _numbers(Path("/proc/self/status"))
    for name, limit, used in (("-v", resource.RLIMIT_AS, "VmSize"), ("-d", resource.RLIMIT_DATA, "VmData")):
        most, _ = resource.getrlimit(limit)
        if most != resource.RLIM_INFINITY:
            yield Room(most - told.get(used, 0) * 1024 - mapped, f"ulimit {name}")


def _numbers(file: Path) -> dict[str, int]:
    """Return the numbers of a file with a name and a number on each line."""
    found = {}
    for line in _text(file).splitlines():
        name, number, *_ = [*line.replace(":", " ").split(), "", ""]
        if number.isdigit():
            found[name] = int(number)
    return found


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:  # not on this system, or not for us
        return ""
