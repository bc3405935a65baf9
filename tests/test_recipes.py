"""The papers' experiments: each recipe is planned on models of the exact names and shapes, in files without content.

Each path of evaluation runs on a tiny stand-in. Nothing is fetched.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from families import load
from recipes import fetching
from safetensors.torch import save_file
from sparse_families import room_taken, shapes_of, write_model
from typer.testing import CliRunner

from superpose.cli import app

RECIPES = Path(__file__).parent.parent / "recipes"
MOST_ROOM = 32 * 2**20
CLIP = {
    "b32": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
            "patch_size": 32},
    "l14": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
            "patch_size": 14},
}  # fmt: skip


def t5_family(root):
    """T5-base, as the hub has it and as transformers saves fine-tunes of it."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        d_model=768, d_kv=64, d_ff=3072, num_heads=12, num_layers=12, architectures=["T5ForConditionalGeneration"]
    )
    shapes = shapes_of(T5ForConditionalGeneration, config)
    of_the_hub = {"decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight": (32, 12)}
    write_model(root / "base", {**shapes, **of_the_hub}, config)
    for task in ("paws", "qasc", "quartz", "story_cloze", "wiki_qa", "winogrande", "wsc"):
        write_model(root / task, shapes, config)


def clip_family(root, size):
    """The vision encoder of a CLIP, its tensors named as in the hub's files."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(**CLIP[size], image_size=224, architectures=["CLIPVisionModel"])
    names = shapes_of(CLIPVisionModel, config).items()
    shapes = {f"vision_model.{name.removeprefix('vision_model.')}": shape for name, shape in names}
    for folder in ("base", "sun397", "stanford-cars", "resisc45", "eurosat", "svhn", "gtsrb", "mnist", "dtd"):
        write_model(root / folder, shapes, config)


def gpt2_family(root):
    """GPT-2 Medium, its tensors named as in the hub's file with the masks there, and adapters in loralib's form."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_embd=1024, n_layer=24, n_head=16, architectures=["GPT2LMHeadModel"])
    names = shapes_of(GPT2LMHeadModel, config).items()
    shapes = {name.removeprefix("transformer."): shape for name, shape in names}
    masks = {f"h.{layer}.attn.bias": (1, 1, 1024, 1024) for layer in range(24)}
    write_model(root / "base", {**shapes, **masks}, config)
    for task in ("e2e", "dart", "webnlg"):
        write_released(root / task, f"gpt2_md_lora_{task}.pt", layers=24, width=1024)


def write_released(folder, file, *, layers, width):
    """Write an adapter as microsoft/LoRA released some: factors of query and value, and nothing that says so."""
    from recipes.gpt2_medium_lora.fetch import write_config

    folder.mkdir(parents=True)
    tensors = {}
    for layer in range(layers):
        at = f"transformer.h.{layer}.attn.c_attn"
        tensors |= {f"{at}.lora_A": torch.randn(8, width), f"{at}.lora_B": torch.randn(2 * width, 4)}
    torch.save({"model_state_dict": tensors}, folder / file)
    write_config(folder)


