"""AdaMerging's learning: its gradient against autograd and finite differences, and what it does step by step."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import classified, family, make_bert, read, recipe_of, setting_of
from torch.func import functional_call
from transformers import AutoTokenizer, BertForSequenceClassification, BertModel

import superpose as library
from superpose import SuperposeError
from superpose.learning import adamerging

TASK = {"batch_size": 4}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("coefficients")


@pytest.fixture(scope="module")
def folders(root):
    return family(root / "family", hidden_dropout_prob=0.4)


@pytest.fixture(scope="module")
def files(root):
    return [classified(root / f"rows{task}.jsonl", 10, seed=task) for task in (1, 2)]


def recipe(folders, files, **options):
    return recipe_of(folders, files, "adamerging", task=TASK, **options)


def state(folder, dtype=torch.float64):
    return {name: tensor.to(dtype) for name, tensor in load_file(folder / "model.safetensors").items()}


def merged_by_hand(base, vectors, coefficients, names):
    """Return base + sum_i l_i^t tau_i^t, as a graph of the coefficients."""
    rows = {name: coefficients[place if len(coefficients) > 1 else 0] for place, name in enumerate(names)}
    return {
        name: base[name] + sum(one * vector[name] for one, vector in zip(rows[name], vectors, strict=True))
        for name in names
    }


def entropy_by_hand(model, weights, tokenizer, texts, size):
    """Return the entropies of the predictions for each text, added up and divided by the batch size."""
    total = 0.0
    for text in texts:
        scores = functional_call(model, weights, (), dict(tokenizer(text, return_tensors="pt"))).logits[0]
        total = total - (scores.softmax(-1) * scores.log_softmax(-1)).sum()
    return total / size


def at_random(setting, coefficients):
    """Return some of each task's batches, and the texts in them."""
    draw = np.random.default_rng(0)
    return [task.batches()[draw.integers(len(task.batches()))] for task in setting.tasks]


