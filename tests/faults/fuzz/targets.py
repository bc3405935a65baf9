"""What is fuzzed: each target takes the bytes of one file, and ends in a result or in one of our errors.

What else comes out is a crash; so is memory beyond a bound, and a file opened outside the folder that the target has.
"""

from __future__ import annotations

import os
import sys
import tempfile
import threading
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from faults.fuzz.scratch import SCRATCH, in_memory
from faults.fuzz.seeds import FOUND, SEEDS, adapter_weights
from superpose.checkpoints.files import headers_of
from superpose.checkpoints.folder import open_checkpoint
from superpose.checkpoints.headers import FileHeaders
from superpose.checkpoints.lora import open_adapter
from superpose.errors import SuperposeError
from superpose.recipe import load_recipe

ALLOWED_MEMORY = 64
"""Bytes that reading may take per byte of the file, beside `MEMORY_BESIDE`."""
MEMORY_BESIDE = 32_000_000


class Crash(Exception):
    """A target did what it must not do."""


@dataclass(frozen=True)
class Target:
    """What is fuzzed.

    Args:
        name: of the target.
        file: the name under which it finds its input.
        run: reads the input from a folder.
        prepare: writes what else is in that folder.
    """

    name: str
    file: str
    run: Callable[[Path], object]
    prepare: Callable[[Path], object] = lambda folder: None

    @cached_property
    def seeds(self) -> list[bytes]:
        """Inputs to begin with: valid ones, ones known to be nearly so, and what was found before."""
        return [*SEEDS[self.name](), *FOUND[self.name]]


class Outside:
    """Notes files that are opened outside a folder while something runs; there is one for the process."""

    def __init__(self) -> None:
        self._folder = ""
        self._thread = 0
        self._found: list[str] = []
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple) -> None:
        if not self._folder or threading.get_ident() != self._thread:
            return
        if event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "socket.connect"):
            self._found.append(event)
        if event in ("open", "os.remove", "os.rename", "os.mkdir", "os.link", "os.symlink", "os.truncate"):
            place = arguments[0]
            if isinstance(place, (str, bytes, os.PathLike)) and not self._is_inside(os.fsdecode(place)):
                self._found.append(f"{event} {place!r}")

    def _is_inside(self, place: str) -> bool:
        # Python looks for modules, and their source for the lines of a traceback, whenever it likes.
        whole = os.path.normpath(Path.cwd() / place)
        return whole.startswith(self._folder) or whole.endswith((".py", ".pyc", ".so"))

    def watch(self, folder: Path, run: Callable[[], object]) -> object:
        """Run something, and raise `Crash` if it opened what is not in the folder."""
        self._folder, self._thread, self._found = f"{folder}{os.sep}", threading.get_ident(), []
        try:
            return run()
        finally:
            self._folder = ""
            if self._found:
                raise Crash(f"it reached outside its folder: {self._found}")


_outside: list[Outside] = []


def attempt(target: Target, folder: Path, content: bytes, *, measure: bool = False) -> str:
    """Give a target its input.

    Args:
        target: what is fuzzed.
        folder: its own, prepared.
        content: of the file.
        measure: whether to measure memory too, which makes it several times slower.

    Returns:
        "read" or "refused".

    Raises:
        Crash: memory was taken beyond the bound, or something outside the folder was touched.
    """
    if not _outside:
        _outside.append(Outside())
    (folder / target.file).write_bytes(content)
    if measure:
        tracemalloc.start()
    try:
        _outside[0].watch(folder, lambda: target.run(folder))
        return "read"
    except SuperposeError as error:
        text = str(error)
        if not all(1 <= len(part.split("\n")) <= 3 for part in text.split("\n\n")):
            raise Crash(f"an error of forged lines: {text!r}") from error
        return "refused"
    finally:
        if measure:
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            if peak > ALLOWED_MEMORY * len(content) + MEMORY_BESIDE:
                raise Crash(f"{peak} bytes of memory for {len(content)} bytes of input")


def folder_for(target: Target) -> tempfile.TemporaryDirectory:
    """Return a prepared folder for a target."""
    folder = tempfile.TemporaryDirectory(dir=os.environ.get(SCRATCH) or in_memory(), prefix="superpose-fuzz-")
    target.prepare(Path(folder.name))
    return folder


def _sound(found: FileHeaders) -> FileHeaders:
    """See that what is listed has names, sizes and dtypes, and that a problem is one of ours."""
    for header in found.tensors.values():
        assert header.nbytes >= 0
        header.name.encode("utf-8")
    if found.problems:
        raise found.problems[0]
    return found


def _read_safetensors(folder: Path) -> object:
    return _sound(headers_of(folder / "model.safetensors"))


def _read_pickle(folder: Path) -> object:
    return _sound(headers_of(folder / "pytorch_model.bin"))


def _read_index(folder: Path) -> object:
    found = open_checkpoint(str(folder))
    for header in found.tensors.values():
        if header.file.resolve().parent != folder.resolve():
            raise Crash(f"a shard outside the folder: {header.file}")
    if found.problems:
        raise found.problems[0]
    return found


def _read_recipe(folder: Path) -> object:
    recipe = load_recipe(folder / "recipe.yaml")
    again = load_recipe(recipe.model_dump(mode="json"))
    # JSON has neither NaN nor infinity: what an option is to do with them is the method's to say.
    if again != recipe and not any(word in str(recipe).lower() for word in ("nan", "inf")):
        raise Crash("a recipe is not what it is written as")
    return [rule.applies("layers.0.mlp.up_proj.weight", None) for rule in recipe.rules], recipe.task_names


def _read_adapter(folder: Path) -> object:
    found = open_adapter(folder, "adapter")
    if found.problems:
        raise found.problems[0]
    return found.tensors


def _shards(folder: Path) -> None:
    for number, content in enumerate(SEEDS["safetensors"]()[:2]):
        (folder / f"model-{number + 1:05d}-of-00002.safetensors").write_bytes(content)


TARGETS = {
    target.name: target
    for target in (
        Target("safetensors", "model.safetensors", _read_safetensors),
        Target("index", "model.safetensors.index.json", _read_index, _shards),
        Target("recipe", "recipe.yaml", _read_recipe),
        Target(
            "adapter", "adapter_config.json", _read_adapter,
            lambda folder: (folder / "adapter_model.safetensors").write_bytes(adapter_weights()),
        ),
        Target("pickle", "pytorch_model.bin", _read_pickle),
    )
}  # fmt: skip
