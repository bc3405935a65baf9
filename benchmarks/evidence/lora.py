"""LoRA adapters of a decoder on three tasks posed as prompts, and what the model with a merged adapter answers rightly.

SmolLM2-135M-Instruct, adapters of rank 8 on the attention's maps (`benchmarks/adapters`). An answer is the class whose
name's first token is the likeliest after the prompt. Merged models are written out whole, so that every method can be
scored; half of what is held out of training is for choosing hyperparameters, half for the final numbers.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).parent.parent / "adapters"))

import torch
from finetune import ALPHA, RANK, adapter
from grid import Setting
from smollm2 import base_model
from suite import Answers, Part, source_of
from tasks import LONGEST, NAMES, Prompts, load_all, padded
from torch import Tensor, nn

from superpose.demo.encoder import fast_bfloat16

TRAIN, VALIDATION, TEST = 480, 80, 150
"""Examples of each task."""
BATCH = 16


@dataclass(frozen=True)
class LoraSuite:
    """The benchmark of adapters.

    Args:
        cache: folder of archives and adapters.
    """

    cache: Path
    name: str = "lora"

    @property
    def mark(self) -> str:
        """Numbers of examples, their length, and the adapters' form."""
        return f"{TRAIN}/{VALIDATION}/{TEST} texts of {LONGEST} tokens, adapters of rank {RANK}, alpha {ALPHA}"

    @property
    def rules(self) -> tuple[Mapping[str, Any], ...]:
        """No rules."""
        return ()

    @property
    def base(self) -> Path:
        """The decoder, dequantised."""
        return base_model(self.cache)

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks."""
        return NAMES

    @property
    def sizes(self) -> dict[str, list[int]]:
        """Numbers of training, validation and test examples of each task."""
        return {name: [TRAIN, VALIDATION, TEST] for name in self.tasks}

    def finetune(self, task: str, seed: int) -> Path:
        """Return the folder of an adapter, trained if it is not in the cache."""
        return adapter(self.base, _prompts(self.cache)[task], self.cache, _pad(self.cache), seed)

    def tuned(self, seed: int) -> list[Path]:
        """Return the folders of a seed's adapters, in the tasks' order."""
        return [self.finetune(name, seed) for name in self.tasks]

    def answers(self, model: Path, tasks: Sequence[str], seed: int, part: Part) -> dict[str, Answers]:
        """Return which prompts a model answers rightly."""
        del seed  # adapters keep nothing to themselves
        from transformers import AutoModelForCausalLM

        place = self.base if (model / "adapter_config.json").exists() else model
        decoder = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)
        if place != model:
            from peft import PeftModel

            decoder = PeftModel.from_pretrained(decoder, str(model)).merge_and_unload()
        source, count = source_of(part)
        cut = (
            slice(0, min(count or VALIDATION, VALIDATION))
            if source == "validation"
            else slice(VALIDATION, VALIDATION + TEST)
        )
        prompts = _prompts(self.cache)
        return {
            task: right_answers(
                decoder.eval(), replace(prompts[task], held_out=prompts[task].held_out[cut]), _pad(self.cache)
            )
            for task in tasks
        }

    @property
    def held_out(self) -> tuple[str, ...]:
        """No tasks."""
        return ()

    def features(self, model: Path, task: str, part: Literal["train", "test"], count: int) -> tuple[Tensor, Tensor]:
        """Features of prompts are not asked for: a decoder's tasks are answered in words."""
        raise NotImplementedError(f"{task}: this benchmark has no heads")

    def data(self, setting: Setting, task: str, seed: int) -> dict[str, Any]:
        """Return nothing: methods that look at data are not run here."""
        del task, seed
        if setting.data or setting.statistics:
            raise ValueError(f"{setting.text}: this benchmark has no data for it")
        return {}


@cache
def _tokenizer(cache_folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(base_model(cache_folder))


def _pad(cache_folder: Path) -> int:
    return _tokenizer(cache_folder).pad_token_id or 0


@cache
def _prompts(cache_folder: Path) -> dict[str, Prompts]:
    found = load_all(cache_folder, _tokenizer(cache_folder), TRAIN, VALIDATION + TEST)
    return {task.name: task for task in found}


@torch.inference_mode()
def right_answers(model: Any, task: Prompts, pad: int) -> Answers:
    """Return, in the prompts' order, whether the right class's name begins with the likeliest token of all classes'."""
    firsts = torch.tensor([answer[0] for answer in task.answers])
    order = sorted(range(len(task.held_out)), key=lambda index: len(task.held_out[index][0]))
    found = [False] * len(order)
    for start in range(0, len(order), BATCH):
        batch = order[start : start + BATCH]
        ids, mask = padded([task.held_out[index][0] for index in batch], pad)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=fast_bfloat16()):
            hidden = model.model(input_ids=ids, attention_mask=mask).last_hidden_state
        last = hidden[torch.arange(len(batch)), mask.sum(dim=1) - 1].float()
        said = nn.functional.linear(last, model.lm_head.weight[firsts]).argmax(dim=1).tolist()
        for index, answer in zip(batch, said, strict=True):
            found[index] = answer == task.held_out[index][1]
    return Answers(found)
