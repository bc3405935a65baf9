"""The papers' figures on one benchmark: what STF's parts do, how it reacts to its settings, what its promise is worth.

    python benchmarks/evidence/analyses.py text --out FOLDER [--only NAME ...] [--workers 2]

Run `run.py` first, in the same FOLDER: chosen hyperparameters are read from docs/evidence/NAME.json. Interrupted, the
same command goes on; each analysis goes into docs/evidence/NAME-analyses.json as it ends. Fine-tunes of the first seed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))  # measuring.py is one folder up

import numpy as np
import torch
from bootstrap import difference
from grid import LEFT_OUT, SPECTRAL, Setting
from jobs import NAMES, Bench, Job, suite_of, working_on
from measuring import machine
from probe import probed
from rows import Evaluated, Row, made_by, scratch_of
from safetensors.torch import load_file
from suite import Answers

import superpose
from superpose.checkpoints.lora import Adapter
from superpose.demo.folders import scratch_folder
from superpose.maths.matrices import acts_as_matrix
from superpose.maths.measures import feature_preservation
from superpose.maths.svd import Features, thin_svd
from superpose.own_code import code_digest
from superpose.registry import find_method

RESULTS = Path(__file__).parent.parent.parent / "docs" / "evidence"
SEED = 0
SHARES = (0.05, 0.2, 0.4, 0.6, 0.8, 0.9, 0.95)
"""Of the features, that are removed."""
DENSITIES = (0.05, 0.1, 0.2, 0.5, 1.0)
SUMS = (0.8, 1.6, 2.4, 4.0, 6.4, 9.6)
"""Times 1 / T: factors on sums of T task vectors, of STF and its control."""
MEAN_FACTORS = (0.5, 0.8, 1.2, 1.6, 2.0, 2.5)
"""On elected values: TIES and PCB; and on flat spectra."""
PROBED = 500
"""Examples that a probe learns from, and as many that it is asked."""
Chosen = Mapping[str, Setting]


def described(row: Row) -> dict[str, Any]:
    """Return what is published of a row."""
    return {"name": row.name, "mean": row.mean, "accuracy": row.accuracy}


def matrices(bench: Bench, chosen: Chosen) -> Any:
    """Task matrices against fine-tuned ones (Figure 3a of the paper)."""
    settings = [Setting("stf"), chosen["stf"], Setting("stf", {"matrices": "finetuned"})]
    return [described(row) for row in bench.rows([Job(one, SEED, "test") for one in settings])]


def number_of_tasks(bench: Bench, chosen: Chosen) -> Any:
    """Two tasks to all: the best factor of each number, and what is left of each task (Figures 3b and v1's 1b).

    Tasks are runs of neighbours in the benchmark's order, from its beginning and from its middle. Factors are chosen on
    the few validation examples, numbers are of the test part; other options are those chosen for all tasks.
    """
    names, found = list(bench.suite.tasks), []
    counts = [count for count in (2, 3, 4, 6, 8) if count < len(names)] + [len(names)]
    swept: dict[str, Callable[[float], Setting]] = {
        name: lambda factor, name=name: Setting(name, {**_fixed(chosen[name]), "scaling_factor": factor})
        for name in ("stf", "task_arithmetic", "ties", *(_kernels(chosen, name) for name in ("tsv", "iso_c")))
    }
    cells = []
    for count in counts:
        for begin in (0, len(names) // 2) if count < len(names) else (0,):
            merged = tuple((names + names)[begin : begin + count])
            for method, setting in swept.items():
                is_sum = method in ("stf", "task_arithmetic")
                factors = [round(one / count, 4) for one in SUMS] if is_sum else MEAN_FACTORS
                cells.append((count, merged, method, [setting(factor) for factor in factors]))
            cells.append((count, merged, "iso_share", [Setting("iso_share")]))
    tried = [Job(one, SEED, "few", merged, merged) for _, merged, _, some in cells if len(some) > 1 for one in some]
    bench.rows(tried)
    best = []
    for _, merged, _, some in cells:
        means = (
            [bench.rows([Job(one, SEED, "few", merged, merged)])[0].mean for one in some] if len(some) > 1 else [0.0]
        )
        best.append((some[means.index(max(means))], dict(zip((str(one.options.get("scaling_factor")) for one in some),
                                                             means, strict=True))))  # fmt: skip
    alone = bench.rows([Job("fine-tuned", SEED, "test")])[0].accuracy
    rows = bench.rows([Job(one, SEED, "test", cell[1], cell[1]) for cell, (one, _) in zip(cells, best, strict=True)])
    for (count, merged, method, _), (setting, means), row in zip(cells, best, rows, strict=True):
        share = statistics.mean(row.accuracy[task] / alone[task] for task in merged)
        found.append({"tasks": count, "merged": merged, "method": method, "normalised": share, "mean": row.mean,
                      "factor": setting.options.get("scaling_factor"), "tried": means})  # fmt: skip
    return found


def density_and_factor(bench: Bench, chosen: Chosen) -> Any:
    """How STF, its control, TIES and PCB react to density and scaling factor (Figures 3c, 3d), on validation data."""
    del chosen
    sums = [round(one / len(bench.suite.tasks), 4) for one in SUMS]
    swept: dict[str, Sequence[float]] = {
        "stf": sums, "trimmed_task_arithmetic": sums, "ties": MEAN_FACTORS, "pcb": MEAN_FACTORS
    }  # fmt: skip
    settings = [
        Setting(method, {"density": density, "scaling_factor": factor})
        for method, factors in swept.items()
        for density in DENSITIES
        for factor in factors
    ]
    rows = bench.rows([Job(one, SEED, "few") for one in settings])
    return [{"method": one.method, **one.options, "mean": row.mean} for one, row in zip(settings, rows, strict=True)]


def control(bench: Bench, chosen: Chosen) -> Any:
    """STF against the sum of the same trimmed task vectors, at the same density and factor: what solving is worth."""
    settings = {
        "STF's published defaults": {"density": 0.2, "scaling_factor": 0.8},
        "STF's chosen": dict(chosen["stf"].options),
        "the control's chosen": dict(chosen["trimmed_task_arithmetic"].options),
    }
    found = []
    for said, options in settings.items():
        jobs = [Job(Setting(name, options), SEED, "test") for name in ("stf", "trimmed_task_arithmetic")]
        solved, summed = bench.rows(jobs)
        found.append({"at": said, **options, "stf": described(solved), "control": described(summed),
                      "difference": asdict(difference([solved.answers], [summed.answers]))})  # fmt: skip
    return found


def removed_features(bench: Bench, chosen: Chosen) -> Any:
    """The weakest or the strongest features of every task left out (Figures 5a and 5b)."""
    whole = _fixed(chosen["stf"]) | {"scaling_factor": chosen["stf"].options["scaling_factor"]}
    settings = [(end, share, Setting("stf", {**whole, end: share})) for end in ("remove_smallest", "remove_largest")
                for share in SHARES]  # fmt: skip
    jobs = [Job(chosen["stf"], SEED, "test")] + [Job(one, SEED, "test") for _, _, one in settings]
    none, *rows = bench.rows(jobs)
    return {"none": none.mean, "removed": [
        {"end": end, "share": share, "mean": row.mean} for (end, share, _), row in zip(settings, rows, strict=True)
    ]}  # fmt: skip


def variations(bench: Bench, chosen: Chosen) -> Any:
    """A ridge, fewer features, densities counted over the whole model: one change each to a setting of STF.

    The first two to its chosen setting, the last to its published defaults, where something is trimmed.
    """
    mine, found = dict(chosen["stf"].options), []
    changes: list[dict[str, Any]] = [{}]
    changes += [{"ridge": value} for value in (1e-3, 1e-2, 1e-1, 1.0)]
    changes += [{"feature_share": value} for value in (0.5, 0.2, 0.1, 0.05)]
    for base, some in ((mine, changes), ({}, [{}, {"density_scope": "model"}])):
        rows = bench.rows([Job(Setting("stf", {**base, **change}), SEED, "test") for change in some])
        found += [
            {"to": "the chosen" if base else "the defaults", "change": change, **described(row),
             "difference": asdict(difference([row.answers], [rows[0].answers]))}
            for change, row in zip(some, rows, strict=True)
        ]  # fmt: skip
    return found


def preservation(bench: Bench, chosen: Chosen) -> Any:
    """How well every method answers the tasks' features, layer by layer (Figures 1a and 4), and what that says of it.

    At factor 1 as in the paper's appendix (methods without a factor: as merged), and as merged with the chosen setting.
    Spearman's correlation with the mean accuracy is over methods that make one model from weights alone, and that do
    not all do the same: where there is a row that decomposes kernels, it stands for its method.
    """
    settings = {
        name: one
        for name, one in chosen.items()
        if find_method(one.method).beside is None and not one.data and not one.statistics
        and (name not in SPECTRAL or _kernels(chosen, name) == name)
    }  # fmt: skip
    found = bench.each(_preserved, [(bench.name, bench.out, one) for one in settings.values()])
    rows = bench.rows([Job(one, SEED, "test") for one in settings.values()])
    by_method = {
        name: {"setting": one.text, "mean": row.mean, "layers": layers}
        for (name, one), row, layers in zip(settings.items(), rows, found, strict=True)
    }
    return {"methods": by_method, "correlations": {
        measure: rank_correlation([
            (statistics.mean(layer[measure] for layer in one["layers"].values()), one["mean"])
            for one in by_method.values()
        ])
        for measure in ("at_factor_1", "relative", "answered")
    }}  # fmt: skip


def held_out(bench: Bench, chosen: Chosen) -> Any:
    """Tasks that were not merged: a linear probe on merges of all the others, each task left out in turn."""
    names = ("average", "task_arithmetic", "ties", "pcb", "stf", "iso_share",
             *(_kernels(chosen, name) for name in ("tsv", "iso_c")))  # fmt: skip
    settings: dict[str, Setting | str] = {"pretrained": "pretrained", **{name: chosen[name] for name in names}}
    asked = [(name, task) for name in settings for task in (*bench.suite.tasks, *bench.suite.held_out)]
    found = bench.each(_probe, [(bench.name, bench.out, settings[name], task) for name, task in asked])
    by_method: dict[str, dict[str, str]] = {}
    for (name, task), answers in zip(asked, found, strict=True):
        by_method.setdefault(name, {})[task] = answers
    return {
        name: {
            "accuracy": {task: Answers.unpacked(text).accuracy for task, text in answers.items()},
            "less pretrained": asdict(difference([answers], [by_method["pretrained"]])),
        }
        for name, answers in by_method.items()
    }


def times(bench: Bench, chosen: Chosen) -> Any:
    """Seconds of one merge at published defaults, on all cores; the median of three. Run it with nothing beside it.

    Left out are methods that look at data: what they look at is computed before.
    """
    del chosen
    models = [{"path": str(path)} for path in bench.suite.tuned(SEED)]
    found = {}
    for method in superpose.list_methods():
        if method.name in LEFT_OUT or method.statistics or (method.learns and method.learns(method.options())):
            continue
        recipe = {"base": str(bench.suite.base), "models": models, "method": method.name}
        taken = []
        for _ in range(3):
            with scratch_folder(scratch_of(bench.name, bench.out)) as scratch:
                started = time.perf_counter()
                superpose.merge(recipe, scratch / "merged")
                taken.append(time.perf_counter() - started)
        found[method.name] = statistics.median(taken)
    return found


ANALYSES: Mapping[str, Callable[[Bench, Chosen], Any]] = {
    "matrices": matrices,
    "control": control,
    "variations": variations,
    "removed_features": removed_features,
    "density_and_factor": density_and_factor,
    "number_of_tasks": number_of_tasks,
    "preservation": preservation,
    "held_out": held_out,
    "times": times,
}
"""By name; times last, when nothing else runs."""
NOT_FOR = {"lora": ("preservation", "held_out")}
"""Analyses that a benchmark has nothing for: merged adapters have no head, and their matrices are the factors'."""


def _fixed(setting: Setting) -> dict[str, Any]:
    return {name: value for name, value in setting.options.items() if name != "scaling_factor"}


def _kernels(chosen: Chosen, name: str) -> str:
    """Return the row in which a method decomposes kernels, where there is one."""
    assert name in SPECTRAL, "others have no such row"
    wide = f"{name}, kernels as matrices"
    return wide if wide in chosen else name


def rank_correlation(pairs: Sequence[tuple[float, float]]) -> dict[str, float]:
    """Return Spearman's correlation: that of ranks, those of equal values averaged."""
    ranks = []
    for values in zip(*pairs, strict=True):
        _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
        ranks.append((np.cumsum(counts) - (counts - 1) / 2)[places])
    return {"correlation": float(np.corrcoef(ranks)[0, 1]), "methods": len(pairs)}


def _kept(folder: Path, what: str, make: Callable[[], Any]) -> Any:
    """Return what this code found under this description, found now if it is not there."""
    file = folder / f"{hashlib.sha256(f'{code_digest()} {what}'.encode()).hexdigest()[:16]}.json"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".partial")
        partial.write_text(json.dumps({"what": what, "found": make()}), encoding="utf-8")
        partial.replace(file)
    return json.loads(file.read_text(encoding="utf-8"))["found"]


