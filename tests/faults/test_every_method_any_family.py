"""Every method that needs no data, on families of any sort: the right result, or one of our errors."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from families import generator, save
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import superpose as library
from faults.damage import MERGED, REFUSED, assert_says, bits
from faults.tally import rounds
from superpose import SuperposeError, list_methods
from superpose.checkpoints.names import kind_of
from superpose.kinds import Kind

GROUP = "Mismatch"
METHODS = {method.name: method for method in list_methods() if not method.needs}
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
OTHERS = (torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2)
SHAPES = {
    "layers.0.mlp.up_proj.weight": ((4, 6), (6, 4), (1, 5), (5, 1), (1, 1), (0, 3), (3, 0), (7, 7), (2, 3, 4)),
    "layers.1.self_attn.in_proj_weight": ((6, 4), (3, 1), (0, 4)),
    "layers.0.mlp.up_proj.bias": ((4,), (1,), (0,)),
    "layers.0.input_layernorm.weight": ((5,), (1,)),
    "embed_tokens.weight": ((6, 3), (1, 3), (0, 3)),
    "lm_head.weight": ((6, 3), (2, 1)),
    "conv1.weight": ((2, 3, 3, 3), (2, 1, 1), (1, 1, 1, 1)),
    "experts.0.w1": ((2, 3, 4), (1, 2, 2)),
    "logit_scale": ((), (1,)),
    "bn.running_mean": ((4,), ()),
    "odd name ü 重み": ((3, 3), (), (2, 0, 2)),
}


@dataclass
class Family:
    """A base and its fine-tunes, in memory, and how they are stored.

    Args:
        base: the base's tensors.
        tuned: those of each fine-tune.
        shards: files that each model is stored in.
        pickled: whether they are files of torch.save.
        fits: whether every fine-tune has what the base has, and nothing more.
        finite: whether all numbers are.
        aliases: names that share another's memory, to that name.
    """

    base: dict[str, torch.Tensor]
    tuned: list[dict[str, torch.Tensor]]
    shards: int = 1
    pickled: bool = False
    fits: bool = True
    finite: bool = True
    aliases: dict[str, str] = field(default_factory=dict)

    @property
    def is_plain(self) -> bool:
        """Whether all fine-tunes are the base with other numbers in it."""
        return self.fits and self.finite and not self.aliases

    def write(self, root: Path) -> list[Path]:
        """Write the folders, the base first."""
        folders = []
        for place, tensors in enumerate([self.base, *self.tuned]):
            folder = root / (f"tuned-{place}" if place else "base")
            if self.pickled:
                folder.mkdir()
                torch.save(tensors, folder / "pytorch_model.bin")
            else:
                save(folder, tensors, shards=min(self.shards, len(tensors)), reverse=bool(place % 2))
            folders.append(folder)
        return folders


@st.composite
def families(draw, fewest: int, most: int) -> Family:
    """A random family; most of them fit."""
    names = draw(st.lists(st.sampled_from(sorted(SHAPES)), min_size=1, max_size=5, unique=True))
    seed = draw(st.integers(0, 2**32))
    scale = draw(st.sampled_from([1.0, 1.0, 1e-3, 1e3, 1e-30]))
    base = {}
    for name in names:
        dtype = draw(st.sampled_from(FLOATS * 3 + OTHERS))
        shape = draw(st.sampled_from(SHAPES[name]))
        size = scale if dtype in FLOATS and dtype is not torch.float16 else 1.0
        noise = torch.randn(shape, generator=generator(seed, name), dtype=torch.float64) * size
        base[name] = (noise > 0) if dtype is torch.bool else noise.to(dtype)
    family = Family(base, [])
    for place in range(draw(st.integers(fewest, most))):
        family.tuned.append(_tuned(draw, family, seed, place))
    family.pickled = draw(st.booleans())
    family.shards = draw(st.integers(1, 3))
    matrices = [name for name, tensor in base.items() if tensor.ndim == 2 and tensor.numel() and tensor.dtype in FLOATS]
    if family.pickled and matrices and draw(st.integers(0, 4)) == 0:
        family.aliases["tied.weight"] = matrices[0]
        for tensors in [base, *family.tuned]:
            if matrices[0] in tensors:
                tensors["tied.weight"] = tensors[matrices[0]]
    return family


def _tuned(draw, family: Family, seed: int, place: int) -> dict[str, torch.Tensor]:
    way = draw(st.sampled_from(["near", "near", "near", "same", "far", "part"]))
    tensors = {}
    for name, tensor in family.base.items():
        step = {"near": 0.1, "same": 0.0, "far": 10.0, "part": 0.1 * draw(st.booleans())}[way]
        tensors[name] = tensor.clone()
        if tensor.dtype in FLOATS and step:
            noise = torch.randn(tensor.shape, generator=generator(seed, place, name), dtype=torch.float64)
            size = float(tensor.double().abs().max()) if tensor.numel() else 0.0
            tensors[name] = (tensor.double() + step * size * noise).to(tensor.dtype)
    odd = draw(st.integers(0, 30))
    name = draw(st.sampled_from(sorted(tensors)))
    if odd == 0 and len(tensors) > 1:
        del tensors[name]
        family.fits = False
    elif odd == 1:
        tensors["extra.weight"] = torch.ones(2, 2)
        family.fits = False
    elif odd == 2 and tensors[name].dtype in FLOATS and tensors[name].numel():
        tensors[name].reshape(-1)[0] = draw(st.sampled_from([float("nan"), float("inf")]))
        family.finite = False
    elif odd == 3:
        tensors[name] = torch.ones(*tensors[name].shape, 2)
        family.fits = False
    elif odd in (4, 5) and tensors[name].dtype in FLOATS:
        tensors[name] = tensors[name].to(draw(st.sampled_from(FLOATS)))
        family.finite &= bool(tensors[name].isfinite().all())
    return tensors


@pytest.mark.parametrize("name", METHODS)
def test_a_method_gives_the_right_result_or_one_of_our_errors(name, tally):
    method = METHODS[name]
    fewest, most = method.models

    @given(
        family=families(fewest, min(most or 3, 3)),
        seed=st.integers(0, 9),
        backend=st.sampled_from(["serial", "threads"]),
    )
    @settings(
        max_examples=rounds(6), deadline=None, database=None, derandomize=rounds(0) == 0,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    def one(family: Family, seed: int, backend: str) -> None:
        root = Path(tempfile.mkdtemp(prefix="any-family-"))
        try:
            with tally(GROUP, "a family of any sort", name) as injection:
                injection.outcome = merge_and_check(family, root, name, seed, backend)
        finally:
            shutil.rmtree(root)

    one()


def merge_and_check(family: Family, root: Path, method: str, seed: int, backend: str) -> str:
    """Merge through files, and see that the result is right or the error one of ours."""
    folders = family.write(root)
    recipe = {
        "base": str(folders[0]),
        "models": [str(folder) for folder in folders[1:]],
        "method": method,
        "seed": seed,
    }
    try:
        library.merge(recipe, root / "out", backend=backend)
    except SuperposeError as error:
        refusal = str(error)
    else:
        refusal = ""
    if refusal:
        assert_says(refusal)
        assert not (root / "out").exists()
        assert not family.is_plain or _may_refuse(refusal), refusal
        return REFUSED
    found = load_all(root / "out")
    expected = {name: tensor for name, tensor in family.base.items() if name not in family.aliases}
    assert {name: (t.dtype, t.shape) for name, t in found.items()} == {
        name: (t.dtype, t.shape) for name, t in expected.items()
    }
    assert not _lacks_what_counts(family), "a fine-tune that does not fit was merged"
    for name, tensor in found.items():
        if tensor.dtype not in FLOATS:
            assert bits(tensor) == bits(family.base[name]), name
        elif family.finite:
            assert bool(tensor.isfinite().all()), name
    if all(_same(tensors, family.base) for tensors in family.tuned):
        assert {name: bits(tensor) for name, tensor in found.items()} == {
            name: bits(tensor) for name, tensor in expected.items()
        }
    if family.is_plain:
        names = [folder.name for folder in folders[1:]]
        again = library.merge_tensors(family.base, family.tuned, method, seed=seed, names=names)
        assert {name: bits(tensor) for name, tensor in found.items()} == {
            name: bits(tensor) for name, tensor in again.items()
        }
        check_formula(family, found, method)
    return MERGED


def load_all(folder: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a merged folder."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def _same(tensors: dict[str, torch.Tensor], base: dict[str, torch.Tensor]) -> bool:
    return all(
        name in tensors and tensors[name].dtype == t.dtype and bits(tensors[name]) == bits(t)
        for name, t in base.items()
    )


def _kind(name: str, tensor: torch.Tensor) -> Kind:
    return kind_of(name, tuple(tensor.shape), is_float=tensor.dtype in FLOATS)


def _lacks_what_counts(family: Family) -> bool:
    """Whether a fine-tune lacks a tensor that is merged, has another shape for it, or has one more."""
    for tensors in family.tuned:
        for name, tensor in family.base.items():
            counts = _kind(name, tensor) is not Kind.BUFFER
            if counts and (name not in tensors or tensors[name].shape != tensor.shape):
                return True
        if "extra.weight" in tensors:
            return True
    return False


def _may_refuse(error: str) -> bool:
    """Whether a family that fits may be refused all the same: its result has no number in the base's dtype."""
    return "NaN" in error or "infinit" in error or "inf" in error


