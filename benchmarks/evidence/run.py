"""One benchmark from the first download to its results: fine-tunes, searches on validation data, numbers on test data.

    python benchmarks/evidence/run.py text --out FOLDER [--seeds 0 1 2] [--methods NAME ...] [--workers 2]
    python benchmarks/evidence/run.py text --out FOLDER --quick        two methods, one seed: to try it
    python benchmarks/evidence/run.py text --out FOLDER --add --methods NAME ...    into the published results

FOLDER, outside the repository, keeps downloads, fine-tunes and every row; interrupted, the same command goes on. In the
end the rows of the table are in docs/evidence/NAME.json, and docs/evidence.md and its figures are made anew; with some
methods or seeds alone they are in FOLDER/NAME.json.

Hyperparameters are chosen on validation data with the fine-tunes of the first seed, and used for all seeds.

Linux. Downloads go through pip and, for text, npm; for vision, npm, apt-get and dpkg-deb (after an apt-get update).
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))  # measuring.py is one folder up

import page
from grid import SIZE, Setting, Variant, variants
from jobs import NAMES, Bench, Job, working_on
from measuring import machine
from rows import Row

import superpose


def main() -> None:
    """Read the command line and run a benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("benchmark", choices=NAMES)
    parser.add_argument("--out", type=Path, required=True, help="folder, outside the repository, that keeps everything")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the fine-tunes")
    parser.add_argument("--methods", nargs="+", help="some methods only; the results then hold no others")
    parser.add_argument("--workers", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--add", action="store_true", help="put --methods into the results that are published already")
    parser.add_argument("--quick", action="store_true", help="average and task arithmetic of one seed")
    asked = parser.parse_args()
    seeds = [0] if asked.quick else asked.seeds
    methods = ["average", "task_arithmetic"] if asked.quick else asked.methods
    # Results of some seeds or methods alone are not for the page.
    is_for_page = not asked.quick and (asked.add or not asked.methods) and asked.seeds == parser.get_default("seeds")
    out = asked.out.absolute()
    file = (page.RESULTS if is_for_page else out) / f"{asked.benchmark}.json"
    if asked.add and not (is_for_page and methods and file.exists()):
        parser.error(f"--add wants --methods, all seeds, and the results of a whole run in {page.RESULTS}")
    published = json.loads(file.read_text(encoding="utf-8")) if asked.add else None
    file.parent.mkdir(parents=True, exist_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    with working_on(asked.benchmark, out, asked.workers) as bench:
        known = [one.name for one in known_variants(bench)]
        if unknown := sorted(set(methods or ()) - set(known)):
            parser.error(f"{', '.join(unknown)}: not among {', '.join(known)}")
        found = {}
        for made in run(bench, seeds, methods, published):
            found = added(published, made) if published else made
            write(found, out / f"{asked.benchmark}.json")
    # The page names methods that look at data: it is made once they are there.
    if is_for_page:
        write(found, file)
        page.write()


def write(found: Mapping[str, Any], file: Path) -> None:
    """Write results."""
    file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(file, flush=True)


def run(
    bench: Bench, seeds: Sequence[int], methods: Sequence[str] | None, published: Mapping[str, Any] | None
) -> Iterator[dict[str, Any]]:
    """Run a benchmark.

    Args:
        bench: the benchmark.
        seeds: of the fine-tunes; hyperparameters are chosen with the first.
        methods: some methods only; None for all.
        published: results that these are to be added to.

    Yields:
        The results, as they are published: without methods that look at data, which take longest, then with them.

    Raises:
        SystemExit: the examples or the fine-tunes are not those of the published results.
    """
    if published and (published["mark"], published["sizes"]) != (bench.suite.mark, bench.suite.sizes):
        sys.exit(f"{bench.name}: published with other examples, training or models; run all methods")
    bench.finetune(seeds)
    originals = [Job(one, seed, "test") for seed in seeds for one in ("pretrained", "fine-tuned")]
    original_rows = bench.rows(originals)
    if published:
        check_same(published["originals"], original_rows)
    entries: list[dict[str, Any]] = []
    asked = [one for one in known_variants(bench) if methods is None or one.name in methods]
    for looks_at_data in (False, True):
        some = [one for one in asked if one.looks_at_data == looks_at_data]
        if not some:
            continue
        entries += _entries(bench, seeds, some)
        yield {
            "benchmark": bench.name, "machine": machine(),
            "command": f"python benchmarks/evidence/run.py {bench.name} --out FOLDER", "mark": bench.suite.mark,
            "seeds": list(seeds), "tasks": list(bench.suite.tasks), "sizes": bench.suite.sizes, "grid_size": SIZE,
            "fine_tunes": [str(path.relative_to(bench.out)) for seed in seeds for path in bench.suite.tuned(seed)],
            "rows": len(bench.seconds), "minutes_of_rows": round(sum(bench.seconds.values()) / 60),
            "originals": [asdict(row) for row in original_rows], "methods": entries,
        }  # fmt: skip


def check_same(published: Sequence[Mapping[str, Any]], originals: Sequence[Row]) -> None:
    """Refuse fine-tunes that answer otherwise than published ones: their numbers are not for one table.

    Args:
        published: rows of the pretrained model and of the fine-tunes.
        originals: the same, made now.

    Raises:
        SystemExit: a model answers another test example rightly.
    """
    for kept, mine in zip(published, originals, strict=True):
        if kept["answers"] != mine.answers:
            sys.exit(f"{mine.name}, seed {mine.seed}: answers otherwise than the published one; run all methods")


def added(published: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """Return published results with some methods' rows made anew, or made at last.

    Args:
        published: results of a whole run.
        found: results of some methods, with the same fine-tunes.
    """
    names = [one["name"] for one in found["methods"]]
    said = {
        "methods": names,
        "command": f"{found['command']} --add --methods {shlex.join(names)}",
        **{name: found[name] for name in ("machine", "rows", "minutes_of_rows")},
    }
    others = [one for one in published["methods"] if one["name"] not in names]
    before = [{**one, "methods": [name for name in one["methods"] if name not in names]}
              for one in published.get("added", ())]  # fmt: skip
    stay = [one for one in before if one["methods"]]
    return {**published, "methods": [*others, *found["methods"]], "added": [*stay, said]}


def known_variants(bench: Bench) -> list[Variant]:
    """Return the rows of a benchmark's table."""
    known = [method.name for method in superpose.list_methods()]
    return variants(len(bench.suite.tasks), known, data=bench.name == "text", kernels=bench.name == "vision")


def _entries(bench: Bench, seeds: Sequence[int], asked: Sequence[Variant]) -> list[dict[str, Any]]:
    """Choose every method's setting, and return its numbers."""
    tried = {one.name: dict.fromkeys((setting.text for setting in one.tried), 0.0) for one in asked}
    jobs = [Job(setting, seeds[0], "validation") for one in asked for setting in one.tried]
    names = [one.name for one in asked for _ in one.tried]
    for name, found in zip(names, bench.rows(jobs), strict=True):
        tried[name][found.name] = found.mean
    best = {one.name: _best(one.tried, tried[one.name]) for one in asked if one.grid}
    defaults = {one.name: [Job(one.default, seed, "test") for seed in seeds] for one in asked}
    chosen = {name: [Job(setting, seed, "test") for seed in seeds] for name, setting in best.items()}
    bench.rows([job for some in (*defaults.values(), *chosen.values()) for job in some])
    return [
        {
            "name": one.name,
            "looks_at_data": one.looks_at_data,
            "default": [asdict(row) for row in bench.rows(defaults[one.name])],
            "chosen": [asdict(row) for row in bench.rows(chosen.get(one.name, []))],
            "validation": tried[one.name],
        }
        for one in asked
    ]


def _best(grid: Sequence[Setting], tried: dict[str, float]) -> Setting:
    """Return the setting with the highest mean on validation data; of equals the first in the grid."""
    return max(grid, key=lambda setting: tried[setting.text])


if __name__ == "__main__":
    main()
