"""Localize-and-Stitch's learned masks: each step against autograd of the objective, and what becomes of the masks."""

import shutil

import pytest
import torch
from safetensors.torch import load_file
from small_models import classified, family, make_gpt2, prompted, recipe_of, setting_of
from torch.nn.functional import cross_entropy

from superpose.inference import IGNORED
from superpose.learning import localize_and_stitch as masks
from superpose.learning.setting import losses
from superpose.maths.bits import unpack
from superpose.methods.localize_and_stitch import LocalizeAndStitchOptions


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("masks")


@pytest.fixture(scope="module")
def folders(root):
    return family(root / "family", hidden_dropout_prob=0.4)


@pytest.fixture(scope="module")
def files(root):
    return [classified(root / f"rows{task}.jsonl", 10, seed=task) for task in (1, 2)]


def recipe(folders, files, **options):
    task = {"batch_size": 4, "label": "label"}
    return recipe_of(folders, files, "localize_and_stitch", task=task, masks="learned", **options)


def stored(folder):
    return load_file(folder / "model.safetensors")


def unpacked(found, folders):
    """Return the masks by name, (tasks, *shape)."""
    shapes = {name: tensor.shape for name, tensor in stored(folders[0]).items()}
    return {
        name: torch.stack([unpack(row, shapes[name].numel()).reshape(shapes[name]) for row in rows])
        for name, rows in found.tensors.items()
    }


@pytest.mark.parametrize("regulariser", ["shrink", "binarise"])
@pytest.mark.parametrize("l1", [0.0, 0.7])
def test_a_step_follows_the_objective(regulariser, l1):
    """loss(base + sigma(S) tau) + l1 / learning_rate * sum sigma(S), and the authors' pull instead."""
    draw = torch.Generator().manual_seed(0)
    base, tau, wanted = (torch.randn(5, 4, generator=draw, dtype=torch.float64) for _ in range(3))
    scores = (4 * torch.randn(5, 4, generator=draw, dtype=torch.float64)).requires_grad_()
    options = LocalizeAndStitchOptions(masks="learned", l1=l1, learning_rate=30.0, regulariser=regulariser)
    weights = (base + torch.sigmoid(scores) * tau).detach().requires_grad_()
    (weights - wanted).square().sum().backward()
    step = masks.step_of(scores.detach(), weights.grad, tau, options)
    sign = torch.where(scores.detach() > 0, -1.0, 1.0) if regulariser == "binarise" else 1.0
    loss = (base + torch.sigmoid(scores) * tau - wanted).square().sum()
    (30.0 * loss + l1 * (sign * torch.sigmoid(scores)).sum()).backward()
    torch.testing.assert_close(step, scores.grad, rtol=1e-10, atol=1e-12)


def test_without_a_gradient_the_pull_is_left():
    scores, tau = torch.tensor([5.0, -5.0]), torch.ones(2)
    options = LocalizeAndStitchOptions(masks="learned", l1=2.0)
    slope = torch.sigmoid(scores) * torch.sigmoid(-scores)
    torch.testing.assert_close(masks.step_of(scores, None, tau, options), 2 * slope)


