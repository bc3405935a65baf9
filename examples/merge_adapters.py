"""Merge LoRA adapters into one adapter, truncate it, and fold it into the base.

python examples/merge_adapters.py
"""

import json
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import superpose

folder = Path(tempfile.mkdtemp())
torch.manual_seed(0)
base = {f"layers.{layer}.{part}.weight": torch.randn(64, 64) for layer in range(2) for part in ("q_proj", "v_proj")}
(folder / "base").mkdir()
save_file(base, folder / "base" / "model.safetensors")
for rank, name in ((4, "math"), (8, "code")):
    (folder / name).mkdir()
    factors = {}
    for weight in base:
        module = f"base_model.model.{weight.removesuffix('.weight')}"
        factors[f"{module}.lora_A.weight"] = torch.randn(rank, 64) / 8
        factors[f"{module}.lora_B.weight"] = torch.randn(64, rank) / 8
    save_file(factors, folder / name / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": ["q_proj", "v_proj"]}
    (folder / name / "adapter_config.json").write_text(json.dumps(config))

recipe = {
    "base": str(folder / "base"),
    "models": [str(folder / "math"), str(folder / "code")],
    "method": "stf",
    "options": {"scaling_factor": 1.0},
}
exact = superpose.merge(recipe | {"output": {"form": "adapter"}}, folder / "merged")
print("exact:", {tensor.name: tensor.stats["adapter_rank"] for tensor in exact.tensors})
small = superpose.merge(recipe | {"output": {"form": "adapter", "rank": 8}}, folder / "small")
print(f"rank 8: {small.totals['truncation_error']:.1%} of the update's norm is left out")

superpose.merge(recipe, folder / "model")  # folded into the base, as a model
model, adapter = (load_file(next((folder / name).glob("*.safetensors"))) for name in ("model", "merged"))
name = "layers.0.q_proj"
update = adapter[f"base_model.model.{name}.lora_B.weight"] @ adapter[f"base_model.model.{name}.lora_A.weight"]
difference = model[f"{name}.weight"] - base[f"{name}.weight"] - update
print(f"the model is the base and the adapter to {float(difference.abs().max()):.0e}")
