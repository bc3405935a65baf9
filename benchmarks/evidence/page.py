"""docs/evidence.md and its figures out of the results in docs/evidence; the summary was written by hand.

    python benchmarks/evidence/page.py [--check]        run.py and analyse.py write it too

Numbers come from the results alone; what they mean is in docs/evidence/summary.md, whose {names} are numbers too.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from analyses import ANALYSES
from bootstrap import DRAWS, Difference, difference
from suite import Answers

DOCS = Path(__file__).parent.parent.parent / "docs"
RESULTS = DOCS / "evidence"
REFERENCE = "stf"
"""The method that every other is compared with."""
UNTUNED = "iso_share"
"""That every other is compared with too, at its defaults whatever the others chose."""
ABOUT = {
    "text": (
        "Text, full fine-tuning",
        "MiniLM (6 layers, 22.7M weights), all weights fine-tuned with a linear head on eight classification tasks;"
        " the encoders are merged, each task keeps its head. `reviews` and `subjectivity` are of the same reviews, and"
        " a part of `sources` too; what one task is asked is in no other's training data. Methods that look at data see"
        " 256 training examples of each task.",
    ),
    "vision": (
        "Vision, full fine-tuning, with convolutions",
        "EfficientNet-lite0 (3.4M weights, 49 BatchNorms) at 64 x 64 pixels, fine-tuned on six image tasks; the bodies"
        " are merged, each task keeps its head. BatchNorm's statistics are taken anew for every model and task from 256"
        " unlabelled training images. The body has no 2-D tensors: `tsv`, `iso_c` and `iso_cts` as published average"
        " its kernels, and are the average times a factor; below them they decompose kernels as matrices. Methods that"
        " look at data were not run.",
    ),
    "lora": (
        "LoRA",
        "SmolLM2-135M-Instruct, adapters of rank 8 on the attention's maps, three classification tasks as prompts; a"
        " class is chosen by the likelihood of its name's first token. The tasks share no text. Adapters keep nothing"
        " to themselves: one and the same model answers all tasks. Methods that look at data were not run. As they"
        " are, `stf` and its control `trimmed_task_arithmetic` have a density of 1 here: superpose does not trim"
        " adapters for them unless it is told to.",
    ),
}


@dataclass(frozen=True)
class Entry:
    """A row of a table: one model, or merges by one method, over all seeds.

    Args:
        name: of the row.
        rows: one for each seed.
    """

    name: str
    rows: Sequence[Mapping[str, Any]]

    @cached_property
    def by_seed(self) -> list[dict[str, float]]:
        """Accuracy by task, for each seed."""
        return [{task: Answers.unpacked(text).accuracy for task, text in row["answers"].items()} for row in self.rows]

    @property
    def answers(self) -> list[Mapping[str, str]]:
        """Packed answers by task, for each seed."""
        return [row["answers"] for row in self.rows]

    def task(self, name: str) -> float:
        """Return the mean accuracy of a task over the seeds."""
        return statistics.mean(found[name] for found in self.by_seed)

    @cached_property
    def means(self) -> list[float]:
        """Mean over tasks, for each seed."""
        return [statistics.mean(found.values()) for found in self.by_seed]

    @property
    def mean(self) -> float:
        """Mean over tasks and seeds."""
        return statistics.mean(self.means)

    @property
    def spread(self) -> float:
        """Standard deviation of the mean over the seeds; NaN for one seed."""
        return statistics.stdev(self.means) if len(self.means) > 1 else math.nan

    @property
    def settings(self) -> list[str]:
        """The settings, without the method's name, each once."""
        said = [row["name"].partition(" (")[2].removesuffix(")") or "as it is" for row in self.rows]
        return list(dict.fromkeys(said))


class Results:
    """Results of one benchmark.

    Args:
        content: as `run.py` writes it.
        analyses: as `analyse.py` writes them.
    """

    def __init__(self, content: Mapping[str, Any], analyses: Mapping[str, Any]) -> None:
        self.content, self.analyses = content, analyses
        self.tasks: list[str] = list(content["tasks"])
        self.looking = {one["name"] for one in content["methods"] if one["looks_at_data"]}
        originals: dict[str, list[Mapping[str, Any]]] = {}
        for row in content["originals"]:
            originals.setdefault(row["name"], []).append(row)
        self.originals = {name: Entry(name, rows) for name, rows in originals.items()}
        self.defaults = {one["name"]: Entry(one["name"], one["default"]) for one in content["methods"]}
        self.chosen = {one["name"]: Entry(one["name"], one["chosen"] or one["default"]) for one in content["methods"]}

    def normalised(self, entry: Entry) -> float:
        """Return the mean over tasks and seeds of accuracy divided by the fine-tuned model's own."""
        alone = self.originals["fine-tuned"].by_seed
        shares = [found[task] / best[task] for found, best in zip(entry.by_seed, alone, strict=True) for task in found]
        return statistics.mean(shares)

    def against(self, entries: Mapping[str, Entry], reference: Entry | None) -> dict[str, Difference]:
        """Return how much better a reference is than each of the others; nothing where there is none."""
        if reference is None:
            return {}
        return {
            name: difference(reference.answers, entry.answers)
            for name, entry in entries.items()
            if entry.answers != reference.answers
        }


