"""Changes to an input that keep most of it as it was: of bytes anywhere, and of what is framed in it."""

from __future__ import annotations

import copy
import io
import json
import random
import struct
import zipfile
import zlib

WORDS = (
    b'"', b"{", b"}", b"[", b"]", b":", b",", b"\\u0000", b"\\ud800", b"\x00", b"\xff", b"\n", b"\r", b"-1", b"0",
    b"1e999", b"9" * 25, b"null", b"true", b"NaN", b"Infinity", b"../", b"/etc/passwd",
    b"__metadata__", b"data_offsets",
    b"dtype", b"F32", b"BF16", b"shape", b"weight_map", b"!!python/object/apply:os.system", b"&a ", b"*a", b"<<: *a",
    b"? ", b"- ", b"|", b">", b"'", b"#", b"%", b"LORA", b"rank_pattern", b"(.*)*", b"use_dora", b"enable_lora",
    b"cposix\nsystem\n", b"cbuiltins\nbytearray\n", b"ccollections\nOrderedDict\n", b"\x85R", b"h\x00", b"q\x00", b"(",
    b"t", b"Q", b"}", b"]", b"u", b"e", b".", b"\x8a\x08", b"X\x02\x00\x00\x00", b"\x1b[2J", b"\xe2\x80\xae",
)  # fmt: skip


VALUES = (
    None, True, 0, 1, -1, 2, 3, 4, 8, 2**31, 2**63, 10**30, 0.5, float("nan"), float("inf"), "", "a.weight", "x" * 600,
    "../x", "/etc/passwd", "model-00001-of-00002.safetensors", "F32", "BF16", "F8_E5M2", "I64", "LORA", "*", "(.*)*",
    "base", "keep", "norm", "ties", "\x1b[2J", "\ud800", "5GB", [], [0], [2, 3], [0, 24], [[[]]], {}, {"a": 1},
)  # fmt: skip
"""What a value in JSON is replaced by."""


def mutated(content: bytes, others: list[bytes], draw: random.Random, target: str) -> bytes:
    """Return the content with a few changes; the frame around it is made to fit again, most of the time."""
    if draw.random() < 0.3:  # what was changed often is rarely more than refused at once
        content = draw.choice(others)
    if draw.random() < 0.2:
        return changed(content, others, draw)
    if target == "safetensors" and len(content) >= 8:
        end = 8 + int.from_bytes(content[:8], "little")
        header = _changed_json(content[8:end], [other[8:] for other in others], draw)
        return len(header).to_bytes(8, "little") + header + content[end:]
    if target == "pickle":
        return _with_another_pickle(content, others, draw)
    return _changed_json(content, others, draw)


def _changed_json(content: bytes, others: list[bytes], draw: random.Random) -> bytes:
    """Return JSON with one or two values changed, left out or put elsewhere; anything else with bytes changed."""
    if draw.random() < 0.4:
        return changed(content, others, draw)
    try:
        made = json.loads(content)
    except (ValueError, RecursionError):
        return changed(content, others, draw)
    for _ in range(draw.choice((1, 1, 2))):
        places = _places(made)
        if not places:
            break
        holder, key = draw.choice(places)
        way = draw.randrange(4)
        if way == 0:
            del holder[key]
        elif way == 1 and isinstance(holder, dict):
            holder[str(draw.choice(VALUES))] = holder[key]
        elif way == 2:
            other, there = draw.choice(places)
            holder[key] = copy.deepcopy(other[there]) if other is not holder or there != key else None
        else:
            holder[key] = copy.deepcopy(draw.choice(VALUES))
    return json.dumps(made).encode()


def _places(value: object, depth: int = 0) -> list[tuple]:
    """Return every place of a value in JSON: what holds it, and its key there."""
    if depth > 20 or not isinstance(value, (dict, list)):
        return []
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    return [(value, key) for key in keys] + [one for key in keys for one in _places(value[key], depth + 1)]


def changed(content: bytes, others: list[bytes], draw: random.Random) -> bytes:
    """Return bytes with one to three changes."""
    made = bytearray(content)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        place = draw.randrange(len(made) + 1)
        stop = min(place + draw.choice((1, 1, 2, 4, 16, 64)), len(made))
        way = draw.randrange(7)
        if way == 0 and place < len(made):
            made[place] ^= 1 << draw.randrange(8)
        elif way == 1 and place < len(made):
            made[place] = draw.randrange(256)
        elif way == 2:
            del made[place:stop]
        elif way == 3:
            made[place:place] = draw.choice(WORDS)
        elif way == 4:
            made[place:stop] = draw.choice(WORDS)
        elif way == 5:
            made[place:place] = made[place:stop] * draw.choice((1, 2, 50))
        else:
            other = draw.choice(others)
            begin = draw.randrange(len(other) + 1)
            made[place:place] = other[begin : begin + draw.choice((4, 16, 64, 256))]
    return bytes(made[:100_000])


def _with_another_pickle(content: bytes, others: list[bytes], draw: random.Random) -> bytes:
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            entries = {info.filename: archive.read(info) for info in archive.infolist()}
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, RuntimeError, zlib.error, struct.error):
        # One that was changed before: it need be no zip any more.
        return changed(content, others, draw)
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, inside in entries.items():
            archive.writestr(name, changed(inside, others, draw) if name.endswith("data.pkl") else inside)
    return stream.getvalue()