def llama_family(root):
    """Llama-2-7B in half precision and its fine-tunes, one in single; some files have the rotary buffer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(max_position_embeddings=4096, dtype="float16", architectures=["LlamaForCausalLM"])
    shapes = shapes_of(LlamaForCausalLM, config)
    rotary = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": (64,) for layer in range(32)}
    write_model(root / "base", {**shapes, **rotary}, config, dtype="F16", shards=2)
    write_model(root / "chinese", shapes, config, dtype="F32", shards=3)
    write_model(root / "math", {**shapes, **rotary}, config, dtype="F16", shards=3)
    write_model(root / "code", shapes, config, dtype="F16", shards=2)


FAMILIES = {
    "t5_base/stf": (
        t5_family,
        {"linear": 192, "norm": 62, "embedding": 3 + 1},
        {"merge": 257, "copy": 1},
        {"density": 0.2, "scaling_factor": 0.8},
    ),
    "clip_vit/stf_b32": (
        lambda root: clip_family(root, "b32"),
        {"linear": 72, "bias": 72, "norm": 52, "embedding": 2, "conv": 1},
        {"merge": 199},
        {"density": 0.2, "scaling_factor": 0.6},
    ),
    "clip_vit/stf_l14": (
        lambda root: clip_family(root, "l14"),
        {"linear": 144, "bias": 144, "norm": 100, "embedding": 2, "conv": 1},
        {"merge": 391},
        {"density": 0.2, "scaling_factor": 0.7},
    ),
    "gpt2_medium_lora/stf": (
        gpt2_family,
        {"linear": 96, "bias": 96, "norm": 98, "embedding": 2, "buffer": 24},
        {"merge": 24, "copy": 292},
        {"density": 0.3, "scaling_factor": 0.5},
    ),
    "llama2_7b/stf": (
        llama_family,
        {"linear": 224, "norm": 65, "embedding": 1, "head": 1, "buffer": 32},
        {"merge": 291, "copy": 32},
        {"density": 1, "scaling_factor": 0.8},
    ),
}
BASELINES = {
    "t5_base/stf": ["average", "task_arithmetic", "ties", "pcb", "metagpt", "consensus", "localize_and_stitch"],
    "clip_vit/stf_b32": ["average", "task_arithmetic", "ties", "pcb"],
    "clip_vit/stf_l14": ["average", "task_arithmetic", "ties", "pcb"],
    "gpt2_medium_lora/stf": ["average", "task_arithmetic", "ties", "pcb", "knots", "metagpt"],
    "llama2_7b/stf": ["average", "task_arithmetic", "ties", "pcb", "metagpt"],
}


def planned(recipe, *more):
    """Return what `superpose plan` makes of a recipe."""
    done = CliRunner().invoke(app, ["plan", str(recipe), "--json", *more])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_recipe_is_planned_on_models_of_its_names_and_shapes(name, tmp_path, monkeypatch):
    make, kinds, actions, options = FAMILIES[name]
    recipe = RECIPES / f"{name}.yaml"
    content = yaml.safe_load(recipe.read_text())
    assert content["options"] == options
    monkeypatch.chdir(tmp_path)
    make(tmp_path / Path(content["base"]).parent)
    assert room_taken(tmp_path) < MOST_ROOM
    plan = planned(recipe)
    assert Counter(item["kind"] for item in plan["items"]) == kinds
    assert Counter(item["action"] for item in plan["items"]) == actions
    merged = [item for item in plan["items"] if item["action"] == "merge"]
    assert all(item["options"][key] == value for item in merged for key, value in options.items())
    for method in BASELINES[name]:
        other = planned(recipe, "--method", method)
        assert {item["method"] for item in other["items"] if item["action"] == "merge"} == {method}


# CLIP: images and a head made of texts


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A tiny CLIP with its tokenizer and preprocessing, as it would be fetched."""
    from evaluators.tiny_models import byte_tokenizer
    from transformers import CLIPConfig, CLIPModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    root = tmp_path_factory.mktemp("clip")
    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        vision_config={**small, "image_size": 16, "patch_size": 8, "initializer_range": 0.3},
        text_config={**small, "hidden_size": 24, "vocab_size": 258, "max_position_embeddings": 64, "bos_token_id": 0,
                     "eos_token_id": 1, "pad_token_id": 0},
        projection_dim=12,
    )  # fmt: skip
    torch.manual_seed(0)
    model = CLIPModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    model.save_pretrained(root / "clip")
    byte_tokenizer(ends=True).save_pretrained(root / "clip")
    processor = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    processor.save_pretrained(root / "clip")
    return root / "clip"


def some_images(labels):
    from PIL import Image

    draw = torch.Generator().manual_seed(0)
    for label in labels:
        pixels = torch.randint(0, 256, (2, 2, 3), generator=draw, dtype=torch.uint8)
        yield {"image": Image.fromarray(pixels.numpy()).resize((24, 20)), "label": label}


