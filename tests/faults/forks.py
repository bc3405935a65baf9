"""Processes of the command line that cost no start: forks of one that has imported everything, with a fault each.

`Forks` talks to a server, this file run as a program. For every request it forks; the child runs `superpose.cli.main`
and meets its fault there: a signal at the k-th event of a kind, or after some time, a power cut, a limit, another user.
"""

from __future__ import annotations

import gc
import json
import mmap
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

EVENTS = (
    "read", "survey", "item", "write", "allocate", "sync", "journal", "text", "copy", "open", "rename", "unlink",
    "mkdir", "rmdir",
)  # fmt: skip
"""What a child does under its root, in words; a fault comes before it is done, or when half of it is."""
AUDITED = {
    "os.rename": "rename", "os.remove": "unlink", "os.mkdir": "mkdir", "os.rmdir": "rmdir",
    "shutil.copyfile": "copy",
}  # fmt: skip
ENDING = (signal.SIGINT, signal.SIGTERM)
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


@dataclass(frozen=True)
class Outcome:
    """How a process ended.

    Args:
        process: its id.
        status: its exit code; the negative number of the signal that killed or stopped it.
        text: what it wrote on stdout and stderr.
        events: how often each event came.
    """

    process: int
    status: int
    text: str
    events: Mapping[str, int]


class Forks:
    """Runs the command line in forks; one at a time, but for those that were stopped."""

    def __init__(self) -> None:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "200", "OMP_NUM_THREADS": "1"}
        path = [str(Path(__file__).parents[1]), *filter(None, [environment.get("PYTHONPATH")])]
        self._server = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**environment, "PYTHONPATH": os.pathsep.join(path)},
            # A shell starts what it puts in the background with SIGINT ignored, and children inherit that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def run(self, arguments: Sequence[object], root: Path, **fault: Any) -> Outcome:
        """Run the command line until it ends or is stopped.

        Args:
            arguments: of the command line.
            root: events under this folder count.
            **fault: `signal`, or `harm` (a function of `faults.harms` and its arguments), with `event` and `count`;
                `again`, for the signal at all events that follow; `signal` with `after` seconds; `power` with `event`
                number and `seed`; `user`; `limit` in bytes a file; `script`, Python to be run first.
        """
        return self._ask({"arguments": [str(one) for one in arguments], "root": str(root), **fault})

    def go_on(self, stopped: Outcome) -> Outcome:
        """Let a stopped process go on to its end."""
        return self._ask({"go_on": stopped.process})

    def close(self) -> None:
        """End the server."""
        self._server.communicate(timeout=30)

    def _ask(self, request: Mapping[str, Any]) -> Outcome:
        assert self._server.stdin is not None, "it is a pipe"
        assert self._server.stdout is not None, "it is a pipe"
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return Outcome(**json.loads(self._server.stdout.readline()))


