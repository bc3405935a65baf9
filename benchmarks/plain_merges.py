"""Plain merges against mergekit: CPU and wall seconds, and peak anonymous memory, of whole runs of both programs.

    python benchmarks/plain_merges.py --size 135m --out FOLDER --mergekit MERGEKIT_YAML [--report FILE] [--runs 3]

FOLDER gets the family of llama_family.py, if it is not there, and the outputs, which are deleted again. MERGEKIT_YAML
is the program of mergekit 0.1.5, in a virtual environment of its own, since its pins are not ours:

    python -m venv mk && mk/bin/pip install mergekit==0.1.5       then --mergekit mk/bin/mergekit-yaml

Both run with one arithmetic thread (OMP_NUM_THREADS=1), in turns, so that what else the machine does falls on both; the
table has medians. Rows of one method and the same flags share mergekit's runs. mergekit runs with the flags that were
best for it on a CPU (small shards, written beside), and once more at its defaults for the average. Ours runs one tensor
after the other and, in rows of their own, by its default backend. CPU seconds are user and system time of the program
and its children; memory is RssAnon, what a process holds beyond mapped files, over all its processes, sampled while
they run. Linux only.

What is compared is not the same to the last bit. mergekit computes in the dtype of the files (bfloat16 here) and trims
TIES tensor by tensor; ours computes in float32 and, as in the paper, trims over the whole model: the rows with
`--density-scope tensor` trim as mergekit does.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llama_family import make_family
from measuring import Report, Run, machine, measure, median, superpose

BEST_FLAGS = ("--out-shard-size", "250M", "--async-write")
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Row:
    """One line of the table: a command of ours against one of mergekit.

    Args:
        name: what is compared.
        method: mergekit's name of the method.
        ours: our method and its options.
        backend: options that choose it.
        flags: of mergekit.
    """

    name: str
    method: str
    ours: tuple[str, ...]
    backend: tuple[str, ...] = ("--backend", "serial")
    flags: tuple[str, ...] = BEST_FLAGS


SUM = ("--scaling-factor", "0.3")
PLAIN = {
    "average": ("linear", ("average",)),
    "task_arithmetic": ("task_arithmetic", ("task_arithmetic", *SUM)),
    "ties": ("ties", ("ties", "--density", "0.2", *SUM)),
    "ties, by tensor": ("ties", ("ties", "--density", "0.2", "--density-scope", "tensor", *SUM)),
    "dare_ties": ("dare_ties", ("dare_ties", "--density", "0.2", *SUM)),
}


def rows() -> list[Row]:
    """Return the lines of the table."""
    serial = [Row(name, method, ours) for name, (method, ours) in PLAIN.items()]
    serial.insert(1, Row("average, mergekit's defaults", "linear", ("average",), flags=()))
    return serial + [Row(f"{name}, default backend", method, ours, ()) for name, (method, ours) in PLAIN.items()]


def mergekit_recipe(method: str, models: Sequence[Path]) -> str:
    """Return mergekit's recipe for base and fine-tunes; JSON is YAML."""
    base, *tuned = map(str, models)
    parameters = {"weight": 1 / len(tuned) if method == "linear" else 0.3}
    if "ties" in method:
        parameters["density"] = 0.2
    recipe = {
        "merge_method": method,
        "models": [{"model": model, "parameters": parameters} for model in tuned],
        "dtype": "bfloat16",
        **({"parameters": {"normalize": True}} if method == "linear" else {"base_model": base}),
    }
    return json.dumps(recipe, indent=2)


def compare(alike: Sequence[Row], models: Sequence[Path], mergekit: str, runs: int) -> tuple[list[Run], Run]:
    """Return the medians of ours, for each of the rows, and of the run of mergekit that they share, all in turns."""
    ours: list[list[Run]] = [[] for _ in alike]
    theirs = []
    for _ in range(runs):
        with tempfile.TemporaryDirectory(dir=models[0].parent) as scratch:
            out, recipe = Path(scratch) / "out", Path(scratch) / "recipe.yml"
            for row, measured in zip(alike, ours, strict=True):
                command = superpose("merge", *models, "-o", out, "--quiet", "--method", *row.ours, *row.backend)
                measured.append(measure(command, **ONE_THREAD))
                shutil.rmtree(out)
            recipe.write_text(mergekit_recipe(alike[0].method, models))
            command = [mergekit, str(recipe), str(out), "--random-seed", "0", *alike[0].flags]
            theirs.append(measure(command, **ONE_THREAD))
    return [median(measured) for measured in ours], median(theirs)


def cells(row: Row, ours: Run, theirs: Run) -> list[str]:
    """Return one row of the table, ratios first."""
    ratios = [f"{theirs.cpu / ours.cpu:.1f}", f"{theirs.wall / ours.wall:.1f}", f"{theirs.memory / ours.memory:.1f}"]
    return [row.name, *ratios, *(f"{run.cpu:.1f} / {run.wall:.1f} / {run.memory:.0f}" for run in (ours, theirs))]


def main() -> None:
    """Read the command line, measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", choices=("tiny", "135m", "1b"), default="135m")
    parser.add_argument("--out", type=Path, required=True, help="folder of the family")
    parser.add_argument("--mergekit", required=True, help="the program mergekit-yaml of mergekit 0.1.5")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--only", nargs="+", help="names of rows")
    parser.add_argument("--report", type=Path, help="file that gets the table too")
    arguments = parser.parse_args()
    if not (arguments.out / "base").exists():
        make_family(arguments.out, arguments.size)
    models = [arguments.out / "base", *sorted(arguments.out.glob("ft*"))]
    ask = [
        str(Path(arguments.mergekit).parent / "python"),
        "-c",
        "import importlib.metadata as m; print(m.version('mergekit'))",
    ]
    version = subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip()
    report = Report(arguments.report)
    report.say(
        f"{machine()}, mergekit {version};"
        f" {arguments.size}, {len(models) - 1} fine-tunes, bfloat16; medians of {arguments.runs}"
    )
    report.table(
        "merge", "CPU, times less", "wall", "memory", "ours: CPU s / wall s / MiB", "mergekit: CPU s / wall s / MiB"
    )
    wanted = [row for row in rows() if not arguments.only or row.name in arguments.only]
    for method, flags in dict.fromkeys((row.method, row.flags) for row in wanted):
        alike = [row for row in wanted if (row.method, row.flags) == (method, flags)]
        ours, theirs = compare(alike, models, arguments.mergekit, arguments.runs)
        for row, run in zip(alike, ours, strict=True):
            report.row(*cells(row, run, theirs))
    report.write()


if __name__ == "__main__":
    main()
