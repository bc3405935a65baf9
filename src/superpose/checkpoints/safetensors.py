"""safetensors: a length, a JSON header, the tensors' bytes.

Headers are parsed here, so that a broken file is described tensor by tensor; data is read by the safetensors library,
which maps the file into memory.
"""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from superpose.checkpoints.headers import MOST_TENSORS, TORCH_DTYPES, FileHeaders, TensorHeader, name_problem
from superpose.errors import SuperposeError

LONGEST_HEADER = 100_000_000
"""Bytes; the limit of the safetensors library, which keeps a hostile header from filling the memory."""
LARGE_HEADER, SPARE_PARTS = 10_000_000, 1_000_000
"""Bytes, beyond which a header is not parsed that has more lists and values than its tensors explain, and how many more
it may have: three bytes of JSON can be a list, which takes twenty times as much in memory."""
FETCH_AGAIN = "fetch or save the file again: it is incomplete or damaged"


class SafetensorsReader:
    """An open safetensors file; its tensors are views of the mapped file."""

    def __init__(self, file: Path) -> None:
        self._file = safe_open(str(file), framework="pt")

    def read(self, name: str) -> Tensor:
        """Return a tensor as a view of the file: two reads share memory, so it is never written to."""
        return self._file.get_tensor(name)


class SafetensorsFormat:
    """The safetensors format."""

    suffixes = (".safetensors",)

    def open(self, file: Path) -> SafetensorsReader:
        """Open a file whose headers were found sound."""
        return SafetensorsReader(file)

    def headers(self, file: Path) -> FileHeaders:
        """Return what a file declares, and what is wrong with it."""
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, LONGEST_HEADER):
                return _broken(file, "no safetensors file, or cut off inside its header", FETCH_AGAIN)
            text = stream.read(length)
        if problem := _beyond_measure(text):
            return _broken(file, problem, "do not use this file")
        try:
            entries = json.loads(text, object_pairs_hook=_refuse_duplicates)
            entries.pop("__metadata__", None)
            declared = {name: _entry(name, entry, file, 8 + length) for name, entry in entries.items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            return _broken(file, f"damaged safetensors header: {error}", FETCH_AGAIN)
        headers = {name: header for name, (header, _, _) in declared.items()}
        problems = _check_layout(declared, size - 8 - length, file) or _ask_library(file)
        return FileHeaders(headers, {}, tuple(problems))


FORMAT = SafetensorsFormat()


def _beyond_measure(text: bytes) -> str:
    """Return why a header is not parsed, "" if it is."""
    tensors = text.count(b'"data_offsets"')
    if tensors > MOST_TENSORS:
        return f"{tensors} tensors in one file, more than {MOST_TENSORS}"
    if len(text) < LARGE_HEADER:
        return ""
    lists, values = text.count(b"[") + text.count(b"{"), text.count(b",")
    if lists > 4 * tensors + SPARE_PARTS or values > 16 * tensors + SPARE_PARTS:
        return f"damaged safetensors header: {len(text)} bytes for {tensors} tensors"
    return ""


def _entry(name: str, entry: dict, file: Path, data: int) -> tuple[TensorHeader, int, int]:
    try:
        dtype, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
        numbers = [*shape, start, stop]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"tensor {name!r} is not declared by dtype, shape and two offsets") from error
    if not isinstance(shape, list):
        raise ValueError(f"tensor {name!r} has a shape that is no list of sizes")
    if not isinstance(dtype, str) or dtype not in TORCH_DTYPES:
        raise ValueError(f"tensor {name!r} has the unknown dtype {dtype!r}")
    if problem := name_problem(name):
        raise ValueError(problem)
    if not all(isinstance(number, int) and not isinstance(number, bool) and 0 <= number < 2**63 for number in numbers):
        raise ValueError(f"tensor {name!r} has a shape or offsets that are no sizes")
    header = TensorHeader(name, dtype, tuple(shape), file, offset=data + start)
    if stop - start != header.nbytes:
        raise ValueError(f"tensor {name!r} declares {stop - start} bytes, its shape needs {header.nbytes}")
    return header, start, stop


def _check_layout(
    declared: dict[str, tuple[TensorHeader, int, int]], available: int, file: Path
) -> list[SuperposeError]:
    """Find gaps, overlaps, and tensors beyond the end of the file."""
    end = 0
    for name, (_, start, stop) in sorted(declared.items(), key=lambda item: item[1][1:]):
        if start != end:
            what = f"damaged safetensors header: tensor {name!r} begins at byte {start}, not {end}"
            return [SuperposeError(what, where=f"{file}, tensor {name}", mend=FETCH_AGAIN)]
        end = stop
    if end == available:
        return []
    if end < available:
        return [SuperposeError(f"{available - end} bytes too many", where=str(file), mend=FETCH_AGAIN)]
    cut = sorted(name for name, (_, _, stop) in declared.items() if stop > available)
    more = f" and {len(cut) - 1} more" if len(cut) > 1 else ""
    return [
        SuperposeError(
            f"truncated: {end - available} of {end} bytes of tensors are missing",
            where=f"{file}, tensor {cut[0]}{more}",
            mend=FETCH_AGAIN,
        )
    ]


def _ask_library(file: Path) -> list[SuperposeError]:
    """Return what keeps the library, which is stricter in small things, from opening a file."""
    try:
        with safe_open(str(file), framework="pt"):
            return []
    except (SafetensorError, OSError, ValueError) as error:
        return [SuperposeError(f"damaged safetensors header: {error}", where=str(file), mend=FETCH_AGAIN)]


def _refuse_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found: dict[str, object] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name!r} occurs twice")
        found[name] = value
    return found


def _broken(file: Path, what: str, mend: str) -> FileHeaders:
    return FileHeaders({}, {}, (SuperposeError(what, where=str(file), mend=mend),))
