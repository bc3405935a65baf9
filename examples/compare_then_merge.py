"""Compare fine-tunes before merging, merge them by every method, and keep the tasks apart in a set.

python examples/compare_then_merge.py
"""

import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import superpose

folder = Path(tempfile.mkdtemp())
torch.manual_seed(0)
base = {"layers.0.proj.weight": torch.randn(64, 64), "layers.0.proj.bias": torch.randn(64)}
# Both tasks move along one direction, to a different degree, and each has a part of its own.
shared = 0.02 * torch.randn(64, 1) @ torch.randn(1, 64)
models = {"base": base}
for name, strength in (("math", 3.0), ("code", 1.0)):
    models[name] = {key: tensor + 0.005 * torch.randn_like(tensor) for key, tensor in base.items()}
    models[name]["layers.0.proj.weight"] += strength * shared
for name, tensors in models.items():
    (folder / name).mkdir()
    save_file(tensors, folder / name / "model.safetensors")

found = superpose.compare(folder / "base", [folder / "math", folder / "code"])
for pair in found.whole.pairs:
    print(f"{pair.first}, {pair.second}: cosine {pair.cosine:.2f}, left overlap {pair.left_overlap:.2f}")
for text in found.suggestions:
    print("-", text)

tuned = [models["math"], models["code"]]
for method in (method for method in superpose.list_methods() if not method.needs):
    merged = superpose.merge_tensors(base, tuned, method.name)
    moved = merged["layers.0.proj.weight"] - base["layers.0.proj.weight"]
    strength = float((moved * shared).sum() / shared.square().sum())
    print(f"{method.name:24} along the shared direction: {strength:5.2f}   (math 3, code 1)")

# Where strengths disagree on nearly one direction, STF answers both; a ridge asks for a shorter compromise.
for ridge in (0.0, 0.1):
    merged = superpose.merge_tensors(base, tuned, "stf", density=1.0, scaling_factor=1.0, ridge=ridge)
    moved = merged["layers.0.proj.weight"] - base["layers.0.proj.weight"]
    print(f"stf, untrimmed, ridge {ridge}: the update has norm {moved.norm():.1f}")

recipe = {"base": str(folder / "base"), "models": [str(folder / "math"), str(folder / "code")], "method": "emr"}
superpose.merge(recipe, folder / "set")
superpose.rebuild(folder / "set", "code", folder / "code-again")
again = load_file(folder / "code-again" / "model.safetensors")
for name in ("math", "code"):
    distance = (again["layers.0.proj.weight"] - models[name]["layers.0.proj.weight"]).norm()
    print(f"the model rebuilt for code is {distance:.2f} from {name}")