def tables(found: Results) -> Iterator[str]:
    """Yield the lines of a benchmark's section."""
    content = found.content
    title, about = ABOUT[content["benchmark"]]
    yield f"## {title}\n"
    yield f"{about}\n"
    yield f"Regenerated by `{content['command']}`; {len(content['seeds'])} seeds of fine-tuning; {content['mark']}.\n"
    sizes = ", ".join(f"{task} {'/'.join(map(str, counts))}" for task, counts in content["sizes"].items())
    yield f"Training, validation and test examples: {sizes}. Seeds differ in the order of the training examples.\n"
    entries = [*found.originals.values(), *found.defaults.values(), *found.chosen.values()]
    versions = {(row["made_by"]["code"], row["made_by"]["torch"], row["made_by"]["transformers"])
                for entry in entries for row in entry.rows}  # fmt: skip
    said = "; ".join(
        f"superpose code {code}, torch {torch}, transformers {other}" for code, torch, other in sorted(versions)
    )
    yield (
        f"{content['machine']}. Merging and scoring took {content['minutes_of_rows']} minutes of one process for"
        f" {content['rows']} rows, several at a time and beside other work. They were made by: {said}.\n"
    )
    for one in content.get("added", ()):
        names = ", ".join(f"`{name}`" for name in one["methods"])
        yield (
            f"{names} came later, by `{one['command']}`, on {one['machine']}"
            f" ({one['minutes_of_rows']} minutes for {one['rows']} rows), with fine-tunes made anew: they are right"
            " on the same test examples as those of the other rows.\n"
        )
    yield "### Hyperparameters chosen on validation data\n"
    yield (
        f"Where there is something to choose, each method's best of its defaults and {content['grid_size']} settings,"
        " which may have them among them (`benchmarks/evidence/grid.py`), on the validation part with the fine-tunes of"
        f" seed {content['seeds'][0]}; numbers are of the test part, of all seeds. ± is the standard deviation of the"
        " mean over seeds. The last columns: how much better than the row are STF with its chosen setting, and"
        " `iso_share` with its defaults, which were chosen on validation data of seed 0 of the text and vision"
        f" benchmarks; with 95% intervals from a paired bootstrap over test examples ({DRAWS:,} draws), of these seeds"
        " and settings, uncorrected for their number.\n"
    )
    yield from _table(found, found.chosen, with_originals=True)
    if REFERENCE in found.chosen:
        name = content["benchmark"]
        yield f"![mean accuracy of every method](evidence/{name}-methods.svg)\n"
        yield f"![STF less each method](evidence/{name}-differences.svg)\n"
    yield "### Defaults\n"
    yield "As published, but that what learns from data takes fewer and larger steps.\n"
    yield from _table(found, found.defaults, with_originals=False)
    if found.analyses:
        yield "### Analyses\n"
        yield f"Fine-tunes of seed {content['seeds'][0]}.\n"
        yield from sections(content["benchmark"], found.analyses)


