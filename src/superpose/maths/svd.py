"""Singular features of a task matrix: only those that carry something, accurate down to the cut.

Three routes to one decomposition, each exact to rounding of the strongest feature:

    LAPACK's      small matrices, and all in float64
    double Gram   eigenvectors of the smaller Gram matrix in float64: squaring costs half the digits, and float64 has
                  them to spare; twice as fast as LAPACK's in float32, and two digits more exact
    single Gram   the same in float32 with the weak end redone, again twice as fast: for matrices whose strengths lie
                  close together, which have little for float32 to lose

Where only the leading features are asked for, `leading_svd` finds about those, far faster, by subspace iteration.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

SMALL = 128
"""Up to this size LAPACK's decomposition is as fast as any other."""
ROUNDING = 16
"""Rounding a matrix to its dtype moves a singular value by a few eps of the largest, whatever the size."""
LARGE = 512
"""From this size on float32 saves enough time to be worth its rounding."""
FLAT = 6.0
"""Largest square of a singular value, over their mean, at which float32's Gram matrix resolves them."""
WEAK = 0.1
"""Below this share of the largest, strengths from float32's Gram matrix are redone."""
FAINT = 0.02
"""Above this share of the largest, what float64 tells apart is multiplied in float32."""
LAST = 64
"""So few weak features are redone in float64."""
FIRST_ORDER = 1e-3
"""Largest rotation that is corrected to first order: its square is rounding."""
ALIKE = 1e-5
"""Down to this ratio of their lengths, directions that were multiplied together are told apart."""
SIDE = 16
"""Sketches have a multiple of so many columns."""
SMALL_SKETCH = 256
"""Smallest side of a matrix whose leading features are worth a sketch."""


@dataclass(frozen=True)
class Features:
    """The kept part of a thin singular value decomposition, u @ diag(s) @ vh, s descending."""

    u: Float[Tensor, "out rank"]
    s: Float[Tensor, " rank"]
    vh: Float[Tensor, "rank in_"]

    @property
    def count(self) -> int:
        """Number of features."""
        return len(self.s)

    def take(self, start: int, stop: int) -> Features:
        """Return features start..stop, in order of strength."""
        return Features(self.u[:, start:stop], self.s[start:stop], self.vh[start:stop])

    def matrix(self) -> Float[Tensor, "out in_"]:
        """Return the matrix these features add up to."""
        return (self.u * self.s) @ self.vh

    @property
    def T(self) -> Features:  # noqa: N802 - as of a matrix
        """The features of the transposed matrix."""
        return Features(self.vh.T, self.s, self.u.T)


def thin_svd(matrix: Float[Tensor, "out in_"]) -> Features:
    """Return the singular features of a matrix, those of numerical rank only.

    Args:
        matrix: finite, float32 or float64.

    Returns:
        Features in the dtype of the matrix; none for a zero matrix.
    """
    out, in_ = matrix.shape
    if out > in_:
        return thin_svd(matrix.T).T
    if matrix.dtype == torch.float64 or in_ <= SMALL:
        scale, found = 1.0, _by_lapack(matrix.double())
    else:
        scale, matrix = _near_one(matrix)
        found = _by_a_gram(matrix)
    rank = numerical_rank(found.s, in_, matrix.dtype)
    found = found.take(0, rank)
    return Features(found.u.to(matrix.dtype), (found.s / scale).to(matrix.dtype), found.vh.to(matrix.dtype))


