"""Merge checkpoint folders, read the record, verify the result, and plan again with rules.

python examples/merge_folders.py
"""

import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

import superpose

folder = Path(tempfile.mkdtemp())
torch.manual_seed(0)
shapes = {"embed.weight": (50, 32), "layers.0.proj.weight": (32, 32), "layers.0.norm.weight": (32,)}
base = {name: torch.randn(shape) for name, shape in shapes.items()}
for model in ("base", "math", "code"):
    noise = 0.0 if model == "base" else 0.05
    (folder / model).mkdir()
    tensors = {name: tensor + noise * torch.randn_like(tensor) for name, tensor in base.items()}
    save_file(tensors, folder / model / "model.safetensors")

recipe = {
    "base": str(folder / "base"),
    "models": [str(folder / "math"), str(folder / "code")],
    "method": "stf",
    "options": {"density": 1, "scaling_factor": 0.8},
}
record = superpose.merge(recipe, folder / "merged", measure=True)
for tensor in record.tensors:
    print(f"{tensor.name:24}{tensor.kind:12}{tensor.method:8}{dict(tensor.stats)}")
linear = next(tensor for tensor in record.tensors if tensor.kind == "linear")
print(f"features answered to within {linear.measures['trimmed']['relative']:.1e} of their strength")

found = superpose.verify(folder / "merged", recompute=2)
print(f"{found.tensors} tensors as recorded, {len(found.recomputed)} computed once more; sound: {found.is_sound}")

careful = recipe | {"rules": [{"kind": "norm", "keep": "base"}, {"match": "embed.*", "method": "average"}]}
plan = superpose.plan(careful)
print({item.name: item.method or item.why for item in plan.items})
