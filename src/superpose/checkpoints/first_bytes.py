"""What a file is that is not what its name says, told by its first bytes: what downloads leave in place of weights."""

from __future__ import annotations

import re
from pathlib import Path

from superpose.checkpoints.torch_zip import SUFFIXES
from superpose.errors import SuperposeError

READ = 512
"""Bytes that tell."""
_POINTER = b"version https://git-lfs.github.com/spec/"
_ZIP = b"PK\x03\x04"
# What begins so, what that is, and what to do about it.
_KNOWN = (
    (_POINTER, "a git-lfs pointer, not the file itself", "fetch it in the repository's folder: git lfs pull"),
    (_ZIP, "a zip, as torch.save and others write it", "name it .bin if torch.save wrote it, or unpack it"),
    (b"\x80\x02", "a pickle without a zip around it", "load and save it again with a newer PyTorch, or as safetensors"),
    (b"\x89PNG", "an image (PNG)", "fetch the weights again"),
    (b"\xff\xd8\xff", "an image (JPEG)", "fetch the weights again"),
    (b"%PDF", "a PDF", "fetch the weights again"),
    (b"\x1f\x8b", "packed by gzip", "unpack it first"),
    (b"BZh", "packed by bzip2", "unpack it first"),
    (b"\xfd7zXZ", "packed by xz", "unpack it first"),
    (b"(\xb5/\xfd", "packed by zstd", "unpack it first"),
    (b"GGUF", "a GGUF file", "merge the safetensors that it was made from"),
    (b"\x89HDF", "an HDF5 file, as Keras writes it", "save the model as safetensors"),
)
_PAGE = re.compile(rb"\s*(<!doctype html|<html|<head|<\?xml)", re.IGNORECASE)


def told_by_first_bytes(file: Path) -> SuperposeError | None:
    """Return what a file is that cannot be read as what its name says, None if its first bytes do not tell."""
    try:
        with file.open("rb") as stream:
            head = stream.read(READ)
    except OSError:  # what cannot be read was reported
        return None
    if not head:
        return SuperposeError("the file is empty", where=str(file), mend="fetch or save it again")
    if _PAGE.match(head):
        mend = "fetch it again: log in, or accept the model's terms, where that is asked for"
        return SuperposeError("a web page, not the file itself", where=str(file), mend=mend)
    if not any(head):
        mend = "fetch it again: the download was broken off"
        return SuperposeError("the file holds zeros where its header should be", where=str(file), mend=mend)
    if head.startswith(_ZIP) and file.suffix in SUFFIXES:  # the right sort, with something else wrong with it
        return None
    found = next(((what, mend) for begin, what, mend in _KNOWN if head.startswith(begin)), None)
    return SuperposeError(found[0], where=str(file), mend=found[1]) if found else None
