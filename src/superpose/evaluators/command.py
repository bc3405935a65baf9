"""Any program that prints numbers: `--command "python score.py {model}"`.

{model} is replaced by the model's folder inside each argument; no shell reads the line. The program's output, or the
last line of it that is not empty, has to be a JSON object of names and finite numbers. Higher is taken to be better
except for the names listed in `--lower`.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shlex
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from superpose.checkpoints.folder import locate
from superpose.errors import SuperposeError, nearest
from superpose.evaluators.evaluation import MODEL
from superpose.evaluators.registry import Better, Measured, evaluator
from superpose.options import Range

MOST_SHOWN = 600
"""Characters of a program's own words that an error shows: the last ones."""


@dataclass(frozen=True, kw_only=True)
class CommandOptions:
    """What is run, and how its numbers are read."""

    command: str = ""
    """The program and its arguments, {model} standing for the model's folder."""
    lower: str = ""
    """Names of metrics for which lower is better, with commas."""
    timeout: Annotated[float, Range(0.1, 10_000_000)] = 3600.0
    """Seconds after which the program is stopped."""


@evaluator("command", options=CommandOptions)
def command(model: str, options: CommandOptions) -> Measured:
    """Return what a program prints about a model.

    Args:
        model: folder or file, or hub id.
        options: the program.

    Returns:
        The numbers that it prints.

    Raises:
        SuperposeError: it cannot be run, fails, takes too long, or prints no such object.
    """
    arguments = _arguments(options.command, model)
    where = f"command {shlex.join(arguments)}"
    metrics = _numbers(_output(arguments, options.timeout, where), where)
    lower = [name.strip() for name in options.lower.split(",") if name.strip()]
    for name in lower:
        if name not in metrics:
            raise SuperposeError(f"'{name}' is none of its metrics", where="lower", mend=nearest(name, metrics))
    better: dict[str, Better] = {name: "lower" if name in lower else "higher" for name in metrics}
    return Measured(metrics, {"command": arguments}, better)


def _arguments(line: str, model: str) -> list[str]:
    mend = 'write --command "python score.py {model}"'
    try:
        words = shlex.split(line)
    except ValueError as error:
        raise SuperposeError(f"the command cannot be split: {error}", where=f"command {line}", mend=mend) from error
    if not words:
        raise SuperposeError("the evaluator command runs a program, and none is named", where="command", mend=mend)
    if not any(MODEL in word for word in words):
        raise SuperposeError(f"no argument holds {MODEL}", where=f"command {line}", mend=mend)
    place, plus, _ = model.rpartition("+")
    try:
        folder, _ = locate(model)
    except SuperposeError as error:
        if not (plus and place):
            raise
        mend = "merge the adapter into its model first, and name the result"
        raise SuperposeError("a program is given one folder", where=model, mend=mend) from error
    return [word.replace(MODEL, str(folder)) for word in words]


def _output(arguments: Sequence[str], timeout: float, where: str) -> str:
    try:
        process = subprocess.Popen(
            arguments, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            errors="replace", start_new_session=True,
        )  # fmt: skip
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        mend = "name a program that can be run"
        raise SuperposeError(f"{arguments[0]} cannot be run: {reason}", where=where, mend=mend) from error
    with process:
        try:
            told, complaint = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired as error:
            _stop(process)
            _, complaint = process.communicate()
            mend = f"raise --timeout{_shown(complaint)}"
            raise SuperposeError(f"the program took more than {timeout:g} s", where=where, mend=mend) from error
        except BaseException:  # an interruption has to end the program too: it is in a session of its own
            _stop(process)
            raise
    if process.returncode:
        mend = f"mend the program{_shown(complaint)}"
        raise SuperposeError(f"the program ended with exit code {process.returncode}", where=where, mend=mend)
    if not told.strip():
        mend = f'print a JSON object such as {{"accuracy": 0.8}}{_shown(complaint)}'
        raise SuperposeError("the program printed nothing", where=where, mend=mend)
    return told


def _stop(process: subprocess.Popen) -> None:
    """End the program and what it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _shown(complaint: str) -> str:
    text = complaint.strip()
    if not text:
        return "; it wrote nothing on stderr"
    return f"; the end of its stderr:\n{'... ' if len(text) > MOST_SHOWN else ''}{text[-MOST_SHOWN:]}"


def _numbers(told: str, where: str) -> dict[str, float]:
    mend = 'print a JSON object of numbers, such as {"accuracy": 0.8}, as the last line'
    for text in (told.strip(), told.strip().splitlines()[-1]):
        try:
            found: Any = json.loads(text)
            break
        except (ValueError, RecursionError):
            continue
    else:
        last = told.strip().splitlines()[-1][:MOST_SHOWN]
        raise SuperposeError(f"the program's last line is no JSON: {last}", where=where, mend=mend)
    if not isinstance(found, dict) or not found:
        raise SuperposeError(f"the program printed {type(found).__name__}, no metrics", where=where, mend=mend)
    for name, value in found.items():
        if not _is_finite(value):
            shown = json.dumps(value)[:MOST_SHOWN]
            raise SuperposeError(f"{name} is {shown}, no finite number", where=where, mend=mend)
    return {name: float(value) for name, value in found.items()}


def _is_finite(value: object) -> bool:
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer that no float holds
        return False
