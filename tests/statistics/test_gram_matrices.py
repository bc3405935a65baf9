"""Gram matrices against what the linear maps were given, example by example, in float64."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import (
    byte_tokenizer,
    classified,
    close,
    make_bert,
    make_gpt2,
    make_llama,
    make_t5,
    prompted,
    read,
    save,
)
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    T5ForConditionalGeneration,
)

from superpose import SuperposeError
from superpose.inference import TaskData
from superpose.statistics import compute, prepare, tensors_of


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("gram")


@pytest.fixture(scope="module")
def texts(root):
    return classified(root / "texts.jsonl")


@pytest.fixture(scope="module")
def prompts(root):
    return prompted(root / "prompts.jsonl")


@pytest.fixture(scope="module")
def bert(root):
    return make_bert(root / "bert", hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5)


def gram(model, memory=4 << 30, **task):
    request = prepare("gram", str(model), TaskData(**task), memory=memory)
    return tensors_of(request), request.metadata


def watched(model, passes, is_map=lambda module: isinstance(module, nn.Linear)):
    """Return the mean of x x^T over all that each map was given in the passes, and the number of rows."""
    rows = {}
    for name, module in model.named_modules():
        if is_map(module):
            module.register_forward_pre_hook(
                lambda module, args, name=name: rows.setdefault(f"{name}.weight", []).append(
                    args[0].detach().double().reshape(-1, args[0].shape[-1])
                )
            )
    with torch.no_grad():
        for run in passes:
            run()
    stacked = {name: torch.cat(each) for name, each in rows.items()}
    return {name: x.T @ x / len(x) for name, x in stacked.items()}, {name: len(x) for name, x in stacked.items()}


@pytest.mark.parametrize("batch_size", [1, 8])
def test_gram_of_a_classifier(bert, texts, batch_size):
    model = AutoModelForSequenceClassification.from_pretrained(bert).eval()
    tokenizer = AutoTokenizer.from_pretrained(bert)
    given = [tokenizer(row["text"], return_tensors="pt") for row in read(texts)]
    expected, rows = watched(model, [lambda one=one: model(**one) for one in given])
    found, told = gram(bert, data=texts, batch_size=batch_size)
    close(found, expected)
    assert all(tensor.dtype == torch.float32 for tensor in found.values())
    assert told["examples"] == rows["classifier.weight"] == len(given)
    assert told["tokens"] == rows["bert.encoder.layer.0.output.dense.weight"]


def test_padding_never_counts(bert, texts):
    """A padded batch, its padding masked out by hand, is the same."""
    model = AutoModelForSequenceClassification.from_pretrained(bert).eval()
    tokenizer = AutoTokenizer.from_pretrained(bert)
    batch = tokenizer([row["text"] for row in read(texts)], return_tensors="pt", padding=True)
    name, seen = "bert.encoder.layer.1.intermediate.dense", []
    model.get_submodule(name).register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().double()))
    with torch.no_grad():
        model(**batch)
    mask = batch["attention_mask"].bool()
    assert not mask.all()
    x = seen[0][mask]
    found = gram(bert, data=texts, batch_size=16)[0][f"{name}.weight"]
    np.testing.assert_allclose(found, x.T @ x / len(x), rtol=1e-5, atol=1e-5)
    padded = seen[0].reshape(-1, 32)
    assert (found - padded.T @ padded / len(padded)).abs().max() > 1e-2


def test_maps_of_one_input_share_a_matrix_which_is_stored_once(root, bert, texts):
    request = prepare("gram", str(bert), TaskData(data=texts))
    told = request.metadata
    place = "bert.encoder.layer.0.attention.self"
    owner = next(iter({told["same"].get(f"{place}.{name}.weight") for name in ("query", "key", "value")} - {None}))
    group = {f"{place}.{name}.weight" for name in ("query", "key", "value")}
    assert {name for name, to in told["same"].items() if to == owner} | {owner} == group
    stored = load_file(compute(request, root / "bert.gram.safetensors"))
    assert group & set(stored) == {owner}
    assert set(stored) | set(told["same"]) == {
        name for name, tensor in load_file(bert / "model.safetensors").items()
        if tensor.ndim == 2 and "embeddings" not in name
    }  # fmt: skip


def test_several_passes_give_what_one_gives(bert, texts):
    one, _ = gram(bert, data=texts)
    request = prepare("gram", str(bert), TaskData(data=texts), memory=10_000)
    assert len(request.groups) > 3
    for group in request.groups:
        sums = request.statistic.sums(group, torch.device("cpu"))
        with request.statistic.adding(sums, request.batches[0]) as add:
            for batch in request.batches:
                add(batch)
        for name in group:
            assert torch.equal(request.statistic.mean(name, sums, 0), one[name])


@pytest.mark.parametrize("batch_size", [1, 8])
def test_gram_of_gpt2(root, prompts, batch_size):
    """Its maps are stored in x out; its head is the embedding, which is averaged."""
    folder = make_gpt2(root / f"gpt2-{batch_size}")
    model, tokenizer = GPT2LMHeadModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    given = [
        torch.tensor([tokenizer(row["text"])["input_ids"] + tokenizer(row["target"])["input_ids"] + [1]])
        for row in read(prompts)
    ]
    expected, _ = watched(
        model, [lambda one=one: model(input_ids=one) for one in given],
        lambda module: type(module).__name__ == "Conv1D",
    )  # fmt: skip
    found, told = gram(folder, data=prompts, target="target", batch_size=batch_size)
    close(found, expected)
    assert set(told["in_x_out"]) == set(expected)
    assert found["transformer.h.0.mlp.c_proj.weight"].shape == (96, 96)


def test_gram_of_llama_leaves_no_map_out(root, prompts):
    folder = make_llama(root / "llama")
    model, tokenizer = LlamaForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    given = [tokenizer(row["text"], return_tensors="pt").input_ids for row in read(prompts)]
    expected, _ = watched(model, [lambda one=one: model(input_ids=one) for one in given])
    found, told = gram(folder, data=prompts)
    close(found, expected)
    assert "lm_head.weight" in found
    assert told["in_x_out"] == []


def test_gram_of_t5(root, prompts):
    folder = make_t5(root / "t5")
    model, tokenizer = T5ForConditionalGeneration.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)

    def run(row):
        given, wanted = (tokenizer(row[name], return_tensors="pt").input_ids for name in ("text", "target"))
        return lambda: model(input_ids=given, labels=wanted)

    expected, _ = watched(model, [run(row) for row in read(prompts)])
    tied = model.lm_head.weight is model.shared.weight
    expected = {name: tensor for name, tensor in expected.items() if not (tied and name == "lm_head.weight")}
    for batch_size in (1, 8):
        found, told = gram(folder, data=prompts, target="target", batch_size=batch_size)
        close(found, expected)
    # The decoder's attention to the encoder takes its queries elsewhere.
    place = "decoder.block.0.layer.1.EncDecAttention"
    assert told["same"][f"{place}.v.weight"] == told["same"].get(f"{place}.k.weight", f"{place}.k.weight")
    assert told["same"].get(f"{place}.q.weight") != f"{place}.k.weight"


@pytest.mark.parametrize("batch_size", [1, 8])
def test_what_a_batch_shares_counts_for_each_example(root, texts, batch_size):
    """DeBERTa's keys and queries are made of relative positions too: once for a batch, whatever its size."""
    torch.manual_seed(0)
    config = DebertaV2Config(
        vocab_size=258, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=32, relative_attention=True, pos_att_type=["c2p", "p2c"], share_att_key=True,
        position_buckets=8, num_labels=3, initializer_range=0.5, type_vocab_size=0, norm_rel_ebd="layer_norm",
    )  # fmt: skip
    folder = save(DebertaV2ForSequenceClassification(config), byte_tokenizer(), root / f"deberta-{batch_size}")
    model, tokenizer = (
        DebertaV2ForSequenceClassification.from_pretrained(folder).eval(),
        AutoTokenizer.from_pretrained(folder),
    )
    given = [tokenizer(row["text"], return_tensors="pt") for row in read(texts)]
    runs = [lambda one=one: model(input_ids=one["input_ids"], attention_mask=one["attention_mask"]) for one in given]
    expected, rows = watched(model, runs)
    place = "deberta.encoder.layer.0.attention.self"
    assert rows[f"{place}.key_proj.weight"] > rows[f"{place}.value_proj.weight"]
    close(gram(folder, data=texts, batch_size=batch_size)[0], expected)


