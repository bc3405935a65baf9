"""Peak anonymous memory of whole merges, sampled while they run.

    python benchmarks/memory.py --family FOLDER [--methods task_arithmetic ties] [--runs 3]

Merges base and fine-tunes of a folder that llama_family.py made, by the command line, and prints for each method the
peak of RssAnon (what the process holds beyond mapped files), wall and CPU seconds. Linux only.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

from measuring import machine, measure, median, superpose


def merge_command(family: Path, method: str, out: Path) -> list[str]:
    """Return the command that merges a family."""
    models = [family / "base", *sorted(family.glob("ft*"))]
    return superpose("merge", *models, "-o", out, "--method", method, "--quiet")


def main() -> None:
    """Read the command line, measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--family", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", default=["task_arithmetic", "ties"])
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    print(machine())
    print(f"{'method':18}{'peak RssAnon MiB':>18}{'wall s':>10}{'CPU s':>10}   medians of {arguments.runs}")
    for method in arguments.methods:
        runs = []
        for _ in range(arguments.runs):
            scratch = Path(tempfile.mkdtemp(dir=arguments.family))
            runs.append(measure(merge_command(arguments.family, method, scratch / "out")))
            shutil.rmtree(scratch)
        run = median(runs)
        print(f"{method:18}{run.memory:18.0f}{run.wall:10.1f}{run.cpu:10.1f}", flush=True)


if __name__ == "__main__":
    main()
