"""What the merged model writes on E2E, DART and WebNLG against the references, by superpose's `generate`.

python -m recipes.gpt2_medium_lora.evaluate MODEL [MODEL ...]

Decoding is that of microsoft/LoRA: 10 beams, length penalty 0.8, no 4-gram twice, 64 tokens, cut at an empty line.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from recipes.gpt2_medium_lora.data import FILES
from recipes.gpt2_medium_lora.fetch import DATA
from recipes.scores import evaluated, measure

METRICS = {
    "e2e": ("bleu", "nist", "meteor", "rouge_l", "cider"),
    "dart": ("bleu", "meteor", "ter"),
    "webnlg": ("bleu", "meteor", "ter"),
}
DECODING = {"num_beams": 10, "length_penalty": 0.8, "no_repeat_ngram_size": 4, "max_new_tokens": 64, "stop": "\n\n"}
IN_PERCENT = ("meteor", "rouge_l")
"""Shares of one here, percents in the papers."""
LOADER = "recipes.gpt2_medium_lora.loader:load"


def written(
    model: str, name: str, *, data: Path, without: Sequence[str], examples: int | None, batch_size: int, device: str
) -> dict[str, float]:
    """Return how near a model's texts come to the references of a test set."""
    task = {"data": data / f"{name}.jsonl", "target": "target", "batch_size": batch_size, "loader": LOADER}
    task |= {"examples": examples} if examples else {}
    metrics = ",".join(metric for metric in METRICS[name] if metric not in without)
    found = evaluated(model, "generate", data=task, metrics=metrics, device=device, **DECODING)
    return {
        f"{name} {metric}": 100 * value if metric in IN_PERCENT else value
        for metric, value in found.items()
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> list[dict[str, float]]:
    """Read the command line, measure, and print the table's rows."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", nargs="+", help="folder of a merged model")
    parser.add_argument("--tasks", nargs="+", choices=FILES, default=list(FILES))
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--results", type=Path, default=Path("results/gpt2_medium_lora.jsonl"))
    parser.add_argument("--without", nargs="+", default=[], help="metrics that are left out: meteor needs Java")
    parser.add_argument("--examples", type=int, help="rows of each test set, drawn at random")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--device", default="auto")
    asked = parser.parse_args(arguments)
    score = partial(
        written, data=asked.data, without=asked.without, examples=asked.examples, batch_size=asked.batch_size,
        device=asked.device,
    )  # fmt: skip
    return measure(asked.model, asked.tasks, score, asked.results, average=False)


if __name__ == "__main__":
    main()
