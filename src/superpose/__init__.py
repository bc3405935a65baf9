"""Merge fine-tuned neural networks.

    record = superpose.merge(recipe, output="out")
    merged = superpose.merge_tensors(base, tuned, method="ties", density=0.2)

Names load on first use, so that importing the package (and `superpose --help`) imports no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from superpose.errors import Problems, SuperposeError

if TYPE_CHECKING:
    from superpose.api import (
        compare,
        compute_statistics,
        evaluate,
        extract,
        inspect,
        list_methods,
        merge,
        merge_scaled,
        plan,
        rebuild,
        verify,
    )
    from superpose.in_memory import merge_tensors, merge_to_set
    from superpose.kinds import Kind
    from superpose.recipe import Recipe
    from superpose.records import RunRecord

__all__ = [
    "Kind",
    "Problems",
    "Recipe",
    "RunRecord",
    "SuperposeError",
    "compare",
    "compute_statistics",
    "evaluate",
    "extract",
    "inspect",
    "list_methods",
    "merge",
    "merge_scaled",
    "merge_tensors",
    "merge_to_set",
    "methods",
    "plan",
    "rebuild",
    "verify",
]

_HOMES = {
    "Kind": "superpose.kinds",
    "Recipe": "superpose.recipe",
    "RunRecord": "superpose.records",
    "compare": "superpose.api",
    "compute_statistics": "superpose.api",
    "evaluate": "superpose.api",
    "extract": "superpose.api",
    "inspect": "superpose.api",
    "list_methods": "superpose.api",
    "merge": "superpose.api",
    "merge_scaled": "superpose.api",
    "merge_tensors": "superpose.in_memory",
    "merge_to_set": "superpose.in_memory",
    "rebuild": "superpose.api",
    "plan": "superpose.api",
    "verify": "superpose.api",
}


def __getattr__(name: str) -> Any:
    if name == "methods":
        return import_module("superpose.methods")
    if name == "__version__":
        return import_module("importlib.metadata").version("superpose")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'superpose' has no attribute '{name}'")
