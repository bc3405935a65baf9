"""Changes to an input that keep most of it as it was: of bytes anywhere, and of what is framed in it."""

from __future__ import annotations

import io
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


def mutated(content: bytes, others: list[bytes], draw: random.Random, target: str) -> bytes:
    """Return the content with a few changes; the frame around it is made to fit again, most of the time."""
    if draw.random() < 0.2:
        return changed(content, others, draw)
    if target == "safetensors" and len(content) >= 8:
        end = 8 + int.from_bytes(content[:8], "little")
        header = changed(content[8:end], [other[8:] for other in others], draw)
        return len(header).to_bytes(8, "little") + header + content[end:]
    if target == "pickle":
        return _with_another_pickle(content, others, draw)
    return changed(content, others, draw)


def changed(content: bytes, others: list[bytes], draw: random.Random) -> bytes:
    """Return bytes with one to four changes."""
    made = bytearray(content)
    for _ in range(draw.randint(1, 4)):
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