LOADERS = """
import torch
from safetensors.torch import load_file
from torch import nn
from superpose.inference import Example, LiveModel


class Maps(nn.Module):
    def __init__(self):
        super().__init__()
        for name in ("first", "again", "named", "left", "right", "unused"):
            setattr(self, name, nn.Linear(4, 4, bias=False))
        self.looked_up = nn.Embedding(4, 4)
        self.tied = nn.Linear(4, 4, bias=False)
        self.tied.weight = self.looked_up.weight

    def forward(self, x):
        hidden = torch.tanh(self.first(x) + self.again(x) + self.named(input=x))
        hidden = hidden + self.again(hidden)
        pick = x[:, :1] > 0
        for chosen, part in ((pick, self.left), (~pick, self.right)):
            rows = chosen[:, 0].nonzero()[:, 0]
            if len(rows):
                hidden = hidden.index_add(0, rows, part(hidden[rows]))
        return self.tied(hidden)


def maps(folder, task):
    module = Maps()
    module.load_state_dict(load_file(folder / "model.safetensors"), strict=False)

    def encode(row):
        return Example({"x": torch.tensor([float(value) for value in row.values["text"].split()])})

    return LiveModel(module, encode, lambda inputs: module(inputs["x"]))


def none(folder, task):
    module = nn.LayerNorm(4)
    return LiveModel(module, maps(folder, task).encode, lambda inputs: module(inputs["x"]))
"""


