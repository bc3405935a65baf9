"""STF of large matrices: leading features found by a sketch, and systems that are never written out."""

import numpy as np
import pytest
import torch
from stf_formula import assert_close, low_rank, merge, random_tensors, triplets

from superpose.methods.stf import StfOptions, stf_cost


def large_tasks(count=3, out=300, in_=280):
    """Return tasks of a few strong features and noise, as fine-tunes are."""
    return torch.stack(
        [
            4 * low_rank(6, out, in_, seed=seed).float() + random_tensors(out, in_, seed=seed + 50).float()
            for seed in range(count)
        ]
    )


@pytest.mark.parametrize("options", [{"feature_share": 0.1}, {"rank": 28}, {"rank": 40, "feature_share": 0.1}])
def test_every_leading_feature_keeps_its_strength(options):
    matrices = large_tasks()
    merged = merge(matrices, **options)
    assert merged.stats["features"] == 3 * 28
    assert merged.stats["worst"] < 1e-5
    exact = merge(matrices, **options, decomposition="exact")
    assert exact.stats["features"] == 3 * 28
    strengths = [np.linalg.svd(matrix.double().numpy(), compute_uv=False)[:28] for matrix in matrices]
    u, s, v = triplets(matrices.double().numpy())
    first = np.concatenate([np.arange(28) + 280 * task for task in range(3)])
    np.testing.assert_allclose(s[first], np.concatenate(strengths))
    answers = np.einsum("ia,ij,ja->a", u[:, first], exact.tensor.double().numpy(), v[:, first])
    np.testing.assert_allclose(answers, s[first], rtol=1e-4)
    # The sketch finds nearly those: most of what they hold, and the strong ones exactly.
    norm = float(exact.tensor.norm())
    assert float((merged.tensor - exact.tensor).norm()) < 0.35 * norm
    strong = np.concatenate([np.arange(6) + 280 * task for task in range(3)])
    answers = np.einsum("ia,ij,ja->a", u[:, strong], merged.tensor.double().numpy(), v[:, strong])
    np.testing.assert_allclose(answers, s[strong], rtol=0.05)


def test_share_of_features_is_of_the_smaller_side():
    matrices = random_tensors(2, 9, 12)
    assert merge(matrices, feature_share=0.5).stats["features"] == 2 * 4
    assert_close(merge(matrices, feature_share=0.5).tensor, merge(matrices, rank=4).tensor)
    assert merge(matrices, feature_share=0.01).stats["features"] == 2


def test_distance_to_all_features_is_recorded_where_it_is_asked_for():
    matrices = random_tensors(3, 9, 12)
    merged, whole = merge(matrices, rank=3, check_share=1.0), merge(matrices)
    distance = float((merged.tensor - whole.tensor).norm() / whole.tensor.norm())
    assert merged.stats["distance_to_all_features"] == pytest.approx(distance, rel=1e-6)
    assert torch.equal(merged.tensor, merge(matrices, rank=3).tensor)
    assert "distance_to_all_features" not in merge(matrices, rank=3).stats
    assert "distance_to_all_features" not in merge(matrices, check_share=1.0).stats  # nothing was left out


def test_sample_of_checked_matrices_has_the_share_asked_for():
    checked = sum(
        "distance_to_all_features" in merge(random_tensors(2, 3, 3, seed=seed), rank=1, check_share=0.25).stats
        for seed in range(200)
    )
    assert 30 < checked < 70


@pytest.mark.parametrize("energy", [0.5, 0.95])
def test_energy_of_large_matrices_is_held(energy):
    matrices = large_tasks()
    merged = merge(matrices, energy=energy)
    exact = merge(matrices, energy=energy, decomposition="exact")
    assert exact.stats["features"] <= merged.stats["features"] <= 1.5 * exact.stats["features"] + 8
    assert merged.stats["worst"] < 1e-5


@pytest.mark.parametrize("apart", [1e-2, 1e-3])
def test_large_systems_of_nearly_parallel_tasks_are_not_taken_for_contradictions(apart, monkeypatch):
    """Beyond what is written out, by an iteration: it is solved, or given up and said, but no task is blamed."""
    monkeypatch.setattr("superpose.maths.linear_system.MOST_DENSE", 150)
    first = random_tensors(130, 140).float()
    tasks = torch.stack([first, first + apart * random_tensors(130, 140, seed=9).float()])
    merged = merge(tasks)
    assert merged.stats["solver"] in ("cg", "cr")
    assert not any("contradict" in caution.text for caution in merged.cautions)
    exact = merge(tasks.double(), solver="eigh")
    assert float((merged.tensor - exact.tensor).norm() / exact.tensor.norm()) < 0.02


def test_large_systems_of_opposite_tasks_cancel(monkeypatch):
    monkeypatch.setattr("superpose.maths.linear_system.MOST_DENSE", 150)
    first, second = random_tensors(2, 90, 100).float()
    merged = merge([first, -first, second, -second])
    assert float(merged.tensor.norm()) < 1e-3 * float(first.norm())
    assert "contradict" in merged.cautions[0].text


def test_memory_counts_what_the_options_ask_for():
    plain = stf_cost((900, 900), 8, StfOptions()).memory
    assert stf_cost((900, 900), 8, StfOptions(solver="eigh")).memory > plain
    fewer = StfOptions(feature_share=0.1)
    assert stf_cost((900, 900), 8, fewer).memory < 0.5 * plain
    assert stf_cost((900, 900), 8, StfOptions(feature_share=0.1, check_share=0.1)).memory > plain


@pytest.mark.parametrize(("tasks", "size"), [(3, 400), (8, 260)])
def test_independent_tasks_are_solved_by_iteration_in_float32(tasks, size):
    """The true residual has to come below the tolerance: rounding in the products must not keep it above."""
    stats = merge(random_tensors(tasks, size, size).float()).stats
    assert stats["solver"] == "cg"
    assert stats["residual"] < 5e-7
