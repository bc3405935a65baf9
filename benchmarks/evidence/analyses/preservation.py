"""How well every method answers the tasks' features, layer by layer (Figures 1a and 4), and what that says of it."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from grid import SPECTRAL, Setting
from jobs import Bench, Job, suite_of
from rows import recipe_of, scratch_of
from safetensors.torch import load_file

import superpose
from analyses.common import SEED, Chosen, Content, figure, kept, table, with_kernels
from superpose.checkpoints.lora import Adapter
from superpose.demo.folders import scratch_folder
from superpose.maths.matrices import acts_as_matrix
from superpose.maths.measures import feature_preservation
from superpose.maths.svd import Features, thin_svd
from superpose.registry import find_method

TITLE = "Are preserved features what counts?"
MEASURES = ("at_factor_1", "of_trimmed", "relative", "answered")
SHOWN = ("stf", "trimmed_task_arithmetic", "task_arithmetic", "ties", "pcb", "tsv", "iso_c", "iso_share")
"""Methods of which every layer is drawn; all are in the scatter beside it."""


def find(bench: Bench, chosen: Chosen) -> Content:
    """Measure merges by every method's chosen setting, and correlate the measures with the mean accuracy.

    Methods are those that make one model from weights alone and that do not all do the same: where there is a row that
    decomposes kernels, it stands for its method.
    """
    settings = {name: one for name, one in chosen.items() if _is_measured(name, one, chosen)}
    found = bench.each(_measured, [(bench.name, bench.out, one) for one in settings.values()])
    rows = bench.rows([Job(one, SEED, "test") for one in settings.values()])
    methods = {
        name: {"setting": one.text, "mean": row.mean, "layers": layers}
        for (name, one), row, layers in zip(settings.items(), rows, found, strict=True)
    }
    means = {measure: [(mean_of(one["layers"], measure), one["mean"]) for one in methods.values()]
             for measure in MEASURES}  # fmt: skip
    return {"methods": methods, "correlations": {measure: rank_correlation(pairs) for measure, pairs in means.items()}}


def _is_measured(name: str, setting: Setting, chosen: Chosen) -> bool:
    if find_method(setting.method).beside is not None or setting.data or setting.statistics:
        return False
    return name not in SPECTRAL or with_kernels(chosen, name) == name


def mean_of(layers: Mapping[str, Mapping[str, float]], measure: str) -> float:
    """Return a measure's mean over matrices."""
    return statistics.mean(layer[measure] for layer in layers.values())


def rank_correlation(pairs: Sequence[tuple[float, float]]) -> dict[str, float]:
    """Return Spearman's correlation: that of ranks, those of equal values averaged."""
    ranks = []
    for values in zip(*pairs, strict=True):
        _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
        ranks.append((np.cumsum(counts) - (counts - 1) / 2)[places])
    return {"correlation": float(np.corrcoef(ranks)[0, 1]), "methods": len(pairs)}


def share_answered(update: torch.Tensor, tasks: Sequence[Features]) -> float:
    """Return sum s (u . M v) / sum s^2 over all features: the strength that is left, 1 if all of it is."""
    answered = sum(float((task.s * ((task.u.T @ update) * task.vh).sum(dim=1)).sum()) for task in tasks)
    return answered / sum(float(task.s.square().sum()) for task in tasks)


def _measured(name: str, out: Path, setting: Setting) -> dict[str, Any]:
    """Return by matrix how well a merge keeps features, at factor 1 and as it is."""
    suite = suite_of(name, out)

    def measure() -> dict[str, Any]:
        with scratch_folder(scratch_of(name, out)) as scratch:
            recipe = recipe_of(suite, setting, SEED, suite.tasks)
            record = superpose.merge(recipe, scratch / "merged", workers=1, measure=True)
            merged = load_file(scratch / "merged" / "model.safetensors")
        base, features, layers = load_file(suite.base / "model.safetensors"), _features_of_tasks(name, out), {}
        for tensor in record.tensors:
            if tensor.name not in features or "untrimmed" not in tensor.measures:
                continue
            update = (merged[tensor.name] - base[tensor.name]).flatten(1)
            layers[tensor.name] = {
                "at_factor_1": tensor.measures["untrimmed"]["mean"],
                "of_trimmed": tensor.measures.get("trimmed", tensor.measures["untrimmed"])["mean"],
                "relative": feature_preservation(update, features[tensor.name]).relative,
                "answered": share_answered(update, features[tensor.name]),
            }
        return layers

    return kept(name, out, "preservation, of trimmed features too", setting, measure)


