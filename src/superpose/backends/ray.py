"""Several machines, by Ray: items go to the nodes of a cluster as tasks, and those that a lost node had go to another.

Ray schedules, retries and notices that nodes are gone. Here is only what a merge needs beside: a budget of memory in
flight, errors that arrive as what they were, and that all nodes run the same code.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import secrets
import socket
import sysconfig
import traceback
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from functools import cache, lru_cache
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from superpose.allocator import keep_freed_memory
from superpose.backends.threads import available_cores
from superpose.errors import SuperposeError
from superpose.own_code import code_digest
from superpose.plug_ins import VARIABLE

RETRIES = 5
"""Nodes or workers that one item may lose before the merge stops."""
STEP = 256 << 20
"""Bytes in which memory is reserved; a worker takes about one beside its item, for the interpreter and torch."""
PATIENCE = 10
"""Seconds to wait for an answer from the address of a cluster, and between looks at its nodes."""
MANY = 1 << 20
"""Workers of a cluster that was not asked yet."""
SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # tasks that reserve no GPU may use one
}
"""Ray's own settings, unless the user has others."""
SETTINGS_TO_CONNECT = {"RAY_NUM_REDIS_GET_RETRIES": "1"}
"""The same where a cluster should run already: one try of 45 seconds, not 20, if its address does not answer."""


