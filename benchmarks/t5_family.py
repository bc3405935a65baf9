"""STF on the shapes of T5-base with seven tasks, all features and a fifth of them: time and memory.

    python benchmarks/t5_family.py --out FOLDER [--report FILE] [--layers N]      8 x 0.9 GB, and 0.9 for the output

FOLDER gets a base and seven fine-tunes in float32, with the names, shapes and config of transformers'
T5ForConditionalGeneration for T5-base; weights are random, a fine-tune is its base plus noise of standard deviation
0.001, half of it of rank 16, seeded by member and name. Both merges go through the command line with the default
backend and as many workers as there are cores.

The paper (Qiu et al. 2025, arXiv:2502.10698v2, Table 4) gives 127 s for STF on T5-base with 7 tasks, on an A100. That
is another machine and another implementation: a yardstick, no comparison.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from llama_family import make_member, members, parameters, shapes_of, tensor_of
from measuring import Kept, arguments_parser, machine, merge, need_room, publish
from transformers import T5Config, T5ForConditionalGeneration

TASKS = 7
DEVIATION = 1e-3
PAPER_SECONDS = 127
BASE = {"d_model": 768, "d_kv": 64, "d_ff": 3072, "num_heads": 12}
TOY = {"d_model": 128, "d_kv": 32, "d_ff": 512, "num_heads": 4, "vocab_size": 4096}
MERGES = {"all features": (), "a fifth of the features": ("--feature-share", "0.2")}


def t5_config(layers: int, toy: bool) -> T5Config:
    """Return the configuration of T5-base, of that depth, or of something with a sixth of its width."""
    config = T5Config(**(TOY if toy else BASE), num_layers=layers, num_decoder_layers=layers, dtype="float32")
    config.architectures = ["T5ForConditionalGeneration"]
    return config


def make_family(out: Path, config: T5Config) -> tuple[list[Path], int]:
    """Make the members that are not there yet; return their folders, the base first, and the parameters of each."""
    shapes = shapes_of(T5ForConditionalGeneration, config)
    folders = [out / member for member in members(TASKS)]
    missing = [folder for folder in folders if not folder.exists()]
    need_room(out, 4 * parameters(shapes) * (len(missing) + 1))
    for folder in missing:
        draw = partial(tensor_of, folder.name, dtype=torch.float32, deviation=DEVIATION)
        make_member(folder, config, torch.float32, shapes, draw)
    return folders, parameters(shapes)


def main() -> None:
    """Read the command line, make the family, measure, and print a table."""
    parser = arguments_parser(__doc__, "the family and what was measured")
    parser.add_argument("--layers", type=int, default=12, help="of the encoder, and of the decoder")
    arguments = parser.parse_args()
    layers = 1 if arguments.quick else arguments.layers
    runs = 1 if arguments.quick else arguments.runs
    family = f"{'toy' if arguments.quick else 't5-base'}-{layers}"
    about = machine()
    models, count = make_family(arguments.out / family, t5_config(layers, arguments.quick))
    about += f"; {family}: {count / 1e6:.1f}M parameters, {TASKS} tasks, float32; medians of {runs}"
    takes = {
        f"{family}, {name}": partial(merge, models, arguments.out / "scratch", "--method", "stf", *options)
        for name, options in MERGES.items()
    }
    measured = Kept(arguments.out).in_turns(takes, runs)
    whole = measured[f"{family}, all features"]
    rows = []
    for name in MERGES:
        run = measured[f"{family}, {name}"]
        rows.append([name, f"{whole.wall / run.wall:.2f}", f"{run.wall / PAPER_SECONDS:.2f}", run])
    about += f".\n\nThe paper's {PAPER_SECONDS} s: T5-base, 7 tasks, an A100; another machine, a yardstick only."
    columns = ["STF with", "times faster than all", f"wall / paper's {PAPER_SECONDS} s", "wall s / CPU s / MiB"]
    publish(about, columns, rows, arguments.report)


if __name__ == "__main__":
    main()
