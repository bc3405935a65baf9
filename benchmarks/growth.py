"""How time and memory grow: STF with tasks and with matrices, plain merges with models.

    python benchmarks/growth.py --out FOLDER [--families FOLDER] [--largest 4096] [--report FILE]

STF (with its defaults: all features) merges random square matrices in memory, each in a process of its own with one
thread: 2 to 16 tasks of 384x384, and two tasks of 256x256 to 4096x4096, or to --largest. Memory is the peak RssAnon
beyond what the interpreter and the libraries hold, inputs and result included.

Task arithmetic and TIES merge the 135m and the 1b family of llama_family.py by the command line, with the default
backend; families are made in the folder of --families if they are not there (1.1 and 8.8 GB). A family of Llama-2-7B's
shape has files of full size and no content (54 GB in name, nothing on the disk): it is planned and surveyed, not
merged. Holes are read as zeros, so that memory is as for real files, and the survey's time is a lower bound.

Exponents are slopes of least squares through the logarithms: 1 is proportional, 2 is with the square. Those of whole
commands are lower than the work's: the start of the program is in their time and memory.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from llama_family import llama_config, make_family, parameters, shapes_of
from measuring import (
    Kept,
    Report,
    Run,
    arguments_parser,
    know_architecture,
    machine,
    measure,
    merge,
    need_room,
    superpose,
)
from transformers import LlamaForCausalLM

TASKS, SIZE_FOR_TASKS = (2, 4, 8, 16), 384
SIZES, TASKS_FOR_SIZES = (256, 512, 1024, 2048, 4096), 2
METHODS = ("task_arithmetic", "ties")
FINE_TUNES = 3
ALONE = Path(__file__).with_name("alone.py")
CELLS = "wall s / CPU s / MiB"


@dataclass(frozen=True)
class Model:
    """A family of some size: its name in llama_family.py, depth if it is another, and whether files have content."""

    size: str
    layers: int | None = None
    sparse: bool = False

    @property
    def name(self) -> str:
        """What it is called in tables, and its folder."""
        return "-".join([self.size, *([f"{self.layers}-layers"] if self.layers else []), *["sparse"] * self.sparse])

    @property
    def parameters(self) -> int:
        """How many entries each member has."""
        return parameters(shapes_of(LlamaForCausalLM, llama_config(self.size, self.layers)))

    def make(self, families: Path) -> list[Path]:
        """Make it if it is not there, and return the folders of its members."""
        folder = families / self.name
        if not self.sparse and not folder.exists():
            need_room(families, 2 * self.parameters * (FINE_TUNES + 2))
        return make_family(folder, self.size, FINE_TUNES, self.layers, self.sparse)


MODELS = (Model("135m"), Model("1b"), Model("7b", sparse=True))
QUICK_MODELS = (Model("tiny"), Model("1b", layers=1, sparse=True))


def alone(*arguments: object) -> Run:
    """Return what a computation took in a process of its own with one thread, without the time to start it."""
    run = measure([sys.executable, str(ALONE), *map(str, arguments)], OMP_NUM_THREADS="1")
    taken = json.loads(run.facts["printed"])
    return Run(taken["wall"], taken["cpu"], run.memory - taken["memory_before"])


def plan(models: Sequence[Path]) -> Run:
    """Return what it takes to plan a merge by the command line."""
    know_architecture(models[0])
    run = measure(superpose("plan", *models, "--method", "ties", "--every"))
    return Run(run.wall, run.cpu, run.memory)


def exponent(sizes: Sequence[float], values: Sequence[float]) -> str:
    """Return the slope of the least squares line through the logarithms."""
    if len(sizes) < 2:
        return "-"
    return f"{statistics.linear_regression(list(map(math.log, sizes)), list(map(math.log, values))).slope:.2f}"


def say_growth(report: Report, name: str, what: str, rows: Sequence[tuple[str, float, Run]], note: str = "") -> None:
    """Add a table with a row for each size, and the exponents."""
    report.table(what, "time, times the row before", "memory, times the row before", CELLS)
    before: Run | None = None
    for label, _, run in rows:
        ratios = ("", "") if before is None else (run.wall / before.wall, run.memory / before.memory)
        report.row(label, *(ratio and f"{ratio:.2f}" for ratio in ratios), run)
        before = run
    sizes = [size for _, size, _ in rows]
    time, memory = (exponent(sizes, [getattr(run, key) for _, _, run in rows]) for key in ("wall", "memory"))
    report.say("", f"{name}: exponent of time {time}, of memory {memory}{note}.")


def grow_matrices(report: Report, kept: Kept, largest: int, quick: bool, runs: int) -> None:
    """Measure STF against the number of tasks and the size of matrices."""
    tasks = TASKS[:2] if quick else TASKS
    cases = {("T", count): (count, 128 if quick else SIZE_FOR_TASKS) for count in tasks}
    cases |= {("N", size): (TASKS_FOR_SIZES, size) for size in SIZES if size <= largest}
    takes: dict[str, Callable[[], Run]] = {
        f"STF, {count} of {size}": partial(alone, "stf", "--tasks", count, "--size", size)
        for count, size in cases.values()
    }
    measured = kept.in_turns(takes, runs)
    for axis, against in (("T", "tasks"), ("N", "the side of a matrix")):
        rows = [
            (f"{count} x {size}x{size}", key[1], measured[f"STF, {count} of {size}"])
            for key, (count, size) in cases.items()
            if key[0] == axis
        ]
        say_growth(report, f"STF against {against}", "STF, tasks x matrix", rows)


def grow_models(report: Report, kept: Kept, scratch: Path, models: dict[Model, list[Path]], runs: int) -> None:
    """Measure merges, plans and surveys against the size of models."""
    takes: dict[str, Callable[[], Run]] = {}
    for model, folders in models.items():
        takes[f"plan, {model.name}"] = partial(plan, folders)
        takes[f"survey, {model.name}"] = partial(alone, "survey", "--method", "ties", "--models", *folders)
        if not model.sparse:
            for method in METHODS:
                takes[f"{method}, {model.name}"] = partial(merge, folders, scratch, "--method", method)
    measured = kept.in_turns(takes, runs)
    names = {
        "plan": "superpose plan",
        "survey": "survey of TIES, one worker, a process of its own",
        **{method: f"superpose merge, {method}" for method in METHODS},
    }
    for kind, name in names.items():
        rows = [
            (f"{model.name}, {model.parameters / 1e6:.0f}M", model.parameters, measured[f"{kind}, {model.name}"])
            for model in models
            if f"{kind}, {model.name}" in takes
        ]
        note = " (the sparse files' time is a lower bound: holes are read)" if kind == "survey" else ""
        say_growth(report, f"{name} against parameters", name, rows, note)


def main() -> None:
    """Read the command line, measure, and print tables."""
    parser = arguments_parser(__doc__, "outputs and what was measured")
    parser.add_argument("--families", type=Path, help="folder of families, that of --out when not given")
    parser.add_argument("--largest", type=int, default=2048, help="side of the largest matrix, up to 4096")
    arguments = parser.parse_args()
    quick = arguments.quick
    runs, largest = (1, min(arguments.largest, 512)) if quick else (arguments.runs, arguments.largest)
    kept, report = Kept(arguments.out), Report(arguments.report)
    report.say(machine(), f"STF in memory: float32, one thread; models: {FINE_TUNES} fine-tunes, bfloat16")
    report.say(f"medians of {runs}")
    grow_matrices(report, kept, largest, quick, runs)
    families = arguments.families or arguments.out
    models = {model: model.make(families) for model in (QUICK_MODELS if quick else MODELS)}
    grow_models(report, kept, arguments.out / "scratch", models, runs)
    report.write()


if __name__ == "__main__":
    main()
