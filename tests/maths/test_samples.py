"""A sample is even over all tensors, and has a largest size."""

import numpy as np
import torch

from superpose.maths.samples import LARGEST_SAMPLE, Sample, take_sample
from superpose.maths.streaming import TensorChunks


def chunks_of(array):
    tensor = torch.from_numpy(array)
    return TensorChunks(*array.shape, 1 << 18, lambda start, stop: tensor[:, start:stop])


def test_each_tensor_gives_its_share_of_magnitudes():
    for size in (1, 100, 5_000, 1_000_000):
        rows = take_sample(chunks_of(-np.arange(1.0, size + 1, dtype=np.float32)[None]), 256).rows()
        assert -(-size // 256) <= rows.shape[1] <= size // 256 + 4
        assert rows.min() >= 1
        assert rows.max() <= size
        assert len(np.unique(rows)) == rows.shape[1]


def test_nothing_gives_nothing():
    assert take_sample(chunks_of(np.zeros((3, 0), np.float32)), 256).rows().shape == (3, 0)


def test_samples_of_different_rates_are_thinned_to_one():
    total = Sample([np.zeros((1, 64), np.float32)], 1)
    total += Sample([np.ones((1, 64), np.float32)], 4)
    assert np.unique(total.rows(), return_counts=True)[1].tolist() == [16, 64]


def test_memory_has_a_bound_and_no_tensor_is_favoured():
    total = Sample([], 1)
    for number in range(30):
        total += Sample([np.full((1, 100_001), number, np.float32)], 1)
    rows = total.rows()
    assert LARGEST_SAMPLE / 2 <= rows.shape[1] <= LARGEST_SAMPLE
    counts = np.unique(rows, return_counts=True)[1]
    assert len(counts) == 30
    assert counts.max() - counts.min() <= 4