def check_formula(family: Family, found: dict[str, torch.Tensor], method: str) -> None:
    """Compare with the formula in float64: the mean, and the base plus 0.x times the sum of task vectors."""
    if method not in ("average", "task_arithmetic"):
        return
    factor = {"average": 1.0 / len(family.tuned), "task_arithmetic": SCALING}[method]
    for name, tensor in found.items():
        base = family.base[name].double()
        if tensor.dtype not in FLOATS or _kind(name, tensor) is Kind.BUFFER:
            continue
        tuned = [tensors[name].double() for tensors in family.tuned]
        expected = sum(tuned) * factor if method == "average" else base + factor * sum(t - base for t in tuned)
        size = sum(t.abs() for t in tuned) + base.abs()
        eps = torch.finfo(tensor.dtype).eps
        wide = torch.finfo(torch.promote_types(tensor.dtype, torch.float32)).eps
        bound = eps * expected.abs() + 4 * wide * size + torch.finfo(tensor.dtype).smallest_normal * eps
        assert bool(((tensor.double() - expected).abs() <= bound).all()), (name, tensor, expected)


SCALING = METHODS["task_arithmetic"].options().scaling_factor
"""The default of task arithmetic."""


@pytest.mark.parametrize("name", METHODS)
def test_a_family_of_empty_tensors_comes_back(tmp_path, tally, name):
    """Found by the test above: a method that counts entries met none."""
    base = {"embed_tokens.weight": torch.zeros(0, 3), "layers.0.mlp.up_proj.weight": torch.zeros(4, 0)}
    family = Family(base, [dict(base)] * METHODS[name].models[0])
    with tally(GROUP, "a family of empty tensors", name) as injection:
        injection.outcome = merge_and_check(family, tmp_path, name, 0, "serial")
        assert injection.outcome == MERGED


