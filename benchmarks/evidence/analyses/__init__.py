"""The papers' figures, one module each: what is measured, how the page says it, and what is drawn.

A module has `TITLE`; `find(bench, chosen)`, which measures, as `analyse.py` keeps it; `lines(name, found)`, the page's;
where there is a figure, `draw(found, figure)`; and `numbers(found)`, where the summary names some. One more file here,
named below, is one more analysis.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType

from analyses import (
    control,
    density_and_factor,
    held_out,
    matrices,
    number_of_tasks,
    preservation,
    removed_features,
    times,
    variations,
)

ANALYSES: Mapping[str, ModuleType] = {
    module.__name__.rpartition(".")[2]: module
    for module in (
        control,
        matrices,
        number_of_tasks,
        density_and_factor,
        removed_features,
        variations,
        preservation,
        held_out,
        times,
    )
}
"""By name, in the order of the page."""
NOT_FOR: Mapping[str, tuple[str, ...]] = {"lora": ("removed_features", "preservation", "held_out")}
"""Analyses that a benchmark has nothing for: adapters have no heads, their matrices are factors, and their features are
eight, fewer than the smallest share that is left out of a matrix's."""
