"""RegMean: (sum Gs_i + eps I)^-1 (sum Gs_i W_i^T + eps Wbar^T) (Jin et al. 2022, arXiv:2212.09849)."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from superpose import merge_tensors
from superpose.methods.average import AverageOptions, average
from superpose.methods.regmean import RegmeanOptions, regmean
from superpose.registry import Grams

DTYPES = [(torch.float32, 1e-5), (torch.float64, 1e-10)]


def in_double(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def random_maps(tasks, out, in_, dtype=torch.float64, seed=0):
    return torch.randn(tasks, out, in_, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def random_grams(tasks, in_, rows=40, seed=5):
    inputs = torch.randn(tasks, rows, in_, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return [(x.T @ x / rows) for x in inputs * torch.linspace(0.1, 2, in_)]


def solved(maps, grams, weights, alpha, ridge):
    """The formula, with a general solve instead of Cholesky, and the average added as it stands."""
    size = maps[0].shape[1]
    left, right = np.zeros((size, size)), np.zeros((size, maps[0].shape[0]))
    mean = sum(w * one for w, one in zip(weights, maps, strict=True)) / sum(weights)
    for weight, gram, one in zip(weights, grams, maps, strict=True):
        shrunk = weight * (alpha * gram + (1 - alpha) * np.diag(np.diag(gram)))
        left += shrunk
        right += shrunk @ one.T
    lift = ridge * np.trace(left) / size
    return np.linalg.solve(left + lift * np.eye(size), right + lift * mean.T).T


def merge(maps, grams, weights=None, *, in_x_out=False, **options):
    given = None if weights is None else torch.tensor(weights, dtype=torch.float64)
    known = Grams(tuple(gram.float() if maps.dtype == torch.float32 else gram for gram in grams), in_x_out)
    return regmean(maps, RegmeanOptions(**options), statistics=known, weights=given)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (4, 6), (6, 4), (1, 5), (5, 1)])
@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.9, 1.0])
@pytest.mark.parametrize("weights", [None, [0.2, 0.5, 0.3], [3.0, 0.0, 10.0]])
def test_equals_the_formula(weights, alpha, shape, dtype, tolerance):
    maps, grams = random_maps(3, *shape, dtype), random_grams(3, shape[1])
    merged = merge(maps, grams, weights, alpha=alpha, ridge=1e-4).tensor
    assert (merged.shape, merged.dtype) == (shape, dtype)
    told = [gram.to(dtype).double().numpy() for gram in grams]
    expected = solved(maps.double().numpy(), told, weights or [1.0] * 3, alpha, 1e-4)
    np.testing.assert_allclose(merged.double().numpy(), expected, rtol=0, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize("alpha", [0.0, 0.9, 1.0])
def test_equals_the_formula_for_maps_stored_in_x_out(alpha):
    maps, grams = random_maps(3, 4, 6), random_grams(3, 6)
    turned = merge(maps.transpose(1, 2).contiguous(), grams, in_x_out=True, alpha=alpha).tensor
    assert torch.allclose(turned, merge(maps, grams, alpha=alpha).tensor.T, atol=1e-12)
    square = random_maps(2, 5, 5)  # shapes alone would not tell
    grams = random_grams(2, 5)
    turned = merge(square.transpose(1, 2).contiguous(), grams, in_x_out=True).tensor
    assert torch.allclose(turned, merge(square, grams).tensor.T, atol=1e-12)


def test_alpha_one_minimises_what_it_is_to_minimise():
    maps, grams = random_maps(3, 4, 6), random_grams(3, 6)
    found = merge(maps, grams, alpha=1.0, ridge=0.0).tensor

    def loss(weight):
        return sum(torch.trace((weight - one) @ gram @ (weight - one).T) for one, gram in zip(maps, grams, strict=True))

    weight = found.clone().requires_grad_()
    loss(weight).backward()
    assert float(weight.grad.abs().max()) < 1e-9 * float(loss(found))


@pytest.mark.parametrize(
    ("alpha", "expected"),
    [(1.0, (0.42857, 0.71429)), (0.9, (0.45736, 0.69767)), (0.1, (0.64643, 0.60707)), (0.0, (0.66667, 0.6))],
)
def test_worked_example(alpha, expected):
    grams = [in_double([2, 1], [1, 2]), torch.diag(torch.tensor([1.0, 3.0], dtype=torch.float64))]
    merged = merge(in_double([[1, 0]], [[0, 1]]), grams, alpha=alpha, ridge=0.0).tensor
    np.testing.assert_allclose(merged.numpy(), [expected], atol=6e-6)


def test_worked_example_through_files_of_tensors():
    base = {"layer.weight": torch.zeros(1, 2), "layer.bias": torch.zeros(1)}
    tuned = [
        {"layer.weight": torch.tensor([[1.0, 0.0]]), "layer.bias": torch.tensor([1.0])},
        {"layer.weight": torch.tensor([[0.0, 1.0]]), "layer.bias": torch.tensor([2.0])},
    ]
    grams = [
        {"layer.weight": torch.tensor([[2.0, 1.0], [1.0, 2.0]])},
        {"layer.weight": torch.diag(torch.tensor([1.0, 3.0]))},
    ]
    merged = merge_tensors(base, tuned, "regmean", statistics=grams, alpha=1.0)
    np.testing.assert_allclose(merged["layer.weight"].numpy(), [[0.42857, 0.71429]], atol=1e-5)
    assert merged["layer.bias"].tolist() == [1.5]  # averaged: no linear map


def test_degenerate_inputs_that_never_fire_get_the_average():
    maps = random_maps(2, 3, 4)
    grams = random_grams(2, 4)
    for gram in grams:
        gram[1] = gram[:, 1] = 0.0
    merged = merge(maps, grams).tensor
    assert torch.allclose(merged[:, 1], maps[:, :, 1].mean(dim=0))
    nothing = [torch.zeros(4, 4, dtype=torch.float64)] * 2
    assert torch.allclose(merge(maps, nothing).tensor, maps.mean(dim=0))


def test_degenerate_one_task_identical_maps_and_equal_grams():
    maps, grams = random_maps(3, 4, 6), random_grams(3, 6)
    assert torch.equal(merge(maps[:1], grams[:1]).tensor, maps[0])
    assert torch.equal(merge(maps[:1].expand(3, 4, 6), grams).tensor, maps[0])
    same = [grams[0]] * 3
    assert torch.allclose(merge(maps, same).tensor, average(maps, AverageOptions()))


def test_degenerate_matrices_of_float32_that_are_singular_take_a_stronger_ridge_and_say_so():
    x = torch.randn(3, 40, generator=torch.Generator().manual_seed(3)) * torch.logspace(-4, 4, 40)
    gram = (x.T @ x).float()  # rank 3 of 40, and rounded: no longer semidefinite
    maps = random_maps(2, 4, 40, torch.float32)
    known = Grams((gram, gram))
    merged = regmean(maps, RegmeanOptions(alpha=1.0, ridge=0.0), statistics=known)
    assert torch.isfinite(merged.tensor).all()
    assert 0 < merged.stats["ridge"] <= 1e-2


def test_matrices_that_are_none_are_refused():
    maps = random_maps(2, 3, 2)
    wrong = [in_double([1, 5], [5, 1])] * 2
    with pytest.raises(torch.linalg.LinAlgError, match="no Gram matrices"):
        merge(maps, wrong, alpha=1.0)


@settings(deadline=None)
@given(st.integers(1, 4), st.floats(0, 1), st.floats(1e-3, 1e3))
def test_order_and_a_common_factor_change_nothing(tasks, alpha, factor):
    maps, grams = random_maps(tasks, 3, 4), random_grams(tasks, 4)
    merged = merge(maps, grams, alpha=alpha).tensor
    turned = merge(maps.flip(0), grams[::-1], alpha=alpha).tensor
    assert torch.allclose(turned, merged, atol=1e-9)
    assert torch.allclose(merge(maps, [factor * gram for gram in grams], alpha=alpha).tensor, merged, atol=1e-9)


def test_breaks_zero_the_base_is_one_more_model():
    tuned = torch.tensor([[[0.0]], [[3.0]]])
    assert torch.allclose(regmean(tuned, RegmeanOptions()).tensor, torch.tensor([[1.5]]))


def test_defaults():
    assert RegmeanOptions() == RegmeanOptions(alpha=0.9, ridge=1e-6)


def test_maps_in_memory_that_are_stored_in_x_out_are_named():
    maps, grams = random_maps(2, 4, 4, torch.float32), [gram.float() for gram in random_grams(2, 4)]
    known = [{"layer.weight": gram} for gram in grams]
    base = {"layer.weight": torch.zeros(4, 4)}
    told = merge_tensors(base, [{"layer.weight": one} for one in maps], "regmean", statistics=known)
    turned = [{"layer.weight": one.T.contiguous()} for one in maps]
    found = merge_tensors(base, turned, "regmean", statistics=known, in_x_out=["layer.weight"])
    assert torch.allclose(found["layer.weight"], told["layer.weight"].T, atol=1e-5)
    assert not torch.allclose(
        merge_tensors(base, turned, "regmean", statistics=known)["layer.weight"], told["layer.weight"].T, atol=1e-2
    )
