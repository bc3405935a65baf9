"""Text generation against references: BLEU, TER, NIST, ROUGE-L, CIDEr, METEOR of what a model writes after prompts.

The column `--text` holds the prompt, `--target` a reference or a list of them. Rows with one and the same prompt are
one prompt, written to once, and all their references are its own (as in E2E's files). Decoding is a beam search without
sampling; the defaults are those of the papers' E2E runs. Metrics are named with commas in `--metrics`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch

from superpose.checkpoints.files import read_json
from superpose.checkpoints.models import open_model
from superpose.errors import SuperposeError
from superpose.evaluators.live import load_language_model, positions_of, row_facts, tokenizer_of
from superpose.evaluators.registry import Measured, Report, evaluator
from superpose.evaluators.text_metrics import METRICS, chosen_metrics
from superpose.inference import Example, LiveModel, Row, TaskData, batches, read_rows
from superpose.options import Range

MOST_SAMPLES = 3
"""Texts that the record shows."""


@dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """How texts are written, and what they are measured by."""

    metrics: str = "bleu,rouge_l"
    """Metrics with commas: bleu, ter, nist, rouge_l, cider, meteor."""
    num_beams: Annotated[int, Range(1, 1000)] = 10
    """Texts that the search keeps at a time; 1 takes the likeliest token each time."""
    length_penalty: Annotated[float, Range(-10, 10)] = 0.8
    """Exponent of the length that a finished text's log-probability is divided by."""
    no_repeat_ngram_size: Annotated[int, Range(0, 100)] = 4
    """No run of this many tokens occurs twice in a text; 0 allows all."""
    max_new_tokens: Annotated[int, Range(1, 100_000)] = 64
    """Tokens that are written at most."""
    stop: str = ""
    """Text at which what is written is cut off, beside the model's end-of-text token."""


@dataclass(frozen=True)
class Prompt:
    """What is written to, once, and everything that would have been right."""

    text: str
    references: tuple[str, ...]


@evaluator(
    "generate",
    options=GenerateOptions,
    reads=("text", "target"),
    needs=("target",),
    data_defaults={"max_length": 512, "batch_size": 8},
    packages=("transformers", "datasets", "sacrebleu", "rouge-score", "nltk", "pycocoevalcap"),
)
def generate(model: str, options: GenerateOptions, *, task: TaskData, device: torch.device, report: Report) -> Measured:
    """Return how near a model's texts come to references.

    Args:
        model: folder, hub id, or MODEL+ADAPTER.
        options: decoding and metrics.
        task: the data and its columns.
        device: where the model goes.
        report: called with the prompts done, and all.

    Returns:
        The metrics, and the first texts.

    Raises:
        SuperposeError: it is no language model, a row is not as it should be, or a metric's package is missing.
    """
    chosen = chosen_metrics(options.metrics)
    for name in chosen:
        METRICS[name].check()  # a package that is missing is told before hours of writing
    rows = read_rows(task, [task.text, task.target])
    prompts = group_prompts(rows.rows, task)
    live = load_language_model(model, task, device)
    tokenizer = tokenizer_of(live, model)
    if not hasattr(live.module, "generate") or not hasattr(live.module, "config"):
        mend = "let the loader return a model of transformers"
        raise SuperposeError("the model has no generate() to write with", where=model, mend=mend)
    examples, cut = _examples(prompts, live, tokenizer, task, options)
    ends = _ends(model, live, tokenizer)
    texts = [""] * len(prompts)
    done = 0
    for batch in batches(examples, task.batch_size):
        written = _write(live, batch.to(device).inputs, tokenizer, options, ends)
        for number, text in zip(batch.numbers, written, strict=True):
            texts[number] = text
        done += len(batch)
        report(done, len(prompts))
    references = [prompt.references for prompt in prompts]
    metrics = {name: METRICS[name].measure(texts, references) for name in chosen}
    samples = [{"prompt": prompt.text, "text": text} for prompt, text in zip(prompts, texts, strict=True)]
    facts = {
        **row_facts(rows), "prompts": len(prompts), "references": sum(map(len, references)), "prompts_cut": cut,
        "samples": samples[:MOST_SAMPLES],
    }  # fmt: skip
    return Measured(metrics, facts, {name: METRICS[name].better for name in chosen})


