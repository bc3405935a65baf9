"""Directions shared out among tasks, against the formula with inverses and whole matrices."""

import numpy as np
import pytest
import torch

from superpose.maths import shares
from superpose.maths.shares import shared_out
from superpose.maths.side_by_side import Crew
from superpose.maths.svd import Features, thin_svd


def random_stack(tasks, *shape, seed=3):
    return torch.randn(tasks, *shape, generator=torch.Generator().manual_seed(seed))


def by_the_formula(tasks, background):
    left, right, weighted = 0, 0, 0
    for task in tasks:
        u, s, vh = (part.double().numpy() for part in (task.u, task.s, task.vh))
        of_left = u @ np.diag(s / s.mean()) @ u.T + background * np.eye(len(u))
        of_right = vh.T @ np.diag(s / s.mean()) @ vh + background * np.eye(vh.shape[1])
        left, right = left + of_left, right + of_right
        weighted = weighted + of_left @ (u * s) @ vh @ of_right
    return np.linalg.inv(left) @ weighted @ np.linalg.inv(right)


def assert_close(actual, expected, tolerance):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize("shape", [(300, 40), (40, 300), (520, 270), (256, 256), (257, 5), (1, 1), (3, 1)])
@pytest.mark.parametrize("background", [1e6, 0.1, 1e-6])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.float64, 1e-7)])
def test_equals_the_formula_in_blocks_of_rows(shape, background, dtype, tolerance):
    tasks = [thin_svd(matrix) for matrix in random_stack(3, *shape).to(dtype)]
    found = shared_out(tasks, background)
    assert found.dtype == torch.float64
    assert_close(found, by_the_formula(tasks, background), tolerance)


def test_a_faint_background_beside_strong_use_is_solved_for_in_float64():
    """In float32 the use of the strongest would round to as much as the background is."""
    u, vh = torch.linalg.qr(random_stack(1, 300, 60)[0])[0], torch.eye(60)
    s = torch.logspace(4, -2, 60)
    found = shared_out([Features(u, s, vh)], 1e-6)
    assert_close(found, by_the_formula([Features(u, s, vh)], 1e-6), 1e-6)


def test_features_in_float32_span_no_more_than_they_do():
    """What rounding adds to the sum of 20 directions stays far below what a flattened spectrum would make strong."""
    tasks = [
        thin_svd(left @ right) for left, right in zip(random_stack(4, 300, 5), random_stack(4, 5, 200), strict=True)
    ]
    s = torch.linalg.svdvals(shared_out(tasks, 0.1))
    assert float(s[19]) > 1e-3 * float(s[0])
    assert float(s[20]) < 1e-14 * float(s[0])


@pytest.mark.parametrize("workers", [2, 5])
def test_bytes_do_not_depend_on_who_forms_which_rows(workers, monkeypatch):
    monkeypatch.setattr(shares, "ROWS", 16)
    tasks = [thin_svd(matrix) for matrix in random_stack(3, 150, 90)]
    alone = shared_out(tasks, 0.1)
    crew = Crew(workers)
    with crew.at_work():
        together = shared_out(tasks, 0.1)
    crew.close()
    assert torch.equal(alone, together)
