"""Measure a base, its fine-tunes and their merge: by labelled texts, and by a program of your own.

python examples/evaluate_models.py
"""

import json
import random
import sys
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast
from transformers.utils import logging

import superpose

logging.disable_progress_bar()
folder = Path(tempfile.mkdtemp())
torch.manual_seed(0)
draw = random.Random(0)

topics = {"sport": ["ball", "goal", "team"], "food": ["soup", "bread", "salt"], "music": ["song", "drum", "choir"]}
words = [word for each in topics.values() for word in each] + ["the", "a", "and", "of"]
vocabulary = {word: number for number, word in enumerate(["[PAD]", "[UNK]", *words])}
inner = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
inner.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]")


def text_about(topic: str) -> str:
    """Return some words, one of them of the topic."""
    chosen = draw.choices(["the", "a", "and", "of"], k=draw.randint(2, 6))
    return " ".join([*chosen, draw.choice(topics[topic])])


def train(model: BertForSequenceClassification, known: list[str]) -> None:
    """Teach the model to tell some of the topics."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(40):
        named = draw.choices(known, k=32)
        inputs = tokenizer([text_about(topic) for topic in named], padding=True, return_tensors="pt")
        inputs.pop("token_type_ids", None)
        optimizer.zero_grad()
        model(**inputs, labels=torch.tensor([list(topics).index(topic) for topic in named])).loss.backward()
        optimizer.step()


def save(model: BertForSequenceClassification, name: str) -> None:
    """Save a model with its tokenizer."""
    model.save_pretrained(folder / name)
    tokenizer.save_pretrained(folder / name)


config = BertConfig(
    vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
    id2label=dict(enumerate(topics)), label2id={topic: number for number, topic in enumerate(topics)},
)  # fmt: skip
base = BertForSequenceClassification(config)
save(base, "base")
for name, known in (("indoors", ["food", "music"]), ("outdoors", ["sport", "food"])):
    tuned = BertForSequenceClassification(config)
    tuned.load_state_dict(base.state_dict())
    train(tuned, known)
    save(tuned, name)
recipe = {"base": str(folder / "base"), "models": [str(folder / "indoors"), str(folder / "outdoors")], "method": "stf"}
superpose.merge({**recipe, "options": {"scaling_factor": 1.0, "density": 1.0}}, folder / "merged")

rows = [{"text": text_about(topic), "topic": topic} for topic in draw.choices(list(topics), k=200)]
(folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
for name in ("base", "indoors", "outdoors", "merged"):
    found = superpose.evaluate(folder / name, "classify", data={"data": folder / "rows.jsonl", "label": "topic"})
    print(f"{name:10}", ", ".join(f"{metric} {value:.3f}" for metric, value in found.metrics.items()))

# Any program that prints a JSON object of numbers is an evaluator: here, the size of the folder.
(folder / "size.py").write_text(
    "import json, pathlib, sys\n"
    "print(json.dumps({'bytes': sum(file.stat().st_size for file in pathlib.Path(sys.argv[1]).iterdir())}))\n"
)
found = superpose.evaluate(
    folder / "merged", "command", command=f"{sys.executable} {folder / 'size.py'} {{model}}", lower="bytes"
)
print(f"merged     bytes {found.metrics['bytes']:.0f}, {found.better['bytes']} is better")