# Worked examples of what the test above is to see.


def test_a_family_that_does_not_fit_is_refused(tmp_path):
    base = {"layers.0.mlp.up_proj.weight": torch.ones(3, 3), "logit_scale": torch.tensor(1.0)}
    family = Family(base, [{"logit_scale": torch.tensor(2.0)}], fits=False)
    assert merge_and_check(family, tmp_path, "average", 0, "serial") == REFUSED


def test_a_family_of_numbers_that_are_none_is_refused(tmp_path):
    base = {"layers.0.mlp.up_proj.weight": torch.ones(3, 3)}
    family = Family(base, [{"layers.0.mlp.up_proj.weight": torch.full((3, 3), float("nan"))}], finite=False)
    assert merge_and_check(family, tmp_path, "ties", 0, "serial") == REFUSED


def test_a_wrong_result_is_seen(tmp_path):
    """A method that loses a thousandth is found out by the formula."""
    base = {"layers.0.mlp.up_proj.weight": torch.ones(3, 3)}
    family = Family(base, [{"layers.0.mlp.up_proj.weight": torch.full((3, 3), 2.0)}])
    (tmp_path / "a").mkdir()
    assert merge_and_check(family, tmp_path / "a", "average", 0, "serial") == MERGED
    found = load_all(tmp_path / "a" / "out")
    with pytest.raises(AssertionError):
        check_formula(family, {name: tensor * 0.999 for name, tensor in found.items()}, "average")
