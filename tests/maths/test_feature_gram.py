"""The matrix of STF's system, by blocks and by features, against its definition written out in float64."""

import numpy as np
import pytest
import torch

from superpose.maths import feature_gram
from superpose.maths.feature_gram import FeatureGram, add_up, block_bytes
from superpose.maths.svd import Features, thin_svd


def tasks_of(counts, dtype=torch.float64, shape=(14, 11)):
    """Return features of random matrices, so many of each."""
    generator = torch.Generator().manual_seed(0)
    return [thin_svd(torch.randn(shape, dtype=dtype, generator=generator)).take(0, count) for count in counts]


def written_out(tasks):
    u = np.hstack([task.u.double().numpy() for task in tasks])
    v = np.vstack([task.vh.double().numpy() for task in tasks]).T
    return (u.T @ u) * (v.T @ v)


@pytest.fixture(params=["blocks", "features"])
def route(request, monkeypatch):
    if request.param == "features":
        monkeypatch.setattr(feature_gram, "MOST_BLOCK_BYTES", 0)
    return request.param


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
@pytest.mark.parametrize("counts", [(11, 11, 11), (3, 0, 7, 1), (5,), (0, 4)])
def test_matrix_is_that_of_the_definition(counts, dtype, tolerance, route):
    tasks = tasks_of(counts, dtype)
    gram, expected = FeatureGram(tasks), written_out(tasks)
    # One task has no pair to form a block with.
    assert gram.keeps_blocks == (route == "blocks" or block_bytes(counts, dtype) == 0)
    assert gram.size == sum(counts)
    vectors = torch.randn(sum(counts), 3, dtype=dtype, generator=torch.Generator().manual_seed(1))
    before = vectors.clone()
    np.testing.assert_allclose(gram.dense(), expected, atol=tolerance)
    np.testing.assert_allclose(gram.times(vectors), expected @ vectors.double().numpy(), atol=20 * tolerance)
    assert torch.equal(vectors, before)


def test_features_add_up_with_their_factors():
    tasks = tasks_of((4, 2))
    factors = [torch.tensor([1.0, -2.0, 0.5, 0.0], dtype=torch.float64), torch.tensor([3.0, 1.0], dtype=torch.float64)]
    expected = sum(
        factor * np.outer(task.u[:, place], task.vh[place])
        for task, part in zip(tasks, factors, strict=True)
        for place, factor in enumerate(part.tolist())
    )
    np.testing.assert_allclose(add_up(tasks, factors), expected, atol=1e-14)


def test_bytes_of_blocks_are_those_of_the_pairs():
    assert block_bytes([3, 4, 5], torch.float32) == 4 * (3 * 4 + 3 * 5 + 4 * 5)
    gram = FeatureGram([Features(task.u.float(), task.s.float(), task.vh.float()) for task in tasks_of((3, 4, 5))])
    assert sum(block.numel() * 4 for _, _, block in gram._blocks) == block_bytes([3, 4, 5], torch.float32)
