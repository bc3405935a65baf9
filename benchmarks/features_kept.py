"""What STF loses with fewer features: accuracy of real merged models, distance from the full solution, and time.

    python benchmarks/features_kept.py                 the demo's four fine-tuned encoders, fine-tuned if need be

Accuracy is that of the demo: the mean over its tasks of 250 held-out examples each (one standard error is about 0.012).
Hyperparameters are STF's defaults but for the features kept, so nothing was chosen on these examples. Distance is
recorded by `check_share`: the mean over all matrices of |M - M_all| / |M_all|.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import measuring

import superpose
from superpose.demo.run import prepare
from superpose.demo.score import score_shared

SETTINGS: list[tuple[str, dict[str, Any]]] = [
    ("all features", {}),
    ("half", {"feature_share": 0.5}),
    ("20%", {"feature_share": 0.2}),
    ("20%, exact decomposition", {"feature_share": 0.2, "decomposition": "exact"}),
    ("10%", {"feature_share": 0.1}),
    ("5%", {"feature_share": 0.05}),
    ("90% of the energy", {"energy": 0.9}),
    ("50% of the energy", {"energy": 0.5}),
]


def main() -> None:
    """Read the command line, merge, score, print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cache", type=Path, help="superpose's cache folder")
    parser.add_argument("--report", type=Path, help="file for the table")
    parser.add_argument("--runs", type=int, default=3, help="timed merges of each")
    parser.add_argument("--quick", action="store_true", help="the first and third setting alone")
    arguments = parser.parse_args()
    base, tuned = prepare(arguments.cache)
    recipe = {"base": str(base), "models": [{"path": str(one.body), "name": one.task.name} for one in tuned]}
    rows = []
    scratch = Path(tempfile.mkdtemp(dir=arguments.cache, prefix="features-kept-"))
    chosen = SETTINGS[:3:2] if arguments.quick else SETTINGS
    try:
        for name, options in chosen:
            folder = scratch / "merged"
            seconds = []
            for _ in range(arguments.runs):
                start = time.perf_counter()
                superpose.merge(recipe | {"options": options}, folder, overwrite=True)
                seconds.append(time.perf_counter() - start)
            scores = score_shared(folder, tuned)
            record = superpose.merge(recipe | {"options": options | {"check_share": 1.0}}, folder, overwrite=True)
            distances = [tensor.stats.get("distance_to_all_features", 0.0) for tensor in record.tensors]
            distances = [one for one, tensor in zip(distances, record.tensors, strict=True) if tensor.stats]
            rows.append(
                [
                    name,
                    f"{statistics.median(seconds):.1f}",
                    f"{statistics.mean(distances):.2f}",
                    *(f"{score:.3f}" for score in scores.values()),
                    f"{statistics.mean(scores.values()):.3f}",
                ]
            )
            print(*rows[-1], flush=True)
    finally:
        shutil.rmtree(scratch)
    columns = ["features kept", "merge, s", "distance", *(one.task.name for one in tuned), "mean accuracy"]
    about = f"{measuring.machine()}; MiniLM (384 wide), 4 tasks; STF, density 0.2, scaling factor 0.8."
    measuring.publish(about, columns, rows, arguments.report)


if __name__ == "__main__":
    main()
