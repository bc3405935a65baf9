"""Make a family of synthetic Llama checkpoints of real shapes: one base and fine-tunes, for timing merges.

    python benchmarks/llama_family.py --size 135m --out FOLDER        270 MB a model, under a minute
    python benchmarks/llama_family.py --size 1b --out FOLDER          2.2 GB a model, a few minutes
    python benchmarks/llama_family.py --size 7b --out FOLDER --sparse  13.5 GB a model in name, nothing on the disk

Weights are random, but names, shapes, dtype (bf16), config and tokenizer are those of models that users merge: 135m
has the shape of SmolLM-135M (30 layers, hidden 576, tied head), 1b that of TinyLlama-1.1B, 7b that of Llama-2-7B, tiny
is a toy. A fine-tune is its base plus noise, 3% of each tensor's own spread, half of it of rank 16. Every tensor has a
generator of its own, seeded by member and name, so that any of them can be made again alone. With --layers the depth
changes; with --sparse the files have full size and no content, which is enough to measure memory.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from math import prod
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PretrainedConfig, PreTrainedModel

from superpose.checkpoints.headers import DTYPE_NAMES
from superpose.checkpoints.writer import StreamWriter, lay_out
from superpose.run import INDEX_FILE

SHAPES = {
    "tiny": {
        "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 512, "tie_word_embeddings": False,
    },
    "135m": {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True,
    },
    "1b": {
        "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
        "num_key_value_heads": 4, "vocab_size": 32000, "tie_word_embeddings": False,
    },
    "7b": {
        "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 32, "vocab_size": 32000, "tie_word_embeddings": False,
    },
}  # fmt: skip
SPREAD = 0.02
NOISE = 0.03
RANK = 16


def generator(*key: object) -> torch.Generator:
    """Return a generator that depends on the key alone."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def tensor_of(
    member: str, name: str, shape: tuple[int, ...], dtype: torch.dtype, deviation: float = NOISE * SPREAD
) -> Tensor:
    """Return one tensor of one member of a family, whose fine-tunes are that far from the base."""
    noise = torch.randn(shape, generator=generator("base", name))
    base = (1 + 0.05 * noise if len(shape) == 1 else SPREAD * noise).to(dtype)
    if member == "base":
        return base
    draw = generator(member, name)
    delta = torch.randn(shape, generator=draw)
    if len(shape) == 2:
        left = torch.randn((shape[0], RANK), generator=draw)
        right = torch.randn((RANK, shape[1]), generator=draw)
        delta = 0.5**0.5 * (delta + left @ right / RANK**0.5)
    # The fine-tune starts from what was stored, not from what was meant.
    return (base.float() + deviation * delta).to(dtype)


def shapes_of(architecture: type[PreTrainedModel], config: PretrainedConfig) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of a model that is never allocated, tied copies left out."""
    with torch.device("meta"):
        model = architecture(config)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def write_tokenizer(folder: Path) -> None:
    """Write a byte-level tokenizer without merges: enough for tools that insist on one."""
    specials = ["<unk>", "<s>", "</s>"]
    vocabulary = {token: i for i, token in enumerate([*specials, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(specials)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    content = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 2048, **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(content, indent=2))
    (folder / "special_tokens_map.json").write_text(json.dumps(names, indent=2))


def make_member(
    folder: Path,
    config: PretrainedConfig,
    dtype: torch.dtype,
    shapes: Mapping[str, tuple[int, ...]],
    draw: Callable[[str, tuple[int, ...]], Tensor] | None,
) -> None:
    """Write one member of a family: each tensor as it is drawn, or files of that size and no content."""
    start = time.perf_counter()
    scratch = folder.with_name(f".{folder.name}.making")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    config.save_pretrained(scratch)
    write_tokenizer(scratch)
    layout = lay_out([(name, DTYPE_NAMES[dtype], shape) for name, shape in shapes.items()], 5 * 10**9)
    if draw is None:
        for file in layout.files:
            with (scratch / file.name).open("wb") as stream:
                stream.write(file.header)
                stream.truncate(file.size)
    else:
        writer = StreamWriter(scratch, layout)
        for name, shape in shapes.items():
            writer.write(name, 0, draw(name, shape))
        writer.close()
    if (index := layout.index()) is not None:
        (scratch / INDEX_FILE).write_text(index)
    scratch.rename(folder)
    print(f"{folder}: {parameters(shapes) / 1e6:.1f}M parameters, {time.perf_counter() - start:.1f} s", file=sys.stderr)


def parameters(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Return how many entries all tensors have."""
    return sum(map(prod, shapes.values()))


def members(fine_tunes: int) -> list[str]:
    """Return the names of a family's members, the base first."""
    return ["base", *(f"ft{number}" for number in range(1, fine_tunes + 1))]


def llama_config(size: str, layers: int | None = None) -> LlamaConfig:
    """Return the configuration of a size, of another depth if one is given."""
    options = SHAPES[size] | ({"num_hidden_layers": layers} if layers else {})
    config = LlamaConfig(**options, max_position_embeddings=2048, bos_token_id=1, eos_token_id=2, dtype="bfloat16")
    config.architectures = ["LlamaForCausalLM"]
    return config


def make_family(
    out: Path, size: str, fine_tunes: int = 3, layers: int | None = None, sparse: bool = False
) -> list[Path]:
    """Make the members that are not there yet and return their folders, the base first."""
    config = llama_config(size, layers)
    shapes = shapes_of(LlamaForCausalLM, config)
    folders = [out / member for member in members(fine_tunes)]
    for folder in folders:
        if not folder.exists():
            draw = None if sparse else partial(tensor_of, folder.name, dtype=torch.bfloat16)
            make_member(folder, config, torch.bfloat16, shapes, draw)
    return folders


def main() -> None:
    """Read the command line and make the family."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", choices=SHAPES, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--fine-tunes", type=int, default=3)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--sparse", action="store_true")
    arguments = parser.parse_args()
    make_family(arguments.out, arguments.size, arguments.fine_tunes, arguments.layers, arguments.sparse)


if __name__ == "__main__":
    main()
