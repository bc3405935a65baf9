"""How well a merge keeps its tasks' features: mean of |<s u, M v - s u>| (arXiv:2502.10698v2, Appendix A)."""

import numpy as np
import pytest
import torch

from superpose.maths.measures import feature_preservation
from superpose.maths.svd import thin_svd
from superpose.methods.stf import superpose_features


def misses_by_feature(merged, matrices):
    """Return, task by task, |<s u, M v - s u>| and |u . M v / s - 1| of every feature."""
    misses, shares = [], []
    for matrix in matrices:
        u, s, vh = np.linalg.svd(matrix, full_matrices=False)
        misses.append([abs(s[k] * u[:, k] @ (merged @ vh[k] - s[k] * u[:, k])) for k in range(len(s))])
        shares.append([abs(u[:, k] @ merged @ vh[k] / s[k] - 1) for k in range(len(s))])
    return misses, shares


def random_matrices(*shape):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_equals_the_formula_feature_by_feature():
    matrices, merged = random_matrices(3, 6, 8), random_matrices(6, 8)
    found = feature_preservation(merged, [thin_svd(matrix) for matrix in matrices])
    misses, shares = misses_by_feature(merged.numpy(), matrices.numpy())
    assert found.mean == pytest.approx(np.mean(misses), rel=1e-12)
    assert found.relative == pytest.approx(np.mean(shares), rel=1e-12)
    assert found.by_task == pytest.approx(np.mean(misses, axis=1), rel=1e-12)
    assert found.features == 18


def test_superposed_matrix_keeps_every_feature_and_sum_and_mean_do_not():
    """About 8 for the sum and 29 for the mean of four random 30 x 40 matrices."""
    matrices = random_matrices(4, 30, 40)
    tasks = [thin_svd(matrix) for matrix in matrices]
    assert feature_preservation(superpose_features(tasks).matrix, tasks).mean < 1e-12
    assert feature_preservation(matrices.sum(dim=0), tasks).mean == pytest.approx(7.8, rel=0.1)
    assert feature_preservation(matrices.mean(dim=0), tasks).mean == pytest.approx(29.0, rel=0.1)


def test_means_are_over_features_not_over_tasks():
    strong, weak = thin_svd(torch.diag(torch.tensor([3.0, 2.0]))), thin_svd(torch.diag(torch.tensor([0.0, 1.0])))
    found = feature_preservation(torch.zeros(2, 2), [strong, weak])
    assert found.mean == pytest.approx((9 + 4 + 1) / 3)
    assert found.by_task == pytest.approx((6.5, 1))
    assert found.relative == pytest.approx(1)


def test_task_without_features_counts_for_nothing():
    none, some = thin_svd(torch.zeros(2, 2)), thin_svd(torch.diag(torch.tensor([3.0, 2.0])))
    assert feature_preservation(torch.zeros(2, 2), [none, some]).by_task == pytest.approx((0, 6.5))
    assert feature_preservation(torch.zeros(2, 2), [none, some]).mean == pytest.approx(6.5)
    assert feature_preservation(torch.zeros(2, 2), [none]).mean == 0
