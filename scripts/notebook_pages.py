"""A hook of MkDocs: show a notebook in place of `<!-- notebook: NAME -->` on a page."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent.parent / "docs" / "notebooks"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Return the page with its notebook's cells."""
    return re.sub(r"<!-- notebook: (\w+) -->", lambda match: _cells(match[1]), markdown)


def _cells(name: str) -> str:
    notebook = json.loads((FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))
    parts = []
    for cell in notebook["cells"]:
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
    return "\n\n".join(parts)
