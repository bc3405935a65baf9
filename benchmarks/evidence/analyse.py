"""The papers' figures on one benchmark: what STF's parts do, how it reacts to its settings, what its promise is worth.

    python benchmarks/evidence/analyse.py text --out FOLDER [--only NAME ...] [--workers 2]

Run `run.py` first, in the same FOLDER: chosen hyperparameters are read from docs/evidence/NAME.json. Interrupted, the
same command goes on; each analysis goes into docs/evidence/NAME-analyses.json as it ends, and the page is made anew.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # measuring.py is one folder up

import page
from analyses import ANALYSES, NOT_FOR
from analyses.common import SEED
from grid import Setting
from jobs import NAMES, working_on
from measuring import machine
from rows import made_by


def main() -> None:
    """Read the command line and run analyses."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("benchmark", choices=NAMES)
    parser.add_argument("--out", type=Path, required=True, help="folder of run.py")
    parser.add_argument("--only", nargs="+", choices=ANALYSES, default=list(ANALYSES), help="some analyses")
    parser.add_argument("--workers", type=int, default=2, help="processes, of one thread each")
    asked = parser.parse_args()
    results = page.RESULTS / f"{asked.benchmark}.json"
    if not results.exists():
        sys.exit(f"{results} is not there: run benchmarks/evidence/run.py {asked.benchmark}, all of it, first")
    content = json.loads(results.read_text(encoding="utf-8"))
    chosen = {one["name"]: Setting(**(one["chosen"] or one["default"])[0]["setting"]) for one in content["methods"]}
    file = page.RESULTS / f"{asked.benchmark}-analyses.json"
    found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    with working_on(asked.benchmark, asked.out.absolute(), asked.workers) as bench:
        bench.finetune([SEED])
        for name in [one for one in asked.only if one not in NOT_FOR.get(asked.benchmark, ())]:
            started = time.time()
            result = ANALYSES[name].find(bench, chosen)
            found[name] = {
                "found": result, "machine": machine(), "made_by": made_by(),
                "minutes_of_this_call": round((time.time() - started) / 60, 1),
                "command": f"python benchmarks/evidence/analyse.py {asked.benchmark} --out FOLDER --only {name}",
            }  # fmt: skip
            file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            print(f"{file}: {name}", flush=True)
    page.write()


if __name__ == "__main__":
    main()