@pytest.fixture(scope="module")
def loaders(root):
    import runpy

    from small_models import write_rows

    (root / "loaders.py").write_text(LOADERS)
    draw = torch.Generator().manual_seed(3)
    # The first three are for one expert only.
    x = torch.randn(9, 4, generator=draw)
    x[:, 0] = torch.tensor([1.0, 1, 1, -1, 1, -1, -1, 1, 1])
    write_rows(root / "numbers.jsonl", [{"text": " ".join(str(float(value)) for value in row)} for row in x])
    own = runpy.run_path(str(root / "loaders.py"))
    torch.manual_seed(5)
    (root / "maps").mkdir()
    module = own["Maps"]()
    save_file(
        {name: tensor.clone() for name, tensor in module.state_dict().items() if name != "tied.weight"},
        root / "maps" / "model.safetensors",
    )
    return module, x


@pytest.mark.parametrize("batch_size", [1, 3, 9])
def test_maps_that_are_called_twice_by_name_or_for_some_examples(root, loaders, batch_size):
    module, x = loaders
    task = {"data": str(root / "numbers.jsonl"), "loader": f"{root / 'loaders.py'}:maps", "batch_size": batch_size}
    found, told = gram(root / "maps", **task)
    with torch.no_grad():
        hidden = torch.tanh(module.first(x) + module.again(x) + module.named(x))
        later = hidden + module.again(hidden)
    picked = x[:, 0] > 0
    given = {
        "first": x, "named": x, "again": torch.cat([x, hidden]), "left": later[picked], "right": later[~picked],
    }  # fmt: skip
    expected = {f"{name}.weight": rows.T @ rows / len(rows) for name, rows in given.items()}
    close(found, {**expected, "unused.weight": torch.zeros(4, 4)})
    assert told["same"] == {"named.weight": "first.weight"}


def test_a_model_without_linear_maps_is_an_error(root, loaders):
    with pytest.raises(SuperposeError, match="no linear map of the model was used"):
        gram(root / "maps", data=str(root / "numbers.jsonl"), loader=f"{root / 'loaders.py'}:none")
