"""Read PyTorch checkpoints from elsewhere without running any code in them.

A checkpoint is a pickle. It is read with `torch.load(weights_only=True)`, which accepts tensors,
numbers and plain containers only.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dmkd_fast.runtime.errors import UserError, invalid, one_line

# Where checkpoints keep their weights, in the order of preference; averaged weights come first.
_NESTS = (
    *("state_dict_ema", "model_ema", "ema_state_dict", "state_dict", "model_state_dict"),
    *("model", "net", "network", "module", "weights", "params"),
)


def read_checkpoint(path: Path) -> Any:
    """Read a file of torch.save or safetensors without running any code.

    Raises:
        UserError: The file is missing or damaged, or holds more than tensors and plain containers.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; give a checkpoint")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # timm's train.py stores its arguments in a Namespace, which only holds values.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path}: damaged ({one_line(error, most=200)}); fetch or save it again"
        ) from None
    except Exception as error:  # torch.load raises many kinds of errors for what it does not read.
        raise UserError(
            f"{path}: cannot be read with weights_only, which accepts tensors and plain containers "
            f"and runs no code ({one_line(error, most=200)}); save it where it was made with "
            "torch.save(model.state_dict(), FILE)"
        ) from None


def find_weights(path: Path, content: Any) -> tuple[str, dict[str, Tensor]]:
    """Find the state dictionary in a checkpoint.

    Returns:
        Keys that lead to it, joined by dots, and the tensors by name.

    Raises:
        UserError: There is none.
    """
    if isinstance(content, Mapping):
        for key in _NESTS:
            inner = content.get(key)
            if isinstance(inner, Mapping) and inner:
                place, weights = find_weights(path, inner)
                return f"{key}.{place}" if place else key, weights
        weights = {str(k): v for k, v in content.items() if isinstance(v, Tensor)}
        if weights:
            return "", weights
    shown = f"keys {', '.join(map(str, content))}"[:200] if isinstance(content, Mapping) else ""
    raise invalid(
        path,
        shown or f"a {type(content).__name__}",
        f"tensors by name, at the top or below one of {', '.join(_NESTS)}",
        "save it with torch.save(model.state_dict(), FILE)",
    )