def test_clip_is_evaluated_as_by_its_texts(clip, tmp_path, capsys):
    from recipes.clip_vit import evaluate, heads
    from recipes.clip_vit.fetch import take_vision_encoder, write_rows
    from recipes.clip_vit.tasks import TASKS

    models, data, task = tmp_path / "models", tmp_path / "data", TASKS["eurosat"]
    base = take_vision_encoder(clip, models / "base")
    assert all(name.startswith("vision_model.") for name in load(base))
    shutil.copytree(base, models / "tuned")
    noisy = {name: tensor + 0.3 * torch.randn(tensor.shape) for name, tensor in load(base).items()}
    save_file(noisy, models / "tuned/model.safetensors", {"format": "pt"})
    options = ["--method", "stf", "--density", "0.2", "-o", str(models / "merged")]
    done = CliRunner().invoke(app, ["merge", str(base), str(models / "tuned"), str(models / "tuned"), *options])
    assert done.exit_code == 0, done.output

    classes = ["forest", "a river", "highway"]
    answers = {folder: answers_by_texts(clip, models / folder, task.prompts, classes) for folder in ("base", "merged")}
    assert len(set(answers["base"])) > 1
    assert answers["base"] != answers["merged"]
    write_rows(some_images(answers["base"]), task, data / "eurosat")
    (data / "eurosat/classes.json").write_text(json.dumps(classes))
    heads.write_heads(clip, data, models / "clip_vit_b32/heads")
    arguments = ["--size", "b32", "--tasks", "eurosat", "--models", str(models), "--data", str(data), "--results",
                 str(tmp_path / "results.jsonl"), "--device", "cpu"]  # fmt: skip
    rows = evaluate.main([str(models / folder) for folder in answers] + arguments)
    agree = sum(map(int.__eq__, *answers.values())) / IMAGES
    assert [row["eurosat"] for row in rows] == pytest.approx([100, 100 * agree])
    assert "| model | eurosat | average |" in capsys.readouterr().out
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 2


IMAGES = 30


@torch.inference_mode()
def answers_by_texts(clip, encoder, prompts, classes):
    """Return for each image the class whose mean text is nearest, by CLIP itself with another vision encoder."""
    from transformers import AutoTokenizer, CLIPModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    model = CLIPModel.from_pretrained(clip).eval()
    own = {name.removeprefix("vision_model."): tensor for name, tensor in load(encoder).items()}
    model.vision_model.load_state_dict(own)
    tokenizer, processor = AutoTokenizer.from_pretrained(clip), CLIPImageProcessorPil.from_pretrained(clip)
    answers = []
    for image in some_images([0] * IMAGES):
        pixels = processor(images=image["image"], return_tensors="pt")["pixel_values"]
        similar = []
        for name in classes:
            found = [
                model(**tokenizer(prompt.format(name), return_tensors="pt"), pixel_values=pixels) for prompt in prompts
            ]
            text = torch.stack([out.text_embeds[0] for out in found]).mean(dim=0)
            similar.append(float(torch.cosine_similarity(text, found[0].image_embeds[0], dim=0)))
        answers.append(similar.index(max(similar)))
    return answers


# Fetching, with a hub of the test's own


