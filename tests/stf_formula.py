"""STF by its formula, in NumPy and float64, and what its tests are made from.

Qiu et al. 2025, arXiv:2502.10698v2: M = sum_a alpha_a u_a v_a^T, where alpha solves equation (3), G alpha = s
with G_ab = (u_a . u_b)(v_a . v_b).
"""

import numpy as np
import torch

from superpose.kinds import Kind
from superpose.methods.stf import StfOptions, stf

CUTOFF = {np.dtype(np.float32): 1e-5, np.dtype(np.float64): 1e-10}


def triplets(matrices):
    """Return u (columns), s and v (columns) of all matrices together, without what is rounding noise."""
    us, ss, vs = [], [], []
    for matrix in matrices:
        u, s, vh = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
        kept = s > max(matrix.shape) * np.finfo(matrix.dtype).eps * s[0]
        us.append(u[:, kept])
        ss.append(s[kept])
        vs.append(vh[kept].T)
    return np.hstack(us), np.hstack(ss), np.hstack(vs)


def superposed(matrices, ridge=0.0):
    """Return M by equation (3), with `ridge` added to the diagonal of G."""
    u, s, v = triplets(matrices)
    gram = (u.T @ u) * (v.T @ v) + ridge * np.eye(len(s))
    alpha = np.linalg.pinv(gram, rcond=CUTOFF[matrices[0].dtype], hermitian=True) @ s
    return (u * alpha) @ v.T


def shortest(matrices):
    """Return the least-squares matrix of smallest norm from the constraints alone, without G."""
    u, s, v = triplets(matrices)
    rows = np.einsum("ia,ja->aij", u, v).reshape(len(s), -1)
    return np.linalg.lstsq(rows, s, rcond=1e-6)[0].reshape(matrices[0].shape)


def random_tensors(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def orthonormal(rows, columns, seed=0):
    return torch.linalg.qr(random_tensors(rows, columns, seed=seed)).Q


def low_rank(rank, out, in_, seed=0):
    return random_tensors(out, rank, seed=seed) @ random_tensors(rank, in_, seed=seed + 1000)


def merge(matrices, **options):
    """Merge untrimmed and unscaled linear maps; the tests of single laws say what they change."""
    matrices = torch.stack(list(matrices))
    return stf(matrices, StfOptions(**{"density": 1.0, "scaling_factor": 1.0, **options}), kind=Kind.LINEAR)


def assert_close(actual, expected, tolerance=1e-10):
    """Compare in Frobenius norm, relative to what is expected."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    assert np.linalg.norm(actual - expected) <= tolerance * np.linalg.norm(expected)
