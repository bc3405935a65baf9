"""The seven tasks and the six held out: their data, splits, labels and templates, as the code of TIES-Merging has them.

Every task's own test split is used where its answers are public. Of the others the validation split is shuffled with
seed 42; the first 32 rows choose when training stops, the rest is the test set.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]
Templates = tuple[tuple[str, str], ...]


def number_of(column: str, first: int = 0) -> Callable[[Row], int]:
    """Return what reads a class's number, counted from `first` in the data."""
    return lambda row: int(row[column]) - first


def letter_of(column: str) -> Callable[[Row], int]:
    """Return what reads a class's letter."""
    return lambda row: "ABCDEFGH".index(row[column])


@dataclass(frozen=True)
class Task:
    """A task of multiple choice.

    Args:
        data: repository on the hub; "" for what has to be asked for by hand.
        label: a row -> the number of the right choice, from 0.
        templates: folder of promptsource's templates.
        count: templates of that folder that the papers' average is over, 0 where they do not say.
        subset: of the data.
        test: split whose answers are tested.
        validation: split that training is stopped by.
        train: split that is trained on.
        ignored: names of templates that are left out.
        added: templates beside promptsource's: name and text; their choices are the column `endings`.
        held_out: whether no model is trained on it.
        revision: of the data.
    """

    data: str
    label: Callable[[Row], int]
    templates: str
    count: int = 0
    subset: str | None = None
    test: str = "validation"
    validation: str = "validation"
    train: str = "train"
    ignored: tuple[str, ...] = ()
    added: Templates = ()
    held_out: bool = False
    revision: str = "main"


ENDINGS = tuple(
    (f"randomized prompt {number}", text + " {{ctx}}|||{{answer_choices[label | int()]}}")
    for number, text in enumerate(
        (
            "Can you pick the correct ending for the sentence:",
            "The task is to generate the ending for the sentence:",
            "How does this sentence end?",
            "From the list of endings described below, what ending makes the most sense for the sentence",
        ),
        1,
    )
)
"""One template of promptsource draws one of these; here each is one."""

TASKS = {
    "paws": Task(
        "google-research-datasets/paws", number_of("label"), "paws/labeled_final", 11, "labeled_final", test="test"
    ),
    "qasc": Task("allenai/qasc", letter_of("answerKey"), "qasc", 5),
    "quartz": Task("allenai/quartz", letter_of("answerKey"), "quartz", 8, test="test"),
    "story_cloze": Task(
        "", number_of("answer_right_ending", 1), "story_cloze/2016", 5, test="test", validation="test",
        train="validation",
    ),
    "wiki_qa": Task("microsoft/wiki_qa", number_of("label"), "wiki_qa", 5, test="test"),
    "winogrande": Task(
        "allenai/winogrande", number_of("answer", 1), "winogrande/winogrande_xl", 5, "winogrande_xl"
    ),
    "wsc": Task("aps/super_glue", number_of("label"), "super_glue/wsc.fixed", 10, "wsc.fixed"),
    "cosmos_qa": Task("allenai/cosmos_qa", number_of("label"), "cosmos_qa", held_out=True),
    "social_iqa": Task(
        "allenai/social_i_qa", number_of("label", 1), "social_i_qa", held_out=True,
        ignored=("Check if a random answer is valid or not",),
    ),
    "quail": Task(
        "textmachinelab/quail", number_of("correct_answer_id"), "quail", held_out=True, test="challenge"
    ),
    "wic": Task("aps/super_glue", number_of("label"), "super_glue/wic", subset="wic", held_out=True),
    "copa": Task(
        "aps/super_glue", number_of("label"), "super_glue/copa", subset="copa", held_out=True,
        ignored=(
            "…which may be caused by", "…What could happen next, C1 or C2?", "…As a result, C1 or C2?",
            "…why? C1 or C2",
        ),
    ),
    "h-swag": Task(
        "Rowan/hellaswag", number_of("label"), "hellaswag", held_out=True, added=ENDINGS,
        ignored=("Randomized prompts template",),
    ),
}  # fmt: skip
MERGED = [name for name, task in TASKS.items() if not task.held_out]
HELD_OUT = [name for name, task in TASKS.items() if task.held_out]
