"""Merging adapters: a small model's three against PEFT, and sixteen of a 7B-shaped model whose base is never opened.

    python benchmarks/adapter_merges.py --out FOLDER [--quick] [--report FILE]

1. Three rank-4 adapters of a GPT-2-Medium-shaped model (c_attn, alpha 8: a scale of 2). Ours: `superpose.merge` in a
   process that has its imports behind it; files read and written. PEFT: `add_weighted_adapter` between loading the
   adapters and saving the result; the model is there beforehand. Error: distance of the adapter's update from the sum
   of the three updates, relative to its norm, in float64; empty for STF, which is not to be the sum.
2. Sixteen rank-64 adapters of a Llama-2-7B-shaped model (query and value, PEFT's defaults, bfloat16) by STF, exact,
   through the command line, start-up included.

Factors are random, so that no small rank holds their sum; both sides have the same files and as many threads.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from measuring import Kept, Report, Run, arguments_parser, machine, measure, need_room, superpose
from safetensors.torch import load_file, save_file

SMALL = {"layers": 24, "width": 1024, "rank": 4, "alpha": 8, "adapters": 3}
LARGE = {"layers": 32, "width": 4096, "rank": 64, "alpha": 128, "adapters": 16}
OURS = {
    "superpose, task_arithmetic, exact": {"method": "task_arithmetic", "options": {"scaling_factor": 1.0}},
    "superpose, task_arithmetic, rank 4": {
        "method": "task_arithmetic", "options": {"scaling_factor": 1.0}, "output": {"rank": 4},
    },
    "superpose, stf, exact": {"method": "stf"},
    "superpose, knots": {"method": "knots"},
}  # fmt: skip
PEFT = ("cat", "svd", "ties_svd")


def write_adapter(
    folder: Path, seed: int, shape: Mapping[str, int], paths: list[tuple[str, int, int]], **config: object
) -> Path:
    """Write an adapter with random factors, if it is not there.

    Args:
        folder: of the adapter.
        seed: of its factors.
        shape: rank and alpha.
        paths: module, rows out and columns in of each.
        **config: further keys of its config.

    Returns:
        The folder.
    """
    if (folder / "adapter_config.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    draw, rank, tensors = torch.Generator().manual_seed(seed), shape["rank"], {}
    for path, out, in_ in paths:
        key = f"base_model.model.{path}"
        tensors[f"{key}.lora_A.weight"] = torch.randn(rank, in_, generator=draw) / in_**0.5
        tensors[f"{key}.lora_B.weight"] = torch.randn(out, rank, generator=draw) * 0.02
    dtype = torch.bfloat16 if shape is LARGE else torch.float32
    save_file({key: tensor.to(dtype) for key, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    targets = sorted({path.rpartition(".")[2] for path, _, _ in paths})
    content = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": shape["alpha"],
        "target_modules": targets, "base_model_name_or_path": "somebody/base", **config,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(content))
    return folder


def small_adapters(out: Path) -> list[Path]:
    """Return three adapters of a GPT-2-Medium-shaped model."""
    width = SMALL["width"]
    paths = [(f"transformer.h.{layer}.attn.c_attn", 3 * width, width) for layer in range(SMALL["layers"])]
    seeds = range(SMALL["adapters"])
    return [write_adapter(out / f"small/{seed}", seed, SMALL, paths, fan_in_fan_out=True) for seed in seeds]


def large_adapters(out: Path, quick: bool) -> list[Path]:
    """Return sixteen adapters of a Llama-2-7B-shaped model, or a few small ones of two layers."""
    layers, width, count = (2, 256, 3) if quick else (LARGE["layers"], LARGE["width"], LARGE["adapters"])
    names = [f"model.layers.{layer}.self_attn.{part}" for layer in range(layers) for part in ("q_proj", "v_proj")]
    paths = [(name, width, width) for name in names]
    return [write_adapter(out / f"large-{width}/{seed}", seed, LARGE, paths) for seed in range(count)]


def timed(act: Callable[[], None]) -> Run:
    """Return what a function takes in this process."""
    wall, cpu = time.perf_counter(), time.process_time()
    act()
    return Run(time.perf_counter() - wall, time.process_time() - cpu, 0)


def ours(models: list[Path], recipe: Mapping, output: Path) -> Run:
    """Merge by superpose, in this process; the first merge of all loads what is loaded at first use."""
    import superpose as package

    given = {"form": "adapter", **recipe.get("output", {})}
    whole = {**recipe, "base": "somebody/base", "models": [{"path": str(one)} for one in models], "output": given}
    for _ in range(2):
        shutil.rmtree(output, ignore_errors=True)
        run = timed(lambda: package.merge(whole, output))
    return run


def by_peft(models: list[Path], kind: str, output: Path) -> Run:
    """Merge by PEFT, in this process, on a model of random weights that is made beforehand."""
    from peft import PeftModel
    from transformers import GPT2Config, GPT2LMHeadModel

    warnings.simplefilter("ignore")
    model = GPT2LMHeadModel(GPT2Config(n_embd=SMALL["width"], n_layer=SMALL["layers"], n_head=16))
    names = [f"a{number}" for number in range(len(models))]
    alone = 0.0

    def act() -> None:
        nonlocal alone
        loaded = PeftModel.from_pretrained(model, models[0], adapter_name=names[0])
        for name, folder in zip(names[1:], models[1:], strict=True):
            loaded.load_adapter(str(folder), adapter_name=name)
        started = time.perf_counter()
        options = {"svd_rank": SMALL["rank"]} if kind != "cat" else {}
        options |= {"density": 0.2} if "ties" in kind else {}
        loaded.add_weighted_adapter(names, [1.0] * len(names), "merged", combination_type=kind, **options)
        alone = time.perf_counter() - started
        loaded.save_pretrained(str(output), selected_adapters=["merged"])

    shutil.rmtree(output, ignore_errors=True)
    run = timed(act)
    shutil.copytree(output / "merged", output, dirs_exist_ok=True)
    return replace(run, facts={"alone": alone})


def updates(folder: Path) -> dict[str, torch.Tensor]:
    """Return an adapter's updates in float64, by module."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    scale = config["lora_alpha"] / config["r"]
    return {
        key.removesuffix(".lora_A.weight"): scale * tensors[key.replace("lora_A", "lora_B")].double() @ down.double()
        for key, down in tensors.items()
        if key.endswith(".lora_A.weight")
    }