def _preserved(name: str, out: Path, setting: Setting) -> dict[str, Any]:
    """Return by matrix how well a merge keeps features, at factor 1 and as it is."""
    suite = suite_of(name, out)

    def measured() -> dict[str, Any]:
        with scratch_folder(scratch_of(name, out)) as scratch:
            models = [
                {"path": str(path), "name": task, **suite.data(setting, task, SEED)}
                for task, path in zip(suite.tasks, suite.tuned(SEED), strict=True)
            ]
            recipe = {"base": str(suite.base), "models": models, "method": setting.method,
                      "options": dict(setting.options), "rules": list(suite.rules)}  # fmt: skip
            record = superpose.merge(recipe, scratch / "merged", workers=1, measure=True)
            merged = load_file(scratch / "merged" / "model.safetensors")
        base, layers = load_file(suite.base / "model.safetensors"), {}
        features = _features_of_tasks(name, out)
        for tensor in record.tensors:
            if tensor.name not in features or "untrimmed" not in tensor.measures:
                continue
            update = (merged[tensor.name] - base[tensor.name]).flatten(1)
            found = feature_preservation(update, features[tensor.name])
            layers[tensor.name] = {
                "at_factor_1": tensor.measures["untrimmed"]["mean"], "relative": found.relative,
                "answered": share_answered(update, features[tensor.name]),
            }  # fmt: skip
        return layers

    return _kept(out / "rows" / f"{name}-preservation", f"measured {_key(name, out, setting)}", measured)


