"""Fetch the models and data of the CLIP recipes, take the vision encoder out of CLIP, and make the text heads.

python -m recipes.clip_vit.fetch --size b32
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recipes.clip_vit.heads import write_heads
from recipes.clip_vit.tasks import BASES, FINE_TUNES, TASKS, Task
from recipes.fetching import Source, fetch_models
from recipes.rewriting import rewrite

DATA = Path("data/clip_vit")
TOWER = "vision_model."
PREPROCESSOR = "preprocessor_config.json"


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line and fetch."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", choices=BASES, required=True)
    parser.add_argument("--models", type=Path, default=Path("models"))
    parser.add_argument("--data", type=Path, default=DATA)
    asked = parser.parse_args(arguments)
    models = asked.models / f"clip_vit_{asked.size}"
    fine_tunes = [Source(FINE_TUNES[asked.size].format(name), name) for name in TASKS]
    fetch_models([Source(BASES[asked.size], "clip"), *fine_tunes], models)
    if not (models / "base").exists():
        take_vision_encoder(models / "clip", models / "base")
    for name in TASKS:
        # What turns an image into pixels lies beside CLIP alone.
        shutil.copyfile(models / "clip" / PREPROCESSOR, models / name / PREPROCESSOR)
    for name, task in TASKS.items():
        if not (asked.data / name / "rows.jsonl").exists():
            write_images(name, task, asked.data / name)
    write_heads(models / "clip", asked.data, models / "heads")


def take_vision_encoder(clip: Path, out: Path) -> Path:
    """Write CLIP's vision encoder as a model of its own, its tensors named as in CLIP and in the fine-tunes."""
    config = json.loads((clip / "config.json").read_text())["vision_config"]
    config |= {"model_type": "clip_vision_model", "architectures": ["CLIPVisionModel"]}

    def kept(name: str, tensor: Any) -> Any:
        # Numbers of places: older files have them, and no fine-tune.
        return tensor if name.startswith(TOWER) and not name.endswith("position_ids") else None

    return rewrite(clip, out, kept, config)


def write_images(name: str, task: Task, folder: Path) -> None:
    """Write a task's test images, a table of them, and its classes' names."""
    import datasets

    try:
        found = datasets.load_dataset(task.data, task.subset, split="test", revision=task.revision)
    except Exception as error:  # the hub's own text says what failed
        sys.exit(f"{task.data} cannot be fetched: {error}")
    write_rows(found, task, folder)
    names = [word.replace("_", " ") for word in found.features[task.label].names]
    if not (folder / "classes.json").exists():
        (folder / "classes.json").write_text(json.dumps(names, indent=1), encoding="utf-8")
    print(f"{name}: {len(found)} images of {len(names)} classes", file=sys.stderr)


def write_rows(rows: Any, task: Task, folder: Path) -> None:
    """Write images as files and the table that `classify` reads; the table comes last, when all images are there."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, row in enumerate(rows):
        file = f"{number:06d}.png"
        row[task.image].convert("RGB").save(folder / file)
        lines.append(json.dumps({"image": file, "label": int(row[task.label])}) + "\n")
    (folder / "rows.jsonl").write_text("".join(lines))


if __name__ == "__main__":
    main()
