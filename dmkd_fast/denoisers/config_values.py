"""Read values of a model's config files, of the right type and in a sensible range."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dmkd_fast.runtime import checks
from dmkd_fast.runtime.errors import UserError, invalid

MOST_LAYERS = 256


def whole(
    where: Path | str,
    config: Mapping[str, Any],
    key: str,
    default: int | None = None,
    *,
    low: int = 1,
    high: int = 65_536,
) -> int:
    """Read an integer in [low, high] from a config.

    Args:
        where: Path or name of the config, for messages.
        config: Content of the config.
        key: Key to read.
        default: Value of a key that is not there; None means that the key is required.
        low, high: Smallest and largest accepted value.

    Raises:
        UserError: The value is missing, has another type or is out of range.
    """
    try:
        return checks.whole(f"{where}: {key}", config.get(key, default), low=low, high=high)
    except TypeError as error:
        raise UserError(str(error)) from None


def number(
    where: Path | str,
    config: Mapping[str, Any],
    key: str,
    default: float | None = None,
    *,
    low: float = -math.inf,
    high: float = math.inf,
) -> float:
    """Read a finite number in [low, high] from a config; the arguments are those of `whole`.

    Raises:
        UserError: The value is missing, has another type or is out of range.
    """
    try:
        return checks.number(f"{where}: {key}", config.get(key, default), low=low, high=high)
    except TypeError as error:
        raise UserError(str(error)) from None


def sides(
    path: Path, config: Mapping[str, Any], key: str, default: int | None = None
) -> tuple[int, int]:
    """Read height and width from a config that has one number or a list of two.

    Raises:
        UserError: The value is something else, or a side is not an integer from 1 to 2048.
    """
    value = config.get(key, default)
    both = list(value) if isinstance(value, list | tuple) else [value, value]
    if len(both) != 2:
        raise invalid(f"{path}: {key}", f"{len(both)} numbers", "one or two")
    height, width = (whole(path, {key: side}, key, high=2048) for side in both)
    return height, width


def check_values(path: Path, config: Mapping[str, Any], model_class: Any) -> None:
    """Reject config values of a wrong type, and unreasonable numbers of layers.

    The type must be that of the network's default. diffusers checks neither: a string in place of a
    number fails only in the first forward pass, and 10**9 layers would be built one by one.

    Args:
        path: Path of the config, for messages.
        config: Content of the config.
        model_class: Class of diffusers whose parameters the config sets.

    Raises:
        UserError: A value is wrong; the message names its key.
    """
    parameters = inspect.signature(model_class.__init__).parameters
    for key, value in config.items():
        default = parameters[key].default if key in parameters else None
        # AutoencoderDC takes one name, or one for each of its levels.
        is_name = isinstance(default, str) and "tuple[str" in str(parameters[key].annotation)
        names = is_name and isinstance(value, list)
        if not all(_is_like(v, default) for v in (value if names else [value])):
            like = f"something like {default!r:.60}"
            raise invalid(f"{path}: {key}", f"{value!r:.60}", like, "fetch the model again")
        for count in value if isinstance(value, list) else [value]:
            if isinstance(count, int) and ("layers" in key or "blocks" in key):
                whole(path, {key: count}, key, low=0, high=MOST_LAYERS)


def _is_like(value: Any, default: Any) -> bool:
    """Return whether a value has the type of `default`; None allows any type."""
    if isinstance(default, bool):
        values = value if isinstance(value, list) else [value]
        return all(isinstance(v, bool) for v in values)
    if isinstance(default, int | float):
        if isinstance(value, list) and value:  # one number for each resolution level
            return all(_is_like(v, default) for v in value)
        if value is None:
            return isinstance(default, int)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return is_number and abs(value) < 2**31
    if isinstance(default, str):
        return value is None or isinstance(value, str)
    return not isinstance(default, tuple) or isinstance(value, list)
