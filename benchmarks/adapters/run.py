"""Real adapters merged by every method: what the merged model can do, and that PEFT says the same as superpose.

    python benchmarks/adapters/run.py --out FOLDER [--train N] [--held-out N] [--only METHOD ...] [--report FILE]

LoRA fine-tunes of SmolLM2-135M on three real tasks, merged with each method's defaults. A row's accuracies are those of
the merged model. Methods that keep adapters as factors give an exact adapter; the others one of the sum of the ranks,
of which the table says how much of the update it does not hold. Each adapter is loaded by PEFT and, folded into the
base by superpose, as a model: both have to generate the same text.

Models and data come from the package registry and are kept in FOLDER, as are adapters and measurements.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))  # measuring.py is one folder up

import torch
from finetune import ALPHA, RANK, adapter
from measuring import Kept, Report, Run, machine
from smollm2 import base_model
from tasks import Prompts, accuracy, load_all

import superpose

GENERATED = 16
"""Tokens that are generated from each prompt."""
LEFT_OUT = ("emr",)
"""EMR makes a set of models around one that is meant for no task: not an adapter."""


def load(folder: Path, on: Path | None = None) -> Any:
    """Return a model, or the model `on` with the adapter in `folder`."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(on or folder, dtype=torch.float32)
    return (PeftModel.from_pretrained(model, folder) if on is not None else model).eval()


def texts(model: Any, prompts: Sequence[tuple[int, ...]], pad: int) -> list[list[int]]:
    """Return what a model says after each prompt, the likeliest token every time."""
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        mask = torch.ones_like(ids)
        said = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=GENERATED, do_sample=False, pad_token_id=pad
        )
        found.append(said[0, len(prompt) :].tolist())
    return found


def scores(folder: Path, tasks: Sequence[Prompts], pad: int) -> dict[str, float]:
    """Return a model's accuracy on every task."""
    model = load(folder)
    return {task.name: accuracy(model, task, pad) for task in tasks}


class Bench:
    """The base, its adapters, and what was measured.

    Args:
        out: folder of everything.
        train: examples to learn from.
        held_out: examples to score on.
    """

    def __init__(self, out: Path, train: int, held_out: int) -> None:
        from transformers import AutoTokenizer

        self.out, self.base = out, base_model(out)
        tokenizer = AutoTokenizer.from_pretrained(self.base)
        self.pad = tokenizer.pad_token_id or 0
        self.tasks = load_all(out, tokenizer, train, held_out)
        self.adapters = [adapter(self.base, task, out, self.pad) for task in self.tasks]
        self.prompts = [task.held_out[0][0] for task in self.tasks]
        self.kept = Kept(out)
        self.mark = f"{train} to learn from, {held_out} held out"

    def measured(self, name: str, take: Any) -> dict[str, Any]:
        """Return the facts of a name, found now if they are not kept."""
        facts = self.kept.run(f"{name}, {self.mark}", lambda: Run(0, 0, 0, take())).facts
        print(f"  {name}: {json.dumps(facts)}", file=sys.stderr, flush=True)
        return dict(facts)

    def recipe(self, models: Sequence[Path], **rest: Any) -> dict[str, Any]:
        """Return a recipe with these adapters."""
        return {"base": str(self.base), "models": [{"path": str(one)} for one in models], **rest}

    def folded(self, one: Path, target: Path) -> None:
        """Fold an adapter into the base."""
        options = {"method": "task_arithmetic", "options": {"scaling_factor": 1.0}}
        superpose.merge(self.recipe([one], **options), target, overwrite=True)

    def single(self, number: int) -> dict[str, Any]:
        """Return the accuracies of the base with one adapter."""
        self.folded(self.adapters[number], self.out / "scratch")
        return {"scores": scores(self.out / "scratch", self.tasks, self.pad)}

    def merged(self, method: str) -> dict[str, Any]:
        """Merge by a method into a model and an adapter; return accuracies, what was lost, and whether PEFT agrees."""
        models = self.adapters[:2] if method == "slerp" else self.adapters
        output = {"form": "both"}
        try:
            superpose.plan(self.recipe(models, method=method, output=output))
        except superpose.SuperposeError as error:
            if "--adapter-rank" not in error.mend:
                raise
            output |= {"rank": RANK * len(models)}  # it changes single entries
        scratch = self.out / "scratch"
        record = superpose.merge(self.recipe(models, method=method, output=output), scratch, overwrite=True)
        found = scores(scratch, self.tasks, self.pad)
        self.folded(scratch / "adapter", self.out / "folded")
        said = texts(load(scratch / "adapter", on=self.base), self.prompts, self.pad)
        same = said == texts(load(self.out / "folded"), self.prompts, self.pad)
        ranks = [tensor.stats["adapter_rank"] for tensor in record.tensors if tensor.factors]
        return {
            "scores": found, "same": same, "lost": record.totals["truncation_error"], "rank": max(ranks),
            "seconds": record.totals["seconds"],
        }  # fmt: skip


def main() -> None:
    """Read the command line, fine-tune, merge, score, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder, outside the repository, of everything")
    parser.add_argument("--train", type=int, default=480, help="examples to learn from, of each task")
    parser.add_argument("--held-out", type=int, default=200, help="examples to score on, of each task")
    parser.add_argument("--quick", action="store_true", help="a few examples, two methods: to try the benchmark")
    parser.add_argument("--only", nargs="+", help="names of methods")
    parser.add_argument("--report", type=Path, help="file that gets the table too")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    train, held_out = (16, 8) if arguments.quick else (arguments.train, arguments.held_out)
    bench = Bench(arguments.out, train, held_out)
    methods = [method.name for method in superpose.list_methods() if method.name not in LEFT_OUT]
    methods = arguments.only or (["stf", "ties"] if arguments.quick else methods)
    from peft import __version__

    report = Report(arguments.report)
    error = math.sqrt(0.75 * 0.25 / held_out / len(bench.tasks))
    report.say(
        f"{machine()}, peft {__version__}",
        f"SmolLM2-135M-Instruct, LoRA of rank {RANK}, alpha {ALPHA} on attention; {train} examples to learn from and"
        f" {held_out} held out of each task; one standard error of a mean is about {error:.3f}",
    )
    names = [task.name for task in bench.tasks]
    report.table("model", *names, "mean", "adapter's rank", "left out", "PEFT says the same", "merged in, s")
    rows = {"base": bench.measured("base", lambda: {"scores": scores(bench.base, bench.tasks, bench.pad)})}
    for number, name in enumerate(names):
        rows[f"adapter of {name}"] = bench.measured(f"single {name}", lambda number=number: bench.single(number))
    for method in methods:
        rows[f"`{method}`"] = bench.measured(method, lambda method=method: bench.merged(method))
    for name, facts in rows.items():
        found = facts["scores"]
        mean = sum(found.values()) / len(found)
        rest = ["", "", "", ""]
        if "rank" in facts:
            lost = f"{facts['lost']:.1%}" if facts["lost"] else ""
            rest = [facts["rank"], lost, "yes" if facts["same"] else "no", f"{facts['seconds']:.1f}"]
        report.row(name, *(f"{found[task]:.3f}" for task in names), f"{mean:.3f}", *rest)
    report.write()
    for folder in ("scratch", "folded"):
        shutil.rmtree(bench.out / folder, ignore_errors=True)


if __name__ == "__main__":
    main()