@pytest.mark.parametrize("plus_plus", [False, True])
@pytest.mark.parametrize("granularity", ["layer", "task"])
def test_the_gradient_is_that_of_autograd_and_of_finite_differences(tmp_path, folders, files, granularity, plus_plus):
    setting, options = setting_of(
        recipe(folders, files, granularity=granularity, plus_plus=plus_plus, ties_density=0.4), tmp_path / "state"
    )
    merged = adamerging.prepare(setting, options)
    names = merged.vectors.names
    rows = len(names) if granularity == "layer" else 1
    draw = torch.Generator().manual_seed(1)
    coefficients = torch.rand(rows, 2, generator=draw, dtype=torch.float64)
    batches = at_random(setting, coefficients)
    merged.fill(coefficients)
    found = adamerging.entropies(setting, merged, batches)
    gradient = merged.gradient(adamerging._added(found), coefficients)

    base, tuned = state(folders[0]), [state(folder) for folder in folders[1:]]
    assert names == sorted(base)
    vectors = [{name: one[name] - base[name] for name in names} for one in tuned]
    if plus_plus:
        vectors = elected(vectors, names, 0.4)
    model = BertForSequenceClassification.from_pretrained(folders[0]).double().eval()
    tokenizer = AutoTokenizer.from_pretrained(folders[0])
    texts = [
        [read(file)[number]["text"] for number in batch.numbers] for file, batch in zip(files, batches, strict=True)
    ]

    def objective(values):
        weights = merged_by_hand(base, vectors, values, names)
        return sum(entropy_by_hand(model, weights, tokenizer, each, 4) for each in texts)

    wanted = coefficients.clone().requires_grad_()
    objective(wanted).backward()
    size = wanted.grad.abs().max()
    assert (gradient - wanted.grad).abs().max() < 1e-4 * size
    with torch.no_grad():
        for place in [(0, 0), (rows - 1, 1), (rows // 2, 0)]:
            step = torch.zeros_like(coefficients)
            step[place] = 1e-5
            slope = (objective(coefficients + step) - objective(coefficients - step)) / 2e-5
            assert abs(slope - gradient[place]) < 1e-4 * size
        for (entropy, _), each in zip(found, texts, strict=True):
            mean = entropy_by_hand(
                model, merged_by_hand(base, vectors, coefficients, names), tokenizer, each, len(each)
            )
            assert abs(entropy - float(mean)) < 1e-5


def elected(vectors, names, density):
    """Return what TIES keeps: the largest entries over the model, without those against the sign of their sum."""
    flat = [torch.cat([one[name].reshape(-1) for name in names]) for one in vectors]
    kept = []
    for row in flat:
        count = int(density * len(row) + 1e-9)
        places = row.abs().float().topk(count).indices
        kept.append(torch.zeros_like(row).index_copy(0, places, row[places]))
    sign = sum(kept).sign()
    kept = [torch.where(row.sign() == sign, row, 0.0) for row in kept]
    sizes = [vectors[0][name].numel() for name in names]
    return [
        {n: piece.reshape(vectors[0][n].shape) for n, piece in zip(names, row.split(sizes), strict=True)}
        for row in kept
    ]


def test_the_gradient_holds_for_tensors_that_only_some_models_use(tmp_path, root, files):
    """Bodies under heads of their own: the pooler has no gradient."""
    folders = bodies(root / "bodies")
    made = recipe(folders, files)
    for number, entry in enumerate(made["models"]):
        entry["task"]["head"] = head(root / f"head{number}.safetensors", number + 2)
    setting, options = setting_of(made, tmp_path / "state")
    merged = adamerging.prepare(setting, options)
    coefficients = torch.full((len(merged.vectors.names), 2), 0.3, dtype=torch.float64)
    merged.fill(coefficients)
    found = adamerging.entropies(setting, merged, at_random(setting, coefficients))
    gradient = merged.gradient(adamerging._added(found), coefficients)
    rows = dict(zip(merged.vectors.names, gradient, strict=True))
    assert not rows["pooler.dense.weight"].any()
    assert rows["encoder.layer.0.output.dense.weight"].all()


def bodies(root):
    folders = family(root)
    for folder in folders:
        tensors = {
            name.removeprefix("bert."): tensor
            for name, tensor in load_file(folder / "model.safetensors").items()
            if name.startswith("bert.")
        }
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = BertModel.from_pretrained(folder)
        assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in tensors.items())
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folders


def head(file, classes):
    draw = torch.Generator().manual_seed(classes)
    save_file({"weight": torch.randn(classes, 32, generator=draw), "bias": torch.zeros(classes)}, file)
    return str(file)


def learn(tmp_path, *arguments, **options):
    setting, chosen = setting_of(recipe(*arguments, **options), tmp_path / "state")
    return adamerging.learn(setting, chosen)


def entropy_of_all(setting, options, coefficients):
    """Return the sum over tasks of the mean entropy of all examples."""
    merged = adamerging.prepare(setting, options)
    merged.fill(coefficients)
    total = 0.0
    for live, task in zip(merged.models, setting.tasks, strict=True):
        with torch.no_grad():
            scores = [live.scores(batch)[:, 0] for batch in task.batches()]
        total += float(torch.distributions.Categorical(logits=torch.cat(scores)).entropy().mean())
    return total


@pytest.mark.parametrize("granularity", ["layer", "task"])
def test_entropy_falls(tmp_path, folders, files, granularity):
    setting, options = setting_of(
        recipe(folders, files, steps=25, learning_rate=0.02, granularity=granularity), tmp_path / "state"
    )
    found = adamerging.learn(setting, options)
    final = torch.stack(list(found.tensors.values()))
    assert entropy_of_all(setting, options, final) < entropy_of_all(setting, options, 0.3 + 0 * final) - 0.01
    assert 15 < len(found.facts["entropy"]["by_step"]) <= 40
    assert found.facts["entropy"]["tasks"] == ["task1", "task2"]
    assert list(found.tensors) == (["*"] if granularity == "task" else sorted(state(folders[0])))
    assert all(tensor.shape == (2,) and ((tensor >= 0) & (tensor <= 1)).all() for tensor in found.tensors.values())


def test_a_step_is_adams(tmp_path, folders, files):
    """The first step of Adam is the learning rate against the sign of the gradient."""
    found = learn(tmp_path, folders, files, steps=1, learning_rate=1e-3, granularity="task")
    assert torch.allclose((found.tensors["*"] - 0.3).abs(), torch.full((2,), 1e-3, dtype=torch.float64), rtol=1e-3)


@pytest.mark.parametrize(("initial", "used"), [(-0.2, 0.0), (1.7, 1.0)])
def test_outside_of_0_to_1_a_clamped_coefficient_stays_where_it_is(tmp_path, folders, files, initial, used):
    found = learn(tmp_path, folders, files, steps=3, initial=initial, granularity="task")
    assert found.tensors["*"].tolist() == [used, used]
    free = learn(tmp_path / "state", folders, files, steps=3, initial=initial, granularity="task", clamp=False)
    assert (free.tensors["*"] - initial).abs().max() > 1e-4
    assert (free.tensors["*"] - initial).abs().max() < 1e-2


def test_no_steps_are_task_arithmetic(tmp_path, folders):
    made = recipe_of(folders, [None, None], "adamerging", steps=0)
    library.merge(made, tmp_path / "none")
    made = recipe_of(folders, [None, None], "task_arithmetic", scaling_factor=0.3)
    library.merge(made, tmp_path / "arithmetic")
    found, wanted = (load_file(tmp_path / name / "model.safetensors") for name in ("none", "arithmetic"))
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-7)


