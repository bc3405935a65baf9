"""LoRA files: what PEFT saves for modules of every kind is read as what PEFT adds."""

import json

import pytest
import torch
from families import generator
from safetensors.torch import save_file
from torch import nn

import superpose
from superpose.checkpoints.lora import open_adapter
from superpose.checkpoints.models import open_base, open_model
from superpose.errors import SuperposeError

peft = pytest.importorskip("peft")
ONE = {"method": "task_arithmetic", "options": {"scaling_factor": 1.0}}


class Net(nn.Module):
    """Modules of every kind that LoRA knows."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.conv = nn.Conv2d(3, 8, (3, 2))
        self.signal = nn.Conv1d(4, 6, 3)
        self.linear = nn.Linear(6, 5)
        self.norm = nn.LayerNorm(5)


def save_net(folder):
    torch.manual_seed(0)
    net = Net()
    folder.mkdir()
    save_file(net.state_dict(), folder / "model.safetensors")
    return net


def save_adapter(net, folder, **config):
    """Save an adapter of the net, and return what PEFT adds to every tensor."""
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    model = peft.get_peft_model(net, peft.LoraConfig(r=3, lora_alpha=6, **config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator(name)))
    model.save_pretrained(folder)
    after = model.merge_and_unload().state_dict()
    return before, {name: after[name] - tensor for name, tensor in before.items()}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["embedding"]},
        {"target_modules": ["conv"]},
        {"target_modules": ["signal"]},
        {"target_modules": ["linear"], "bias": "lora_only"},
        {"target_modules": ["linear"], "bias": "all"},
        {"target_modules": ["linear"], "lora_bias": True},
        {"target_modules": ["linear"], "modules_to_save": ["norm"]},
        {"target_modules": ["linear"], "use_dora": True},
        {"target_modules": ["embedding", "conv", "signal", "linear"], "use_rslora": True},
    ],
    ids=lambda config: ", ".join(f"{key} {value}" for key, value in config.items()),
)
def test_modules_of_every_kind(config, tmp_path):
    before, added = save_adapter(save_net(tmp_path / "net"), tmp_path / "adapter", **config)
    recipe = {"base": tmp_path / "net", "models": [{"path": tmp_path / "adapter"}], **ONE}
    superpose.merge(recipe, tmp_path / "out")
    merged = open_model(str(tmp_path / "out"))
    from superpose.reading import read_tensor

    for name, tensor in before.items():
        found = read_tensor(merged.tensors[name])
        assert torch.allclose(found, tensor + added[name], rtol=0, atol=2e-6), name
    assert any(change.abs().max() > 0.01 for change in added.values())


def test_an_adapter_alone_is_no_base(tmp_path):
    save_adapter(save_net(tmp_path / "net"), tmp_path / "adapter", target_modules=["linear"])
    with pytest.raises(SuperposeError, match="an adapter alone is no base"):
        open_base(str(tmp_path / "adapter"))
    with pytest.raises(SuperposeError, match="a checkpoint and an adapter, in this order"):
        open_model(f"{tmp_path / 'adapter'}+{tmp_path / 'net'}")


def test_a_plus_in_a_folder_is_part_of_its_name(tmp_path):
    save_net(tmp_path / "net+more")
    assert open_model(str(tmp_path / "net+more")).tensors


def write(folder, tensors, **config):
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    content = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, **config}
    (folder / "adapter_config.json").write_text(json.dumps(content))
    return open_adapter(folder, "one")


def pair(module="base_model.model.linear", rank=2):
    return {f"{module}.lora_A.weight": torch.ones(rank, 6), f"{module}.lora_B.weight": torch.ones(5, rank)}


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        ({}, {}, "holds no tensors"),
        ({**pair(), "base_model.model.linear.lora_C.weight": torch.ones(2)}, {}, "no part of LoRA"),
        ({"base_model.model.linear.lora_A.weight": torch.ones(2, 6)}, {}, "has no lora_B"),
        ({**pair(), "base_model.model.other.lora_B.weight": torch.ones(5, 2)}, {}, "has no lora_A"),
        (pair(rank=3), {}, "rank 3, adapter_config.json says 2"),
        (pair(), {"lora_alpha": "four"}, "does not say r and lora_alpha"),
        (pair(), {"rank_pattern": [2]}, "no mapping of patterns"),
        (pair(), {"alpha_pattern": {"(": 2}}, "no mapping of patterns"),
        (pair(), {"lora_alpha": 10**400}, "does not say r and lora_alpha"),
        (pair(), {"alpha_pattern": {"(.*.*.*.*x)": 1}}, "no mapping of patterns"),
        (pair(), {"alpha_pattern": {"a" * 201: 1}}, "no mapping of patterns"),
        (pair(), {"use_dora": True}, "has no lora_magnitude_vector"),
        ({**pair(), "base_model.model.linear.lora_magnitude_vector": torch.ones(4)}, {}, "4 magnitudes for 5 rows"),
        (pair(), {"peft_type": "LOHA"}, "of type LOHA"),
        (pair(), {"use_qalora": True}, "use_qalora"),
        (pair(), {"init_lora_weights": "PiSSA_niter_4"}, "changes the base"),
    ],
)
def test_what_is_wrong_is_told(tensors, config, message, tmp_path):
    found = write(tmp_path / "adapter", tensors, **config)
    assert [problem for problem in found.problems if message in problem.what], found.problems
    assert all(problem.mend and problem.where for problem in found.problems)


def test_a_bias_of_another_length_is_refused(tmp_path):
    save_net(tmp_path / "net")
    write(tmp_path / "adapter", {**pair(), "base_model.model.linear.lora_B.bias": torch.ones(1)})
    recipe = {"base": tmp_path / "net", "models": [{"path": tmp_path / "adapter"}], **ONE}
    with pytest.raises(SuperposeError, match=r"shape \[1\], the base's bias has \[5\]"):
        superpose.merge(recipe, tmp_path / "out")


@pytest.mark.filterwarnings("ignore")
def test_a_grouped_convolution_is_refused(tmp_path):
    net = save_net(tmp_path / "net")
    net.conv = nn.Conv2d(4, 8, 3, groups=2)
    net_adapter = peft.get_peft_model(net, peft.LoraConfig(r=4, target_modules=["conv"]))
    net_adapter.save_pretrained(tmp_path / "adapter")
    found = open_adapter(tmp_path / "adapter", "one")
    assert "grouped convolution" in found.problems[0].what


def test_broken_files(tmp_path):
    write(tmp_path / "adapter", pair())
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    assert "truncated" in open_adapter(tmp_path / "adapter", "one").problems[0].what
    file.unlink()
    with pytest.raises(SuperposeError, match=r"has no adapter_model\.safetensors"):
        open_adapter(tmp_path / "adapter", "one")
    (tmp_path / "adapter" / "adapter_config.json").write_text("[")
    with pytest.raises(SuperposeError, match="no readable JSON"):
        open_adapter(tmp_path / "adapter", "one")


def test_the_first_pattern_that_matches_the_end_of_a_path_counts(tmp_path):
    names = ["base_model.model.a.linear", "base_model.model.ba.linear", "base_model.model.linear"]
    tensors = {key: tensor for name in names for key, tensor in pair(name).items()}
    found = write(tmp_path / "adapter", tensors, alpha_pattern={r"a\.linear": 6, "linear": 8})
    assert {path: module.scale for path, module in found.modules.items()} == {
        "a.linear": 3.0, "ba.linear": 4.0, "linear": 4.0,
    }  # fmt: skip


def test_values_that_are_not_finite_are_named(tmp_path):
    save_net(tmp_path / "net")
    tensors = pair()
    tensors["base_model.model.linear.lora_B.weight"][1, 1] = float("nan")
    write(tmp_path / "adapter", tensors)
    recipe = {"base": tmp_path / "net", "models": [{"path": tmp_path / "adapter"}], "method": "stf"}
    for form in ("model", "adapter"):
        with pytest.raises(SuperposeError, match="1 entries are NaN") as caught:
            superpose.merge({**recipe, "output": {"form": form}}, tmp_path / "out")
        assert "lora_B" in caught.value.where
        assert not (tmp_path / "out").exists()
