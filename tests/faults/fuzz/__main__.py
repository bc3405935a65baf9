"""`python -m faults.fuzz --runs 1000000 --out counts.json [TARGET ...]`: fuzz all targets, or those named.

Coverage guides it where atheris is installed (`pip install 'superpose[fuzz]'`), which sees which branches of superpose
an input takes and goes on from those that take new ones; without atheris the inputs are mutated at random. A crash ends
the target's process; its input is kept beside the counts, and the next process goes on with the runs that are left.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from faults.fuzz.scratch import SCRATCH, in_memory

NAMES = ("safetensors", "index", "recipe", "adapter", "pickle")
MOST_CRASHES = 20
"""Of one target; it is given up then."""


def main() -> None:
    """Fuzz in a process per target, and write counts."""
    options = _options()
    if options.inside:
        _inside(options)
        return
    out = Path(options.out)
    counts = []
    for target in options.targets or NAMES:
        wanted = options.runs // len(options.targets or NAMES)
        found = _fuzz(target, wanted, out, options.seed)
        counts.append(found)
        print(f"{target}: {found['executions']} executions, {found['crashes']} crashes", flush=True)
        out.write_text(json.dumps(counts, indent=1) + "\n", encoding="utf-8")
    total = sum(found["executions"] for found in counts)
    print(f"total: {total} executions, {sum(found['crashes'] for found in counts)} crashes")
    sys.exit(any(found["crashes"] for found in counts))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m faults.fuzz", description=__doc__)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(NAMES)}; all if none is named")
    parser.add_argument("--runs", type=int, default=100_000, help="executions of all targets together")
    parser.add_argument("--seed", type=int, default=1, help="of the random numbers")
    parser.add_argument("--out", default="fuzz.json", help="file for the counts; inputs that crash are put beside it")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if unknown := set(options.targets) - set(NAMES):
        parser.error(f"no target {sorted(unknown)[0]}; known: {', '.join(NAMES)}")
    return options


def _fuzz(target: str, wanted: int, out: Path, seed: int) -> dict:
    begun = time.monotonic()
    total = {"target": target, "executions": 0, "read": 0, "refused": 0, "crashes": 0, "guided": False}
    state = out.with_name(f"{out.name}.{target}.state")
    while total["executions"] < wanted and total["crashes"] < MOST_CRASHES:
        state.unlink(missing_ok=True)
        more = [
            "--runs",
            str(wanted - total["executions"]),
            "--seed",
            str(seed + total["crashes"]),
            "--out",
            str(state),
        ]
        command = [sys.executable, "-W", "ignore", "-m", "faults.fuzz", target, "--inside", *more]
        with tempfile.TemporaryDirectory(dir=in_memory(), prefix="superpose-fuzz-") as scratch:
            done = subprocess.run(command, check=False, env={**os.environ, SCRATCH: scratch})
        if not state.exists():
            sys.exit(f"{target}: the process ended with {done.returncode}, and has run nothing")
        told = json.loads(state.read_text(encoding="utf-8"))
        for key in ("executions", "read", "refused"):
            total[key] += told[key]
        total["guided"] = told["guided"]
        if done.returncode or "crash" in told:
            total["crashes"] += 1
            kept = out.with_name(f"{out.stem}-{target}-{total['crashes']}.crash")
            kept.write_bytes(base64.b64decode(told["last"]))
            print(f"{target}: {told.get('crash', f'ended with {done.returncode}')}; the input is in {kept}", flush=True)
    state.unlink(missing_ok=True)
    return {**total, "seconds": round(time.monotonic() - begun, 1)}


def _inside(options: argparse.Namespace) -> None:
    """Fuzz one target in this process."""
    try:
        import atheris
    except ImportError:
        _Runner(options, guided=False).at_random()
        return
    with atheris.instrument_imports(include=["superpose.checkpoints", "superpose.recipe", "superpose.errors"]):
        runner = _Runner(options, guided=True)
    flags = [f"-runs={options.runs}", f"-seed={options.seed}", "-max_len=20000", "-timeout=30", "-rss_limit_mb=4000"]
    flags.append(f"-artifact_prefix={options.out}.")
    corpus = runner.corpus()
    atheris.Setup([sys.argv[0], *flags, "-verbosity=0", "-print_final_stats=0", corpus], runner.one,
                  custom_mutator=runner.mutate)  # fmt: skip
    atheris.Fuzz()


class _Runner:
    """Runs one target, and keeps count in a file that outlasts the process."""

    def __init__(self, options: argparse.Namespace, *, guided: bool) -> None:
        from faults.fuzz import targets

        self._targets = targets
        self._target = targets.TARGETS[options.targets[0]]
        self._runs, self._out = options.runs, Path(options.out)
        self._place = targets.folder_for(self._target)
        self._folder = Path(self._place.name)
        self._draw = random.Random(options.seed)
        self._counts = {"executions": 0, "read": 0, "refused": 0, "guided": guided}

    def corpus(self) -> str:
        """Write the seeds where libFuzzer looks for them."""
        folder = self._folder.with_name(f"{self._folder.name}-corpus")
        folder.mkdir()
        for number, seed in enumerate(self._target.seeds):
            (folder / str(number)).write_bytes(seed)
        return str(folder)

    def mutate(self, data: bytes, size: int, seed: int) -> bytes:
        """Return another input, for libFuzzer."""
        from faults.fuzz.mutations import mutated

        return mutated(data, self._target.seeds, random.Random(seed), self._target.name)[:size]

    def one(self, data: bytes) -> None:
        """Run one input; what must not happen is written down, and ends the process."""
        number = self._counts["executions"] = self._counts["executions"] + 1
        try:
            # Memory is measured every so often: it takes several times as long.
            self._counts[self._targets.attempt(self._target, self._folder, data, measure=number % 20 == 0)] += 1
        except BaseException as error:
            self._write(data, f"{type(error).__name__}: {error}")
            os._exit(70)
        if number % 1000 == 0 or number >= self._runs:
            self._write(data)

    def _write(self, last: bytes, crash: str = "") -> None:
        told = {**self._counts, "last": base64.b64encode(last).decode(), **({"crash": crash[:500]} if crash else {})}
        self._out.write_text(json.dumps(told), encoding="utf-8")

    def at_random(self) -> None:
        """Run mutations of the seeds, and of what came of them."""
        from faults.fuzz.mutations import mutated

        pool = list(self._target.seeds)
        for _ in range(self._runs):
            made = mutated(self._draw.choice(pool), self._target.seeds, self._draw, self._target.name)
            self.one(made)
            if self._draw.random() < 0.01 and len(pool) < 1000:
                pool.append(made)


if __name__ == "__main__":
    main()