def test_what_is_fetched_is_pinned(tmp_path, monkeypatch, capsys):
    import huggingface_hub

    asked = []

    def model_info(repository, revision):
        asked.append((repository, revision))
        files = ["README.md", "config.json", "model.safetensors", "pytorch_model.bin", "onnx/model.onnx", "tf_model.h5"]
        return SimpleNamespace(sha="c0ffee", siblings=[SimpleNamespace(rfilename=name) for name in files])

    def snapshot_download(repository, revision, allow_patterns, local_dir):
        assert (revision, allow_patterns) == ("c0ffee", ["README.md", "config.json", "model.safetensors"])
        local_dir.mkdir(exist_ok=True)

    monkeypatch.setattr(huggingface_hub, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    for _ in range(2):
        fetching.fetch_models([fetching.Source("some/model", "one")], tmp_path / "models")
    assert asked == [("some/model", "main"), ("some/model", "c0ffee")]


def test_without_a_network_it_says_so(tmp_path):
    with pytest.raises(SystemExit, match=r"some/model at main cannot be fetched(.|\n)*HF_HUB_OFFLINE is set"):
        fetching.fetch_models([fetching.Source("some/model", "one")], tmp_path / "models")
    with pytest.raises(SystemExit, match="by hand"):
        fetching.fetch_file("file:///nowhere/at/all", tmp_path / "data/file")


# T5: prompts of promptsource, ranked choices

TEMPLATES = """
dataset: quartz
templates:
  1: !Template
    answer_choices: '{{choices["text"] | join("|||")}}'
    id: a
    jinja: "{{question}}
      Which? {{choices['text'][0]}} or {{choices['text'][1]}} ||| {{answer_choices[choices['label'].index(answerKey)]}}"
    metadata: !TemplateMetadata {original_task: true, metrics: [Accuracy], choices_in_prompt: true}
    name: which
    reference: ''
  2: !Template
    answer_choices: A ||| B
    id: b
    jinja: "{{question}} {% for letter, text in zip(answer_choices, choices.text) %}{{letter}}: {{text}} {% endfor %}
      ||| {{answerKey}}"
    metadata: !TemplateMetadata {original_task: true, metrics: [Accuracy]}
    name: letters
    reference: ''
  3: !Template
    answer_choices: null
    id: c
    jinja: "{{question}} ||| {{choices.text[0]}}"
    metadata: !TemplateMetadata {original_task: false, metrics: [BLEU]}
    name: another task
    reference: ''
"""


@pytest.fixture(scope="module")
def quartz(tmp_path_factory):
    """A base and its data, prepared: a folder with models/ and data/."""
    from evaluators.tiny_models import make_t5, some_texts, write_rows
    from recipes.t5_base import prepare

    root = tmp_path_factory.mktemp("t5")
    make_t5(root / "models/t5_base/base")
    (root / "raw/quartz").mkdir(parents=True)
    (root / "templates/quartz").mkdir(parents=True)
    (root / "templates/quartz/templates.yaml").write_text(TEMPLATES)
    rows = [
        {"question": f"{text} a ||| b?", "choices": {"text": ["red", "blue"], "label": ["A", "B"]},
         "answerKey": "AB"[number % 2]}
        for number, text in enumerate(some_texts(48, longest=3))
    ]  # fmt: skip
    for split in ("train", "validation", "test"):
        write_rows(root / f"raw/quartz/{split}.jsonl", rows)
    folders = ["--raw", str(root / "raw"), "--data", str(root / "data"), "--templates", str(root / "templates")]
    prepare.main(["--tasks", "quartz", *folders])
    return root


def test_rows_are_put_by_templates_of_the_task_itself(quartz):
    rows = [json.loads(line) for line in (quartz / "data/quartz/test.jsonl").read_text().splitlines()]
    text = json.loads((quartz / "raw/quartz/test.jsonl").read_text().splitlines()[1])["question"]
    assert rows[1] == {
        "label": 1,
        "prompt_0": f"{text} Which? red or blue",
        "choices_0": ["red", "blue"],
        "answer": "blue",
        "prompt_1": f"{text} A: red B: blue",
        "choices_1": ["A", "B"],
    }
    sizes = {
        split: len((quartz / f"data/quartz/{split}.jsonl").read_text().splitlines())
        for split in ("train", "validation", "test")
    }
    assert sizes == {"train": 48, "validation": 32, "test": 48}


def test_where_a_task_has_no_public_test_its_validation_is_divided(tmp_path):
    from recipes.t5_base.prepare import read_splits
    from recipes.t5_base.tasks import TASKS

    assert read_splits("story_cloze", TASKS["story_cloze"], tmp_path) is None
    (tmp_path / "copa").mkdir()
    (tmp_path / "copa/validation.jsonl").write_text("".join(f'{{"label": {n % 2}, "idx": {n}}}\n' for n in range(50)))
    splits = read_splits("copa", TASKS["copa"], tmp_path)
    assert splits is not None
    assert [len(splits[name]) for name in ("validation", "test")] == [32, 18]
    assert {row["idx"] for rows in splits.values() for row in rows} == set(range(50))


def test_a_task_is_trained_on_and_evaluated(quartz, monkeypatch, capsys):
    from recipes.t5_base import evaluate, finetune

    monkeypatch.chdir(quartz)
    folders = ["--data", "data", "--device", "cpu"]
    few = ["--batch-size", "16", "--batches-a-step", "1", "--batches", "40", "--batches-a-check", "20"]
    tuned = finetune.main(["quartz", "--models", "models", *few, "--learning-rate", "0.01", *folders])
    assert tuned == Path("models/t5_base/quartz")
    assert not list(tuned.parent.glob(".*"))
    rows = evaluate.main(["models/t5_base/base", str(tuned), *folders])
    assert [set(row) for row in rows] == [{"quartz"}] * 2
    assert all(0 <= row["quartz"] <= 100 for row in rows)
    assert "| models/t5_base/quartz |" in capsys.readouterr().out
    assert len(Path("results/t5_base.jsonl").read_text().splitlines()) == 2


# GPT-2: prompts with a separator, texts against references

SPICE = "name : Blue Spice | food : red||"
E2E = f"{SPICE}Blue Spice is red .\n{SPICE}It is red .\nname : Cotto||New .\n"
DART = [{"tripleset": [["red", "IS", "cold"], ["old", "IS", "new"]], "annotations": [{"text": "a"}, {"text": "b"}]},
        {"tripleset": [["blue", "IS", "warm"]], "annotations": [{"text": "blue is warm"}]}]  # fmt: skip
TRIPLE = {"subject": "red", "property": "isA", "object": "blue"}
WEBNLG = {"entries": [
    {"1": {"category": "Food", "modifiedtripleset": [TRIPLE, TRIPLE], "lexicalisations": [
        {"comment": "good", "lex": "red is blue"}, {"comment": "bad", "lex": "no"}]}},
    {"2": {"category": "City", "modifiedtripleset": [TRIPLE], "lexicalisations": [{"comment": "good", "lex": "so"}]}},
]}  # fmt: skip


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A tiny GPT-2, three adapters in the released form, their merge by the recipe, and the three test sets."""
    from evaluators.tiny_models import byte_tokenizer
    from recipes.gpt2_medium_lora.data import FILES, write_rows
    from transformers import GPT2Config, GPT2LMHeadModel

    root = tmp_path_factory.mktemp("gpt2")
    models, data = root / "models/gpt2_medium_lora", root / "data"
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=259, n_embd=24, n_layer=2, n_head=4, n_positions=160, bos_token_id=258, eos_token_id=258,
        initializer_range=0.3,
    )  # fmt: skip
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "<|endoftext|>"})
    GPT2LMHeadModel(config).save_pretrained(models / "base")
    tokenizer.save_pretrained(models / "base")
    data.mkdir()
    raw = {"e2e": E2E, "dart": json.dumps(DART), "webnlg": json.dumps(WEBNLG)}
    for name, file in FILES.items():
        write_released(models / name, f"gpt2_md_lora_{name}.pt", layers=2, width=24)
        (root / Path(file).name).write_text(raw[name])
        write_rows(name, root / Path(file).name, data / f"{name}.jsonl")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        arguments = ["merge", str(RECIPES / "gpt2_medium_lora/stf.yaml"), "-o", "merged"]
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 0, done.output
    return root


def test_test_sets_become_prompts_with_their_references(written):
    rows = {
        name: [tuple(json.loads(line).values()) for line in (written / f"data/{name}.jsonl").read_text().splitlines()]
        for name in ("e2e", "dart", "webnlg")
    }
    assert rows["e2e"][:2] == [
        ("name : Blue Spice | food : red<|endoftext|>", "Blue Spice is red ."),
        ("name : Blue Spice | food : red<|endoftext|>", "It is red ."),
    ]
    assert rows["dart"][1] == ("red : is : cold | old : is : new<|endoftext|>", "b")
    assert rows["webnlg"] == [
        ("red : isA : blue | red : isA : blue<|endoftext|>", "red is blue"),
        ("red : isA : blue<|endoftext|>", "so"),
    ]


def test_the_separator_stays_on_the_prompt(written):
    from recipes.gpt2_medium_lora.evaluate import DECODING, LOADER
    from transformers import AutoTokenizer, GPT2LMHeadModel

    import superpose

    model = str(written / "merged")
    data = {"data": written / "data/webnlg.jsonl", "target": "target", "loader": LOADER}
    found = superpose.evaluate(model, "generate", data=data, metrics="bleu", **DECODING)
    tokenizer, live = AutoTokenizer.from_pretrained(model), GPT2LMHeadModel.from_pretrained(model).eval()
    for sample in found.facts["samples"]:
        ids = tokenizer(sample["prompt"], return_tensors="pt")["input_ids"]
        assert ids[0, -1] == 258
        written_by = live.generate(
            ids, attention_mask=torch.ones_like(ids), num_beams=10, length_penalty=0.8, no_repeat_ngram_size=4,
            max_new_tokens=64, do_sample=False, pad_token_id=258,
        )  # fmt: skip
        text = tokenizer.decode(written_by[0, ids.shape[1] :], skip_special_tokens=True)
        assert sample["text"] == text.partition("\n\n")[0].strip()


def test_texts_are_measured_on_the_three_test_sets(written, monkeypatch, capsys):
    from recipes.gpt2_medium_lora import evaluate

    monkeypatch.chdir(written)
    [row] = evaluate.main(["merged", "--data", "data", "--without", "meteor", "--device", "cpu"])
    assert list(row) == [
        "e2e bleu", "e2e nist", "e2e rouge_l", "e2e cider", "dart bleu", "dart ter", "webnlg bleu", "webnlg ter",
    ]  # fmt: skip
    assert "| merged |" in capsys.readouterr().out


# Llama: the harness's tasks in its own words, their data a file

CODE = """
task: humaneval
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/humaneval.jsonl}}
unsafe_code: true
test_split: test
output_type: generate_until
doc_to_text: "{{prompt}}"
doc_to_target: "{{test}}"
metric_list: [{metric: !function scoring.pass_at_k, aggregation: mean, higher_is_better: true, k: [1]}]
generation_kwargs: {until: ["\\ndef"], max_gen_toks: 8, do_sample: false}
filter_list: [{name: create_test, filter: [{function: custom, filter_fn: !function scoring.whole}]}]
"""
SCORING = """
def whole(responses, documents):
    return [[document["prompt"] + text for text in each] for each, document in zip(responses, documents)]