class Backend:
    """Tasks on a Ray cluster: the one at `address`, or one that is started on this machine and ended after.

    Args:
        workers: items at a time; None for one per CPU of the cluster.
        budget: bytes in flight at most, over all nodes.
        address: "auto" or host:port; None to start a cluster, or to use the one this process is connected to.

    Raises:
        SuperposeError: Ray is not installed, or the address is none.
    """

    in_process = False

    def __init__(self, workers: int | None, budget: int, address: str | None = None) -> None:
        self._ray = _import_ray(connects=address is not None)
        if address is not None and address != "auto":
            _host_and_port(address)
        self._asked, self._budget, self._address = workers, budget, address
        self.workers = workers or (available_cores() if address is None else MANY)
        self._ending = contextlib.ExitStack()
        self._connected = False
        self._running: dict[Any, int] = {}
        self._task_options: dict[str, Any] = {}
        self._facts: dict[str, Any] = {}

    def map(
        self, function: Callable[[Any], Any], items: Sequence[Any], memory: Sequence[int]
    ) -> Generator[tuple[int, Any], None, None]:
        """Yield (index, result) as results come; no more is begun once one has failed or the caller stops."""
        if not items:
            return
        ray = self._connect()
        # Once for all items, and as bytes: Ray would unpickle it, which may load plug-ins, before the code is compared.
        held = ray.put(pickle.dumps(function))
        most = self._memory_of_smallest_node()
        waiting = list(range(len(items)))
        running = self._running
        try:
            while waiting or running:
                used = sum(memory[index] for index in running.values())
                for index in list(waiting):
                    if len(running) == self.workers:
                        break
                    if not running or used + memory[index] <= self._budget:
                        # What no node has would wait for ever; what the smallest has fits any, also after a loss.
                        reserved = self._task.options(memory=min((memory[index] // STEP + 2) * STEP, most))
                        running[reserved.remote(_identity(), [held], pickle.dumps(items[index]))] = index
                        waiting.remove(index)
                        used += memory[index]
                done, _ = ray.wait(list(running), num_returns=1, timeout=PATIENCE)
                if not done and not self._nodes():
                    raise _no_cluster(str(self._address), "no node is left that takes tasks")
                for reference in done:
                    yield running.pop(reference), self._result(reference)
        finally:
            self._cancel()

    def facts(self) -> Mapping[str, Any]:
        """Return how many items there were at a time, and on what cluster."""
        return {"workers": self.workers, **self._facts}

    def close(self) -> None:
        """End the cluster if it was started here, else only the connection to it if that was made here."""
        self._cancel()  # once more: a caller that failed may have left `map` without an end
        self._ending.close()
        self._connected = False

    def _cancel(self) -> None:
        for reference in self._running:  # by force: they write into files that are soon someone else's
            self._ray.cancel(reference, force=True)
        self._running.clear()

    def _connect(self) -> ModuleType:
        ray = self._ray
        if self._connected:
            return ray
        quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
        if ray.is_initialized():  # the caller's own connection: left as it is
            self._task_options = {"runtime_env": {"env_vars": _variables()}}
        elif self._address is None:
            self._ending.enter_context(_private_environment())
            variables = {"env_vars": {**_variables(), **_import_path()}}
            self._ending.callback(ray.shutdown)
            ray.init("local", num_cpus=self.workers, include_dashboard=False, runtime_env=variables, **quiet)
        else:
            _check_reachable(self._address)
            self._ending.callback(ray.shutdown)
            try:
                ray.init(self._address, runtime_env={"env_vars": _variables()}, **quiet)
            except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
                raise _no_cluster(self._address, str(error)) from error
        self._connected = True
        nodes = self._nodes()
        self.workers = self._asked or max(1, int(sum(node["Resources"]["CPU"] for node in nodes)))
        self._task = ray.remote(num_cpus=1, max_retries=RETRIES, **self._task_options)(_errand())
        self._facts = {
            "ray": ray.__version__,
            "ray_cluster": ray.get_runtime_context().gcs_address,
            "ray_nodes": sorted(node["NodeManagerAddress"] for node in nodes),
        }
        return ray

    def _nodes(self) -> list[dict[str, Any]]:
        """Return the nodes that take tasks."""
        return [node for node in self._ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) >= 1]

    def _memory_of_smallest_node(self) -> int:
        return int(min((node["Resources"].get("memory", 0) for node in self._nodes()), default=0))

    def _result(self, reference: Any) -> Any:
        """Return what a task returned; raise what it raised."""
        try:
            outcome, value = self._ray.get(reference)
        except self._ray.exceptions.RayError as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            raise SuperposeError(
                f"Ray gave up on a tensor: {type(error).__name__}: {' '.join(lines)[:500]}",
                where="--backend ray",
                mend="look at the state of the cluster, and run the same command again: finished tensors are kept",
            ) from error
        if outcome == "other code":
            raise SuperposeError(
                f"a node of the cluster has other code: {value}, here {_identity()}",
                where=f"--ray-address {self._address}",
                mend="install the same superpose and the same torch on all nodes",
            )
        if outcome == "raised":
            error, there = value
            raise error from RuntimeError(there)
        return pickle.loads(value)  # noqa: S301 - from our own code on a node of our cluster


@cache
def _errand() -> Callable[..., tuple[str, Any]]:
    """Return the function that nodes run; nested, so that it travels as code: a node may not have this module."""

    def errand(identity: str, held: list[Any], item: bytes) -> tuple[str, Any]:
        import socket

        try:
            from superpose.backends import ray
        except ImportError as error:
            return "other code", f"{socket.gethostname()}: {error}"
        return ray.perform(identity, held, item)

    return errand


def perform(identity: str, held: list[Any], item: bytes) -> tuple[str, Any]:
    """Apply a function to an item, on a node.

    Args:
        identity: of the code that the function and the item are pickled by.
        held: a reference to the pickled function.
        item: the pickled item.

    Returns:
        "done" and the pickled result, "raised" and the exception with its traceback, or "other code" and which: as
        values, since Ray would wrap what is raised.
    """
    if identity != _identity():
        return "other code", f"{socket.gethostname()}: {_identity()}"
    torch.set_num_threads(1)
    keep_freed_memory()  # the worker is a process of ours
    try:
        result = _function(held[0])(pickle.loads(item))  # noqa: S301 - the driver's, through its own cluster
        return "done", pickle.dumps(result)  # as bytes: Ray hands out arrays that cannot be added to
    except Exception as error:  # raised again by the driver, whatever it is
        return "raised", _portable(error)


@lru_cache(maxsize=1)
def _function(reference: Any) -> Callable[[Any], Any]:
    """Return the function of a map; kept, since a survey's numbers can be large."""
    return pickle.loads(_import_ray().get(reference))  # noqa: S301


def _portable(error: Exception) -> tuple[Exception, str]:
    """Return an exception that can be pickled, and where it was raised."""
    there = f"on {socket.gethostname()}:\n{''.join(traceback.format_exception(error))}"
    try:
        return pickle.loads(pickle.dumps(error)), there  # noqa: S301
    except Exception:  # anything can go wrong in a class of anybody's
        return RuntimeError(f"{type(error).__name__}: {error}"), there


@cache
def _identity() -> str:
    """Return what all nodes must agree on for the same bytes."""
    return f"superpose {version('superpose')} (code {code_digest()}) with torch {torch.__version__}"


def _import_ray(*, connects: bool = False) -> ModuleType:
    for name, value in {**SETTINGS, **(SETTINGS_TO_CONNECT if connects else {})}.items():  # read as Ray is imported
        os.environ.setdefault(name, value)
    try:
        import ray
    except ImportError as error:
        raise SuperposeError(
            f"the backend ray needs Ray, which cannot be imported: {error}",
            where="--backend ray",
            mend="pip install 'superpose[ray]'",
        ) from error
    return ray


def _variables() -> dict[str, str]:
    """Return the environment that nodes need: where plug-ins are, from any working directory."""
    named = filter(None, os.environ.get(VARIABLE, "").split(os.pathsep))
    places = [str(Path(place).expanduser().resolve()) for place in named]
    return {VARIABLE: os.pathsep.join(places)} if places else {}


def _import_path() -> dict[str, str]:
    """Return the environment by which another interpreter here finds this superpose, also where it is not installed."""
    root = str(Path(__file__).parents[2])
    if root == sysconfig.get_path("purelib"):  # found anyway, and before the standard library it could shadow that
        return {}
    return {"PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))}


@contextlib.contextmanager
def _private_environment() -> Iterator[None]:
    """Let a cluster that is started here take orders from this process alone, which knows its token.

    By itself Ray writes a token to the user's home, after which `ray start` asks for tokens too.
    """
    if "RAY_AUTH_MODE" in os.environ:
        yield
        return
    given = os.environ.get("RAY_AUTH_TOKEN")
    os.environ["RAY_AUTH_TOKEN"] = given or _token()
    try:
        yield
    finally:
        os.environ.pop("RAY_AUTH_MODE", None)  # set by Ray
        if given is None:
            del os.environ["RAY_AUTH_TOKEN"]


@cache
def _token() -> str:
    return secrets.token_hex(32)  # one for all clusters: Ray reads it once in a process


def _host_and_port(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or "//" in address:
        mend = "give auto or host:port, as `ray start --head` shows it, on a machine of the cluster"
        raise SuperposeError("this is no address of a Ray cluster", where=f"--ray-address {address}", mend=mend)
    return host.strip("[]"), int(port)


def _check_reachable(address: str) -> None:
    """Ask whether anything answers: Ray itself tries for minutes, and then ends the process."""
    if address == "auto":
        return
    try:
        with socket.create_connection(_host_and_port(address), timeout=PATIENCE):
            pass
    except OSError as error:
        raise _no_cluster(address, str(error)) from error


def _no_cluster(address: str, why: str) -> SuperposeError:
    lines = " ".join(why.split())
    return SuperposeError(
        f"no Ray cluster can be reached: {lines[:500]}",
        where=f"--ray-address {address}",
        mend="start one with `ray start --head`, or leave the address out to start one for this merge alone",
    )