def error(models: list[Path], output: Path) -> float:
    """Return how far an adapter's updates are from the sum of those of others, relative to the sum's norm."""
    found, lost, norm = updates(output), 0.0, 0.0
    each = [updates(one) for one in models]
    for name in each[0]:
        total = sum(one[name] for one in each)
        lost += float((found[name] - total).square().sum())
        norm += float(total.square().sum())
    return (lost / norm) ** 0.5


def in_a_process(name: str, out: Path, with_error: bool) -> Run:
    """Run one of the small merges in a process of its own."""
    run = measure([sys.executable, __file__, "--out", str(out), "--alone", name])
    facts = json.loads(run.facts["printed"].splitlines()[-1])
    facts["error"] = facts["error"] if with_error else None
    return Run(facts["wall"], facts["cpu"], run.memory, facts)


def alone(name: str, out: Path) -> None:
    """Merge the small adapters one way, and print what that takes."""
    models, output = small_adapters(out), out / "scratch" / "merged"
    run = ours(models, OURS[name], output) if name in OURS else by_peft(models, name.rpartition(" ")[2], output)
    print(json.dumps({"wall": run.wall, "cpu": run.cpu, "error": error(models, output), **run.facts}))
    shutil.rmtree(output.parent)


def merge_large(models: list[Path], out: Path) -> Run:
    """Merge the large adapters by the command line."""
    output = out / "scratch-large" / "merged"
    shutil.rmtree(output.parent, ignore_errors=True)
    given = ["--method", "stf", "--form", "adapter", "-q", "--json"]
    run = measure(superpose("merge", "somebody/base", *models, "-o", output, *given))
    record = json.loads(run.facts["printed"])
    nbytes = (output / "adapter_model.safetensors").stat().st_size
    worst = max(tensor["stats"]["worst"] for tensor in record["tensors"])
    shutil.rmtree(output.parent)
    return replace(run, facts={"bytes": nbytes, "worst": worst, "read": record["totals"]["bytes_read"]})


def main() -> None:
    """Read the command line, measure, and print tables."""
    parser = arguments_parser(__doc__, "adapters, outputs and what was measured")
    parser.add_argument("--alone", help="one of the small merges, in this process")
    arguments = parser.parse_args()
    out = arguments.out
    if arguments.alone:
        alone(arguments.alone, out)
        return
    from peft import __version__ as peft_version

    runs = 1 if arguments.quick else arguments.runs
    report, kept = Report(arguments.report), Kept(out)
    need_room(out, 10**9 if arguments.quick else 8 * 10**9)
    report.say(f"{machine()}, peft {peft_version}; medians of {runs}, one run of PEFT's svd types")
    small_adapters(out)
    names = [*OURS, *(f"PEFT, {kind}" for kind in PEFT)]
    takes = {name: partial(in_a_process, name, out, name not in list(OURS)[2:]) for name in names}
    slow = {name: take for name, take in takes.items() if name.endswith("svd")}  # a minute each: one run says enough
    fast = {name: take for name, take in takes.items() if name not in slow}
    measured = {**kept.in_turns(fast, runs), **kept.in_turns(slow, 1)}
    reference = measured["superpose, task_arithmetic, exact"].wall
    columns = "wall, times ours", "error against the sum", "wall s", "CPU s", "merge alone, s"
    report.table("three rank-4 adapters", *columns)
    for name, run in measured.items():
        off = "" if run.facts["error"] is None else f"{run.facts['error']:.1e}"
        apart = f"{run.facts['alone']:.2f}" if "alone" in run.facts else ""
        report.row(name, f"{run.wall / reference:.1f}", off, f"{run.wall:.2f}", f"{run.cpu:.2f}", apart)
    models = large_adapters(out, arguments.quick)
    large = kept.in_turns({f"{len(models)} large adapters, stf": partial(merge_large, models, out)}, runs)
    columns = "wall s / CPU s / MiB", "read, GB", "written, GB", "worst miss"
    report.table("adapters of a 7B-shaped model, STF, exact", *columns)
    for name, run in large.items():
        facts = run.facts
        report.row(name, run, f"{facts['read'] / 1e9:.2f}", f"{facts['bytes'] / 1e9:.2f}", f"{facts['worst']:.1e}")
    report.write()


if __name__ == "__main__":
    main()