def test_a_pass_adds_up_the_gradient_of_the_mean_loss(tmp_path, folders, files):
    """Batches of several lengths make no difference: examples count alike."""
    from small_models import read
    from transformers import AutoTokenizer, BertForSequenceClassification

    setting, _ = setting_of(recipe(folders, files), tmp_path / "state")
    live = setting.load(setting.tasks[0])
    weights = masks.SharedWeights([live], setting.items, setting.plan.tied)
    weights.ask_for_gradients()
    loss = masks._pass(setting, live, weights, 0)
    model = BertForSequenceClassification.from_pretrained(folders[1]).eval()
    tokenizer = AutoTokenizer.from_pretrained(folders[1])
    scores = [model(**tokenizer(row["text"], return_tensors="pt")).logits for row in read(files[0])]
    mean = cross_entropy(torch.cat(scores), torch.tensor([row["label"] for row in read(files[0])]))
    mean.backward()
    assert loss == pytest.approx(mean.item(), rel=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(weights.parameters[name].grad, parameter.grad, rtol=1e-4, atol=1e-6)


def test_the_loss_of_a_language_model_is_its_mean_over_what_is_asked_for(tmp_path, root):
    folders = family(root / "gpt2", make_gpt2)
    file = prompted(root / "prompts.jsonl")
    made = recipe(folders, [file, file])
    for entry in made["models"]:
        entry["task"] |= {"target": "target", "label": ""}
    setting, _ = setting_of(made, tmp_path / "state")
    task = setting.tasks[0]
    live = setting.load(task)
    for batch in task.batches():
        with torch.no_grad():
            found, scores = losses(live, batch), live.scores(batch)
        for loss, target, row in zip(found, batch.targets, scores, strict=True):
            asked = target != IGNORED
            torch.testing.assert_close(loss, cross_entropy(row[asked], target[asked]), rtol=1e-5, atol=1e-6)


def test_the_loss_falls_and_masks_are_sparse(tmp_path, folders, files):
    setting, options = setting_of(
        recipe(folders, files, epochs=6, initial_density=0.1, learning_rate=3e4, l1=0.01), tmp_path / "state"
    )
    found = masks.learn(setting, options)
    kept = unpacked(found, folders)
    for place, (task, facts) in enumerate(found.facts["tasks"].items()):
        assert task == f"task{place + 1}"
        assert len(facts["loss"]) == 6
        assert facts["loss"][-1] < facts["loss"][0]
        share = sum(int(mask[place].sum()) for mask in kept.values()) / sum(
            mask[place].numel() for mask in kept.values()
        )
        assert facts["density"] == pytest.approx(share)
        assert 0 < share < 1


def test_masks_begin_with_the_largest_entries_of_the_whole_model(tmp_path, folders, files):
    """Without steps, they are those of each task by itself."""
    setting, options = setting_of(recipe(folders, files, epochs=0, initial_density=0.03), tmp_path / "state")
    kept = unpacked(masks.learn(setting, options), folders)
    base = stored(folders[0])
    for place, folder in enumerate(folders[1:]):
        sizes = {name: (tensor - base[name]).abs() for name, tensor in stored(folder).items()}
        count = int(0.03 * sum(size.numel() for size in sizes.values()))
        least = torch.cat([size.reshape(-1) for size in sizes.values()]).topk(count).values.min()
        assert all(torch.equal(kept[name][place], size >= least) for name, size in sizes.items())


def test_models_that_are_loaded_by_threads_are_whole(tmp_path, root):
    """transformers leaves its classes changed when two threads load at once: nothing is tied any more."""
    from transformers import GPT2Config, GPT2LMHeadModel

    folders = family(root / "many", make_gpt2, tasks=4)
    file = prompted(root / "some.jsonl")
    made = recipe(folders, [file] * 4, epochs=1)
    for entry in made["models"]:
        entry["task"] |= {"target": "target", "label": ""}
    setting, options = setting_of(made, tmp_path / "state", workers=4)
    masks.learn(setting, options)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=2))
    assert model.lm_head.weight is model.transformer.wte.weight


def test_a_strong_pull_empties_the_masks_and_binarising_does_not(tmp_path, folders, files):
    options = {"epochs": 10, "initial_density": 0.2, "learning_rate": 0.0, "l1": 1000.0}
    for regulariser, share in (("shrink", 0.0), ("binarise", 0.2)):
        setting, chosen = setting_of(recipe(folders, files, **options, regulariser=regulariser), tmp_path / regulariser)
        for facts in masks.learn(setting, chosen).facts["tasks"].values():
            assert facts["density"] == pytest.approx(share, abs=1e-3)


def test_a_task_that_is_the_base_has_empty_masks(tmp_path, folders, files):
    same = tmp_path / "same"
    shutil.copytree(folders[0], same)
    setting, options = setting_of(
        recipe([*folders[:2], same], files, epochs=2, initial_density=0.5, regulariser="binarise"), tmp_path / "state"
    )
    kept = unpacked(masks.learn(setting, options), folders)
    assert not any(mask[1].any() for mask in kept.values())
    assert any(mask[0].any() for mask in kept.values())


def test_tasks_that_are_finished_are_not_learned_again(tmp_path, folders, files, monkeypatch):
    made = recipe(folders, files, epochs=2, initial_density=0.1, learning_rate=1e4)
    whole = masks.learn(*setting_of(made, tmp_path / "whole"))
    setting, options = setting_of(made, tmp_path / "state", workers=1)
    real, seen = masks._masks_of_one, []

    def failing(setting, place, *arguments):
        seen.append(place)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return real(setting, place, *arguments)

    monkeypatch.setattr(masks, "_masks_of_one", failing)
    with pytest.raises(KeyboardInterrupt):
        masks.learn(setting, options)
    found = masks.learn(setting, options)
    assert seen == [0, 1, 1]
    assert found.facts == whole.facts
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in whole.tensors.items())
