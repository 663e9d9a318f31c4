"""Find and read the weight files of a folder in diffusers format; explain wrong paths."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from dmkd_fast.runtime.errors import UserError, invalid, one_line
from dmkd_fast.runtime.model_files import CONFIG, PICKLES, check_plain, read_json

STEM = "diffusion_pytorch_model"
# What a clone without Git LFS has in place of a large file.
POINTER = b"version https://git-lfs.github.com"


def check_is_pipeline(folder: Path) -> None:
    """Check that `folder` is a diffusers pipeline.

    Raises:
        UserError: It is not one; the message says what was found and what to do.
    """
    expected = "a folder in diffusers format (scheduler/ and transformer/ or unet/)"
    if folder.is_file():
        raise invalid(
            f"{folder}",
            "a file",
            expected,
            "give its folder, or rewrite a single-file checkpoint with dmkd import denoiser",
        )
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder, expected {expected}; check denoiser.path")
    if any((folder / name).is_dir() for name in ("scheduler", "transformer", "unet")):
        return
    config = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    got, fix = "neither transformer/ nor unet/", "use another model"
    if "_class_name" in config:
        got = f"one part of a model ({config['_class_name']!s:.60})"
        fix = "give the folder above it"
    elif "architectures" in config or "architecture" in config:
        got = "the folder of a transformers or timm model"
        fix = "use a diffusion model as denoiser.path"
    raise invalid(f"{folder}", got, expected, fix)


def weight_files(folder: Path, stem: str = STEM) -> tuple[list[Path], str | None]:
    """Find the weight files of one part of a model.

    Full precision is preferred to float16, and a single file to shards of the same precision.

    Args:
        folder: Folder of the part.
        stem: Name of a single file without its suffix, by the library that wrote it.

    Returns:
        The files, and diffusers' name for their variant: `fp16`, or None for full precision.

    Raises:
        UserError: There is no safetensors file, a shard is missing, or the part names code or
            files elsewhere.
    """
    check_plain(folder)
    if found := find_files(folder, stem, ".safetensors"):
        return found
    pickles = sorted(p.name for p in folder.glob("*") if p.suffix in PICKLES)
    if pickles:
        raise UserError(
            f"{folder}: got no .safetensors file but {pickles[0]}, a pickle, which can run code "
            "when read; fetch the weights as safetensors, or rewrite them: dmkd import denoiser "
            "SOURCE OUT"
        )
    others = sorted(p.name for p in folder.glob("*.safetensors"))
    got = f"only {others[0]}" if others else "no .safetensors file"
    raise UserError(f"{folder}: no such file: {stem}.safetensors; got {got}; fetch the model again")


def find_files(folder: Path, stem: str, suffix: str) -> tuple[list[Path], str | None] | None:
    """Find weight files by the naming of diffusers and transformers, or return None.

    Args:
        folder: Folder of one part of a model.
        stem: Name of a single file without its suffix.
        suffix: `.safetensors` or `.bin`.

    Returns:
        The files and their variant, as in `weight_files`.

    Raises:
        UserError: A shard is missing, or the index names files elsewhere.
    """
    for variant in (None, "fp16"):
        infix = "" if variant is None else f".{variant}"
        single = folder / f"{stem}{infix}{suffix}"
        if single.is_file():
            return [single], variant
        index = folder / f"{stem}{suffix}.index{infix}.json"
        if index.is_file():
            return _shards(index, suffix), variant
    return None


def load_strictly(model: nn.Module, files: list[Path]) -> None:
    """Load weights from safetensors files that together fit `model` exactly.

    Raises:
        UserError: A file is damaged, a name or shape differs from the model's, or weights are
            quantized.
    """
    expected = model.state_dict()
    weights = read_weights(files, {name: tuple(value.shape) for name, value in expected.items()})
    model.load_state_dict({name: value.to(expected[name].dtype) for name, value in weights.items()})


def read_weights(files: list[Path], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Read safetensors files that together hold exactly the given weights, as float32.

    Args:
        files: Weight files.
        shapes: Shape of each weight by its name.

    Raises:
        UserError: A file is damaged, a name or shape differs, or weights are quantized.
    """
    weights: dict[str, Tensor] = {}
    for path in files:
        try:
            weights |= load_file(path)
        except (SafetensorError, OSError) as error:
            raise _damaged(path, error) from None
    for name in sorted(shapes.keys() | weights.keys()):
        got = tuple(weights[name].shape) if name in weights else "nothing"
        want = tuple(shapes[name]) if name in shapes else "nothing"
        if got != want:
            fix = "use the file of this architecture and class count"
            raise invalid(f"weights {files[0]}: {name}", got, str(want), fix)
        if not weights[name].is_floating_point():
            dtype, fix = weights[name].dtype, "fetch weights that are not quantized"
            raise invalid(f"weights {files[0]}: {name}", dtype, "floating-point numbers", fix)
    return {name: value.float() for name, value in weights.items()}


def num_stored(files: list[Path]) -> int:
    """Count the numbers in safetensors files, by reading only the headers.

    Raises:
        UserError: A file is damaged, or weights are quantized.
    """
    total = 0
    for path in files:
        try:
            with safe_open(path, "pt") as file:
                slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
                kinds = {name: part.get_dtype() for name, part in slices.items()}
                total += sum(math.prod(part.get_shape()) for part in slices.values())
        except (SafetensorError, OSError) as error:
            raise _damaged(path, error) from None
        for name, kind in kinds.items():
            # transformers stores the numbers of positions.
            if not kind.startswith(("F", "BF")) and not name.endswith("position_ids"):
                fix = "fetch weights that are not quantized"
                raise invalid(f"weights {path}: {name}", kind, "floating-point numbers", fix)
    return total


@contextmanager
def quietly(logging: Any) -> Iterator[None]:
    """Use diffusers or transformers without its log lines and progress bars.

    Reports on a damaged folder would stand beside our error of one line.

    Args:
        logging: `utils.logging` of the library.
    """
    level, shows_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shows_bars:
            logging.enable_progress_bar()


def _shards(index: Path, suffix: str) -> list[Path]:
    """Return the files that an index names; all must be in the folder of the index."""
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(n, str) for n in names.values()):
        raise UserError(f"{index}: weight_map: got no names of files; fetch the model again")
    files = [index.parent / name for name in sorted(set(names.values()))]
    for path in files:
        if path.parent != index.parent or path.suffix != suffix:
            got = f"{path.name!r:.60} outside of its folder or not {suffix.removeprefix('.')}"
            raise invalid(f"{index}: weight_map", got, "files beside it", "fetch the model again")
        if not path.is_file():
            raise UserError(f"{path}: no such file, but {index.name} names it; fetch it again")
    if not files:
        raise UserError(f"{index}: weight_map: got no file; fetch the model again")
    return files


def _damaged(path: Path, error: Exception) -> UserError:
    with contextlib.suppress(OSError), path.open("rb") as file:
        if file.read(len(POINTER)) == POINTER:
            got, fix = "a pointer of Git LFS", "run git lfs pull, or fetch it with hf download"
            return invalid(f"weights {path}", got, "the weights", fix)
    return UserError(f"weights {path}: damaged ({one_line(error)}); fetch or save them again")
