"""Dtypes, shapes and values that are rare but right: they come out as they should, not in an error."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from faults.damage import MERGED, SUFFIXES, bits, merged_or_refused

GROUP = "Broken inputs"


def rare_tensors():
    draw = torch.Generator().manual_seed(7)
    whole = torch.arange(12).reshape(3, 4)
    return {
        "denormals.weight": torch.full((3, 4), 1e-42) * torch.randint(1, 9, (3, 4), generator=draw),
        "double.weight": torch.randn(3, 4, generator=draw, dtype=torch.float64),
        "half.weight": torch.randn(3, 4, generator=draw).half(),
        "brain.weight": torch.randn(3, 4, generator=draw).bfloat16(),
        "eighth.weight": torch.randn(3, 4, generator=draw).to(torch.float8_e4m3fn),
        "eighth.wide.weight": torch.randn(3, 4, generator=draw).to(torch.float8_e5m2),
        "whole.weight": whole,
        "bytes.weight": whole.to(torch.uint8),
        "truth.weight": whole > 4,
        "empty.weight": torch.zeros(0, 4),
        "empty.bias": torch.zeros(0),
        "scalar": torch.tensor(2.5),
        "one.row.weight": torch.randn(1, 5, generator=draw),
        "one.column.weight": torch.randn(5, 1, generator=draw),
        "kernel.weight": torch.randn(2, 3, 3, 3, generator=draw),
    }


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_rare_dtypes_shapes_and_values_come_out_right(tmp_path, tally, suffix):
    """A mean of two is exact to a rounding; what is no number with a point is the base's."""
    base, tuned = rare_tensors(), rare_tensors()
    for name, tensor in tuned.items():
        if tensor.dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            tuned[name] = tensor + (tensor * 0.5).to(tensor.dtype)
    folders = []
    for role, tensors in (("base", base), ("tuned", tuned), ("again", base)):
        (tmp_path / role).mkdir()
        if suffix == ".bin":
            torch.save(tensors, tmp_path / role / "pytorch_model.bin")
        else:
            save_file(tensors, tmp_path / role / "model.safetensors")
        folders.append(tmp_path / role)
    assert merged_or_refused(folders[0], folders[1:], tmp_path / "out") == MERGED
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == base.keys()
    for name, tensor in base.items():
        with tally(GROUP, f"rare: {name}", suffix) as injection:
            assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
            if tensor.dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
                expected = (tuned[name].double() + tensor.double()) / 2
                eps = torch.finfo(tensor.dtype if tensor.dtype is not torch.float64 else torch.float64).eps
                assert torch.allclose(found[name].double(), expected, rtol=2 * eps, atol=2e-45), name
            else:
                assert bits(found[name]) == bits(tensor)
            injection.outcome = MERGED