def test_every_batch_is_seen_once_before_any_is_seen_again(tmp_path, folders, files):
    setting, _ = setting_of(recipe(folders, files), tmp_path / "state")
    task = setting.tasks[0]
    count = len(task.batches())
    feed = adamerging._feed(task, 7, 0)
    seen = [next(feed).numbers for _ in range(3 * count)]
    everything = sorted(batch.numbers for batch in task.batches())
    assert all(sorted(seen[start : start + count]) == everything for start in (0, count, 2 * count))
    assert seen[:count] != seen[count : 2 * count]
    for skipped in range(2 * count + 1):  # going on after an interruption
        assert next(adamerging._feed(task, 7, skipped)).numbers == seen[skipped]


@pytest.mark.parametrize("seed", [-1, 2**40])
def test_any_whole_number_is_a_seed(tmp_path, folders, files, seed):
    setting, options = setting_of(
        {**recipe(folders, files, steps=1, granularity="task"), "seed": seed}, tmp_path / "state"
    )
    assert adamerging.learn(setting, options).tensors["*"].shape == (2,)


def test_interrupted_it_goes_on_with_the_same_coefficients(tmp_path, folders, files, monkeypatch):
    whole = learn(tmp_path, folders, files, steps=9, learning_rate=0.01)
    monkeypatch.setattr(adamerging, "SECONDS_BETWEEN_SAVES", -1.0)
    setting, options = setting_of(recipe(folders, files, steps=9, learning_rate=0.01), tmp_path / "other")
    real = adamerging.entropies
    calls = []

    def failing(*arguments):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(adamerging, "entropies", failing)
    with pytest.raises(KeyboardInterrupt):
        adamerging.learn(setting, options)
    found = adamerging.learn(setting, options)
    assert len(calls) == 6 + 4
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in whole.tensors.items())
    assert found.facts == whole.facts


def test_a_language_model_is_an_error(tmp_path, root):
    from small_models import make_gpt2, prompted

    folders = family(root / "gpt2", make_gpt2)
    file = prompted(root / "prompts.jsonl")
    setting, options = setting_of(recipe(folders, [file, file]), tmp_path / "state")
    with pytest.raises(SuperposeError, match="learns from a classifier's predictions"):
        adamerging.learn(setting, options)


def test_a_task_whose_model_has_other_shapes_is_an_error(tmp_path, root, folders, files):
    other = make_bert(root / "other", type_vocab_size=3)
    made = recipe(folders, files)
    made["models"][1]["task"]["model"] = str(other)
    setting, options = setting_of(made, tmp_path / "state")
    with pytest.raises(SuperposeError, match=r"has it in shape \[3, 32\], not \[2, 32\]"):
        adamerging.learn(setting, options)
