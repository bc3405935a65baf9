"""Fetch GPT-2 Medium, the three adapters that microsoft/LoRA released, and the three test sets in its repository.

python -m recipes.gpt2_medium_lora.fetch
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from recipes.fetching import Source, fetch_file, fetch_models
from recipes.gpt2_medium_lora.data import FILES, write_rows

DATA = Path("data/gpt2_medium_lora")
RELEASE = "https://github.com/microsoft/LoRA/releases/download/GPT-2/gpt2_md_lora_{}.pt"
REPOSITORY = "https://raw.githubusercontent.com/microsoft/LoRA/{}/examples/NLG/data/{}"
ADAPTER = {
    "peft_type": "LORA",
    "base_model_name_or_path": "openai-community/gpt2-medium",
    "r": 4,
    "lora_alpha": 32,
    "enable_lora": [True, False, True],
    "fan_in_fan_out": True,
}
"""What the released files do not say: factors of query and value, of rank 4 each, whose product counts eightfold."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line and fetch."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", type=Path, default=Path("models"))
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--revision", default="main", help="of the repository that the data is in")
    asked = parser.parse_args(arguments)
    models = asked.models / "gpt2_medium_lora"
    fetch_models([Source("openai-community/gpt2-medium", "base")], models)
    for name, file in FILES.items():
        fetch_file(RELEASE.format(name), models / name / f"gpt2_md_lora_{name}.pt")
        write_config(models / name)
        raw = fetch_file(REPOSITORY.format(asked.revision, file), asked.data / "raw" / Path(file).name)
        write_rows(name, raw, asked.data / f"{name}.jsonl")


def write_config(folder: Path) -> None:
    """Write what makes a released file an adapter."""
    (folder / "adapter_config.json").write_text(json.dumps(ADAPTER, indent=2) + "\n")


if __name__ == "__main__":
    main()
