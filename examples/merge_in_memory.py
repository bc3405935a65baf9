"""Merge state dicts in memory, by every method, and see how each answers a feature that two tasks share.

python examples/merge_in_memory.py
"""

import torch

import superpose

torch.manual_seed(0)
base = {"layer.weight": torch.randn(64, 48)}

# Two fine-tunes with a direction of their own each, and one that both have: strength 2 in both.
u, _ = torch.linalg.qr(torch.randn(64, 3))
v, _ = torch.linalg.qr(torch.randn(48, 3))
shared = 2.0 * torch.outer(u[:, 0], v[:, 0])
tuned = [{"layer.weight": base["layer.weight"] + shared + 1.5 * torch.outer(u[:, i], v[:, i])} for i in (1, 2)]

options = {
    "average": {},
    "task_arithmetic": {"scaling_factor": 1},
    "ties": {"density": 1, "scaling_factor": 1},
    "stf": {"density": 1, "scaling_factor": 1},
}
print(f"{'method':18}{'shared (2.0)':>14}{'first (1.5)':>14}{'second (1.5)':>14}")
for method, chosen in options.items():
    merged = superpose.merge_tensors(base, tuned, method, **chosen)
    change = merged["layer.weight"] - base["layer.weight"]
    answers = [float(u[:, i] @ change @ v[:, i]) for i in range(3)]
    print(f"{method:18}" + "".join(f"{answer:14.2f}" for answer in answers))
