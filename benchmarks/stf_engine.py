"""STF against the textbook route, matrix by matrix: time with one thread, and distance from the float64 answer.

    python benchmarks/stf_engine.py                the four shapes, three runs of each side in turns: 15 minutes
    python benchmarks/stf_engine.py --quick        one small shape, to try it

The textbook route takes `torch.linalg.svd` of every task matrix, the whole of (U^T U) * (V^T V), and
`torch.linalg.solve`, all in float32. Both sides get the same tensors in memory, in a process that keeps what is freed,
as the command line does: page faults are part of neither. Two kinds of tasks, because it matters: `noise` is dense and
random, as fine-tuning with full rank is taken to be; `decaying` has the spectrum that trimmed task matrices of
fine-tuned encoders were found to have, from which float32 has more to lose.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import measuring
import torch
from torch import Tensor

from superpose.allocator import keep_freed_memory
from superpose.kinds import Kind
from superpose.methods.stf import StfOptions, stf

SHAPES = [(768, 768, 7), (768, 3072, 7), (1024, 1024, 8), (2048, 2048, 3)]
QUICK = [(256, 256, 3)]
EXACT = StfOptions(density=1.0, scaling_factor=1.0)
REDUCED = StfOptions(density=1.0, scaling_factor=1.0, feature_share=0.2)
SPREAD = 1e-3


def tasks_of(kind: str, out: int, in_: int, count: int) -> Tensor:
    """Return random task matrices, the same every time."""
    draw = torch.Generator().manual_seed(0)
    noise = SPREAD * torch.randn(count, out, in_, generator=draw)
    if kind == "noise":
        return noise
    rank = min(out, in_) // 8
    falling = torch.arange(1, rank + 1).float().rsqrt()
    left = falling * torch.randn(count, out, rank, generator=draw)
    return noise + 4 * SPREAD / rank**0.5 * left @ torch.randn(count, rank, in_, generator=draw)


def textbook(tasks: Tensor) -> Tensor:
    """Return STF's matrix by the shortest way to write it."""
    parts = [torch.linalg.svd(task, full_matrices=False) for task in tasks]
    u = torch.cat([part.U for part in parts], dim=1)
    s = torch.cat([part.S for part in parts])
    vh = torch.cat([part.Vh for part in parts])
    factors = torch.linalg.solve((u.T @ u) * (vh @ vh.T), s)
    return (u * factors) @ vh


def ours(tasks: Tensor, options: StfOptions) -> Tensor:
    """Return STF's matrix as superpose computes it."""
    return stf(tasks, options, kind=Kind.LINEAR).tensor


def distance(found: Tensor, exact: Tensor) -> float:
    """Return the relative distance in Frobenius norm."""
    return float((found.double() - exact).norm() / exact.norm())


def compare(kind: str, shape: tuple[int, int, int], runs: int) -> list[str]:
    """Time both sides in turns and return a row of the table."""
    tasks = tasks_of(kind, *shape)
    sides = {
        "textbook": lambda: textbook(tasks),
        "exact": lambda: ours(tasks, EXACT),
        "reduced": lambda: ours(tasks, REDUCED),
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    found: dict[str, Tensor] = {}
    for _ in range(runs):
        for name, side in sides.items():
            start = time.perf_counter()
            found[name] = side()
            seconds[name].append(time.perf_counter() - start)
    exact = textbook(tasks.double())
    middle = {name: statistics.median(times) for name, times in seconds.items()}
    out, in_, count = shape
    return [
        f"{out} x {in_}, T = {count}",
        kind,
        f"**{middle['textbook'] / middle['exact']:.1f}**",
        f"**{middle['textbook'] / middle['reduced']:.1f}**",
        f"{middle['textbook']:.2f}",
        f"{middle['exact']:.2f}",
        f"{middle['reduced']:.3f}",
        f"{distance(found['textbook'], exact):.1e}",
        f"{distance(found['exact'], exact):.1e}",
        f"{distance(found['reduced'], exact):.2f}",
    ]


def main() -> None:
    """Read the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--report", type=Path, help="file for the table")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    torch.linalg.svd(torch.randn(64, 64))  # libraries load on first use
    shapes = QUICK if arguments.quick else SHAPES
    rows = []
    for shape in shapes:
        for kind in ("noise", "decaying"):
            rows.append(compare(kind, shape, arguments.runs))
            print(*rows[-1], flush=True)
    columns = [
        "matrices", "tasks", "textbook / exact", "textbook / 20%", "textbook, s", "exact, s", "20% of features, s",
        "textbook's error", "our error", "20% from exact",
    ]  # fmt: skip
    about = f"{measuring.machine()}; one thread; median of {arguments.runs}; errors are relative to the float64 answer."
    measuring.publish(about, columns, rows, arguments.report)


if __name__ == "__main__":
    main()