def leading_svd(matrix: Float[Tensor, "out in_"], count: int) -> Features:
    """Return about the strongest features of a matrix, by subspace iteration from a sketch.

    Halko, Martinsson and Tropp 2011, arXiv:0909.4061, Algorithms 4.3 and 5.1, with one power iteration and an eighth
    more directions than asked for (4.4, where strengths fall so far that rounding would bury the weak); the sketch adds
    up columns with random signs, which costs one reading. Each feature answers as the matrix does, u . matrix v = s;
    together they hold nearly as much of it as the strongest do, the nearer the faster its strengths fall. Where that
    would save little, the strongest themselves.

    Args:
        matrix: finite, float32 or float64.
        count: features wanted.

    Returns:
        At most `count` features of numerical rank, orthonormal, strongest first.
    """
    out, in_ = matrix.shape
    if out > in_:
        return leading_svd(matrix.T, count).T
    wide = count + max(8, count // 8)
    wide += -wide % SIDE  # products are faster so
    if out < SMALL_SKETCH or 3 * wide > out:  # from about 30% on
        return thin_svd(matrix).take(0, count)
    scale, matrix = _near_one(matrix)
    sketch = _add_up_columns(matrix, wide)
    basis, triangle = torch.linalg.qr(_once_more(matrix, sketch))
    lengths = triangle.diagonal().abs()
    if float(lengths.min()) < ALIKE * float(lengths.max()):  # rounding of the strong would bury the weak
        basis = torch.linalg.qr(_once_more(matrix, torch.linalg.qr(sketch)[0]))[0]
    core = thin_svd(basis.T @ matrix).take(0, count)
    if core.count < count:  # few features, which a sketch can mix up: all of them are found the sure way
        return thin_svd(matrix / scale).take(0, count)
    return Features(basis @ core.u, core.s / scale, core.vh)


def leading_by_energy(matrix: Float[Tensor, "out in_"], energy: float) -> Features:
    """Return about the strongest features of a matrix that hold a share of its squared norm (see `leading_svd`).

    Args:
        matrix: finite, float32 or float64.
        energy: share in [0, 1).

    Returns:
        The features, strongest first.
    """
    size = min(matrix.shape)
    norm = float(torch.linalg.vector_norm(matrix, dtype=torch.float64))
    count = max(SMALL_SKETCH // 8, size // 16)
    while size >= SMALL_SKETCH and 3 * count <= size:  # doubled until they hold enough, or the whole costs no more
        found = leading_svd(matrix, count)
        held = found.s.double().square().cumsum(0)
        if found.count and float(held[-1]) >= energy * norm**2:
            return found.take(0, int(torch.searchsorted(held, energy * norm**2)) + 1)
        count *= 2
    return leading(thin_svd(matrix), None, energy)


def svd_of_product(left: Float[Tensor, "out inner"], right: Float[Tensor, "inner in_"]) -> Features:
    """Return the singular features of left @ right without forming the product.

    Two QR decompositions and a small SVD, O((out + in) inner^2): the route for adapters, whose task matrix is
    scale * B @ A.
    """
    q_left, r_left = torch.linalg.qr(left)
    q_right, r_right = torch.linalg.qr(right.T)
    core = thin_svd(r_left @ r_right.T)
    rank = numerical_rank(core.s, max(left.shape[0], right.shape[1]), left.dtype)
    core = core.take(0, rank)
    return Features(q_left @ core.u, core.s, core.vh @ q_right.T)


def numerical_rank(s: Float[Tensor, " rank"], size: int, dtype: torch.dtype) -> int:
    """Return how many singular values are more than rounding noise of a matrix of this size and dtype.

    The directions of smaller ones are arbitrary: as constraints they would change the merge. In float64 the cut is the
    usual size * eps * the largest, which bounds what the decomposition itself leaves in place of a zero. A matrix in
    float32 is decomposed more exactly than it is known; rounding its entries moves a singular value by an eps or so of
    the largest, whatever the size, and the usual cut would take features of large matrices that are there: here the
    factor ends at 16.
    """
    if len(s) == 0 or s[0] == 0:
        return 0
    factor = size if dtype == torch.float64 else min(size, ROUNDING)
    return int((s > factor * torch.finfo(dtype).eps * s[0]).sum())


def leading(features: Features, rank: int | None, energy: float) -> Features:
    """Return the leading features: at most `rank` of them, and no more than hold `energy` of the squared norm.

    Args:
        features: ordered by strength.
        rank: most features to return; None for no limit.
        energy: share of the sum of squared singular values, in [0, 1]; 1 keeps every feature.

    Returns:
        The features kept, strongest first.
    """
    count = features.count if rank is None else min(rank, features.count)
    if energy < 1 and features.count:
        share = features.s.double().square().cumsum(0)
        needed = int(torch.searchsorted(share, energy * share[-1])) + 1
        count = min(count, needed)
    return features.take(0, count)


def without_ends(features: Features, smallest: float, largest: float) -> Features:
    """Return the features less the weakest and strongest, given as fractions of their number (rounded down)."""
    # The 1e-9 undoes binary rounding: 0.29 * 100 is 28.999999999999996.
    first = math.floor(largest * features.count + 1e-9)
    last = features.count - math.floor(smallest * features.count + 1e-9)
    return features.take(first, max(first, last))


def _by_lapack(matrix: Float[Tensor, "out in_"]) -> Features:
    v, s, uh = torch.linalg.svd(matrix.T, full_matrices=False)  # the driver is faster on tall matrices
    return Features(uh.T, s, v.T)


def _by_a_gram(matrix: Float[Tensor, "out in_"]) -> Features:
    """Decompose a float32 matrix, no taller than wide, by the fastest route that does."""
    routes = [_by_double_gram, lambda one: _by_lapack(one.double())]
    if len(matrix) >= LARGE and _is_flat(matrix):
        routes.insert(0, _by_single_gram)
    for route in routes[:-1]:
        try:
            return route(matrix)
        except torch.linalg.LinAlgError:  # pyright: ignore[reportPrivateImportUsage]
            continue  # LAPACK's iteration for eigenvectors fails for some matrices of many equal values
    return routes[-1](matrix)


def _by_double_gram(matrix: Float[Tensor, "out in_"]) -> Features:
    """Decompose a float32 matrix, no taller than wide, by its Gram matrix in float64."""
    exact = matrix.double()
    squares, vectors = torch.linalg.eigh(_gram(exact))
    s = squares.flip(0).clamp_min(0).sqrt()
    # Only directions that survive the caller's cut are divided by their strength.
    rank = numerical_rank(s, matrix.shape[1], matrix.dtype)
    uh, s = vectors.T.flip(0)[:rank], s[:rank]
    strong = int((s > FAINT * s[0]).sum()) if rank else 0
    vh = matrix.new_empty(rank, matrix.shape[1])
    torch.mm(uh[:strong].to(matrix), matrix, out=vh[:strong])
    # Float32's rounding is relative to the strongest: too coarse for what is far weaker.
    vh[strong:] = uh[strong:] @ exact
    return Features(uh.to(matrix).T, s, vh.div_(s[:, None].to(matrix)))


def _by_single_gram(matrix: Float[Tensor, "out in_"]) -> Features:
    """Decompose a flat float32 matrix, no taller than wide, by its Gram matrix in float32.

    Rounding mixes features k and l by eps s_1^2 / |s_k^2 - s_l^2|: harmless where both are strong. Weak ones are taken
    apart from the strong, to first order, and decomposed again among themselves, where the largest is no longer s_1.
    """
    uh = torch.linalg.eigh(_gram(matrix))[1].T.flip(0)
    answers = uh @ matrix  # row k is s_k v_k
    first, left = 0, len(uh)
    while left > LAST:
        squares = answers.square().sum(dim=1)
        if squares[first] <= (ROUNDING * torch.finfo(matrix.dtype).eps) ** 2 * squares[0]:
            break  # rounding noise alone, or nothing: below the caller's cut
        weak = int((squares > WEAK**2 * squares[first]).sum())
        left = len(uh) - weak
        if left == 0:
            break
        # A rotation takes each weak row out of each strong one, and the other way round.
        angles = answers[weak:] @ answers[:weak].T / (squares[:weak] - squares[weak:, None])
        # At the border pairs can be equally strong: those stay as they are, which is as exact as float32 knows them.
        angles = torch.where(angles.abs() < FIRST_ORDER, angles, angles.new_zeros(()))
        for rows in (uh, answers):
            strong = rows[:weak].clone()
            rows[:weak].addmm_(angles.T, rows[weak:])
            rows[weak:].addmm_(angles, strong, alpha=-1)
        wide = torch.float64 if left <= LAST else torch.float32
        turn = torch.linalg.eigh(_gram(answers[weak:].to(wide)))[1].T.flip(0)
        for rows in (uh, answers):
            rows[weak:] = turn @ rows[weak:].to(wide)
        first = weak
    s, order = answers.norm(dim=1).sort(descending=True, stable=True)
    vh = answers.index_select(0, order).div_(s[:, None].clamp_min(torch.finfo(s.dtype).tiny))
    return Features(uh.index_select(0, order).T, s, vh)


def _gram(matrix: Float[Tensor, "out in_"]) -> Float[Tensor, "out out"]:
    """Return matrix @ matrix.T, each half of it computed once."""
    size = len(matrix)
    if size <= 2 * SMALL:
        return matrix @ matrix.T
    half = size // 2
    gram = matrix.new_empty(size, size)
    gram[:half, :half] = _gram(matrix[:half])
    gram[half:, half:] = _gram(matrix[half:])
    gram[half:, :half] = matrix[half:] @ matrix[:half].T
    gram[:half, half:] = gram[half:, :half].T
    return gram


def _add_up_columns(matrix: Float[Tensor, "out in_"], count: int) -> Float[Tensor, "out count"]:
    """Return `count` sums of columns with random signs, each column in three of them: a sketch of the range.

    In one of them alone, columns of a sparse matrix that meet there could not be told apart.
    """
    columns = matrix.shape[1]
    generator = torch.Generator().manual_seed(0)
    sketch = matrix.new_zeros(len(matrix), count)
    for _ in range(3):
        signs = torch.randint(0, 2, (columns,), generator=generator).to(matrix) * 2 - 1
        for start in range(0, columns, count):  # by runs: picking single columns costs more than a product
            place = int(torch.randint(0, count, (), generator=generator))
            around, stop = min(start + count - place, columns), min(start + count, columns)
            sketch[:, place : place + around - start].addcmul_(matrix[:, start:around], signs[start:around])
            sketch[:, : stop - around].addcmul_(matrix[:, around:stop], signs[around:stop])
    return sketch


def _once_more(matrix: Float[Tensor, "out in_"], sketch: Float[Tensor, "out count"]) -> Float[Tensor, "out count"]:
    """Return matrix @ matrix.T @ sketch; by rows, which is the faster way round."""
    return ((sketch.T.contiguous() @ matrix) @ matrix.T).T


def _near_one(matrix: Float[Tensor, "out in_"]) -> tuple[float, Float[Tensor, "out in_"]]:
    """Return a power of two, and the matrix times it, so that squares of its entries neither vanish nor overflow."""
    low, high = torch.aminmax(matrix)
    largest = max(-float(low), float(high))
    if largest == 0 or 2.0**-20 < largest < 2.0**20:
        return 1.0, matrix
    most = 126 if matrix.dtype == torch.float32 else 1000  # beyond, the factor itself would overflow
    scale = 2.0 ** max(-most, min(most, -math.frexp(largest)[1]))
    return scale, matrix * scale


def _is_flat(matrix: Float[Tensor, "out in_"]) -> bool:
    """Return whether the strongest feature is not far stronger than the mean one."""
    # A lower bound of the largest singular value, by power iteration: a few products with a vector.
    vector = torch.randn(len(matrix), generator=torch.Generator().manual_seed(0)).to(matrix)
    most = FLAT * float(matrix.norm()) ** 2 / len(matrix)
    for _ in range(8):
        image = matrix.T @ (vector / vector.norm())
        if float(image.norm()) ** 2 > most:
            return False
        vector = matrix @ image
    return True
