"""Hub ids: `org/name[@revision]` to a local folder, through huggingface_hub and its cache."""

from __future__ import annotations

import re
from pathlib import Path

from superpose.errors import SuperposeError

# Weights in one format only: a repository often holds the same model two or three times.
SAFE_PATTERNS = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.py"]
PICKLE_PATTERNS = ["*.json", "*.bin", "*.txt", "*.model", "*.jinja", "*.py"]
HUB_ID = re.compile(r"[\w.\-]+/[\w.\-]+(@[\w.\-/]+)?")


def looks_like_hub_id(location: str) -> bool:
    """Whether a text has the form `org/name` or `org/name@revision`."""
    return bool(HUB_ID.fullmatch(location)) and not location.startswith((".", "/"))


def fetch_from_hub(location: str, nearest_path: str = "") -> tuple[Path, str]:
    """Return the local folder of a hub id, fetched if it is not in the cache, and the commit it resolved to.

    Args:
        location: `org/name`, or with a branch, tag or commit `org/name@revision`.
        nearest_path: what a local path of that form could have meant, for the error.

    Returns:
        The snapshot's folder, and the 40-digit commit.

    Raises:
        SuperposeError: it is not in the cache and cannot be fetched.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    repository, _, revision = location.partition("@")
    options = {"repo_id": repository, "revision": revision or None}
    try:
        folder = Path(snapshot_download(**options, allow_patterns=SAFE_PATTERNS))
        if not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(**options, allow_patterns=PICKLE_PATTERNS))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise SuperposeError(
            f"no local path, and not to be had from the hub: {str(error).strip().splitlines()[0]}",
            where=location,
            mend="; ".join(filter(None, ["check the name, the revision and the network", nearest_path])),
        ) from error
    return folder, folder.name
