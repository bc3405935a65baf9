"""CMMLU, GSM8K and HumanEval by the harness lm-eval, through superpose's `lm_eval`.

python -m recipes.llama2_7b.evaluate --allow-code MODEL [MODEL ...]

HumanEval runs code that the model writes, on this machine and unprotected: use a container, or leave the task out.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from recipes.scores import evaluated, measure

COLUMNS = {
    "cmmlu": "acc",
    "gsm8k": "exact_match/strict-match",
    "gsm8k_metamath": "exact_match/answer",
    "humaneval": "pass@1/create_test",
}
"""The number of each task that the table has, in percent there."""
OF_THE_PAPER = ("cmmlu", "gsm8k", "humaneval")
Counts = Mapping[str, int | None]
OWN_TASKS = Path(__file__).parent / "tasks"


def scored(
    model: str,
    name: str,
    *,
    include: Path,
    allow_code: bool,
    counts: dict[str, int | None],
    batch_size: int,
    device: str,
) -> dict[str, float]:
    """Return a model's number on a task, in percent."""
    options = {"tasks": name, "include": str(include), "batch_size": batch_size, "allow_code": allow_code}
    options |= {key: count for key, count in counts.items() if count is not None}
    found = evaluated(model, "lm_eval", device=device, **options)
    return {name: 100 * found[f"{name}/{COLUMNS[name]}"]}


def main(arguments: Sequence[str] | None = None) -> list[dict[str, float]]:
    """Read the command line, measure, and print the table's rows."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", nargs="+")
    parser.add_argument("--tasks", nargs="+", choices=COLUMNS, default=list(OF_THE_PAPER))
    parser.add_argument("--include", type=Path, default=OWN_TASKS, help="folder of the harness's task files")
    parser.add_argument("--allow-code", action="store_true")
    parser.add_argument("--limit", type=int, help="questions of each task")
    parser.add_argument("--num-fewshot", type=int, help="examples in the prompt; the harness's own number if not given")
    parser.add_argument("--results", type=Path, default=Path("results/llama2_7b.jsonl"))
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--device", default="auto")
    asked = parser.parse_args(arguments)
    score = partial(
        scored, include=asked.include, allow_code=asked.allow_code, batch_size=asked.batch_size, device=asked.device,
        counts={"limit": asked.limit, "num_fewshot": asked.num_fewshot},
    )  # fmt: skip
    return measure(asked.model, asked.tasks, score, asked.results)


if __name__ == "__main__":
    main()
