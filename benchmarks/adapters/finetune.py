"""LoRA fine-tunes of the base, one for each task, by PEFT; kept once they are made."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch
from tasks import Prompts, padded

from superpose.demo.folders import complete_folder

RANK, ALPHA = 8, 16
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
BATCH = 8
RATE = 5e-4
IGNORED = -100
"""Label of a token that is not learnt."""


def adapter(base: Path, task: Prompts, cache: Path, pad: int, seed: int = 0) -> Path:
    """Return the folder of a task's adapter, trained if it is not there.

    Args:
        base: folder of the base.
        task: what to learn.
        cache: folder that keeps adapters.
        pad: token that fills batches up.
        seed: of the factors to begin with, and the order of the examples.

    Returns:
        A PEFT folder.
    """
    target = cache / f"lora-{task.name}-{len(task.train)}-r{RANK}-a{ALPHA}{f'-seed{seed}' if seed else ''}"
    if target.is_dir():
        return target
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    started = time.perf_counter()
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    _train(model, task, pad)
    with complete_folder(target) as folder:
        model.save_pretrained(folder)
    print(f"{task.name}: trained in {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    return target


def _train(model: Any, task: Prompts, pad: int) -> None:
    learnt = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learnt, lr=RATE)
    order = torch.randperm(len(task.train)).tolist()
    steps = -(-len(order) // BATCH)
    for step in range(steps):
        for group in optimizer.param_groups:  # ten steps of warm-up, then linearly to zero
            group["lr"] = RATE * min(1, (step + 1) / 10) * (1 - step / steps)
        batch = [task.train[place] for place in order[step * BATCH : (step + 1) * BATCH]]
        rows = [(*prompt, *task.answers[label]) for prompt, label in batch]
        ids, mask = padded(rows, pad)
        labels = torch.full_like(ids, IGNORED)
        for number, (prompt, label) in enumerate(batch):
            stop = len(prompt) + len(task.answers[label])
            labels[number, len(prompt) : stop] = ids[number, len(prompt) : stop]
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learnt, 1.0)
        optimizer.step()
