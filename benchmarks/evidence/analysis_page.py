"""The analyses' part of the evidence page: a table or a figure for each, with the command that makes it anew."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

Content = Any
"""What an analysis found, as `analyses.py` writes it."""


def sections(name: str, analyses: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of a benchmark's analyses.

    Args:
        name: of the benchmark.
        analyses: by name, as `analyses.py` writes them.
    """
    for analysis, (title, lines) in SECTIONS.items():
        if analysis not in analyses:
            continue
        one = analyses[analysis]
        yield f"#### {title}\n"
        yield from lines(name, one["found"])
        made = one["made_by"]
        yield f"`{one['command']}`; superpose code {made['code']}, {made['at']} UTC, {one['machine']}.\n"


def table(head: Sequence[str], rows: Iterator[Sequence[str]] | Sequence[Sequence[str]]) -> Iterator[str]:
    """Yield the lines of a table: the first column is text, the others are numbers."""
    yield f"| {' | '.join(head)} |"
    yield f"|---|{'---:|' * (len(head) - 1)}"
    for row in rows:
        yield f"| {' | '.join(row)} |"
    yield ""


def interval(difference: Mapping[str, float]) -> str:
    """Return a difference with its 95% interval."""
    return f"{difference['value']:+.3f} ({difference['low']:+.3f} to {difference['high']:+.3f})"


def figure(name: str, analysis: str, about: str) -> str:
    """Return the line of a figure."""
    return f"![{about}](evidence/{name}-{analysis}.svg)\n"


def _matrices(name: str, found: Content) -> Iterator[str]:
    del name
    yield "Decomposing the fine-tuned matrices instead of their differences from the base (Figure 3a of the paper).\n"
    tasks = list(found[0]["accuracy"])
    yield from table(
        ["setting", *tasks, "mean"],
        [[one["name"], *(f"{one['accuracy'][task]:.3f}" for task in tasks), f"{one['mean']:.3f}"] for one in found],
    )


def _control(name: str, found: Content) -> Iterator[str]:
    del name
    yield (
        "The same trimmed task vectors at the same density and factor, once solved for (STF), once added up (its"
        " control, `trimmed_task_arithmetic`): all that differs is the linear system. Paired bootstrap over test"
        " examples.\n"
    )
    yield from table(
        ["at", "density", "factor", "STF", "control", "STF less control"],
        [[one["at"], f"{one['density']:g}", f"{one['scaling_factor']:g}", f"{one['stf']['mean']:.3f}",
          f"{one['control']['mean']:.3f}", interval(one["difference"])] for one in found],
    )  # fmt: skip
    tasks = list(found[0]["stf"]["accuracy"])
    yield "By task, STF less control:\n"
    yield from table(
        ["at", *tasks],
        [[one["at"], *(f"{one['stf']['accuracy'][task] - one['control']['accuracy'][task]:+.3f}" for task in tasks)]
         for one in found],
    )  # fmt: skip


def _variations(name: str, found: Content) -> Iterator[str]:
    del name
    yield "One change each to a setting of STF; the difference is to that setting, with a 95% interval.\n"
    yield from table(
        ["to", "change", "mean", "difference"],
        [[one["to"], _said(one["change"]) or "none", f"{one['mean']:.3f}",
          interval(one["difference"]) if one["change"] else ""] for one in found],
    )  # fmt: skip


def _removed_features(name: str, found: Content) -> Iterator[str]:
    yield f"Features left out of every task matrix, by count (Figures 5a, 5b); with all of them {found['none']:.3f}.\n"
    yield figure(name, "removed_features", "accuracy by share of removed features")
    shares = sorted({one["share"] for one in found["removed"]})
    at = {(one["end"], one["share"]): one["mean"] for one in found["removed"]}
    yield from table(
        ["removed", *(f"{share:.0%}" for share in shares)],
        [[said, *(f"{at[end, share]:.3f}" for share in shares)]
         for end, said in (("remove_smallest", "the weakest"), ("remove_largest", "the strongest"))],
    )  # fmt: skip


def _density_and_factor(name: str, found: Content) -> Iterator[str]:
    yield (
        "On validation data, 100 examples a task: to see a shape, not to rank (Figures 3c and 3d). Factors of STF and"
        " its control act on sums, those of TIES and PCB on elected values.\n"
    )
    yield figure(name, "density_and_factor", "accuracy by density and scaling factor")
    best: dict[str, Any] = {}
    for one in found:
        if one["mean"] > best.get(one["method"], {"mean": -1.0})["mean"]:
            best[one["method"]] = one
    yield from table(
        ["method", "best density", "best factor", "mean", "range over all settings"],
        [[method, f"{one['density']:g}", f"{one['scaling_factor']:g}", f"{one['mean']:.3f}",
          f"{min(means):.3f} to {max(means):.3f}"]
         for method, one in best.items() for means in [[o["mean"] for o in found if o["method"] == method]]],
    )  # fmt: skip


