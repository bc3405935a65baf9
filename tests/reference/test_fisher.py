"""Fisher merging: sum_i w_i F_i theta_i / sum_i w_i F_i, entry by entry (Matena and Raffel 2021, arXiv:2111.09832)."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from superpose import SuperposeError, merge_tensors
from superpose.methods.average import AverageOptions, average
from superpose.methods.fisher import FisherOptions, fisher

DTYPES = [(torch.float32, 1e-6), (torch.float64, 1e-12)]
SHAPES = [(), (1,), (7,), (4, 5), (2, 3, 2, 2)]
PLAIN = FisherOptions(normalise=False, floor=0.0)


def by_entry(tuned, information, weights, *, normalise, floor, favor=False):
    scaled = [np.asarray(one, dtype=np.float64) for one in information]
    if normalise:
        norms = [np.sqrt((one**2).sum()) for one in scaled]
        scaled = [one / norm if norm > 0 else 0 * one for one, norm in zip(scaled, norms, strict=True)]
    floored = [np.maximum(one, floor) if place == 0 or not favor else one for place, one in enumerate(scaled)]
    merged = np.empty(tuned.shape[1:])
    for place in np.ndindex(merged.shape):
        shares = [w * one[place] for w, one in zip(weights, floored, strict=True)]
        if sum(shares) == 0:
            shares = list(weights)
        entries = [model[place] for model in tuned]
        merged[place] = sum(a * b for a, b in zip(shares, entries, strict=True)) / sum(shares)
    return merged


def models(shape, dtype=torch.float64, tasks=3, seed=0):
    return torch.randn(tasks, *shape, dtype=dtype, generator=torch.Generator().manual_seed(seed + len(shape)))


def squares(shape, dtype=torch.float64, tasks=3):
    """Return information that spans many orders of magnitude, as it does, with some zeros."""
    found = models(shape, dtype, tasks, seed=7).mul(4).exp2().square() * 1e-6
    return torch.where(found < found.median(), 0.0 * found, found)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weights", [None, [0.2, 0.5, 0.3], [3.0, 0.0, 10.0]])
@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("favor", [True, False])
def test_equals_the_formula(favor, normalise, weights, shape, dtype, tolerance):
    tuned, information = models(shape, dtype), squares(shape, dtype)
    given = None if weights is None else torch.tensor(weights, dtype=torch.float64)
    options = FisherOptions(normalise=normalise, favor_target=favor)
    merged = fisher(tuned, options, statistics=information, weights=given)
    assert (merged.shape, merged.dtype) == (shape, dtype)
    expected = by_entry(
        tuned.double().numpy(), information.double().numpy(), weights or [1.0] * 3, normalise=normalise, floor=1e-6,
        favor=favor,
    )  # fmt: skip
    np.testing.assert_allclose(merged.double().numpy(), expected, rtol=tolerance * 10, atol=tolerance * 10)


def test_worked_example():
    tuned = torch.tensor([[2.0, 2.0], [6.0, 10.0]])
    information = torch.tensor([[1.0, 4.0], [3.0, 0.0]])
    assert fisher(tuned, PLAIN, statistics=information).tolist() == [5.0, 2.0]


def test_worked_example_of_the_norm_over_the_whole_model():
    # Norms are 5 and 10 over both tensors: shares of "a" are 3/5 and 6/10, of "b" 4/5 and 8/10.
    base = {"a.weight": torch.zeros(1, 1), "b.weight": torch.zeros(1, 1)}
    tuned = [{name: torch.full((1, 1), value) for name in base} for value in (1.0, 2.0)]
    information = [
        {"a.weight": torch.tensor([[3.0]]), "b.weight": torch.tensor([[4.0]])},
        {"a.weight": torch.tensor([[6.0]]), "b.weight": torch.tensor([[8.0]])},
    ]
    merged = merge_tensors(base, tuned, "fisher", statistics=information)
    assert torch.allclose(merged["a.weight"], torch.tensor([[1.5]]))
    plain = merge_tensors(base, tuned, "fisher", statistics=information, normalise=False)
    assert torch.allclose(plain["a.weight"], torch.tensor([[(3 * 1 + 6 * 2) / 9.0]]))


def test_degenerate_information_gives_the_average():
    tuned = models((4, 5))
    mean = average(tuned, AverageOptions())
    zeros = torch.zeros_like(tuned)
    for options in (FisherOptions(), PLAIN, FisherOptions(normalise=False)):
        assert torch.allclose(fisher(tuned, options, statistics=zeros), mean)
        assert torch.allclose(fisher(tuned, options, statistics=torch.full_like(tuned, 3.0)), mean)
    assert torch.allclose(fisher(tuned, FisherOptions()), mean)
    # The authors' floor: what no data depends on is the first model's.
    assert torch.equal(fisher(tuned, FisherOptions(favor_target=True), statistics=zeros), tuned[0])


def test_degenerate_one_task_and_information_of_one_task_alone():
    tuned, information = models((4, 5)), squares((4, 5))
    assert torch.equal(fisher(tuned[:1], FisherOptions(), statistics=information[:1]), tuned[0])
    alone = torch.zeros_like(information)
    alone[1] = information[1]
    merged = fisher(tuned, PLAIN, statistics=alone)
    assert torch.allclose(merged[information[1] > 0], tuned[1][information[1] > 0])


@settings(deadline=None)
@given(st.floats(1e-6, 1e6), st.integers(1, 5))
def test_a_common_factor_of_all_information_changes_nothing(factor, tasks):
    tuned, information = models((3, 4), tasks=tasks), squares((3, 4), tasks=tasks) + 1e-9
    options = FisherOptions(normalise=False, floor=0.0)
    merged = fisher(tuned, options, statistics=information)
    assert torch.allclose(fisher(tuned, options, statistics=factor * information), merged)
    scaled = fisher(tuned, FisherOptions(), statistics=information)
    assert torch.allclose(fisher(tuned, FisherOptions(), statistics=factor * information), scaled)


def test_permuting_tasks_with_their_information_changes_nothing():
    tuned, information, order = models((4, 5)), squares((4, 5)), [2, 0, 1]
    merged = fisher(tuned, FisherOptions(), statistics=information)
    assert torch.allclose(fisher(tuned[order], FisherOptions(), statistics=information[order]), merged)


def test_breaks_zero_the_base_is_one_more_model():
    tuned = torch.tensor([[0.0], [3.0]])  # the base is zero, and a model of its own
    assert torch.allclose(fisher(tuned, FisherOptions()), torch.tensor([1.5]))


def test_defaults():
    assert FisherOptions() == FisherOptions(normalise=True, floor=1e-6, favor_target=False)


def test_information_that_is_none_is_refused():
    base, tuned = {"a": torch.zeros(2), "b": torch.zeros(2)}, [{"a": torch.ones(2), "b": torch.ones(2)}] * 2
    whole = {"a": torch.ones(2), "b": torch.ones(2)}
    with pytest.raises(SuperposeError, match="Fisher information is negative") as caught:
        merge_tensors(base, tuned, "fisher", statistics=[whole, {**whole, "b": -torch.ones(2)}])
    assert "tensor b" in caught.value.where
    with pytest.raises(SuperposeError, match="the statistics of model 2 lack a tensor that others have"):
        merge_tensors(base, tuned, "fisher", statistics=[whole, {"a": torch.ones(2)}])
    merged = merge_tensors(base, tuned, "fisher", statistics=[{"a": torch.ones(2)}] * 2)
    assert torch.equal(merged["b"], torch.ones(2))  # no model has it: the average