def group_prompts(rows: Sequence[Row], task: TaskData) -> list[Prompt]:
    """Return the prompts in the order of their first rows, each with the references of all its rows."""
    found: dict[str, list[str]] = {}
    for row in rows:
        told: Any = row.values[task.target]
        each = [told] if isinstance(told, str) else told
        if not isinstance(each, (list, tuple)) or not each or not all(isinstance(text, str) for text in each):
            what = f"column '{task.target}' holds neither a text nor a list of texts"
            raise SuperposeError(what, where=row.where, mend="name a column of references, or mend the row")
        found.setdefault(row.text(task.text), []).extend(each)
    return [Prompt(text, tuple(references)) for text, references in found.items()]


def _examples(
    prompts: Sequence[Prompt], live: LiveModel, tokenizer: Any, task: TaskData, options: GenerateOptions
) -> tuple[list[Example], int]:
    """Return the prompts as tokens, and how many were too long; a causal model's keep their end."""
    both, most = bool(getattr(live.module.config, "is_encoder_decoder", False)), positions_of(live)
    examples, cut = [], 0
    for prompt in prompts:
        ids = list(tokenizer(prompt.text)["input_ids"])
        if both and len(ids) > task.max_length:
            kept = tokenizer(prompt.text, truncation=True, max_length=task.max_length)["input_ids"]
        else:
            ids = ids[:-1] if not both and ids and ids[-1] == tokenizer.eos_token_id else ids
            kept = ids[-task.max_length :]
        if not kept:
            raise SuperposeError("a prompt has no tokens", where=task.data, mend="leave the row out")
        needed = len(kept) if both else len(kept) + options.max_new_tokens
        if most is not None and needed > most:
            what = f"a prompt and the text need {needed} tokens, and the model knows {most} positions"
            raise SuperposeError(what, where=task.data, mend="lower --max-length or --max-new-tokens")
        cut += len(kept) < len(ids)
        tensor = torch.tensor(kept)
        examples.append(Example({"input_ids": tensor, "attention_mask": torch.ones_like(tensor)}, None, len(kept)))
    return examples, cut


def _ends(model: str, live: LiveModel, tokenizer: Any) -> list[int]:
    """Return the tokens that end a text: chat models name several in a file of their own."""
    folder = getattr(open_model(model), "folder", None)
    told: Any = None
    if folder is not None and (folder / "generation_config.json").is_file():
        content = read_json(folder / "generation_config.json")
        if not isinstance(content, dict):
            mend = "mend the file, or take it out"
            raise SuperposeError("it is no mapping", where=f"{folder}/generation_config.json", mend=mend)
        told = content.get("eos_token_id")
    if told is None:
        told = getattr(live.module.config, "eos_token_id", None)
    if told is None:
        told = tokenizer.eos_token_id
    return [] if told is None else list(told) if isinstance(told, (list, tuple)) else [told]


def _write(live: LiveModel, inputs: Any, tokenizer: Any, options: GenerateOptions, ends: list[int]) -> list[str]:
    from transformers import GenerationConfig

    config: Any = live.module.config
    pad = next((token for token in (tokenizer.pad_token_id, *ends) if token is not None), 0)
    beams = {"length_penalty": options.length_penalty} if options.num_beams > 1 else {}
    settings = GenerationConfig(
        do_sample=False, num_beams=options.num_beams, no_repeat_ngram_size=options.no_repeat_ngram_size,
        max_new_tokens=options.max_new_tokens, eos_token_id=ends or None, pad_token_id=pad,
        bos_token_id=tokenizer.bos_token_id, decoder_start_token_id=getattr(config, "decoder_start_token_id", None),
        **beams,
    )  # fmt: skip
    writer: Any = live.module
    with torch.inference_mode():
        tokens = writer.generate(**inputs, generation_config=settings)
    known = 0 if getattr(config, "is_encoder_decoder", False) else inputs["input_ids"].shape[1]
    texts = [
        tokenizer.decode(each[known:], skip_special_tokens=True, clean_up_tokenization_spaces=False) for each in tokens
    ]
    return [(text.partition(options.stop)[0] if options.stop else text).strip() for text in texts]
