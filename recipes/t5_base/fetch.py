"""Fetch T5-base, the base of the seven fine-tunes. They were not released: `finetune.py` makes them.

python -m recipes.t5_base.fetch
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from recipes.fetching import Source, fetch_models


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line and fetch."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", type=Path, default=Path("models"))
    asked = parser.parse_args(arguments)
    fetch_models([Source("google-t5/t5-base", "base")], asked.models / "t5_base")


if __name__ == "__main__":
    main()
