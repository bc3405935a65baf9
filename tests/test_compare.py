"""Comparing fine-tunes, end to end: the numbers against NumPy, and what they suggest."""

import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
from families import base_tensors, generator, load, make_family, save, tuned_tensors
from safetensors.torch import save_file
from typer.testing import CliRunner

import superpose
from superpose.cli import app
from superpose.comparison import group_name
from superpose.maths.measures import effective_rank, subspace_overlap

EPS = np.finfo(np.float32).eps


def run(*arguments):
    done = CliRunner().invoke(app, ["compare", *map(str, arguments)])
    assert done.exit_code == 0, (done.stderr, done.exception)
    return done.stdout


def refused(*arguments):
    """Return the error text of a comparison that ends with exit code 2 and no traceback."""
    done = CliRunner().invoke(app, ["compare", *map(str, arguments)])
    assert done.exit_code == 2, (done.stdout, done.stderr, done.exception)
    assert isinstance(done.exception, SystemExit)
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    return done.stderr


def compared(root, base, *tuned, **more):
    """Compare mappings of tensors, written to folders first; the fine-tunes are called a, b, c."""
    folders = [save(root / name, model) for name, model in zip(("base", *"abc"), (base, *tuned), strict=False)]
    return superpose.compare(folders[0], folders[1:], **more)


# The formulas, in NumPy.


