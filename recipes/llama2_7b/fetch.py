"""Fetch Llama-2-7B and its three fine-tunes, and cut the vocabulary of the one that has more tokens than the base.

python -m recipes.llama2_7b.fetch
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from recipes.fetching import Source, fetch_models
from recipes.rewriting import rewrite
from torch import Tensor

FETCHED = "math-as-fetched"
SOURCES = [
    Source("meta-llama/Llama-2-7b-hf", "base"),
    Source("LinkSoul/Chinese-Llama-2-7b", "chinese"),
    Source("meta-math/MetaMath-7B-V1.0", FETCHED),
    Source("qualis2006/llama-2-7b-int4-python-code-18k", "code"),
]
BY_TOKEN = ("model.embed_tokens.weight", "lm_head.weight")


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line and fetch."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", type=Path, default=Path("models"))
    asked = parser.parse_args(arguments)
    models = asked.models / "llama2_7b"
    fetch_models(SOURCES, models)
    if not (models / "math").exists():
        tokens = json.loads((models / "base/config.json").read_text())["vocab_size"]
        cut_vocabulary(models / FETCHED, models / "math", tokens)


def cut_vocabulary(folder: Path, out: Path, tokens: int) -> Path:
    """Write a model without the tokens that were added to its base's: the last rows of embedding and head.

    Args:
        folder: the model.
        out: where to.
        tokens: how many the base has.

    Returns:
        The new folder.
    """
    scratch = out.with_name(f".{out.name}.part")
    shutil.rmtree(scratch, ignore_errors=True)
    config = {**json.loads((folder / "config.json").read_text()), "vocab_size": tokens}

    def cut(name: str, tensor: Tensor) -> Tensor:
        return tensor[:tokens] if name in BY_TOKEN else tensor

    rewrite(folder, scratch, cut, config).rename(out)
    return out


if __name__ == "__main__":
    main()
