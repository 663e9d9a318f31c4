"""Reading of weights and their configs: safetensors and JSON only, nothing is ever unpickled.

Stands on floor 1.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

WEIGHTS, CONFIG = "model.safetensors", "config.json"


def load_weights(model: nn.Module, path: Path) -> None:
    """Fill `model` from a safetensors file, strictly.

    Raises:
        ValueError: The file is missing, damaged, or its names or shapes differ from the model's.
    """
    if not path.is_file():
        raise ValueError(f"weights {path}: no such file; check the model's folder")
    try:
        weights = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"weights {path}: damaged ({error}); fetch or save them again") from None
    expected = model.state_dict()
    for name in expected.keys() | weights.keys():
        got = tuple(weights[name].shape) if name in weights else "nothing"
        want = tuple(expected[name].shape) if name in expected else "nothing"
        if got != want:
            raise ValueError(
                f"weights {path}: {name}: got {got}, expected {want}; "
                "the file belongs to another architecture or class count"
            )
    model.load_state_dict({name: value.to(expected[name].dtype) for name, value in weights.items()})


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; what is wrong with it becomes a ValueError."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}; check the model's folder") from None
    except ValueError:
        raise ValueError(f"{path}: not valid JSON; fetch or save the model again") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: got a JSON {type(values).__name__}, expected an object")
    return values


def read_licence(folder: Path) -> str:
    """The licence that a folder's model card states in its header, or "unknown"."""
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    header = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    found = header and re.search(r"^licen[sc]e:\s*[\"']?([\w.+-]+)", header[1], re.MULTILINE)
    return found[1] if found else "unknown"
