"""Tiny models in folders, with tokenizers made here; one has learnt a few texts by heart."""

from __future__ import annotations

import json
import random

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.utils import logging

logging.disable_progress_bar()

WORDS = ["red", "green", "blue", "cold", "warm", "old", "new", "fast", "slow", "small"]
LEARNT = (
    "1 + 2 = #### 3",
    "2 + 2 = #### 4",
    "4 + 4 = #### 8",
    "def three():\n    return 3",
    "def name():\n    return 'x'",
)


def write_rows(file, rows):
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(file)


def word_tokenizer():
    """A tokenizer of whole words that frames texts and pairs as BERT's does."""
    vocabulary = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )  # fmt: skip


def byte_tokenizer(*, ends=False):
    """A tokenizer of bytes, so that any text can be read and written; `ends`: texts end with a token, as T5's do."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<pad>": 0, "</s>": 1, **{letter: number + 2 for number, letter in enumerate(letters)}}
    inner = Tokenizer(models.BPE(vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    if ends:
        inner.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", pad_token="<pad>")


def save(model, tokenizer, folder):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_bert(folder, *, seed=0, **more):
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(WORDS) + 4, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=40, num_labels=3, initializer_range=0.5, pad_token_id=0, **more,
    )  # fmt: skip
    return save(BertForSequenceClassification(config), word_tokenizer(), folder)


def make_llama(folder, *, seed=0, learnt=()):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=258, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, bos_token_id=None, eos_token_id=1, pad_token_id=0,
        initializer_range=0.3 if not learnt else 0.05,
    )  # fmt: skip
    model, tokenizer = LlamaForCausalLM(config), byte_tokenizer()
    if learnt:
        _learn(model, tokenizer, learnt)
    return save(model, tokenizer, folder)


def make_t5(folder, *, seed=0):
    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=258, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0,
        pad_token_id=0, eos_token_id=1, initializer_factor=3.0,
    )  # fmt: skip
    return save(T5ForConditionalGeneration(config), byte_tokenizer(ends=True), folder)


def _learn(model, tokenizer, texts):
    """Let the model write each text to its end; what follows is an end-of-text token."""
    told = [torch.tensor([*tokenizer(text)["input_ids"], 1]) for text in texts]
    ids = torch.nn.utils.rnn.pad_sequence(told, batch_first=True, padding_value=0)
    mask = (torch.arange(ids.shape[1]) < torch.tensor([[len(each)] for each in told])).long()
    labels = torch.where(mask.bool(), ids, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for _ in range(120):
        optimizer.zero_grad()
        model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
        optimizer.step()
    model.eval()


def some_texts(count, *, seed=0, longest=12):
    """Texts of known and unknown words, of many lengths."""
    draw = random.Random(seed)
    return [" ".join(draw.choices([*WORDS, "unknown"], k=draw.randint(1, longest))) for _ in range(count)]
