"""From the path of a setting to a folder: on disk, shipped with the package, or on the Hub.

What ships is listed in `manifest.json`: every file with its SHA-256, which is
checked on load, every folder with its licence and source.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent
PREFIX, HUB = "embedded:", "hf-hub:"


def resolve(path: str, revision: str | None = None) -> Path:
    """The folder that a setting names.

    Args:
        path: `embedded:NAME` (checked), `hf-hub:OWNER/NAME` (fetched once, safetensors and
            configs only), or a path.
        revision: Commit of a Hub repository.

    Raises:
        ValueError: There is no such asset, a file of it differs from the manifest, or the Hub
            does not give it.
    """
    if path.startswith(HUB):
        return _fetch(path.removeprefix(HUB), revision)
    if not path.startswith(PREFIX):
        return Path(path)
    name = path.removeprefix(PREFIX)
    entries: dict[str, Any] = json.loads((ROOT / "manifest.json").read_text(encoding="utf-8"))
    if name not in entries:
        raise ValueError(f"{path}: no such asset, expected one of {', '.join(sorted(entries))}")
    for file, digest in entries[name]["sha256"].items():
        if file_sha256(ROOT / name / file) != digest:
            raise ValueError(f"{path}: {file} differs from the manifest; install the package again")
    return ROOT / name


def newest(repository: str) -> tuple[Path, str]:
    """The folder of a Hub repository as it is today, and its commit: 40 hexadecimal digits.

    Raises:
        ValueError: The Hub does not give it.
    """
    folder = _fetch(repository, None)
    return folder, folder.name  # the cache names snapshots by their commits


def licence(path: str) -> str | None:
    """The licence of an embedded asset; None for other paths."""
    if not path.startswith(PREFIX):
        return None
    entries: dict[str, Any] = json.loads((ROOT / "manifest.json").read_text(encoding="utf-8"))
    return str(entries[path.removeprefix(PREFIX)]["licence"])


def _fetch(repository: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        # A pickled checkpoint is never fetched; .txt and .model are tokenizers' vocabularies.
        patterns = ["*.safetensors", "*.json", "*.txt", "*.model", "README.md"]
        return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        which = revision or "its newest commit"
        raise ValueError(
            f"{HUB}{repository} at {which}: {reason}; check name, revision, network and log-in"
        ) from None


def write_manifest(entries: dict[str, dict[str, str]]) -> None:
    """Write manifest.json: for each folder its licence and source, with all files' hashes."""
    full = {}
    for name, facts in sorted(entries.items()):
        files = sorted(p for p in (ROOT / name).rglob("*") if p.is_file())
        hashes = {str(p.relative_to(ROOT / name)): file_sha256(p) for p in files}
        full[name] = {**facts, "sha256": hashes}
    text = json.dumps(full, indent=2) + "\n"
    (ROOT / "manifest.json").write_text(text, encoding="utf-8")


def file_sha256(path: Path) -> str:
    """Hex digest of a file; an absent file has the empty digest."""
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