@cache
def _features_of_tasks(name: str, out: Path) -> dict[str, list[Features]]:
    suite = suite_of(name, out)
    base = load_file(suite.base / "model.safetensors")
    inspected = superpose.inspect(suite.base)
    assert not isinstance(inspected, Adapter), "a base is no adapter"
    kinds = {tensor: kind for tensor, (kind, _) in inspected.kinds.items() if acts_as_matrix(kind, base[tensor].shape)}
    found: dict[str, list[Features]] = {tensor: [] for tensor in kinds}
    for path in suite.tuned(SEED):
        tuned = load_file(path / "model.safetensors")
        for tensor, tasks in found.items():
            features = thin_svd((tuned[tensor] - base[tensor]).flatten(1))
            if features.count:
                tasks.append(features)
    return {tensor: tasks for tensor, tasks in found.items() if tasks}


def numbers(found: Content) -> dict[str, str]:
    """Return what the summary can name: the correlations."""
    return {measure: f"{one['correlation']:+.2f}" for measure, one in found["correlations"].items()}


def lines(name: str, found: Content) -> Iterator[str]:
    """Yield the lines of the page."""
    yield (
        "How the tasks' features are answered by the merged matrices, averaged over matrices. *At factor 1*: the"
        " paper's metric (Appendix A), mean |⟨s u, M v - s u⟩|, times 1000, of the features of whole task matrices; *of"
        " trimmed*: of those that a method which trims has left; methods without a factor as merged."
        " *Relative*: mean |u·Mv / s - 1| of the matrices as merged, in which the faintest features count as much as"
        " the strongest; *answered*: the strength that is left of all features as merged, 1 for all of it.\n"
    )
    yield figure(name, "preservation", "preservation by layer, and accuracy against it")
    rows = []
    for method, one in sorted(found["methods"].items(), key=lambda pair: -pair[1]["mean"]):
        whole, trimmed, relative, answered = (mean_of(one["layers"], measure) for measure in MEASURES)
        metric = [f"{1000 * whole:.2f}", f"{1000 * trimmed:.2f}"]
        rows.append([method, *metric, f"{relative:.3f}", f"{answered:.3f}", f"{one['mean']:.3f}"])
    yield from table(["method", "at factor 1", "of trimmed", "relative", "answered", "mean accuracy"], rows)
    said = ", ".join(f"{measure.replace('_', ' ')} {found['correlations'][measure]['correlation']:+.2f}"
                     for measure in MEASURES)  # fmt: skip
    count = found["correlations"]["relative"]["methods"]
    yield f"Spearman's correlation with the mean accuracy over {count} methods: {said}.\n"


def draw(found: Content, figure: Any) -> None:
    """Draw the paper's metric by layer, and accuracy against the strength that is answered."""
    from plots import FAINT, LINE

    left, right = figure.subplots(1, 2, width_ratios=[2, 1])
    figure.set_size_inches(10, 3.6)
    for method, one in found["methods"].items():
        layers, short = list(one["layers"].values()), method.partition(",")[0]
        if short in SHOWN:
            thick = 1.8 if short in ("stf", "iso_share") else 0.9
            left.plot([1000 * layer["at_factor_1"] for layer in layers], label=short, linewidth=thick)
        answered = mean_of(one["layers"], "answered")
        right.plot([answered], [one["mean"]], "o", color=LINE if short in SHOWN else FAINT, markersize=4)
        right.annotate(short, (answered, one["mean"]), fontsize=5)
    left.set_xlabel("matrix, in the order of the record")
    left.set_ylabel("mean |⟨s u, M v - s u⟩| x 1000, factor 1")
    left.set_yscale("log")
    left.legend(frameon=False, fontsize=6)
    right.set_xlabel("strength of features answered, as merged")
    right.set_ylabel("mean accuracy")