def pass_at_k(references, predictions, k=(1,)):
    return {"pass@1": float(references[0] in predictions[0][0])}
"""


@pytest.fixture(scope="module")
def harness(tmp_path_factory):
    """Tasks as the harness words them, but with local data; HumanEval's code is looked at, not run."""
    import lm_eval
    from evaluators.tiny_models import write_rows
    from recipes.llama2_7b.evaluate import OWN_TASKS

    folder = tmp_path_factory.mktemp("harness")
    own = Path(lm_eval.__file__).parent / "tasks"
    files = {
        "cmmlu": "task: cmmlu\n" + (own / "cmmlu/_default_template_yaml").read_text(encoding="utf-8"),
        "gsm8k": (own / "gsm8k/gsm8k.yaml").read_text(),
        "gsm8k_metamath": (OWN_TASKS / "gsm8k_metamath.yaml").read_text(),
    }
    # The stand-in knows 512 positions, which a prompt of five examples and a long answer would fill.
    short = {"max_gen_toks: 512": "max_gen_toks: 12", "  do_sample: false": "  do_sample: false\n  max_gen_toks: 12"}
    for name, text in files.items():
        lines = [line for line in text.splitlines() if not line.startswith(("dataset_", "num_fewshot"))]
        content = "\n".join(lines)
        for long, instead in short.items():
            content = content.replace(long, instead)
        data = ", ".join(f"{split}: {folder}/{name}.jsonl" for split in ("train", "dev", "test"))
        content += f"\ndataset_path: json\ndataset_kwargs: {{data_files: {{{data}}}}}\n"
        (folder / f"{name}.yaml").write_text(content, encoding="utf-8")
    (folder / "humaneval.yaml").write_text(CODE.replace("FOLDER", str(folder)))
    (folder / "scoring.py").write_text(SCORING)
    asked = [{"Question": f"{n}?", "A": "a", "B": "b", "C": "c", "D": "d", "Answer": "ABCD"[n % 4]} for n in range(8)]
    write_rows(folder / "cmmlu.jsonl", asked)
    sums = [{"question": "1 + 2", "answer": "1 and 2 make 3. #### 3"}, {"question": "2 + 2", "answer": "#### 4"}]
    write_rows(folder / "gsm8k.jsonl", sums)
    write_rows(folder / "gsm8k_metamath.jsonl", sums)
    write_rows(folder / "humaneval.jsonl", [{"prompt": "def three():", "test": "def three"}])
    return folder