class Counters:
    """Numbers of events in memory that outlasts the process that counts."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 8 * len(EVENTS))
        self._guard = threading.Lock()

    def add(self, event: str) -> int:
        """Count an event, and return how many there were."""
        place = 8 * EVENTS.index(event)
        with self._guard:
            number = int.from_bytes(self._memory[place : place + 8], "little") + 1
            self._memory[place : place + 8] = number.to_bytes(8, "little")
            return number

    def counts(self) -> dict[str, int]:
        """Return how often each event came."""
        found = (self._memory[8 * place : 8 * place + 8] for place in range(len(EVENTS)))
        return {
            event: number
            for event, part in zip(EVENTS, found, strict=True)
            if (number := int.from_bytes(part, "little"))
        }


def serve() -> None:
    """Answer requests until there are no more."""
    import superpose.api
    import superpose.cli
    import superpose.run  # noqa: F401 - so that children need not
    from superpose.own_code import code_digest
    from superpose.registry import registered

    registered()
    code_digest()  # once for all children: sources may be edited meanwhile
    assert threading.active_count() == 1, "a fork takes no threads along"
    signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)  # so in a child, until its command begins
    gc.freeze()  # what children do not look through for garbage they share
    known: dict[int, tuple[Counters, Path]] = {}
    scratch = Path(tempfile.mkdtemp(prefix="superpose-forks-"))
    for line in sys.stdin:
        request = json.loads(line)
        if "go_on" in request:
            process = request["go_on"]
            os.kill(process, signal.SIGCONT)
        else:
            counters = Counters()
            text = scratch / f"{len(known)}.txt"
            process = os.fork()
            if not process:
                _be_child(request, counters, text)
            known[process] = counters, text
            if "after" in request:
                time.sleep(request["after"])  # the moment is random: there is nothing to wait for
                os.kill(process, request["signal"])
        _, status = os.waitpid(process, os.WUNTRACED)
        code = -os.WSTOPSIG(status) if os.WIFSTOPPED(status) else os.waitstatus_to_exitcode(status)
        counters, text = known[process]
        answer = {"process": process, "status": code, "text": text.read_text(), "events": counters.counts()}
        print(json.dumps(answer), flush=True)
    shutil.rmtree(scratch)


def _be_child(request: Mapping[str, Any], counters: Counters, text: Path) -> None:
    """Run the command line and end; this never returns."""
    status = 1
    try:
        output = os.open(text, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if "limit" in request:
            resource.setrlimit(resource.RLIMIT_FSIZE, (request["limit"], request["limit"]))
        if "user" in request:
            os.setgid(request["user"])
            os.setuid(request["user"])
        sys.argv = ["superpose", *request["arguments"]]
        exec(request.get("script", ""), {})
        at_end = _inject(request, counters)
        status = _run()
        at_end()
    except BaseException:  # told as a status that no command of ours has
        traceback.print_exc()
        status = 99
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _run() -> int:
    from superpose import cli

    try:
        try:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
            cli.main()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    except KeyboardInterrupt:  # before the command line has taken over, or after: Python itself ends so
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
        os.kill(os.getpid(), signal.SIGINT)
        raise
    return code


def _inject(request: Mapping[str, Any], counters: Counters) -> Callable[[], None]:
    """Let what is done under the root be counted, and the fault come at its event; or, as is returned, at the end."""
    from faults import harms
    from faults.power import Power

    if "power" in request:
        power = Power(Path(request["root"]), **request["power"])
        power.watch(watch)
        return power.cut

    again = []

    def met(event: str, half: Callable[[], Any]) -> None:
        number = counters.add(event)
        if again:
            os.kill(os.getpid(), request["signal"])
        if number == request.get("count") and event == request.get("event"):
            if request.get("again"):
                again.append(True)
            if "harm" in request:
                name, *arguments = request["harm"]
                getattr(harms, name)(*arguments)
                return
            if request["signal"] == signal.SIGKILL:
                half()
            os.kill(os.getpid(), request["signal"])

    watch(Path(request["root"]), met)
    return lambda: None


def watch(root: Path, met: Callable[[str, Callable[[], Any]], None]) -> None:
    """Call a function before each thing that is done under a folder; for good.

    Args:
        root: the folder.
        met: called with the event, and with what does the half of it.
    """
    from superpose import journal, run

    inside = f"{root}{os.sep}"
    busy = threading.local()

    def tell(event: str, half: Callable[[], Any] = lambda: None) -> None:
        if getattr(busy, "now", False):  # what is done here, and what a larger event is made of
            return
        busy.now = True
        try:
            met(event, half)
        finally:
            busy.now = False

    def audit(name: str, arguments: tuple) -> None:
        if name == "open" and arguments[0] is not None and str(arguments[0]).startswith(inside):
            tell("open" if (arguments[2] or 0) & WRITING else "read")
        elif name in AUDITED:
            place = os.fsdecode(cast(str, arguments[0]))
            if place.startswith(inside) or not Path(place).is_absolute():  # rmtree names what is in an open folder
                tell(AUDITED[name])

    def before(module: Any, name: str, event: str, half: Callable[..., Any] = lambda *_: None) -> None:
        real = getattr(module, name)

        def told(*arguments: Any, **more: Any) -> Any:
            tell(event, lambda: half(real, *arguments))
            return real(*arguments, **more)

        setattr(module, name, told)

    before(os, "pwrite", "write", lambda real, file, data, place: real(file, data[: len(data) // 2], place))
    before(os, "fsync", "sync")
    before(os, "ftruncate", "allocate")
    before(os, "posix_fallocate", "allocate")
    before(Path, "write_text", "text", lambda real, path, text, *_: real(path, text[: len(text) // 2], "utf-8"))
    if "ray" not in sys.argv:  # its workers get the functions by name
        before(run, "survey_item", "survey")
        before(run, "merge_item", "item")
    before(journal.Journal, "add", "journal", _half_a_line)
    sys.addaudithook(audit)


def _half_a_line(real: Callable, journal: Any, item: Any, record: Any) -> None:
    del real, record
    with journal._guard, journal._path.open("a", encoding="utf-8") as stream:
        stream.write(f'{{"key": "{item.key}", "rec')


if __name__ == "__main__":
    serve()
