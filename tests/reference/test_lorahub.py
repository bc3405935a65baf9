"""LoraHub's composition: sum_i w_i tau_i, or (sum_i w_i B_i) (sum_i w_i A_i) (Huang et al. 2023, section 3)."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from superpose.maths.low_rank import LowRank
from superpose.methods.lorahub import LorahubOptions, lorahub
from superpose.registry import find_method

DTYPES = [(torch.float32, 1e-6), (torch.float64, 1e-12)]


def random_stack(tasks, *shape, dtype=torch.float64):
    return torch.randn(tasks, *shape, dtype=dtype, generator=torch.Generator().manual_seed(11))


def compose(pairs, weights, space):
    given = torch.tensor(weights, dtype=torch.float64)
    tasks = [LowRank(up, down) for up, down in pairs]
    options = LorahubOptions(space=space)
    return find_method("lorahub").factored(tasks, options, weights=given, learned=None).update.matrix()


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("shape", [(), (13,), (6, 9), (4, 3, 2, 2)])
@pytest.mark.parametrize("weights", [[1, 1, 1], [1.5, -1.5, 0.2], [0, 0, 0]])
def test_equals_the_formula(weights, shape, dtype, tolerance):
    task_vectors = random_stack(3, *shape, dtype=dtype)
    merged = lorahub(task_vectors, LorahubOptions(), weights=torch.tensor(weights, dtype=torch.float64))
    expected = sum(w * np.asarray(t.double()) for w, t in zip(weights, task_vectors, strict=True))
    assert merged.dtype == dtype
    np.testing.assert_allclose(merged.double().numpy(), expected, rtol=0, atol=tolerance * 5)


@settings(deadline=None)
@given(st.lists(st.floats(-1.5, 1.5), min_size=1, max_size=4), st.integers(1, 3))
def test_equals_the_formula_in_both_spaces(weights, rank):
    ups, downs = random_stack(len(weights), 5, rank), random_stack(len(weights), rank, 4)
    pairs = list(zip(ups, downs, strict=True))
    delta = sum(w * up @ down for w, (up, down) in zip(weights, pairs, strict=True))
    factor = sum(w * up for w, up in zip(weights, ups, strict=True)) @ sum(
        w * down for w, down in zip(weights, downs, strict=True)
    )
    assert torch.allclose(compose(pairs, weights, "delta"), delta, atol=1e-12)
    assert torch.allclose(compose(pairs, weights, "factor"), factor, atol=1e-12)


def test_worked_example():
    # A1 = [1 0], B1 = [1 0]^T, A2 = [0 1], B2 = [0 1]^T: halves of both.
    e = torch.eye(2, dtype=torch.float64)
    pairs = [(e[:, :1], e[:1]), (e[:, 1:], e[1:])]
    assert torch.equal(compose(pairs, [0.5, 0.5], "delta"), 0.5 * e)
    assert torch.equal(compose(pairs, [0.5, 0.5], "factor"), torch.full((2, 2), 0.25).double())


def test_factor_space_is_quadratic_in_the_weights_and_one_module_of_weight_one_comes_back():
    up, down = random_stack(1, 5, 2)[0], random_stack(1, 2, 4)[0]
    assert torch.allclose(compose([(up, down)], [1.0], "factor"), up @ down)
    assert torch.allclose(compose([(up, down)], [0.3], "factor"), 0.09 * up @ down)


def test_degenerate_weights_of_zero_are_the_base():
    pairs = [(random_stack(1, 5, 2)[0], random_stack(1, 2, 4)[0])]
    for space in ("delta", "factor"):
        assert not compose(pairs, [0.0], space).any()


def test_breaks_same_identical_tasks_add_up():
    task = random_stack(1, 6, 4)
    assert torch.allclose(lorahub(task.expand(3, -1, -1), LorahubOptions()), 3 * task[0])


def test_defaults():
    assert LorahubOptions() == LorahubOptions(space="delta")


def test_coefficients_that_were_found_take_the_place_of_the_weights():
    task_vectors = random_stack(3, 4, 5)
    weights, found = torch.ones(3, dtype=torch.float64), torch.tensor([0.5, -1.5, 0.0], dtype=torch.float64)
    merged = lorahub(task_vectors, LorahubOptions(), weights=weights, learned=found)
    assert torch.equal(merged, lorahub(task_vectors, LorahubOptions(), weights=found))
    tasks = [LowRank(random_stack(1, 5, 2)[0], random_stack(1, 2, 4)[0])] * 3
    method = find_method("lorahub").factored
    for space in ("delta", "factor"):
        given = method(tasks, LorahubOptions(space=space), weights=weights, learned=found).update.matrix()
        assert torch.allclose(
            given, method(tasks, LorahubOptions(space=space), weights=found, learned=None).update.matrix()
        )