@pytest.mark.slow
def test_llama_is_evaluated_on_the_harness(harness, tmp_path, tmp_path_factory, monkeypatch, capsys):
    import datasets
    from evaluators.tiny_models import make_llama
    from recipes.llama2_7b import evaluate

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")
    monkeypatch.chdir(tmp_path)
    model = make_llama(tmp_path / "model")
    arguments = [str(model), "--tasks", *evaluate.COLUMNS, "--include", str(harness), "--device", "cpu"]
    [row] = evaluate.main([*arguments, "--allow-code"])
    assert list(row) == ["cmmlu", "gsm8k", "gsm8k_metamath", "humaneval"]
    assert row["humaneval"] == 100
    assert all(0 <= value <= 100 for value in row.values())
    assert "| average |" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="--allow-code"):
        evaluate.main(arguments)


def test_tokens_beyond_the_base_are_cut_off(tmp_path):
    from adapters import llama
    from recipes.llama2_7b.fetch import cut_vocabulary

    folder = llama(tmp_path / "model")
    before = load(folder)
    whole = json.loads((folder / "config.json").read_text())
    after = load(cut_vocabulary(folder, tmp_path / "cut", 59))
    assert all(torch.equal(before[name][: len(after[name])], after[name]) for name in before)
    assert {name: len(after[name]) for name in after if len(after[name]) == 59} == {
        "model.embed_tokens.weight": 59, "lm_head.weight": 59,
    }  # fmt: skip
    assert json.loads((tmp_path / "cut/config.json").read_text()) == {**whole, "vocab_size": 59}
