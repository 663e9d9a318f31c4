"""Find the folder that a setting names: on disk, embedded in the package, or on the Hub.

`manifest.json` lists what the package embeds: every folder with its license and source, and every
file with its SHA-256, which is checked on load.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from dmkd_fast.runtime.errors import UserError, invalid, one_line

ROOT = Path(__file__).parent
PREFIX, HUB = "embedded:", "hf-hub:"


def resolve(path: str, revision: str | None = None, *, pickles: bool = False) -> Path:
    """Return the folder that a setting names, downloaded from the Hub if needed.

    Args:
        path: `embedded:NAME` (checked against the manifest), `hf-hub:OWNER/NAME` (downloaded once;
            safetensors, configs and vocabularies only), or the path of a folder.
        revision: Commit of a Hub repository.
        pickles: Whether to download pickled weights too, to rewrite them.

    Raises:
        UserError: There is no such asset, one of its files differs from the manifest, or the
            download failed.
    """
    if path.startswith(HUB):
        return _fetch(path.removeprefix(HUB), revision, pickles=pickles)
    if not path.startswith(PREFIX):
        return Path(path)
    name = path.removeprefix(PREFIX)
    entries = _entries()
    if name not in entries:
        raise UserError(f"{path}: no such asset, expected one of {', '.join(sorted(entries))}")
    for file, digest in entries[name]["sha256"].items():
        if file_sha256(ROOT / name / file) != digest:
            raise UserError(f"{path}: {file} differs from the manifest; install the package again")
    return ROOT / name


def _entries() -> dict[str, Any]:
    entries: dict[str, Any] = json.loads((ROOT / "manifest.json").read_text(encoding="utf-8"))
    return entries


def split_commit(name: str) -> tuple[str, str | None]:
    """Split `hf-hub:OWNER/NAME@COMMIT` into path and commit; other names have no commit.

    Raises:
        UserError: A Hub repository is named without a whole commit.
    """
    if not name.startswith(HUB):
        return name, None
    path, _, revision = name.partition("@")
    if len(revision) != 40 or set(revision) - set("0123456789abcdef"):
        expected = f"{path}@COMMIT with 40 hexadecimal digits, so that the weights never change"
        raise invalid(path, f"revision {revision!r}", expected)
    return path, revision


def newest(repository: str) -> tuple[Path, str]:
    """Return the folder of a Hub repository at its newest commit, and that commit.

    The commit has 40 hexadecimal digits.

    Raises:
        UserError: The download failed.
    """
    folder = _fetch(repository, None)
    return folder, folder.name  # The cache names snapshots by their commits.


def license(path: str) -> str | None:
    """Return the license of an embedded asset; None for other paths."""
    if not path.startswith(PREFIX):
        return None
    return str(_entries()[path.removeprefix(PREFIX)]["license"])


def _fetch(repository: str, revision: str | None, *, pickles: bool = False) -> Path:
    from huggingface_hub import snapshot_download

    try:
        # .txt and .model files hold the vocabularies of tokenizers.
        patterns = ["*.safetensors", "*.json", "*.txt", "*.model", "README.md"]
        patterns += ["*.bin"] * pickles
        return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns))
    except Exception as error:  # the client raises those of its HTTP library as well
        reason, which = one_line(error), revision or "its newest commit"
        raise UserError(
            f"{HUB}{repository} at {which}: {reason}; check name, revision, network and log-in"
        ) from None


def write_manifest(entries: dict[str, dict[str, str]]) -> None:
    """Write manifest.json: license and source of each folder, and the SHA-256 of its files.

    Args:
        entries: Values `license` and `source` of each folder, by its name below this package.
    """
    full = {}
    for name, facts in sorted(entries.items()):
        files = sorted(p for p in (ROOT / name).rglob("*") if p.is_file())
        hashes = {str(p.relative_to(ROOT / name)): file_sha256(p) for p in files}
        full[name] = {**facts, "sha256": hashes}
    text = json.dumps(full, indent=2) + "\n"
    (ROOT / "manifest.json").write_text(text, encoding="utf-8")


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal digits; empty if there is no file."""
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
