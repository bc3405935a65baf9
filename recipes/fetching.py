"""Fetch models from the Hugging Face hub and files from the web, and keep on record which revision came.

`revisions.json` beside the models says which commit each of them was fetched at. Where it is there already, those
commits are fetched again: keep the file, and a run next year reads the bytes of today.
"""

from __future__ import annotations

import json
import sys
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

BESIDE = ("*.json", "*.model", "*.txt", "LICENSE*", "README.md")
"""Config, tokenizer, preprocessing, and on what terms."""
WEIGHTS = ("*.safetensors", "*.bin")
"""In order: the second is fetched only where the first is not offered."""
REVISIONS = "revisions.json"


@dataclass(frozen=True)
class Source:
    """A model on the hub.

    Args:
        repository: its id.
        folder: what its folder is called here.
        revision: branch, tag or commit, where `revisions.json` names none.
    """

    repository: str
    folder: str
    revision: str = "main"


def fetch_models(sources: Sequence[Source], root: Path) -> list[Path]:
    """Fetch models into folders of their own.

    Args:
        sources: what to fetch.
        root: where the folders go, and the revisions.

    Returns:
        The folders.
    """
    import huggingface_hub

    record = root / REVISIONS
    pinned = json.loads(record.read_text()) if record.is_file() else {}
    root.mkdir(parents=True, exist_ok=True)
    folders = []
    for source in sources:
        revision = pinned.get(source.folder, {}).get("commit", source.revision)
        try:
            about = huggingface_hub.model_info(source.repository, revision=revision)
            names = [file.rfilename for file in about.siblings or ()]
            print(f"{source.repository} at {about.sha}", file=sys.stderr)
            huggingface_hub.snapshot_download(
                source.repository, revision=about.sha, allow_patterns=wanted(names), local_dir=root / source.folder
            )
        except Exception as error:  # no network, no access, no such model: the hub's own text says which
            sys.exit(f"{source.repository} at {revision} cannot be fetched: {error}\n{_advice(error)}")
        pinned[source.folder] = {"repository": source.repository, "commit": about.sha}
        record.write_text(json.dumps(pinned, indent=2) + "\n")
        folders.append(root / source.folder)
    return folders


def wanted(names: Sequence[str]) -> list[str]:
    """Return which of a repository's files are fetched: no second copy of the weights, nothing of other frameworks."""
    found = [name for name in names if "/" not in name and any(fnmatch(name, pattern) for pattern in BESIDE)]
    for pattern in WEIGHTS:
        if weights := [name for name in names if "/" not in name and fnmatch(name, pattern)]:
            return found + weights
    return found


def fetch_file(address: str, file: Path) -> Path:
    """Fetch a file from the web, unless it is there."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        scratch = file.with_name(f".{file.name}.part")
        print(address, file=sys.stderr)
        try:
            urllib.request.urlretrieve(address, scratch)
        except OSError as error:
            sys.exit(f"{address} cannot be fetched: {error}\nFetch it by hand into {file}.")
        scratch.rename(file)
    return file


def _advice(error: Exception) -> str:
    text = f"{type(error).__name__} {error}"
    if "Offline" in text or "offline" in text:
        return "HF_HUB_OFFLINE is set: unset it, or run this where the hub can be reached."
    if "gated" in text.lower() or "401" in text or "403" in text:
        return "The model is behind a licence: accept it on its page, then run `hf auth login`."
    return "Is the hub reachable from here? Does the model still go by this name?"