def sections(name: str, analyses: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of a benchmark's analyses.

    Args:
        name: of the benchmark.
        analyses: by name, as `analyse.py` writes them.
    """
    for analysis, module in ANALYSES.items():
        if analysis in analyses:
            one = analyses[analysis]
            yield f"#### {module.TITLE}\n"
            yield from module.lines(name, one["found"])
            made = one["made_by"]
            yield f"`{one['command']}`; superpose code {made['code']}, {made['at']} UTC, {one['machine']}.\n"


def _table(found: Results, entries: Mapping[str, Entry], *, with_originals: bool) -> Iterator[str]:
    against = [
        found.against(entries, entries.get(REFERENCE)),
        found.against(entries, found.defaults.get(UNTUNED)),
    ]
    head = ["method", *found.tasks, "mean", "±", "normalised", "STF less it", f"{UNTUNED} less it", "settings"]
    yield f"| {' | '.join(head)} |"
    yield f"|---|{'---:|' * (len(found.tasks) + 5)}---|"
    if with_originals:
        for entry in found.originals.values():
            yield _line(found, entry, [None, None], "")
    for name, entry in sorted(entries.items(), key=lambda pair: -pair[1].mean):
        yield _line(found, entry, [one.get(name) for one in against], "; ".join(entry.settings))
    yield ""


def _line(found: Results, entry: Entry, against: Sequence[Difference | None], settings: str) -> str:
    compared = ["" if one is None else _said(one) for one in against]
    spread = "" if math.isnan(entry.spread) else f"{entry.spread:.3f}"
    cells = [
        f"**{entry.name}**" if entry.name == REFERENCE else _given(entry.name, found),
        *(f"{entry.task(task):.3f}" for task in found.tasks),
        f"{entry.mean:.3f}", spread, f"{found.normalised(entry):.3f}", *compared, settings,
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def _given(name: str, found: Results) -> str:
    """Return what a method is given that others are not."""
    if name in found.looking:
        return f"{name} (sees data)"
    return f"{name} (a model for each task)" if name == "emr" else name


def numbers(results: Mapping[str, Results]) -> dict[str, str]:
    """Return the numbers that the summary can name.

    `text_stf` is the mean with the chosen setting, `text_stf_default` with the defaults, `text_fine_tuned` of the
    originals; `text_stf_less_ties` and `text_iso_share_less_ties` are differences with intervals, as in the tables;
    `text_held_out_stf` is the number that the analysis `held_out` calls `stf`.
    """
    found = {}
    for benchmark, one in results.items():
        for entry in one.originals.values():
            found[f"{benchmark}_{_word(entry.name)}"] = f"{entry.mean:.3f}"
        for name, entry in one.chosen.items():
            found[f"{benchmark}_{_word(name)}"] = f"{entry.mean:.3f}"
        for name, entry in one.defaults.items():
            found[f"{benchmark}_{_word(name)}_default"] = f"{entry.mean:.3f}"
        for name, reference in ((REFERENCE, one.chosen.get(REFERENCE)), (UNTUNED, one.defaults.get(UNTUNED))):
            if reference is None:
                continue
            for other, less in one.against(one.chosen, reference).items():
                found[f"{benchmark}_{name}_less_{_word(other)}"] = _said(less)
                rest = reference.answers[1:], one.chosen[other].answers[1:]  # but for the seed that chose
                if rest[0]:
                    found[f"{benchmark}_{name}_less_{_word(other)}_on_other_seeds"] = _said(difference(*rest))
        for analysis, module in ANALYSES.items():
            if analysis in one.analyses and hasattr(module, "numbers"):
                some = module.numbers(one.analyses[analysis]["found"])
                found |= {f"{benchmark}_{analysis}_{name}": text for name, text in some.items()}
    return found


def _word(name: str) -> str:
    return name.replace(",", "").replace(" ", "_").replace("-", "_")


def _said(difference: Difference) -> str:
    return f"{difference.value:+.3f} ({difference.low:+.3f} to {difference.high:+.3f})"


def all_results() -> dict[str, Results]:
    """Return the results that there are, by benchmark."""

    def content(name: str) -> dict[str, Any]:
        file = RESULTS / f"{name}.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}

    return {name: Results(found, content(f"{name}-analyses")) for name in ABOUT if (found := content(name))}


def draw(results: Mapping[str, Results]) -> None:
    """Write the figures."""
    from plots import differences_figure, figure_file, methods_figure

    for name, found in results.items():
        chosen = {method: entry.means for method, entry in found.chosen.items()}
        default = {method: entry.mean for method, entry in found.defaults.items()}
        lines = {original: entry.mean for original, entry in found.originals.items()}
        methods_figure(RESULTS / f"{name}-methods", chosen, default, lines)
        if REFERENCE in found.chosen:
            differences_figure(
                RESULTS / f"{name}-differences", REFERENCE, found.against(found.chosen, found.chosen[REFERENCE])
            )
        for analysis, module in ANALYSES.items():
            if analysis in found.analyses and hasattr(module, "draw"):
                with figure_file(RESULTS / f"{name}-{analysis}") as figure:
                    module.draw(found.analyses[analysis]["found"], figure)


def page() -> str:
    """Return the page.

    Raises:
        SystemExit: the summary names a number that no result has.
    """
    results = all_results()
    file = RESULTS / "summary.md"
    try:
        summary = file.read_text(encoding="utf-8").format_map(numbers(results))
    except KeyError as missing:
        sys.exit(f"{file}: {{{missing.args[0]}}} is in no result; what was found is kept, the page is as it was")
    lines = [
        "# Evidence\n",
        "Made by `python benchmarks/evidence/page.py` from the results in `docs/evidence`; the summary is by hand, its"
        " numbers are from them.\n",
        summary,
    ]
    for found in results.values():
        lines += tables(found)
    return "\n".join(lines).rstrip("\n") + "\n"


def write() -> None:
    """Write the page and its figures."""
    (DOCS / "evidence.md").write_text(page(), encoding="utf-8")
    draw(all_results())


def main() -> None:
    """Write the page, or check that it is as the results have it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the page is another")
    file = DOCS / "evidence.md"
    if parser.parse_args().check:
        if file.read_text(encoding="utf-8") != page():
            sys.exit(f"{file} is not what the results make: run python benchmarks/evidence/page.py")
    else:
        write()


if __name__ == "__main__":
    main()
