"""The model card, README.md of a merged checkpoint: made from its record.

Names of models, files and tensors are anybody's, and the hub shows the card as a page: they are written so that they
are read as they are, and make no table, heading, link or HTML of their own.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml

from superpose.errors import printable
from superpose.records import RunRecord

MOST_WARNINGS = 20


def model_card(record: RunRecord, config: Mapping[str, Any]) -> str:
    """Return a card that says what was merged, how, and what the user should know.

    The card names neither the time nor the machine: merged again, it comes out the same.

    Args:
        record: the merge.
        config: the base's config.json.

    Returns:
        Markdown with the hub's YAML header.
    """
    recipe = record.recipe
    ids = [source["path"].partition("@")[0] for source in record.sources if source["revision"]]
    header: dict[str, Any] = {"base_model": ids} if ids else {}
    header |= {"base_model_relation": "merge", "tags": ["merge", "superpose"]}
    form = recipe.get("output", {}).get("form", "model")
    if form == "adapter":
        header |= {"library_name": "peft", "tags": ["lora", *header["tags"]]}
    elif "model_type" in config:
        header["library_name"] = "transformers"
    kinds = Counter((tensor.kind, tensor.method or "copied from the base") for tensor in record.tensors)
    rows = [f"| {_text(kind)} | {_text(method)} | {count} |" for (kind, method), count in sorted(kinds.items())]
    sources = [f"| {_link(s)} | {_text(s['name'])} | {_text(s['revision'] or 'local')} |" for s in record.sources]
    sections = [
        "---\n" + yaml.safe_dump(header, sort_keys=False).strip() + "\n---",
        f"# {_text(Path(record.output).name)}",
        f"Merged by {_code(recipe['method'])} with superpose {record.versions['superpose']}, without training.",
        "## Models\n\n| model | role | revision |\n|---|---|---|\n" + "\n".join(sources),
        "## What was done\n\n| kind | method | tensors |\n|---|---|---|\n" + "\n".join(rows),
        "## Recipe\n\n" + _block(yaml.safe_dump(recipe, sort_keys=False).strip()),
    ]
    sections += _data_section(record)
    if form != "model":
        sections.append(_adapter_section(record, form))
    if any(tensor.beside for tensor in record.tensors):
        names = ", ".join(_code(source["name"]) for source in record.sources[1:])
        sections.append(
            f"## Models of single tasks\n\n`superpose rebuild . --task NAME -o OUT` makes the model of a task from"
            f" `tasks/`: {names}."
        )
    if record.warnings:
        shown = [f"- {_text(warning)}" for warning in record.warnings[:MOST_WARNINGS]]
        if len(record.warnings) > MOST_WARNINGS:
            shown.append(f"- and {len(record.warnings) - MOST_WARNINGS} more, in `run.json`")
        sections.append("## Warnings\n\n" + "\n".join(shown))
    sections.append("Every tensor's kind, method, numbers and digest are in `run.json`.")
    return "\n\n".join(sections) + "\n"


def _data_section(record: RunRecord) -> list[str]:
    """Return a section that names the data that the merge has seen, if it has seen any."""
    rows = []
    for source in record.sources:
        if "statistics" in source:
            told, data = source["statistics"], source["statistics"].get("data")
            seen = {**(data if isinstance(data, Mapping) else {}), "examples": told.get("examples", "not told")}
            rows.append(_data_row(source["name"], seen, "statistics"))
    rows += [_data_row(seen["task"], seen, f"learning, {seen['used']}") for seen in record.learned.get("saw", ())]
    if not rows:
        return []
    said = _text(record.learned.get("transductive", ""))
    table = "| task | data | split | examples | used for |\n|---|---|---|---|---|\n" + "\n".join(rows)
    warning = f" The method is transductive: {said}." if said else ""
    return [f"## Data that this merge has seen\n\n{table}\n\nResults on it are no held-out results.{warning}"]


def _data_row(task: str, seen: Mapping[str, Any], use: str) -> str:
    place, split = Path(str(seen.get("data", ""))).name, seen.get("split") or "not named"
    cells = _text(task), _code(place), _text(split), _text(seen.get("examples", "")), _text(use)
    return f"| {' | '.join(cells)} |"


def _adapter_section(record: RunRecord, form: str) -> str:
    ranks = [tensor.stats["adapter_rank"] for tensor in record.tensors if tensor.factors]
    lost = record.totals.get("truncation_error", 0.0)
    held = f"{len(ranks)} updates of rank {max(ranks, default=0)} at most"
    place = "`adapter/` holds" if form == "both" else "It holds"
    exact = f"{lost:.2%} of their norm is left out" if lost else "nothing of them is left out"
    return f"## Adapter\n\n{place} {held}; {exact}. PEFT loads it onto the base."


def _link(source: Mapping[str, Any]) -> str:
    path, name = source["path"], source["path"].partition("@")[0]
    if source["revision"]:
        return f"[{_text(path)}](https://huggingface.co/{quote(name)})"
    return _code(Path(path).name)


def _text(value: object) -> str:
    """Return a value as Markdown that shows it as it is."""
    text = re.sub(r"([\\`*|\[\]])", r"\\\1", printable(str(value)))
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _code(value: object) -> str:
    """Return a value as a span of code, which holds in a table too."""
    text = printable(str(value))
    if "`" in text:
        fence = "`" * (_longest_run(text) + 1)
        text = f"{fence} {text} {fence}"
    else:
        text = f"`{text}`"
    return text.replace("|", "\\|")


def _block(text: str) -> str:
    """Return YAML as a block of code that nothing in it ends."""
    fence = "`" * max(3, _longest_run(text) + 1)
    return f"{fence}yaml\n{text}\n{fence}"


def _longest_run(text: str) -> int:
    """Return how many backticks follow each other at most."""
    return max(map(len, re.findall("`+", text)), default=0)