def share_answered(update: torch.Tensor, tasks: Sequence[Features]) -> float:
    """Return sum s (u . M v) / sum s^2 over all features: the strength that is left, 1 if all of it is."""
    answered = sum(float((task.s * ((task.u.T @ update) * task.vh).sum(dim=1)).sum()) for task in tasks)
    return answered / sum(float(task.s.square().sum()) for task in tasks)


def _key(name: str, out: Path, setting: Setting | str) -> str:
    return Evaluated(suite_of(name, out), out / "rows").mark(setting, SEED, "")


@cache
def _features_of_tasks(name: str, out: Path) -> dict[str, list[Features]]:
    suite = suite_of(name, out)
    base = load_file(suite.base / "model.safetensors")
    inspected = superpose.inspect(suite.base)
    assert not isinstance(inspected, Adapter), "a base is no adapter"
    kinds = {name: kind for name, (kind, _) in inspected.kinds.items() if acts_as_matrix(kind, base[name].shape)}
    found: dict[str, list[Features]] = {name: [] for name in kinds}
    for path in suite.tuned(SEED):
        tuned = load_file(path / "model.safetensors")
        for tensor, tasks in found.items():
            tasks.append(thin_svd((tuned[tensor] - base[tensor]).flatten(1)))
    return found


def _probe(name: str, out: Path, setting: Setting | str, task: str) -> str:
    """Return what a probe answers on a task, on a merge of all tasks but it; packed."""
    suite = suite_of(name, out)

    def answers() -> str:
        if isinstance(setting, str):
            return _answers(name, out, suite.base, task)
        with scratch_folder(scratch_of(name, out)) as scratch:
            models = [
                {"path": str(path), "name": other}
                for other, path in zip(suite.tasks, suite.tuned(SEED), strict=True)
                if other != task
            ]
            recipe = {"base": str(suite.base), "models": models, "method": setting.method,
                      "options": dict(setting.options), "rules": list(suite.rules)}  # fmt: skip
            superpose.merge(recipe, scratch / "merged", workers=1)
            return _answers(name, out, scratch / "merged", task)

    return _kept(out / "rows" / f"{name}-probes", f"{PROBED} of {task} {_key(name, out, setting)}", answers)


