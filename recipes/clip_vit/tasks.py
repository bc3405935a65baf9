"""The eight tasks: their data on the hub, and the sentences that CLIP was asked with (openai/CLIP, data/prompts.md)."""

from __future__ import annotations

from dataclasses import dataclass

A_PHOTO = ("a photo of a {}.", "a photo of the {}.")
THE_NUMBER = ('a photo of the number: "{}".',)
SATELLITE = tuple(
    f"{view} of {article}{{}}."
    for article in ("", "a ", "the ")
    for view in (
        "satellite imagery", "aerial imagery", "satellite photo", "aerial photo", "satellite view", "aerial view",
    )
)  # fmt: skip


@dataclass(frozen=True)
class Task:
    """A task of image classification.

    Args:
        data: repository of the images on the hub; "subset" of it, where it has several.
        prompts: sentences with {} for the name of a class.
        subset: of the data.
        image: column with the image.
        label: column with the class's number.
        revision: of the data.
    """

    data: str
    prompts: tuple[str, ...]
    subset: str | None = None
    image: str = "image"
    label: str = "label"
    revision: str = "main"


TASKS = {
    "sun397": Task("tanganke/sun397", A_PHOTO),
    "stanford-cars": Task(
        "tanganke/stanford_cars",
        (
            *A_PHOTO, "a photo of my {}.", "i love my {}!", "a photo of my dirty {}.", "a photo of my clean {}.",
            "a photo of my new {}.", "a photo of my old {}.",
        ),
    ),
    "resisc45": Task("tanganke/resisc45", SATELLITE),
    "eurosat": Task(
        "tanganke/eurosat", tuple(f"a centered satellite photo of {article}{{}}." for article in ("", "a ", "the "))
    ),
    "svhn": Task("ufldl-stanford/svhn", THE_NUMBER, subset="cropped_digits"),
    "gtsrb": Task(
        "tanganke/gtsrb",
        tuple(f'a {kind} photo of a "{{}}" traffic sign.' for kind in ("zoomed in", "centered", "close up")),
    ),
    "mnist": Task("ylecun/mnist", THE_NUMBER),
    "dtd": Task(
        "tanganke/dtd",
        tuple(
            f"a photo of {article} {{}} {what}."
            for article in ("a", "the")
            for what in ("texture", "pattern", "thing", "object")
        ),
    ),
}  # fmt: skip
BASES = {"b32": "openai/clip-vit-base-patch32", "l14": "openai/clip-vit-large-patch14"}
FINE_TUNES = {"b32": "tanganke/clip-vit-base-patch32_{}", "l14": "tanganke/clip-vit-large-patch14_{}"}
