"""Fisher information against plain loops over single examples, and against closed forms."""

import runpy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import (
    classified,
    close,
    make_bert,
    make_gpt2,
    make_llama,
    make_t5,
    make_vit,
    names_on_disk,
    prompted,
    read,
    squared_gradients,
    write_images,
    write_rows,
)
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertModel,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    T5ForConditionalGeneration,
    ViTImageProcessor,
)

from superpose import SuperposeError
from superpose.inference import Batch, LiveModel, TaskData
from superpose.statistics import compute, prepare, tensors_of


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("fisher")


@pytest.fixture(scope="module")
def bert(root):
    """Dropout is high: it may not matter."""
    more = {"hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.5, "classifier_dropout": 0.5}
    return make_bert(root / "bert", **more)


@pytest.fixture(scope="module")
def texts(root):
    """One of them names the padding token, whose embedding torch gives no gradient."""
    file = classified(root / "texts.jsonl", 8)
    with Path(file).open("a") as stream:
        stream.write('{"text": "red [PAD] warm", "label": 2}\n')
    return file


@pytest.fixture(scope="module")
def gpt2(root):
    return make_gpt2(root / "gpt2")


@pytest.fixture(scope="module")
def prompts(root):
    return prompted(root / "prompts.jsonl")


def fisher(model, labels="auto", memory=4 << 30, **task):
    return tensors_of(prepare("fisher", str(model), TaskData(**task), labels=labels, memory=memory))


def classifier_terms(folder, file):
    """Return a classifier and, for each row, a function that returns its log-probabilities."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def row_of(text):
        return lambda: model(**tokenizer(text, return_tensors="pt")).logits[0].log_softmax(-1)

    return model, [row_of(row["text"]) for row in read(file)]


def exact(run):
    def terms():
        found = run()
        return [(value, value.detach().exp()) for value in found]

    return terms


@pytest.fixture(scope="module")
def of_bert(bert, texts):
    """The exact Fisher information by the loop, and a model to compare with."""
    model, runs = classifier_terms(bert, texts)
    return squared_gradients(model, [exact(run) for run in runs])


@pytest.mark.parametrize("batch_size", [1, 8])
def test_exact_information_of_a_classifier(bert, texts, of_bert, batch_size):
    close(fisher(bert, data=texts, label="label", batch_size=batch_size), of_bert)


def test_exact_information_needs_no_labels(bert, texts, of_bert):
    close(fisher(bert, "exact", data=texts), of_bert)


def test_several_passes_give_what_one_gives(bert, texts, of_bert):
    request = prepare("fisher", str(bert), TaskData(data=texts), memory=40_000)
    assert len(request.groups) > 5
    assert 0 < request.memory["statistics"] <= 40_000
    total = {}
    for group in request.groups:
        sums = request.statistic.sums(group, torch.device("cpu"))
        with request.statistic.adding(sums, request.batches[0]) as add:
            for batch in request.batches:
                add(batch)
        total |= {name: request.statistic.mean(name, sums, 9) for name in group}
    close(total, of_bert)


@pytest.mark.parametrize("batch_size", [1, 8])
def test_empirical_information_of_a_classifier(bert, texts, batch_size):
    model, runs = classifier_terms(bert, texts)
    labels = [row["label"] for row in read(texts)]
    expected = squared_gradients(
        model, [lambda run=run, label=label: [(run()[label], 1.0)] for run, label in zip(runs, labels, strict=True)]
    )
    close(fisher(bert, "empirical", data=texts, label="label", batch_size=batch_size), expected)


def test_squared_sums_of_batches_are_another_quantity(bert, texts, of_bert):
    model, runs = classifier_terms(bert, texts)
    together = squared_gradients(model, [lambda: [(sum(run()[0] for run in runs), 1.0)]])
    name = "bert.encoder.layer.0.output.dense.weight"
    found = fisher(bert, "exact", data=texts, batch_size=8)[name]
    assert (found - together[name] / 9).abs().max() > 0.1 * found.abs().max()


def test_sampled_information_depends_on_the_seed_and_the_example_alone(bert, texts):
    found = [fisher(bert, "sampled", data=texts, batch_size=size, seed=seed) for size, seed in ((1, 0), (8, 0), (8, 1))]
    close(found[1], found[0])
    name = "classifier.bias"
    assert (found[2][name] - found[0][name]).abs().max() > 1e-3 * found[0][name].abs().max()


def test_sampled_information_is_that_of_one_answer_each_and_exact_on_average(root, bert):
    """A mean over many draws for one text tends to the exact expectation."""
    many = write_rows(root / "many.jsonl", [{"text": "red warm"}] * 1500)
    one = write_rows(root / "one.jsonl", [{"text": "red warm"}])
    sampled = fisher(bert, "sampled", data=many, batch_size=500)["classifier.weight"]
    wanted = fisher(bert, "exact", data=one)["classifier.weight"]
    assert (sampled - wanted).norm() < 0.15 * wanted.norm()
    model, runs = classifier_terms(bert, one)
    answers = [squared_gradients(model, [lambda k=k: [(runs[0]()[k], 1.0)]])["classifier.weight"] for k in range(3)]
    drawn = fisher(bert, "sampled", data=one)["classifier.weight"]
    assert any(torch.allclose(drawn, answer, rtol=1e-4, atol=1e-7) for answer in answers)


def test_unused_parameters_have_no_information(root, bert, texts):
    """The pooler of a body under a head that takes the mean of the hidden states."""
    body = root / "body"
    BertModel.from_pretrained(bert).save_pretrained(body)
    AutoTokenizer.from_pretrained(bert).save_pretrained(body)
    weight = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    save_file({"weight": weight, "bias": torch.ones(4)}, root / "head.safetensors")
    found = fisher(body, data=texts, head=str(root / "head.safetensors"))
    model, tokenizer = BertModel.from_pretrained(body).eval(), AutoTokenizer.from_pretrained(body)

    def terms(text):
        def run():
            states = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
            return (weight @ states.mean(0) + 1.0).log_softmax(-1)

        return exact(run)

    close(found, squared_gradients(model, [terms(row["text"]) for row in read(texts)]))
    assert not found["pooler.dense.weight"].any()
    assert found["encoder.layer.0.output.dense.weight"].any()


def language_terms(model, tokenizer, rows, *, target):
    """Return, for each row, a function with the log-probability of its text, or of what follows the prompt."""

    def terms(row):
        prompt = tokenizer(row["text"])["input_ids"]
        rest = [*tokenizer(row["target"], add_special_tokens=False)["input_ids"], 1] if target else []
        ids = torch.tensor(prompt + rest)
        first = len(prompt) if target else 1

        def run():
            scores = model(input_ids=ids[None]).logits[0].log_softmax(-1)
            return [(sum(scores[place - 1, ids[place]] for place in range(first, len(ids))), 1.0)]

        return run

    return [terms(row) for row in rows]


@pytest.mark.parametrize("target", ["", "target"])
@pytest.mark.parametrize("batch_size", [1, 8])
def test_empirical_information_of_gpt2(gpt2, prompts, target, batch_size):
    model, tokenizer = GPT2LMHeadModel.from_pretrained(gpt2).eval(), AutoTokenizer.from_pretrained(gpt2)
    expected = squared_gradients(model, language_terms(model, tokenizer, read(prompts), target=bool(target)))
    found = fisher(gpt2, "empirical", data=prompts, target=target, batch_size=batch_size)
    close(found, expected)
    assert "lm_head.weight" not in found  # it is the embedding


def test_empirical_information_of_llama(root, prompts):
    folder = make_llama(root / "llama")
    model, tokenizer = LlamaForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    expected = squared_gradients(model, language_terms(model, tokenizer, read(prompts), target=True))
    for batch_size in (1, 8):
        close(fisher(folder, "empirical", data=prompts, target="target", batch_size=batch_size), expected)


def test_sampled_information_of_a_language_model_leaves_the_prompt_out(root, gpt2, prompts):
    """With the answers that were drawn, it is their information."""
    request = prepare("fisher", str(gpt2), TaskData(data=prompts, target="target", batch_size=1), labels="sampled")
    model = GPT2LMHeadModel.from_pretrained(gpt2).eval()
    terms = []
    for batch in request.batches:
        ids, asked = batch.inputs["input_ids"], batch.targets[0] != -100
        log_probabilities = model(input_ids=ids).logits.log_softmax(-1).detach()
        (drawn, _), *_ = request.statistic._answers(log_probabilities, batch)
        assert torch.equal(drawn[0] != -100, asked)
        assert 0 < asked.sum() < len(asked) - 1

        def run(ids=ids, drawn=drawn[0], asked=asked):
            scores = model(input_ids=ids).logits[0].log_softmax(-1)
            return [(sum(scores[place, drawn[place]] for place in asked.nonzero()[:, 0]), 1.0)]

        terms.append(run)
    close(tensors_of(request), squared_gradients(model, terms))


def test_empirical_information_of_t5(root, prompts):
    folder = make_t5(root / "t5")
    model, tokenizer = T5ForConditionalGeneration.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)

    def terms(row):
        given = tokenizer(row["text"], return_tensors="pt").input_ids
        wanted = tokenizer(row["target"], return_tensors="pt").input_ids
        return lambda: [(-model(input_ids=given, labels=wanted).loss * wanted.numel(), 1.0)]

    expected = squared_gradients(model, [terms(row) for row in read(prompts)])
    for batch_size in (1, 8):
        found = fisher(folder, "empirical", data=prompts, target="target", batch_size=batch_size)
        close(found, expected)
    assert found["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"].any()


def test_exact_information_of_a_vision_transformer(root):
    from PIL import Image

    folder, file = make_vit(root / "vit"), write_images(root / "images", 5)
    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    processor = ViTImageProcessor.from_pretrained(folder)

    def terms(row):
        with Image.open(root / "images" / row["image"]) as image:
            pixels = processor(images=image.convert("RGB"), return_tensors="pt")["pixel_values"]
        return exact(lambda: model(pixel_values=pixels).logits[0].log_softmax(-1))

    expected = squared_gradients(model, [terms(row) for row in read(file)])
    found = fisher(folder, data=file, image="image", batch_size=4)
    names = names_on_disk(folder, model)
    close(found, {names[name]: tensor for name, tensor in expected.items()})
    assert found["vit.embeddings.cls_token"].any()


LOADERS = """
import torch
from safetensors.torch import load_file
from torch import nn
from torch.func import functional_call
from superpose.inference import Example, LiveModel


def numbers(row):
    target = torch.tensor([int(row.values["label"])]) if "label" in row.values else None
    return Example({"x": torch.tensor([float(value) for value in row.values["text"].split()])}, target)


def made(module, folder, forward=None):
    module.load_state_dict(load_file(folder / "model.safetensors"))
    return LiveModel(module, numbers, lambda inputs: (forward or module)(inputs["x"]))


class Logistic(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 1)

    def forward(self, x):
        score = self.linear(x)
        return torch.cat([torch.zeros_like(score), score], dim=-1)


def logistic(folder, task):
    return made(Logistic(), folder)


def frozen_bias(folder, task):
    module = Logistic()
    module.linear.bias.requires_grad_(False)
    return made(module, folder)


def frozen(folder, task):
    return made(Logistic().requires_grad_(False), folder)


class Wide(nn.Module):
    \"\"\"Uses parameters in ways that passes over batches have to notice.\"\"\"

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(1, 3, 2)
        self.tail = nn.Sequential(nn.ReLU(inplace=True), nn.GroupNorm(1, 3), nn.Conv1d(3, 3, 2), nn.ReLU(inplace=True))
        self.twice = nn.Linear(6, 6)
        self.aside = nn.Linear(6, 6, bias=False)
        self.picky = Picky()
        self.scale = nn.Parameter(torch.ones(6))
        self.out = nn.Linear(6, 3)
        self.mixing = False

    def forward(self, x):
        hidden = self.tail(self.conv(x[:, None])).flatten(1)
        hidden = self.twice(torch.tanh(self.twice(hidden)))
        self.aside(hidden)  # this use of it leads nowhere
        hidden = self.picky(hidden) if self.mixing else hidden
        hidden += 0.5 * self.aside(torch.tanh(hidden))
        return self.out(hidden * self.scale if self.mixing else hidden)


class Picky(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(6))

    def forward(self, x):
        return x * self.weight if x.sum().item() > 0 else x * self.weight * 2


def wide(folder, task):
    return made(Wide(), folder)


def mixing(folder, task):
    module = Wide()
    module.mixing = True
    return made(module, folder)
"""


@pytest.fixture(scope="module")
def loaders(root):
    file = root / "loaders.py"
    file.write_text(LOADERS)
    draw = torch.Generator().manual_seed(3)
    rows = [{"text": " ".join(f"{value:.3f}" for value in torch.randn(4, generator=draw))} for _ in range(11)]
    write_rows(root / "numbers.jsonl", [{**row, "label": number % 2} for number, row in enumerate(rows)])
    own = runpy.run_path(str(file))
    for name in ("Logistic", "Wide"):
        torch.manual_seed(1)
        (root / name).mkdir()
        save_file(own[name]().state_dict(), root / name / "model.safetensors")
    return own


def by_loader(root, folder, name, **more):
    task = {"data": str(root / "numbers.jsonl"), "loader": f"{root / 'loaders.py'}:{name}", **more}
    return fisher(root / folder, **task)


def inputs_of(root):
    return torch.tensor([[float(value) for value in row["text"].split()] for row in read(root / "numbers.jsonl")])


@pytest.mark.parametrize("batch_size", [1, 4])
def test_logistic_regression_has_its_closed_form(root, loaders, batch_size):
    """F = mean p (1 - p) x^2."""
    found = by_loader(root, "Logistic", "logistic", batch_size=batch_size)
    state, x = load_file(root / "Logistic" / "model.safetensors"), inputs_of(root)
    chance = torch.sigmoid(x @ state["linear.weight"][0] + state["linear.bias"])[:, None]
    spread = chance * (1 - chance)
    expected = {"linear.weight": (spread * x**2).mean(0)[None], "linear.bias": spread.mean(0)}
    close(found, expected)


def test_empirical_information_of_logistic_regression(root, loaders):
    """F = mean (y - p)^2 x^2."""
    request = prepare(
        "fisher", str(root / "Logistic"),
        TaskData(data=str(root / "numbers.jsonl"), label="label", loader=f"{root / 'loaders.py'}:logistic"),
        labels="empirical",
    )  # fmt: skip
    state, x = load_file(root / "Logistic" / "model.safetensors"), inputs_of(root)
    chance = torch.sigmoid(x @ state["linear.weight"][0] + state["linear.bias"])
    error = (torch.arange(11) % 2 - chance)[:, None]
    expected = {"linear.weight": (error**2 * x**2).mean(0)[None], "linear.bias": (error**2).mean(0)}
    close(tensors_of(request), expected)


def test_frozen_parameters_have_no_information(root, loaders):
    found = by_loader(root, "Logistic", "frozen_bias")
    assert not found["linear.bias"].any()
    assert torch.equal(found["linear.weight"], by_loader(root, "Logistic", "logistic")["linear.weight"])


def test_a_model_that_is_frozen_as_a_whole_is_an_error(root, loaders):
    with pytest.raises(SuperposeError, match="all parameters are frozen"):
        by_loader(root, "Logistic", "frozen")


@pytest.mark.parametrize("name", ["wide", "mixing"])
@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("memory", [4 << 30, 300])
def test_uses_that_do_not_tell_examples_apart_are_taken_one_by_one(root, loaders, name, batch_size, memory):
    """Modules used twice, in vain, in place; that decide by their input; parameters used without a module."""
    task = TaskData(data=str(root / "numbers.jsonl"), loader=f"{root / 'loaders.py'}:{name}", batch_size=batch_size)
    request = prepare("fisher", str(root / "Wide"), task, memory=memory)
    assert (len(request.groups) > 3) == (memory == 300)
    found = {}
    for group in request.groups:
        sums = request.statistic.sums(group, torch.device("cpu"))
        with request.statistic.adding(sums, request.batches[0]) as add:
            for batch in request.batches:
                add(batch)
        found |= {name: request.statistic.mean(name, sums, 11) for name in group}
    model = loaders[name](root / "Wide", None).module.eval()
    terms = [exact(lambda one=one: model(one[None])[0].log_softmax(-1)) for one in inputs_of(root)]
    close(found, squared_gradients(model, terms))
    assert found["picky.weight"].any() == (name == "mixing")


def test_what_passes_through_the_model_is_on_its_device(root, bert, monkeypatch):
    """Every batch that the model reads was moved to the device first."""
    moved = set()
    real, scores = Batch.to, LiveModel.scores

    def to(batch, device):
        found = real(batch, device)
        moved.update(tensor.untyped_storage().data_ptr() for tensor in found.inputs.values())
        return found

    def checked(live, batch):
        assert all(tensor.untyped_storage().data_ptr() in moved for tensor in batch.inputs.values())
        return scores(live, batch)

    def own_memory(batch, device):
        return to(replace(batch, inputs={name: tensor.clone() for name, tensor in batch.inputs.items()}), device)

    monkeypatch.setattr(Batch, "to", own_memory)
    monkeypatch.setattr(LiveModel, "scores", checked)
    file = write_rows(root / "alike.jsonl", [{"text": text} for text in ("red", "blue", "old", "new")])
    request = prepare("fisher", str(bert), TaskData(data=file), device=torch.device("cpu"))
    compute(request, root / "moved.safetensors")
    assert moved
