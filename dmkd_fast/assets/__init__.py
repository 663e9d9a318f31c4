"""The data and weights that ship with the package, each checked against `manifest.json` on load.

Stands on floor 0. Every file is listed with its SHA-256; every folder with its licence and source.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent
PREFIX = "embedded:"


def resolve(path: str) -> Path:
    """Turn `embedded:NAME` into a checked folder of the package; other paths are returned as given.

    Raises:
        ValueError: There is no such asset, or a file of it differs from the manifest.
    """
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
