"""Read and check a folder in diffusers format: weight files, config values, wrong paths."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from dmkd_fast.runtime import checks
from dmkd_fast.runtime.errors import UserError
from dmkd_fast.runtime.model_files import CONFIG, read_json

STEM = "diffusion_pytorch_model"
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
MOST_LAYERS = 256


def check_is_pipeline(folder: Path) -> None:
    """Check that `folder` is a diffusers pipeline.

    Raises:
        UserError: It is not one; the message says what was found and what to do.
    """
    expected = "expected a folder in diffusers format (scheduler/ and transformer/ or unet/)"
    if folder.is_file():
        raise UserError(
            f"{folder}: got a file, {expected}; give its folder, or convert a single-file "
            "checkpoint with diffusers' from_single_file(FILE).save_pretrained(FOLDER)"
        )
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder, {expected}; check denoiser.path")
    if any((folder / name).is_dir() for name in ("scheduler", "transformer", "unet")):
        return
    config = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    if "_class_name" in config:
        raise UserError(
            f"{folder}: got one part of a model ({config['_class_name']!s:.60}), {expected}; "
            "give the folder above it"
        )
    if "architectures" in config or "architecture" in config:
        raise UserError(
            f"{folder}: got the folder of a transformers or timm model, {expected}; use a "
            "diffusion model as denoiser.path"
        )
    raise UserError(f"{folder}: got neither transformer/ nor unet/, {expected}; use another model")


def weight_files(folder: Path) -> tuple[list[Path], str | None]:
    """Find the weight files of one part of a model.

    Full precision is preferred to float16, and a single file to shards of the same precision.

    Returns:
        The files, and diffusers' name for their variant: `fp16`, or None for full precision.

    Raises:
        UserError: There is no safetensors file, or a shard is missing.
    """
    for variant in (None, "fp16"):
        infix = "" if variant is None else f".{variant}"
        single = folder / f"{STEM}{infix}.safetensors"
        if single.is_file():
            return [single], variant
        index = folder / f"{STEM}.safetensors.index{infix}.json"
        if index.is_file():
            return _shards(index), variant
    pickles = sorted(p.name for p in folder.glob("*") if p.suffix in PICKLES)
    if pickles:
        raise UserError(
            f"{folder}: got no .safetensors file but {pickles[0]}, a pickle, which can run code "
            "when read; fetch the weights as safetensors, or convert them where that is safe: "
            "load the pipeline with diffusers and call save_pretrained(FOLDER)"
        )
    others = sorted(p.name for p in folder.glob("*.safetensors"))
    found = f"only {others[0]}" if others else "no .safetensors file"
    raise UserError(
        f"{folder}: no such file: {STEM}.safetensors; got {found}; fetch the model again"
    )


def load_strictly(model: nn.Module, files: list[Path]) -> None:
    """Load weights from safetensors files that together fit `model` exactly.

    Raises:
        UserError: A file is damaged, a name or shape differs from the model's, or weights are
            quantized.
    """
    weights: dict[str, Tensor] = {}
    for path in files:
        try:
            weights |= load_file(path)
        except (SafetensorError, OSError) as error:
            raise _damaged(path, error) from None
    expected = model.state_dict()
    for name in sorted(expected.keys() | weights.keys()):
        got = tuple(weights[name].shape) if name in weights else "nothing"
        want = tuple(expected[name].shape) if name in expected else "nothing"
        if got != want:
            raise UserError(
                f"weights {files[0]}: {name}: got {got}, expected {want}; the file belongs to "
                "another architecture or class count"
            )
        if not weights[name].is_floating_point():
            raise UserError(
                f"weights {files[0]}: {name}: got {weights[name].dtype}, expected floating-point "
                "numbers; fetch weights that are not quantized"
            )
    model.load_state_dict({name: value.to(expected[name].dtype) for name, value in weights.items()})


def num_stored(files: list[Path]) -> int:
    """Count the numbers in safetensors files, by reading only the headers.

    Raises:
        UserError: A file is damaged.
    """
    total = 0
    for path in files:
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118
                    size = 1
                    for side in file.get_slice(name).get_shape():
                        size *= side
                    total += size
        except (SafetensorError, OSError) as error:
            raise _damaged(path, error) from None
    return total


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
    defaults = {
        key: parameter.default
        for key, parameter in inspect.signature(model_class.__init__).parameters.items()
    }
    for key, value in config.items():
        default = defaults.get(key)
        if not _is_like(value, default):
            raise UserError(
                f"{path}: {key}: got {value!r:.60}, expected something like {default!r:.60}; fetch "
                "the model again"
            )
        numbers = value if isinstance(value, list) else [value]
        for number in numbers:
            if isinstance(number, int) and ("layers" in key or "blocks" in key):
                whole(path, {key: number}, key, low=0, high=MOST_LAYERS)


def whole(
    path: Path, config: Mapping[str, Any], key: str, *, low: int = 1, high: int = 65_536
) -> int:
    """Read an integer in [low, high] from a config.

    Raises:
        UserError: The value is missing, has another type or is out of range.
    """
    try:
        return checks.whole(f"{path}: {key}", config.get(key), low=low, high=high)
    except TypeError as error:
        raise UserError(str(error)) from None


def number(path: Path, config: Mapping[str, Any], key: str, default: float) -> float:
    """Read a finite number from a config; `default` replaces a missing value or null.

    Raises:
        UserError: The value has another type or is not finite.
    """
    value = config.get(key)
    try:
        return checks.number(f"{path}: {key}", default if value is None else value)
    except TypeError as error:
        raise UserError(str(error)) from None


def sides(path: Path, config: Mapping[str, Any], key: str) -> tuple[int, int]:
    """Read height and width from a config that has one number or a list of two.

    Raises:
        UserError: The value is something else, or a side is not an integer from 1 to 2048.
    """
    value = config.get(key)
    both = list(value) if isinstance(value, list | tuple) else [value, value]
    if len(both) != 2:
        raise UserError(f"{path}: {key}: got {len(both)} numbers, expected one or two")
    height, width = (whole(path, {key: side}, key, high=2048) for side in both)
    return height, width


def one_line(error: Exception) -> str:
    """Return an error's message on one line, cut to 300 characters."""
    return " ".join(str(error).split())[:300] or type(error).__name__


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


def _shards(index: Path) -> list[Path]:
    """Return the files that an index names; all must be in the folder of the index."""
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(n, str) for n in names.values()):
        raise UserError(f"{index}: weight_map: got no names of files; fetch the model again")
    files = [index.parent / name for name in sorted(set(names.values()))]
    for path in files:
        if path.parent != index.parent or path.suffix != ".safetensors":
            raise UserError(
                f"{index}: weight_map: got {path.name!r:.60} outside of its folder or not "
                "safetensors, expected files beside it; fetch the model again"
            )
        if not path.is_file():
            raise UserError(f"{path}: no such file, but {index.name} names it; fetch it again")
    if not files:
        raise UserError(f"{index}: weight_map: got no file; fetch the model again")
    return files


def _damaged(path: Path, error: Exception) -> ValueError:
    text = " ".join(str(error).split())[:200]
    return ValueError(f"weights {path}: damaged ({text}); fetch or save them again")