def by_count(found: Content, value: str) -> dict[str, dict[int, float]]:
    """Return a value of every method by number of tasks, averaged over the sets of tasks."""
    gathered: dict[str, dict[int, list[float]]] = {}
    for one in found:
        if one[value] is not None:
            gathered.setdefault(one["method"], {}).setdefault(one["tasks"], []).append(one[value])
    return {method: {count: statistics.mean(some) for count, some in counts.items()}
            for method, counts in gathered.items()}  # fmt: skip


def _number_of_tasks(name: str, found: Content) -> Iterator[str]:
    yield (
        "Accuracy as a share of the fine-tuned models' own, each method with the best of six factors for each set of"
        " tasks, chosen on 100 validation examples a task (`iso_share`: as it is), other options as for all tasks; mean"
        " of two sets of neighbouring tasks, but for the last number (Figures 3b and v1's 1b). The papers found"
        " STF's best factor to fall with the number of tasks.\n"
    )
    yield figure(name, "number_of_tasks", "normalised accuracy and best factor by number of tasks")
    shares, factors = by_count(found, "normalised"), by_count(found, "factor")
    counts = sorted(shares["stf"])
    rows = [[method, *(f"{at[count]:.3f}" for count in counts)] for method, at in shares.items()]
    rows += [["best factor of STF", *(f"{factors['stf'][count]:g}" for count in counts)]]
    yield from table(["tasks", *map(str, counts)], rows)


def _preservation(name: str, found: Content) -> Iterator[str]:
    yield (
        "How the tasks' features are answered by the merged matrices, averaged over matrices. *At factor 1*: the"
        " paper's metric (Appendix A), mean |⟨s u, M v - s u⟩|, times 1000; methods without a factor as merged."
        " *Relative*: mean |u·Mv / s - 1| of the matrices as merged, in which the faintest features count as much as"
        " the strongest; *answered*: the strength that is left of all features as merged, 1 for all of it.\n"
    )
    yield figure(name, "preservation", "preservation by layer, and accuracy against it")
    measures = ("at_factor_1", "relative", "answered")
    rows = []
    for method, one in sorted(found["methods"].items(), key=lambda pair: -pair[1]["mean"]):
        means = {measure: statistics.mean(layer[measure] for layer in one["layers"].values()) for measure in measures}
        rows.append([method, f"{1000 * means['at_factor_1']:.2f}", f"{means['relative']:.3f}",
                     f"{means['answered']:.3f}", f"{one['mean']:.3f}"])  # fmt: skip
    yield from table(["method", "at factor 1", "relative", "answered", "mean accuracy"], rows)
    said = ", ".join(f"{measure.replace('_', ' ')} {found['correlations'][measure]['correlation']:+.2f}"
                     for measure in measures)  # fmt: skip
    count = found["correlations"]["relative"]["methods"]
    yield f"Spearman's correlation with the mean accuracy over {count} methods: {said}.\n"


def _held_out(name: str, found: Content) -> Iterator[str]:
    del name
    yield (
        "Tasks that were not merged: each task left out of the merge in turn, and scored by a linear probe on the"
        " merged model's features (500 training examples, 500 test examples). Settings as chosen for all tasks, this"
        " one among them, so that they are not quite without it.\n"
    )
    tasks = list(found["pretrained"]["accuracy"])
    rows = []
    for method, one in found.items():
        mean = statistics.mean(one["accuracy"].values())
        less = interval(one["less pretrained"]) if method != "pretrained" else ""
        rows.append([method, *(f"{one['accuracy'][task]:.3f}" for task in tasks), f"{mean:.3f}", less])
    yield from table(["method", *tasks, "mean", "less pretrained"], rows)


def _times(name: str, found: Content) -> Iterator[str]:
    del name
    yield (
        "Seconds of one merge at published defaults, median of three, on all cores. Left out: `slerp`, which merges"
        " two, and methods that look at data.\n"
    )
    ordered = sorted(found.items(), key=lambda pair: pair[1])
    yield from table(["method", "s"], [[method, f"{seconds:.1f}"] for method, seconds in ordered])


def _said(change: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in change.items())


SECTIONS: Mapping[str, tuple[str, Callable[[str, Content], Iterator[str]]]] = {
    "control": ("STF against its control", _control),
    "matrices": ("Task matrices or fine-tuned matrices", _matrices),
    "number_of_tasks": ("Number of tasks", _number_of_tasks),
    "density_and_factor": ("Density and scaling factor", _density_and_factor),
    "removed_features": ("Weakest and strongest features", _removed_features),
    "variations": ("Ridge, density over the model, fewer features", _variations),
    "preservation": ("Are preserved features what counts?", _preservation),
    "held_out": ("Tasks held out of the merge", _held_out),
    "times": ("Time of a merge", _times),
}
"""Title and lines of each analysis, in the order of the page."""
