"""Backends: where work is done. Each is one module with a class `Backend`, a bounded and unordered `map`."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from importlib import import_module
from pkgutil import iter_modules
from typing import Any, Protocol

from superpose.errors import SuperposeError, nearest


class Backend(Protocol):
    """Applies a function to items, as many at a time as workers and memory allow."""

    @property
    def workers(self) -> int:
        """Items at a time; many for a cluster that was not asked yet."""
        ...

    @property
    def in_process(self) -> bool:
        """Whether functions run in this process: if not, they and their items are pickled."""
        ...

    def map(
        self, function: Callable[[Any], Any], items: Sequence[Any], memory: Sequence[int]
    ) -> Generator[tuple[int, Any], None, None]:
        """Yield (index, result) in the order in which results come.

        Args:
            function: safe to call from several workers at once.
            items: taken up in this order.
            memory: bytes each item needs; together they stay within the budget, but for an item that exceeds it alone.

        Returns:
            The pairs, lazily. Who may stop before the last closes it: that begins no more, and waits for those begun.
        """
        ...

    def facts(self) -> Mapping[str, Any]:
        """Return what a record says of where the work was done."""
        ...

    def close(self) -> None:
        """Let go of what was started or opened for the work."""
        ...


def backend_names() -> list[str]:
    """Return the names of the backends there are."""
    return sorted(module.name for module in iter_modules(__path__))


def make_backend(name: str, workers: int | None, budget: int, address: str | None = None) -> Backend:
    """Return a backend by name; it starts nothing before its first item.

    Args:
        name: such as "threads".
        workers: items at a time; None for one per core.
        budget: bytes in flight at most.
        address: of a cluster, for the backend "ray".

    Returns:
        The backend.

    Raises:
        SuperposeError: there is none of that name, its package is not installed, or it does not take an address.
    """
    if name not in backend_names():
        mend = nearest(name, backend_names())
        raise SuperposeError(f"no backend is named '{name}'", where="--backend", mend=mend)
    backend = import_module(f"superpose.backends.{name}").Backend
    if name == "ray":
        return backend(workers, budget, address)
    if address is not None:
        mend = "add --backend ray, or leave the address out"
        raise SuperposeError(f"the backend {name} takes no address", where=f"--ray-address {address}", mend=mend)
    return backend(workers, budget)
