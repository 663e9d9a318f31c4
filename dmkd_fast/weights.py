"""Files of tensors and their configs: safetensors and JSON only, nothing is ever unpickled.

Stands on floor 1.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

WEIGHTS, CONFIG = "model.safetensors", "config.json"
NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


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


def file_parts(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file, piece by piece and without a copy of them.

    safetensors' own `save` copies everything twice while no other Python thread can run, which
    would stop a training loop beside it.

    Args:
        tensors: Contiguous, on the CPU.

    Source: https://github.com/huggingface/safetensors, "Format".
    """
    # The widest first, so that every tensor is aligned in the file.
    names = sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)
    header: dict[str, Any] = {}
    place = 0
    for name in names:
        value, start = tensors[name], place
        if value.dtype not in NAMES:
            raise TypeError(
                f"{name}: got {value.dtype}, expected one of {', '.join(map(str, NAMES))}; keep it "
                "in another dtype"
            )
        place += value.numel() * value.dtype.itemsize
        header[name] = {
            "dtype": NAMES[value.dtype], "shape": list(value.shape), "data_offsets": [start, place],
        }  # fmt: skip
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in names:
        if tensors[name].numel():
            yield tensors[name].reshape(-1).view(torch.uint8).numpy().data


def read_licence(folder: Path) -> str:
    """The licence that a folder's model card states in its header, or "unknown"."""
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    header = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    found = header and re.search(r"^licen[sc]e:\s*[\"']?([\w.+-]+)", header[1], re.MULTILINE)
    return found[1] if found else "unknown"
