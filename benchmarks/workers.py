"""One worker against two: threads, and a Ray cluster on this machine; time, and that the bytes are the same.

    python benchmarks/workers.py --out FOLDER [--families FOLDER] [--report FILE]

STF (with its defaults: all features) and TIES on the 135m family of llama_family.py, which is made in the folder of
--families if it is not there; and STF on a model of one 2048x2048 matrix with three tasks, where the second worker has
no tensor of its own and takes part in the first one's (--split-tensors) or not (--whole-tensors). Ray needs its extra;
its wall time has the start of the cluster in it, which the merge of a toy shows alone. It is not asked for the one
matrix: a tensor is one task of Ray, whatever its workers.

A merge that writes other bytes with another backend or number of workers fails the benchmark.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from llama_family import make_family, members, tensor_of
from measuring import Kept, Report, Run, arguments_parser, machine, merge, need_room
from safetensors.torch import save_file

TASKS = 3
FAMILY_BYTES = 270 * 10**6 * (TASKS + 2)
BACKENDS = {
    "threads": (("--workers", "1"), ("--workers", "2")),
    "Ray": (("--backend", "ray", "--workers", "1"), ("--backend", "ray", "--workers", "2")),
}
SPLIT, WHOLE = ("--workers", "2", "--split-tensors"), ("--workers", "2", "--whole-tensors")
NAME = "model.layers.0.mlp.up_proj.weight"


def make_one_matrix(out: Path, size: int) -> list[Path]:
    """Make a base and fine-tunes of one square matrix each, and return their folders."""
    folders = [out / member for member in members(TASKS)]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        matrix = tensor_of(folder.name, NAME, (size, size), torch.float32)
        save_file({NAME: matrix}, folder / "model.safetensors")
    return folders


@dataclass(frozen=True)
class Comparison:
    """One row: a merge with two choices of how it is run."""

    name: str
    models: Sequence[Path]
    method: str
    one: tuple[str, ...]
    two: tuple[str, ...]

    def label(self, side: tuple[str, ...]) -> str:
        """Return the name of a measurement; what is the same for two rows is measured once."""
        return f"{self.models[0].parent.name}: {' '.join([self.method, *side])}"


def comparisons(
    family: Sequence[Path], matrix: Sequence[Path], toy: Sequence[Path], quick: bool
) -> Iterator[Comparison]:
    """Yield the rows of the table; when in a hurry, Ray merges the toy alone."""
    for backend, (one, two) in BACKENDS.items():
        if backend == "threads" or not quick:
            yield Comparison(f"STF, {backend}", family, "stf", one, two)
            yield Comparison(f"TIES, {backend}", family, "ties", one, two)
        if backend == "Ray" or not quick:
            yield Comparison(f"a toy, {backend}", toy, "stf", one, two)
    one = BACKENDS["threads"][0]
    yield Comparison("STF of one matrix, split", matrix, "stf", one, SPLIT)
    yield Comparison("STF of one matrix, whole", matrix, "stf", one, WHOLE)


def check_bytes(runs: Sequence[tuple[str, Run]]) -> None:
    """End the program if merges that are one and the same wrote different bytes.

    Raises:
        SystemExit: they did.
    """
    (first, run), *others = runs
    for name, other in others:
        if other.facts["digests"] != run.facts["digests"]:
            raise SystemExit(f"different bytes: {first} and {name}")


def main() -> None:
    """Read the command line, measure, and print a table."""
    parser = arguments_parser(__doc__, "outputs and what was measured")
    parser.add_argument("--families", type=Path, help="folder of families, that of --out when not given")
    arguments = parser.parse_args()
    families, quick = arguments.families or arguments.out, arguments.quick
    shape, size, runs = ("tiny", 512, 1) if quick else ("135m", 2048, arguments.runs)
    report = Report(arguments.report)
    report.say(machine())
    need_room(families, FAMILY_BYTES)
    family = make_family(families / shape, shape, TASKS)
    toy = make_family(families / "tiny", "tiny", TASKS)
    matrix = make_one_matrix(families / f"matrix-{size}", size)
    report.say(f"{shape}, {TASKS} fine-tunes, bfloat16; one matrix of {size}x{size}, float32")
    report.say(f"medians of {runs}; all rows of one merge wrote the same bytes")
    report.table("merge", "speed-up of 2 workers", "CPU, times", "1: wall s / CPU s / MiB", "2: wall s / CPU s / MiB")
    kept, same = Kept(arguments.out), {}
    for row in comparisons(family, matrix, toy, quick):
        if "ray" in row.one and importlib.util.find_spec("ray") is None:
            report.row(row.name, "not run: Ray is not installed", "", "", "")
            continue
        takes = {
            row.label(side): partial(merge, row.models, arguments.out / "scratch", "--method", row.method, *side)
            for side in (row.one, row.two)
        }
        measured = kept.in_turns(takes, runs)
        merges = same.setdefault((row.models[0], row.method), [])
        merges += measured.items()
        check_bytes(merges)
        one, two = measured.values()
        report.row(row.name, f"{one.wall / two.wall:.2f}", f"{two.cpu / one.cpu:.2f}", one, two)
    report.write()


if __name__ == "__main__":
    main()
