"""Fisher merging and RegMean of two small classifiers, with statistics computed from their data.

python examples/merge_with_statistics.py
"""

import json
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

import superpose

LOADER = '''
import torch
from safetensors.torch import load_file
from torch import nn
from superpose.inference import Example, LiveModel

def load(folder, task):
    """Two linear maps that tell points of the plane apart; rows have the columns x, y and label."""
    module = nn.Sequential(nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 2))
    module.load_state_dict(load_file(folder / "model.safetensors"))

    def encode(row):
        point = torch.tensor([row.values["x"], row.values["y"]])
        return Example({"point": point}, torch.tensor([row.values["label"]]))

    return LiveModel(module, encode, lambda inputs: module(inputs["point"]))
'''
folder = Path(tempfile.mkdtemp())
(folder / "loader.py").write_text(LOADER)
torch.manual_seed(0)


def points(west: float, east: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw points between two longitudes; the class is the side of a wave on which they are."""
    found = torch.rand(512, 2) * torch.tensor([east - west, 3.0]) + torch.tensor([west, -1.5])
    return found, (found[:, 1] > torch.sin(2 * found[:, 0])).long()


def train(model: nn.Module, data: tuple[torch.Tensor, torch.Tensor], steps: int) -> None:
    """Fit a model to points."""
    optimiser = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(steps):
        loss = nn.functional.cross_entropy(model(data[0]), data[1])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()


def save(model: nn.Module, name: str) -> Path:
    """Write a model's weights as a folder."""
    (folder / name).mkdir()
    save_file({key: tensor.clone() for key, tensor in model.state_dict().items()}, folder / name / "model.safetensors")
    return folder / name


base = nn.Sequential(nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 2))
train(base, points(-3, 3), 100)
place, models = save(base, "base"), {}
for name, (west, east) in {"west": (-3.0, 0.0), "east": (0.0, 3.0)}.items():
    model = nn.Sequential(nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 2))
    model.load_state_dict(base.state_dict())
    seen, labels = points(west, east)
    train(model, (seen, labels), 300)
    rows = [{"x": x, "y": y, "label": label} for (x, y), label in zip(seen.tolist(), labels.tolist(), strict=True)]
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    models[name] = save(model, name), folder / f"{name}.jsonl"

for method, kind in (("average", ""), ("fisher", "fisher"), ("regmean", "gram")):
    entries = []
    for name, (model, data) in models.items():
        task = {"data": str(data), "text": "x", "pair": "y", "label": "label", "loader": f"{folder}/loader.py:load"}
        entry = {"path": str(model), "name": name}
        if kind:
            superpose.compute_statistics(kind, model, task, folder / f"{name}.{kind}.safetensors")
            entry["statistics"] = str(folder / f"{name}.{kind}.safetensors")
        entries.append((entry, task))
    out = folder / method
    superpose.merge({"base": str(place), "models": [entry for entry, _ in entries], "method": method}, out)
    found = [superpose.evaluate(str(out), "classify", data=task).metrics["accuracy"] for _, task in entries]
    print(f"{method:8} west {found[0]:.3f}  east {found[1]:.3f}")
