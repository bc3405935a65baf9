"""What lies beside the weights in a Hugging Face folder: config, tokenizer, preprocessing."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from superpose.errors import SuperposeError

LARGEST_SIDECAR = 2**30
"""Bytes; fifty times the largest tokenizer. A file with a hole can say that it has any number of them."""
# What tokenizers and processors are called, of the many that transformers knows.
NAMES = re.compile(
    r"generation_config\.json|\w*(tokeni[sz]er|vocab|merges|token|special|processor|preprocessor|normalizer)\w*"
    r"(-\w+)?\.(json|txt|model|bpe\.model|tsv)|chat_template\.\w+|\w*(spm|spiece|sentencepiece|bpe)\w*(\.\w+)*"
    r"|\w+\.(model|spm|codes|tiktoken)|dict\.txt|tekken\.json"
)
DTYPE_WORDS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def sidecar_files(folder: Path | None, config: Mapping[str, Any]) -> list[Path]:
    """Return the files of a folder that the merged model takes over as they are; but config.json."""
    if folder is None:
        return []
    found = [file for file in sorted(folder.iterdir()) if NAMES.fullmatch(file.name) and is_own(file, folder)]
    if config.get("auto_map"):  # a model whose code comes with it; copied, never run
        found += [file for file in sorted(folder.glob("*.py")) if is_own(file, folder)]
    return found


def is_own(file: Path, folder: Path) -> bool:
    """Whether a file is the folder's own: no link out of it, but for the hub cache's to its blobs."""
    place, home = file.resolve(), folder.resolve()
    return file.is_file() and (home in place.parents or place.parent == home.parent.parent / "blobs")


def copy_sidecars(folder: Path | None, config: Mapping[str, Any], target: Path, dtype: str | None) -> list[str]:
    """Copy a model's sidecars and write its config.

    Args:
        folder: the base's folder; nothing is copied when it is None.
        config: the base's config.
        target: where to.
        dtype: name of the dtype that all float tensors were cast to, None if each kept its own.

    Returns:
        Names of the files written.
    """
    written = []
    for file in sidecar_files(folder, config):
        if file.stat().st_size > LARGEST_SIDECAR:
            mend = "take it out of the folder, or give it a name that no tokenizer has, and run the same command again"
            raise SuperposeError(f"{file.stat().st_size} bytes are too many for a copy", where=str(file), mend=mend)
        shutil.copyfile(file, target / file.name)  # contents alone: modes come from the umask
        written.append(file.name)
    if folder is not None and config and dtype is None:
        shutil.copyfile(folder / "config.json", target / "config.json")
    elif config and dtype is not None:
        key = "torch_dtype" if "torch_dtype" in config else "dtype"
        merged = {**config, key: DTYPE_WORDS[dtype]}
        (target / "config.json").write_text(json.dumps(merged, indent=2) + "\n", encoding="utf-8")
    return written + (["config.json"] if config else [])