def _answers(name: str, out: Path, model: Path, task: str) -> str:
    suite = suite_of(name, out)
    train, test = (suite.features(model, task, part, PROBED) for part in ("train", "test"))
    return probed(train, test).packed()


def main() -> None:
    """Read the command line and run analyses."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("benchmark", choices=NAMES)
    parser.add_argument("--out", type=Path, required=True, help="folder of run.py")
    parser.add_argument("--only", nargs="+", choices=ANALYSES, default=list(ANALYSES), help="some analyses")
    parser.add_argument("--workers", type=int, default=2, help="processes, of one thread each")
    asked = parser.parse_args()
    results = RESULTS / f"{asked.benchmark}.json"
    if not results.exists():
        sys.exit(f"{results} is not there: run benchmarks/evidence/run.py {asked.benchmark} first")
    content = json.loads(results.read_text(encoding="utf-8"))
    chosen = {one["name"]: Setting(**(one["chosen"] or one["default"])[0]["setting"]) for one in content["methods"]}
    file = RESULTS / f"{asked.benchmark}-analyses.json"
    found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    with working_on(asked.benchmark, asked.out.absolute(), asked.workers) as bench:
        bench.finetune([SEED])
        for name in [one for one in asked.only if one not in NOT_FOR.get(asked.benchmark, ())]:
            started = time.time()
            result = ANALYSES[name](bench, chosen)
            found[name] = {
                "found": result, "machine": machine(), "made_by": made_by(),
                "minutes_of_this_call": round((time.time() - started) / 60, 1),
                "command": f"python benchmarks/evidence/analyses.py {asked.benchmark} --out FOLDER --only {name}",
            }  # fmt: skip
            file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            print(f"{file}: {name}", flush=True)


if __name__ == "__main__":
    main()
