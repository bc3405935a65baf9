"""Backends: where work is done. Each is one module with a class `Backend`, a bounded and unordered `map`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from pkgutil import iter_modules
from typing import Any, Protocol

from superpose.errors import SuperposeError, nearest


class Backend(Protocol):
    """Applies a function to items, as many at a time as workers and memory allow."""

    workers: int

    def map(
        self, function: Callable[[Any], Any], items: Sequence[Any], memory: Sequence[int]
    ) -> Iterator[tuple[int, Any]]:
        """Yield (index, result) in the order in which results come.

        Args:
            function: safe to call from several workers at once.
            items: taken up in this order.
            memory: bytes each item needs; together they stay within the budget, but for an item that exceeds it alone.

        Returns:
            The pairs, lazily.
        """
        ...


def backend_names() -> list[str]:
    """Return the names of the backends there are."""
    return sorted(module.name for module in iter_modules(__path__))


def make_backend(name: str, workers: int | None, budget: int) -> Backend:
    """Return a backend by name.

    Args:
        name: such as "threads".
        workers: items at a time; None for one per core.
        budget: bytes in flight at most.

    Returns:
        The backend.

    Raises:
        SuperposeError: there is none of that name.
    """
    if name not in backend_names():
        mend = nearest(name, backend_names())
        raise SuperposeError(f"no backend is named '{name}'", where="--backend", mend=mend)
    return import_module(f"superpose.backends.{name}").Backend(workers, budget)
