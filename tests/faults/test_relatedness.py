"""Tuned models that are none of this base: the base itself, strangers; and real fine-tunes, which nobody doubts."""

from __future__ import annotations

import pytest
import torch
from families import base_tensors, generator, make_family, save, tuned_tensors

import superpose
from superpose.relatedness import doubts


def merged(tmp_path, base, models, **more):
    folders = [save(tmp_path / "base", base), *(save(tmp_path / name, tensors) for name, tensors in models.items())]
    recipe = {"base": str(folders[0]), "models": [str(folder) for folder in folders[1:]], "method": "average", **more}
    return superpose.merge(recipe, tmp_path / "out").warnings


def strange(base, seed):
    return {
        name: torch.randn(tensor.shape, generator=generator("strange", seed, name)).to(tensor.dtype)
        for name, tensor in base.items()
    }


def test_the_base_given_as_a_fine_tune_is_told(tmp_path, tally):
    base = base_tensors()
    with tally("Mismatch", "tuned model identical to the base") as injection:
        warnings = merged(tmp_path, base, {"same": base, "math": tuned_tensors(base, 1)})
        (told,) = [warning for warning in warnings if "is it the base?" in warning]
        assert told.startswith("same: no difference from the base")
        assert f"of {len(base)} tensors" in told
        injection.outcome = "warned with figures"


def test_a_model_that_differs_in_one_tensor_is_not_the_base(tmp_path):
    base = base_tensors()
    head = {**base, "lm_head.weight": base["lm_head.weight"] + 0.1}
    assert not [warning for warning in merged(tmp_path, base, {"head": head}) if "is it the base?" in warning]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_stranger_is_told_with_figures(tmp_path, tally, dtype):
    base = base_tensors(dtype=dtype)
    with tally("Mismatch", "tuned model that is no fine-tune of this base", str(dtype)) as injection:
        warnings = merged(tmp_path, base, {"other": strange(base, 1), "math": tuned_tensors(base, 1)})
        (told,) = [warning for warning in warnings if "does not look like a fine-tune" in warning]
        assert told.startswith("other: ")
        assert "1.4" in told
        injection.outcome = "warned with figures"


@pytest.mark.parametrize("size", [1e-4, 0.05, 0.5, 1.0])
def test_fine_tunes_are_not_doubted(tmp_path, size):
    base = base_tensors()
    warnings = merged(tmp_path, base, {"near": tuned_tensors(base, 1, size=size)})
    assert not [warning for warning in warnings if "fine-tune" in warning or "is it the base" in warning]


def test_what_is_sampled_is_bounded(tmp_path, monkeypatch):
    folders = make_family(tmp_path, layers=30)
    recipe = {"base": str(folders[0]), "models": [str(folder) for folder in folders[1:]], "method": "average"}
    plan = superpose.plan(recipe)
    read = []
    real = doubts.__globals__["read_tensor"]
    monkeypatch.setattr("superpose.relatedness.read_tensor", lambda header: read.append(header) or real(header))
    monkeypatch.setattr("superpose.relatedness.MOST_PIECES", 40)
    assert doubts(plan.items, plan.recipe.task_names) == []
    assert 0 < len(read) <= 2 * 40


def test_nan_in_the_sample_does_not_hide_a_stranger(tmp_path):
    base, other = base_tensors(), strange(base_tensors(), 1)
    other["lm_head.weight"][:] = float("nan")
    warnings = merged(tmp_path, base, {"other": other}, non_finite="zero")
    assert any("does not look like a fine-tune" in warning for warning in warnings)
