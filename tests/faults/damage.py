"""Damaged checkpoints, and merges of them that have to end in an error by name or in the right result."""

from __future__ import annotations

import json
import random
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from families import base_tensors, save, tuned_tensors
from safetensors.torch import save_file
from torch import Tensor

import superpose as library
from faults.forks import Forks
from superpose import SuperposeError

REFUSED, MERGED = "refused by name", "merged rightly"
BASE, TUNED = "base", "tuned"
NAME = "layers.0.mlp.up_proj.weight"
"""A weight of `small_base`, of 24 rows and 8 columns."""
SUFFIXES = (".safetensors", ".bin")
"""Of the weight files that are read."""
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4d7a" * 16 + b"\nsize 4976698672\n"
"""What git leaves in place of a file whose content was not fetched."""
SOON = 20.0
"""Seconds in which what is hostile is refused, on a slow machine with others at work."""
BOUNDED = """
import re, resource
taken = int(re.search(r"VmData:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (taken + {bytes}, taken + {bytes}))
"""
"""Run in a process before the command line: more memory than this is an error there, of another text than ours."""


def small_base(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Return the tensors of a model of one layer."""
    return base_tensors(layers=1, width=8, dtype=dtype)


def small_family(root: Path, suffix: str = ".safetensors") -> tuple[Path, Path]:
    """Write a base and one fine-tune; return the folder of the base and the fine-tune's weight file."""
    base = small_base()
    tuned = tuned_tensors(base, 1)
    save(root / BASE, base)
    save(root / TUNED, tuned)
    if suffix == ".safetensors":
        return root / BASE, root / TUNED / "model.safetensors"
    (root / TUNED / "model.safetensors").unlink()
    torch.save(tuned, root / TUNED / "pytorch_model.bin")
    return root / BASE, root / TUNED / "pytorch_model.bin"


def adapter(folder: Path, **config: object) -> Path:
    """Write an adapter of `NAME` alone, with more in its config; return its folder."""
    folder.mkdir()
    place = f"base_model.model.{NAME.removesuffix('.weight')}"
    draw = torch.Generator().manual_seed(3)
    tensors = {
        f"{place}.lora_A.weight": torch.randn(2, 8, generator=draw),
        f"{place}.lora_B.weight": torch.randn(24, 2, generator=draw),
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": "base", **config})
    )
    return folder


def merged_or_refused(
    base: Path, models: Sequence[Path | str], output: Path, names: Sequence[str] = (), **recipe: object
) -> str:
    """Merge; return what came of it: the word for an error that names what it should, or `MERGED`."""
    made = {"base": str(base), "models": [str(model) for model in models], "method": "average", **recipe}
    try:
        library.merge(made, output, backend="serial")
    except SuperposeError as error:
        assert_says(str(error), names)
        assert not output.exists()
        return REFUSED
    assert (output / "run.json").exists()
    return MERGED


def error_in(text: str) -> str:
    """Return the error in what the command line wrote, behind tables and notes."""
    before, *found = re.split(r"(?m)^error: ", text.strip())
    assert found, before
    return found[-1]


def assert_says(text: str, names: Sequence[str] = ()) -> None:
    """See that an error is of the lines that errors have, ends in a mend, and names what it should."""
    for problem in text.split("\n\n"):
        lines = problem.split("\n")
        assert 2 <= len(lines) <= 3, text
        assert lines[0]
        assert lines[-1].startswith("mend: "), text
        assert len(lines) == 2 or lines[1].startswith("where: "), text
    assert "Traceback" not in text
    assert all(name in text for name in names), (names, text)


def refused_by_the_command_line(
    forks: Forks, root: Path, *arguments: object, names: Sequence[str] = (), memory: int | None = None
) -> str:
    """Run the command line in a process of its own, with more memory than its own if so; it has to refuse by name."""
    before = sorted(root.iterdir())
    script = {"script": BOUNDED.format(bytes=memory)} if memory else {}
    done = forks.run(arguments, root, **script)
    assert done.status == 2, (done.status, done.text)
    assert "memory ran out" not in done.text
    assert_says(error_in(done.text), names)
    assert sorted(root.iterdir()) == before
    return REFUSED


def merge_refused(
    forks: Forks,
    root: Path,
    base: Path,
    model: Path,
    *more: object,
    names: Sequence[str] = (),
    memory: int | None = None,
) -> str:
    """Merge one model into `root / "out"` by the command line, with more arguments; it has to refuse by name."""
    arguments = ["merge", base, model, "-o", root / "out", *more]
    return refused_by_the_command_line(forks, root, *arguments, names=names, memory=memory)


def header_of(file: Path) -> tuple[dict, bytes]:
    """Return the header of a safetensors file, and the data behind it."""
    content = file.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def write_header(file: Path, header: Mapping | bytes, data: bytes, *, length: int | None = None) -> Path:
    """Write a safetensors file with this header, whatever it says."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return file


def with_header(change: Callable[[dict], object]) -> Callable[[Path], None]:
    """Return what changes the header of a safetensors file."""

    def changed(file: Path) -> None:
        header, data = header_of(file)
        change(header)
        write_header(file, header, data)

    return changed


def with_bytes(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """Return what changes the bytes of a file."""
    return lambda file: file.write_bytes(change(file.read_bytes())) and None


def flip(content: bytes, draw: random.Random, start: int, stop: int) -> bytes:
    """Return the content with one bit of the bytes from start to stop the other way round."""
    changed, place = bytearray(content), draw.randrange(start, stop)
    changed[place] ^= 1 << draw.randrange(8)
    return bytes(changed)


def repacked(file: Path, change: Callable[[str, bytes], bytes], method: int = zipfile.ZIP_STORED) -> None:
    """Write a zip of torch.save again, each entry changed, and packed by a method."""
    with zipfile.ZipFile(file) as source:
        entries = {info.filename: source.read(info) for info in source.infolist()}
    with zipfile.ZipFile(file, "w", method) as target:
        for name, content in entries.items():
            target.writestr(name, change(name, content))


def with_pickle(file: Path, pickled: bytes) -> Path:
    """Put another pickle into a file of torch.save."""
    repacked(file, lambda name, content: pickled if name.endswith("data.pkl") else content)
    return file


def bits(tensor: Tensor) -> bytes:
    """Return a tensor's bytes."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
