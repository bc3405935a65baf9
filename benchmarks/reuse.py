"""What is saved by keeping results: a cache between merges, and several scaling factors in one command.

    python benchmarks/reuse.py --out FOLDER [--families FOLDER] [--report FILE]

STF on the 135m family of llama_family.py, which is made in the folder of --families if it is not there. The first merge
fills an empty cache. Each of the others begins with what the first has left: the same with another scaling factor, with
another ridge, and with a fourth fine-tune beside the three. Beside each stands the same merge without a cache; and one
command for three scaling factors stands beside three of them. A merge that writes other bytes with a cache, or in one
command, fails the benchmark.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from llama_family import make_family
from measuring import MIB, Kept, Report, Run, arguments_parser, machine, merge, need_room

FINE_TUNES = 4
FAMILY_BYTES = 270 * 10**6 * (FINE_TUNES + 1)
CACHE_BYTES = 8 * 10**9
FACTORS = ("0.4", "0.6", "0.8")
FIRST = "first merge, scaling factor 0.8"
OTHERS: dict[str, tuple[int, tuple[str, ...]]] = {
    "another scaling factor": (3, ("--scaling-factor", "0.4")),
    "another ridge": (3, ("--scaling-factor", "0.8", "--ridge", "0.01")),
    "one more task": (4, ("--scaling-factor", "0.8")),
}
MERGES = {FIRST: (3, ("--scaling-factor", "0.8")), **OTHERS}
SINGLES = {"0.8": FIRST, "0.4": "another scaling factor"}
"""Merges of one factor that are measured anyway."""


class Reuse:
    """The merges of one family, with and without a cache.

    Args:
        models: base and fine-tunes.
        out: folder for outputs and caches.
        kept: what was measured already.
    """

    def __init__(self, models: Sequence[Path], out: Path, kept: Kept) -> None:
        self.models, self.out, self.kept = models, out, kept
        self.filled, self.copy = out / "cache-filled", out / "cache-copy"

    def plain(self, tasks: int, options: tuple[str, ...], output: str = "out") -> Run:
        """Merge so many fine-tunes."""
        return merge(self.models[: tasks + 1], self.out / "scratch", "--method", "stf", *options, output=output)

    def filling(self) -> Run:
        """Make the first merge, with an empty cache."""
        shutil.rmtree(self.filled, ignore_errors=True)
        tasks, options = MERGES[FIRST]
        run = self.plain(tasks, (*options, "--cache", str(self.filled)))
        sizes = [file.stat().st_size for file in self.filled.iterdir()]
        return replace(run, facts={**run.facts, "cache": sum(sizes), "entries": len(sizes)})

    def with_filled(self, tasks: int, options: tuple[str, ...]) -> Run:
        """Merge with what the first merge has left, by links, so that it stays as it is."""
        if not self.filled.exists():  # of a run that was interrupted or is over
            self.filling()
        shutil.rmtree(self.copy, ignore_errors=True)
        shutil.copytree(self.filled, self.copy, copy_function=os.link)
        run = self.plain(tasks, (*options, "--cache", str(self.copy)))
        shutil.rmtree(self.copy)
        return run

    def measure(self, runs: int) -> dict[str, Run]:
        """Measure all merges with and without a cache, in turns."""
        name = self.models[0].parent.name
        if not self.kept.file(f"{name}, {FIRST}, cache, run {runs}").exists():
            shutil.rmtree(self.filled, ignore_errors=True)  # may be half full
        takes = {f"{merge}, plain": partial(self.plain, *MERGES[merge]) for merge in MERGES}
        takes[f"{FIRST}, cache"] = self.filling
        takes |= {f"{merge}, cache": partial(self.with_filled, *OTHERS[merge]) for merge in OTHERS}
        takes |= {
            f"scaling factor {factor}": partial(self.plain, 3, ("--scaling-factor", factor))
            for factor in FACTORS
            if factor not in SINGLES
        }
        takes["all factors"] = partial(self.plain, 3, ("--scaling-factor", *FACTORS), "out-{scaling_factor}")
        measured = self.kept.in_turns({f"{name}, {key}": take for key, take in takes.items()}, runs)
        shutil.rmtree(self.filled, ignore_errors=True)
        return {key.removeprefix(f"{name}, "): run for key, run in measured.items()}


def add_up(runs: Sequence[Run]) -> Run:
    """Return what merges take one after the other."""
    return Run(sum(run.wall for run in runs), sum(run.cpu for run in runs), max(run.memory for run in runs))


def row(report: Report, name: str, without: Run, having: Run) -> None:
    """Add a row, ratios first."""
    report.row(name, f"{without.wall / having.wall:.2f}", f"{without.cpu / having.cpu:.2f}", having, without)


def main() -> None:
    """Read the command line, measure, and print tables."""
    parser = arguments_parser(__doc__, "outputs, the cache and what was measured")
    parser.add_argument("--families", type=Path, help="folder of families, that of --out when not given")
    arguments = parser.parse_args()
    families, quick = arguments.families or arguments.out, arguments.quick
    shape, runs = ("tiny", 1) if quick else ("135m", arguments.runs)
    report = Report(arguments.report)
    report.say(machine())
    need_room(families, FAMILY_BYTES)
    need_room(arguments.out, CACHE_BYTES)
    models = make_family(families / shape, shape, FINE_TUNES)
    measured = Reuse(models, arguments.out, Kept(arguments.out)).measure(runs)
    singles = [measured[f"{SINGLES[f]}, plain" if f in SINGLES else f"scaling factor {f}"] for f in FACTORS]
    together = measured["all factors"]
    same = all(measured[f"{name}, plain"].facts == measured[f"{name}, cache"].facts for name in OTHERS)
    filled = measured[f"{FIRST}, cache"].facts
    same &= measured[f"{FIRST}, plain"].facts["digests"] == filled["digests"]
    same &= together.facts["digests"] == {
        f"out-{factor}": single.facts["digests"]["out"] for factor, single in zip(FACTORS, singles, strict=True)
    }
    if not same:
        raise SystemExit(f"different bytes with and without what is kept; see {arguments.out / 'measured'}")
    report.say(f"STF on {shape}, 3 fine-tunes, bfloat16; medians of {runs}; the bytes are the same")
    report.say(f"cache after the first merge: {filled['cache'] / MIB:.0f} MiB in {filled['entries']} entries")
    report.table("merge", "times faster", "CPU, times less", "kept: wall s / CPU s / MiB", "not: wall s / CPU s / MiB")
    for name in MERGES:
        row(report, name, measured[f"{name}, plain"], measured[f"{name}, cache"])
    row(report, f"scaling factors {', '.join(FACTORS)} in one command", add_up(singles), together)
    report.write()


if __name__ == "__main__":
    main()
