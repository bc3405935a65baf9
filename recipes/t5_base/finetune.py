"""Fine-tune T5-base on one task with the settings of the TIES-Merging code, and keep the best of its checkpoints.

python -m recipes.t5_base.finetune paws

AdamW at a constant 1e-4, 256 examples a batch and 4 batches a step, texts of 128 tokens, template 0, bfloat16, seed 42;
every 100 batches the 32 rows held back are asked, and after 5 times without gain, or 75,000 batches, training ends.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from recipes.scores import evaluated
from recipes.t5_base.prepare import DATA, SEED
from recipes.t5_base.tasks import MERGED

LONGEST = 128
IGNORED = -100


def main(arguments: Sequence[str] | None = None) -> Path:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("task", choices=MERGED)
    parser.add_argument("--models", type=Path, default=Path("models"))
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--batches-a-step", type=int, default=4)
    parser.add_argument("--batches", type=int, default=75_000)
    parser.add_argument("--batches-a-check", type=int, default=100)
    parser.add_argument("--patience", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return train(parser.parse_args(arguments))


def train(asked: argparse.Namespace) -> Path:
    """Train on a task, and return the folder of the best checkpoint."""
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    torch.manual_seed(SEED)
    folder, out = asked.models / "t5_base/base", asked.models / "t5_base" / asked.task
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    model.to(asked.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=asked.learning_rate)
    batches = _batches(_read(asked.data / asked.task / "train.jsonl"), tokenizer, asked.batch_size)
    best, unchanged = -1.0, 0
    for number in range(1, asked.batches + 1):
        batch = {name: tensor.to(asked.device) for name, tensor in next(batches).items()}
        with torch.autocast(torch.device(asked.device).type, torch.bfloat16):
            loss = model(**batch).loss
        (loss / asked.batches_a_step).backward()
        if number % asked.batches_a_step == 0:
            optimizer.step()
            optimizer.zero_grad()
        if number % asked.batches_a_check:
            continue
        found = _check(model, tokenizer, out, asked)
        print(f"{asked.task}, batch {number}: loss {float(loss.detach()):.4f}, accuracy {found:.3f}", file=sys.stderr)
        best, unchanged = (found, 0) if found > best else (best, unchanged + 1)
        if unchanged == 0:
            shutil.rmtree(out, ignore_errors=True)
            _checked(out).rename(out)
        if unchanged >= asked.patience:
            break
    shutil.rmtree(_checked(out), ignore_errors=True)
    return out


def _checked(out: Path) -> Path:
    return out.with_name(f".{out.name}.checked")


def _check(model: Any, tokenizer: Any, out: Path, asked: argparse.Namespace) -> float:
    """Save the model beside its final place, and return its accuracy on the rows held back, by the first template."""
    scratch, data = _checked(out), asked.data / asked.task
    model.save_pretrained(scratch)
    tokenizer.save_pretrained(scratch)
    task = {"data": data / "validation.jsonl", "max_length": LONGEST}
    asking = {"templates": str(data / "first.yaml"), "device": asked.device}
    return evaluated(str(scratch), "rank", data=task, **asking)["accuracy"]


def _read(file: Path) -> list[tuple[str, str]]:
    rows = map(json.loads, file.read_text(encoding="utf-8").splitlines())
    return [(row["prompt_0"], row["answer"]) for row in rows]


def _batches(rows: list[tuple[str, str]], tokenizer: Any, size: int) -> Iterator[dict[str, torch.Tensor]]:
    """Return batches without end; the rows are shuffled anew each time that all were seen."""
    draw = random.Random(SEED)
    while True:
        draw.shuffle(rows)
        for start in range(0, len(rows), size):
            prompts, answers = zip(*rows[start : start + size], strict=True)
            read = tokenizer(list(prompts), padding=True, truncation=True, max_length=LONGEST, return_tensors="pt")
            wanted = tokenizer(
                text_target=list(answers), padding=True, truncation=True, max_length=LONGEST, return_tensors="pt"
            )
            labels = wanted["input_ids"].masked_fill(wanted["attention_mask"] == 0, IGNORED)
            yield {"input_ids": read["input_ids"], "attention_mask": read["attention_mask"], "labels": labels}


if __name__ == "__main__":
    main()