def bfloat16_bits(array):
    """Return what is left of float32 in bfloat16: the upper 16 bits, rounded to even."""
    bits = np.asarray(array, np.float32).view(np.uint32).astype(np.uint64)
    return (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16


def features(matrix):
    """Return u, s, vh without what float32 cannot tell from zero."""
    u, s, vh = np.linalg.svd(matrix, full_matrices=False)
    rank = int((s > max(matrix.shape) * EPS * s[0]).sum())
    return u[:, :rank], s[:rank], vh[:rank]


def rank_share(matrix):
    s = features(matrix)[1]
    shares = s / s.sum()
    return np.exp(-sum(p * np.log(p) for p in shares)) / min(matrix.shape)


def overlap(first, second):
    cosines = np.linalg.svd(first.T @ second)[1]
    return np.mean(cosines**2)


def condition(matrices):
    """Return the condition of the Gram matrix of all features u v^T, written out as vectors."""
    written = []
    for u, _, vh in map(features, matrices):
        written += [np.outer(u[:, place], vh[place]).ravel() for place in range(min(64, len(vh)))]
    values = np.linalg.eigvalsh(np.array(written) @ np.array(written).T)
    return values[-1] / max(values[0], values[-1] * EPS)


def differences(base, tuned, names):
    """Return the task vectors of some tensors, subtracted in float32 and flattened to one row per task."""
    rows = [np.concatenate([(model[name] - base[name]).numpy().ravel() for name in names]) for model in tuned]
    return np.array(rows, np.float64)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return make_family(tmp_path_factory.mktemp("family"))


@pytest.fixture(scope="module")
def found(folders):
    return superpose.compare(folders[0], folders[1:])


def assert_sums(group, base, tuned, names):
    rows = differences(base, tuned, names)
    flat = [np.concatenate([model[name].numpy().ravel() for name in names]) for model in (base, *tuned)]
    assert (group.tensors, group.entries) == (len(names), rows.shape[1])
    for index, (task, row) in enumerate(zip(group.tasks, rows, strict=True)):
        assert task.norm == pytest.approx(np.sqrt((row**2).sum()), rel=1e-12)
        assert task.largest == abs(row).max()
        lost = (bfloat16_bits(flat[index + 1]) == bfloat16_bits(flat[0])).mean()
        assert task.lost_in_bfloat16 == pytest.approx(lost, rel=1e-12)
    pairs = [(i, j) for i in range(len(rows)) for j in range(i + 1, len(rows))]
    for pair, (i, j) in zip(group.pairs, pairs, strict=True):
        assert (pair.first, pair.second) == (group.tasks[i].name, group.tasks[j].name)
        assert pair.cosine == pytest.approx(rows[i] @ rows[j] / np.linalg.norm(rows[i]) / np.linalg.norm(rows[j]))
        both = (rows[i] != 0) & (rows[j] != 0)
        assert pair.sign_conflicts == pytest.approx((np.sign(rows[i]) != np.sign(rows[j]))[both].mean(), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_equal_numpys_over_all_tensors_and_in_each_group(tmp_path, dtype):
    folders = make_family(tmp_path, dtype=dtype)
    found = superpose.compare(folders[0], folders[1:])
    base, *tuned = ({name: tensor.float() for name, tensor in load(folder).items()} for folder in folders)
    assert_sums(found.whole, base, tuned, list(base))
    by_group = {}
    for name in base:
        by_group.setdefault(group_name(name), []).append(name)
    assert {group.name for group in found.groups} == by_group.keys()
    assert "layers.*.mlp.up_proj.weight" in by_group
    for group in found.groups:
        assert_sums(group, base, tuned, by_group[group.name])


def test_spectra_equal_numpys(folders, found):
    base, *tuned = map(load, folders)
    names = [name for name in base if name.endswith("proj.weight")]
    stacks = [[(model[name] - base[name]).double().numpy() for model in tuned] for name in names]
    for index, task in enumerate(found.whole.tasks):
        assert task.effective_rank == pytest.approx(np.mean([rank_share(stack[index]) for stack in stacks]), rel=1e-6)
    leading = [max(1, min(stack[0].shape) // 8) for stack in stacks]
    for pair, (i, j) in zip(found.whole.pairs, [(0, 1), (0, 2), (1, 2)], strict=True):
        left = [
            overlap(features(s[i])[0][:, :k], features(s[j])[0][:, :k]) for s, k in zip(stacks, leading, strict=True)
        ]
        right = [
            overlap(features(s[i])[2][:k].T, features(s[j])[2][:k].T) for s, k in zip(stacks, leading, strict=True)
        ]
        assert pair.left_overlap == pytest.approx(np.mean(left), rel=1e-5)
        assert pair.right_overlap == pytest.approx(np.mean(right), rel=1e-5)
    conditions = [condition(stack) for stack in stacks]
    assert found.whole.condition == pytest.approx(np.median(conditions), rel=1e-3)
    assert found.whole.worst_condition == pytest.approx(max(conditions), rel=1e-3)
    without = {group.name for group in found.groups if group.condition is None}
    assert without == {group_name(name) for name in base} - {group_name(name) for name in names}


@pytest.mark.parametrize("size", [80, 140])
def test_condition_is_that_of_the_64_strongest_features(tmp_path, size):
    base = {"layers.0.q_proj.weight": torch.zeros(size, size)}
    tuned = [tuned_tensors(base, seed) for seed in range(2)]
    matrices = [model["layers.0.q_proj.weight"].double().numpy() for model in tuned]
    assert compared(tmp_path, base, *tuned).whole.condition == pytest.approx(condition(matrices), rel=1e-3)


def test_hand_made_tensors_with_zeros_and_losses(tmp_path):
    base = {"x.bias": torch.tensor([1.0, 1, 1, 1, 1])}
    steps = [0.0, 1, -2, 1e-4, 0.5], [1.0, 0, 2, 1e-4, -0.5]
    comparison = compared(tmp_path, base, *({"x.bias": base["x.bias"] + torch.tensor(step)} for step in steps))
    first, second = comparison.whole.tasks
    (pair,) = comparison.whole.pairs
    assert first.norm == pytest.approx(np.sqrt(1 + 4 + 0.25), rel=1e-6)
    assert (first.largest, second.largest) == (2, 2)
    assert (first.lost_in_bfloat16, second.lost_in_bfloat16) == (0.4, 0.4)  # the zero and the 1e-4 of each
    assert pair.sign_conflicts == pytest.approx(2 / 3)  # of three entries in which both moved
    assert pair.cosine == pytest.approx((-4 - 0.25) / (5.25), rel=1e-6)
    assert (first.effective_rank, pair.left_overlap, comparison.whole.condition) == (None, None, None)


def test_effective_rank_and_overlap_of_what_is_known():
    for count in (1, 3, 7):
        assert effective_rank(torch.full((count,), 2.5)) == pytest.approx(count)
    assert effective_rank(torch.tensor([1.0, 0, 0])) == pytest.approx(1)
    assert effective_rank(torch.tensor([])) == 0
    assert effective_rank(torch.tensor([3.0, 1])) == pytest.approx(np.exp(-(0.75 * np.log(0.75) + 0.25 * np.log(0.25))))
    axes = torch.eye(6)
    assert subspace_overlap(axes[:, :2], axes[:, :2]) == 1
    assert subspace_overlap(axes[:, :2], axes[:, 2:4]) == 0
    assert subspace_overlap(axes[:, :2], axes[:, 1:3]) == 0.5
    assert subspace_overlap(axes[:, :1], axes[:, :4]) == 1
    assert subspace_overlap(axes[:, :0], axes[:, :4]) == 0


def random_update(rank, size, *key):
    return torch.randn(size, rank, generator=generator("u", *key)) @ torch.randn(rank, size, generator=generator(*key))


@pytest.mark.parametrize(("first", "second"), [(64, 64), (2, 2), (1, 8), (3, 1)])
def test_chance_is_what_random_directions_have(tmp_path, first, second):
    base = {f"layers.{layer}.q_proj.weight": torch.zeros(64, 64) for layer in range(90)}
    tuned = [{name: random_update(rank, 64, name, i) for name in base} for i, rank in enumerate((first, second))]
    (pair,) = compared(tmp_path, base, *tuned).whole.pairs
    assert pair.left_overlap == pytest.approx(pair.left_chance, rel=0.25)
    assert pair.right_overlap == pytest.approx(pair.right_chance, rel=0.25)


def test_convolutions_are_flattened_and_fused_projections_taken_apart(tmp_path):
    shapes = {"h.0.attn.c_attn.weight": (8, 24), "h.0.attn.in_proj_weight": (24, 8), "conv.weight": (6, 4, 3, 3)}
    shapes |= {"depthwise.conv.weight": (6, 1, 3, 3), "nil.proj.weight": (0, 4)}
    base = {name: torch.zeros(shape) for name, shape in shapes.items()}
    tuned = [tuned_tensors(base, seed) for seed in range(2)]
    comparison = compared(tmp_path, base, *tuned)
    groups = {group.name: group for group in comparison.groups}
    maps = {
        "h.*.attn.c_attn.weight": lambda m: np.split(m["h.0.attn.c_attn.weight"].double().numpy(), 3, axis=1),
        "h.*.attn.in_proj_weight": lambda m: np.split(m["h.0.attn.in_proj_weight"].double().numpy(), 3, axis=0),
        "conv.weight": lambda m: [m["conv.weight"].double().numpy().reshape(6, 36)],
    }
    for name, parts in maps.items():
        pairs = list(zip(*map(parts, tuned), strict=True))
        assert groups[name].tasks[0].effective_rank == pytest.approx(np.mean([rank_share(a) for a, _ in pairs]))
        assert groups[name].condition == pytest.approx(np.median([condition(pair) for pair in pairs]), rel=1e-3)
    assert groups["depthwise.conv.weight"].condition is None
    assert groups["nil.proj.weight"].entries == 0
    assert comparison.whole.entries == sum(tensor.numel() for tensor in base.values())


def test_integers_and_running_statistics_are_left_out(tmp_path):
    base = {"fc.weight": torch.zeros(4, 4), "bn.running_mean": torch.zeros(4), "position_ids": torch.arange(4)}
    tuned = {**base, "fc.weight": torch.eye(4), "bn.running_mean": torch.full((4,), 100.0)}
    comparison = compared(tmp_path, base, tuned)
    assert (comparison.left_out, comparison.whole.tensors, comparison.whole.entries) == (2, 1, 16)
    assert comparison.whole.tasks[0].norm == pytest.approx(2)


# The command line.


def test_json_holds_what_the_function_returns_whatever_the_backend(folders, found):
    expected = json.loads(json.dumps(asdict(found)))
    assert json.loads(run(*folders, "--json", "--memory", "1KiB", "-q"))["groups"] == expected["groups"]
    assert json.loads(run(*folders, "--json", "-q")) == expected
    assert json.loads(run(*folders, "--json", "--backend", "serial", "-q")) == expected
    assert json.loads(run(*folders, "--json", "--workers", "3", "-q")) == expected


def test_tables_show_the_numbers(folders, found):
    text = run(*folders)
    for number, task in enumerate(found.whole.tasks, 1):
        (row,) = [line for line in text.splitlines() if line.startswith(f"{number} {task.name} ")]
        assert row.split()[2:] == [
            f"{task.norm:.3g}", f"{task.unchanged:.0%}", f"{task.lost_in_bfloat16:.0%}", f"{task.largest:.3g}",
            f"{task.effective_rank:.0%}",
        ]  # fmt: skip
    labels = {task.name: number for number, task in enumerate(found.whole.tasks, 1)}
    for pair in found.whole.pairs:
        label = f"{labels[pair.first]}, {labels[pair.second]} "
        (row,) = [line for line in text.splitlines() if line.startswith(label)]
        assert f"{pair.cosine:.3f}" in row
        assert f"{pair.left_overlap:.3f} ({pair.left_chance:.3f})" in row
    assert all(any(line.startswith(group.name) for line in text.splitlines()) for group in found.groups)
    assert all(f"- {suggestion}" in text for suggestion in found.suggestions)


def test_of_many_pairs_the_extremes_are_shown(tmp_path):
    folders = make_family(tmp_path, tasks=6, layers=1)
    text = run(*folders, "--quick", "-q")
    assert "the 5 closest and the 5 furthest of 15" in text
    assert max(map(len, text.partition("Suggestions")[0].splitlines())) < 100


def test_quick_leaves_spectra_out_and_nothing_else(folders, found):
    content = json.loads(run(*folders, "--quick", "--json", "-q"))
    whole = content["whole"]
    assert (whole["condition"], whole["worst_condition"], whole["tasks"][0]["effective_rank"]) == (None, None, None)
    assert {pair["left_overlap"] for pair in whole["pairs"]} == {None}
    assert [task["norm"] for task in whole["tasks"]] == [task.norm for task in found.whole.tasks]
    assert [pair["cosine"] for pair in whole["pairs"]] == [pair.cosine for pair in found.whole.pairs]
    assert "Suggestions" in run(*folders, "--quick", "-q")


def test_large_tensors_are_summed_in_pieces_as_in_one(folders, found, monkeypatch):
    monkeypatch.setattr("superpose.comparison.measure.CHUNK", 50)
    pieces = superpose.compare(folders[0], folders[1:]).whole
    for piece, whole in zip(pieces.tasks, found.whole.tasks, strict=True):
        assert piece.norm == pytest.approx(whole.norm, rel=1e-12)
        assert (piece.lost_in_bfloat16, piece.largest) == (whole.lost_in_bfloat16, whole.largest)
    assert [p.sign_conflicts for p in pieces.pairs] == [p.sign_conflicts for p in found.whole.pairs]


def test_nan_is_refused_by_name(tmp_path):
    folders = make_family(tmp_path, tasks=2)
    tensors = load(folders[2])
    tensors["norm.weight"][3] = float("nan")
    save_file(tensors, folders[2] / "model.safetensors")
    for more in ([], ["--quick"]):
        said = refused(*folders, *more)
        assert "norm.weight" in said
        assert str(folders[2]) in said


def test_a_missing_tensor_or_folder_is_refused_by_name(tmp_path):
    folders = make_family(tmp_path, tasks=2)
    assert "nowhere" in refused(*folders, tmp_path / "nowhere")
    tensors = load(folders[1])
    del tensors["norm.weight"]
    save_file(tensors, folders[1] / "model.safetensors")
    assert "norm.weight" in refused(*folders)


# What the numbers suggest.

ZERO = {"layers.0.q_proj.weight": torch.zeros(32, 32)}


def moved(*parts):
    """Return a fine-tune of ZERO: a sum of (factor, key) of random matrices of norm 32, or of given ones."""
    total = torch.zeros(32, 32)
    for factor, key in parts:
        total += factor * (torch.randn(32, 32, generator=generator(key)) if isinstance(key, str) else key)
    return {"layers.0.q_proj.weight": total}


A, B = moved((1, "a")), moved((1, "b"))
BASE_AT_ONE = {"layers.0.q_proj.weight": torch.ones(32, 32)}
FAR_BELOW = {"layers.0.q_proj.weight": 1 + 0.002 * A["layers.0.q_proj.weight"]}
WIDE = torch.diag(torch.tensor([10.0] * 4 + [0.0] * 28))
NARROW = torch.zeros(32, 32)
NARROW[0, 0] = 10
# Nothing in common: one task in the upper rows, the other in the lower ones.
UPPER, LOWER = [A["layers.0.q_proj.weight"] * (torch.arange(32)[:, None] // 16 == half) for half in (0, 1)]
HALF = {"layers.0.q_proj.weight": BASE_AT_ONE["layers.0.q_proj.weight"] + UPPER * (UPPER > 1)}
SUGGESTED = {
    "the base: leave it out": [(ZERO, A, ZERO)],
    "times as far as": [(ZERO, A, moved((4, "b")))],
    "one fine-tune alone": [(ZERO, A)],
    "nearly the same model": [(ZERO, A, A), (ZERO, A, moved((1, "a"), (0.01, "b")), B)],
    "go the same way": [(ZERO, A, moved((1, "a"), (1, "b")))],
    "work against each other": [(ZERO, A, moved((-1, "a"))), (ZERO, A, moved((-0.5, "a"), (1, "b")))],
    "nearly orthogonal": [(ZERO, A, B)],
    "changes away": [(BASE_AT_ONE, FAR_BELOW), (BASE_AT_ONE, FAR_BELOW, BASE_AT_ONE)],
    "entries are the base's": [(BASE_AT_ONE, HALF), (BASE_AT_ONE, HALF, BASE_AT_ONE)],
    "dare and dare_ties": [(ZERO, moved((0.01, "a")))],
    "of low rank": [(ZERO, moved((1, NARROW)), moved((2, NARROW)))],
    "share leading": [(ZERO, moved((0.1, "a"), (1, WIDE)), moved((0.1, "b"), (1, WIDE)))],
    "hardly shared": [(ZERO, moved((1, UPPER)), moved((1, LOWER)))],
    "badly conditioned": [(ZERO, A, A)],
}
NOT_SUGGESTED = {
    "the base: leave it out": [(ZERO, A, B)],
    "times as far as": [(ZERO, A, moved((2.5, "b"))), (ZERO, A, ZERO), (ZERO, A)],
    "one fine-tune alone": [(ZERO, A, B)],
    "nearly the same model": [(ZERO, A, B), (ZERO, A, moved((1, "a"), (1, "b"))), (ZERO, ZERO, ZERO), (ZERO, A)],
    "go the same way": [(ZERO, A, B), (ZERO, A, A), (ZERO, A, moved((-1, "a")))],
    "work against each other": [(ZERO, A, B), (ZERO, A, A), (ZERO, A, ZERO)],
    "nearly orthogonal": [(ZERO, A, moved((1, "a"), (1, "b"))), (ZERO, A, moved((-1, "a"))), (ZERO, A, ZERO)],
    "changes away": [(ZERO, A, B), (ZERO, A, ZERO), (BASE_AT_ONE, HALF)],
    "entries are the base's": [(ZERO, A, B), (ZERO, A, ZERO), (BASE_AT_ONE, FAR_BELOW)],
    "dare and dare_ties": [(ZERO, moved((0.001, "a")))],
    "of low rank": [(ZERO, A, B), (ZERO, A, moved((1, NARROW))), (ZERO, ZERO, ZERO)],
    "share leading": [(ZERO, A, B), (ZERO, A, ZERO), (ZERO, A)],
    # The third pair shares its strongest direction, cosine 0.9: a sum doubles it, STF does not.
    # Two full square matrices share more than nothing: STF and a sum differ by a tenth and more.
    "hardly shared": [
        (ZERO, A, B),
        (ZERO, A, A),
        (ZERO, A),
        (ZERO, moved((0.1, "a"), (1, NARROW)), moved((0.1, "b"), (1, NARROW))),
    ],
    "badly conditioned": [(ZERO, A), (ZERO, A, ZERO), (ZERO, moved((1, "a")), B)],
}


@pytest.mark.parametrize("words", SUGGESTED)
def test_each_suggestion_is_made_where_it_helps_and_nowhere_else(tmp_path, words):
    for number, models in enumerate(SUGGESTED[words]):
        said = compared(tmp_path / f"with-{number}", *models).suggestions
        assert any(words in text for text in said), (number, said)
    for number, models in enumerate(NOT_SUGGESTED[words]):
        said = compared(tmp_path / f"without-{number}", *models).suggestions
        assert not any(words in text for text in said), (number, said)


def test_identical_opposite_and_unmoved_fine_tunes(tmp_path):
    same = compared(tmp_path / "same", ZERO, A, A).whole
    assert same.pairs[0].cosine == pytest.approx(1)
    assert (same.pairs[0].sign_conflicts, same.pairs[0].left_overlap) == (0, pytest.approx(1, rel=1e-5))
    assert same.worst_condition > 1e6
    opposite = compared(tmp_path / "opposite", ZERO, A, moved((-1, "a"))).whole.pairs[0]
    assert (opposite.cosine, opposite.sign_conflicts) == (pytest.approx(-1), 1)
    unmoved = compared(tmp_path / "unmoved", ZERO, A, ZERO).whole
    assert (unmoved.tasks[1].norm, unmoved.tasks[1].lost_in_bfloat16, unmoved.tasks[1].effective_rank) == (0, 1, 0)
    assert (unmoved.pairs[0].cosine, unmoved.pairs[0].sign_conflicts, unmoved.condition) == (0, 0, 1)
    for folder in ("same", "opposite", "unmoved"):
        assert "Suggestions" in run(*(tmp_path / folder / name for name in ("base", "a", "b")))


def test_what_is_said_of_emr_for_tasks_that_work_against_each_other_is_so(tmp_path):
    """One sign an entry: of two tasks that contradict each other everywhere, the weaker one keeps nothing."""
    weaker = moved((-0.5, "a"))
    (said,) = [text for text in compared(tmp_path, ZERO, A, weaker).suggestions if "against each other" in text]
    rebuilt = superpose.merge_to_set(ZERO, [A, weaker]).model("model 2", ZERO)
    kept_apart = all(torch.allclose(rebuilt[name], tensor) for name, tensor in weaker.items())
    assert kept_apart or "emr keeps both apart" not in said


def test_one_fine_tune_alone_has_no_pairs(tmp_path):
    base = base_tensors()
    comparison = compared(tmp_path, base, tuned_tensors(base, 1))
    assert comparison.whole.pairs == ()
    assert comparison.whole.condition == 1
    assert "Pairs" not in run(tmp_path / "base", tmp_path / "a")


def test_names_of_the_fine_tunes_can_be_given_and_are_one_each(folders):
    comparison = superpose.compare(folders[0], folders[1:], names=["x", "y", "z"], spectra=False)
    assert [task.name for task in comparison.whole.tasks] == ["x", "y", "z"]
    with pytest.raises(superpose.SuperposeError):
        superpose.compare(folders[0], folders[1:], names=["x"], spectra=False)
