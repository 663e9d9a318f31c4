"""Build networks of diffusers from safetensors files, after a check of their configs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dmkd_fast.denoisers.config_values import check_values
from dmkd_fast.denoisers.model_folders import STEM, num_stored, quietly, weight_files
from dmkd_fast.denoisers.wrappers import import_diffusers
from dmkd_fast.runtime.errors import UserError, invalid, one_line
from dmkd_fast.runtime.model_files import CONFIG, read_json


def check_config(
    model_class: Any,
    path: Path,
    config: dict[str, Any],
    files: list[Path],
    trial: Callable[[Any], object],
) -> None:
    """Build and call a network on the meta device, without memory or arithmetic.

    Args:
        model_class: Network class of diffusers.
        path: Path of the config, for messages.
        config: Content of the config.
        files: Weight files; they must hold at least half as many numbers as the network has.
        trial: Function that calls the network once with inputs of its own.

    Raises:
        UserError: The config does not fit the class or the files, or the trial call fails.
    """
    check_values(path, config, model_class)
    try:
        with torch.device("meta"), quietly(import_diffusers().utils.logging):
            described = model_class.from_config(config).eval()
    except Exception as error:  # diffusers checks little, so errors of many kinds can occur
        raise UserError(f"{path}: {one_line(error)}; fetch it again") from None
    wanted = sum(p.numel() for p in described.parameters())
    stored = num_stored(files)
    if wanted > 2 * stored:
        got = f"a config of {wanted:,} weights, but {files[0].name} holds {stored:,}"
        raise invalid(f"{path}", got, "as many", "use the file of this architecture")
    try:
        with torch.device("meta"), torch.no_grad():
            trial(described)
    except Exception as error:
        raise UserError(f"{path}: a trial call failed: {one_line(error)}; fetch it again") from None


def load_network(
    name: str, folder: Path, trial: Callable[[Any], object], dtype: torch.dtype = torch.float32
) -> Any:
    """Load a network of diffusers from safetensors files that fit it exactly.

    Args:
        name: Name of its class.
        folder: Folder with config.json and the weights.
        trial: Function that calls the network once, as in `check_config`.
        dtype: Dtype of the weights.

    Raises:
        UserError: A file is missing or damaged, or does not fit the config.
    """
    files, variant = weight_files(folder)
    infix = f".{variant}" if variant else ""
    index = folder / f"{STEM}.safetensors.index{infix}.json"
    if index.is_file() and files[0].name == f"{STEM}{infix}.safetensors":
        # diffusers would read the shards of the index, which have not been checked.
        got, fix = f"{files[0].name} beside {index.name}", "remove the one that is older"
        raise invalid(f"{folder}", got, "one of the two", fix)
    model_class = getattr(import_diffusers(), name)
    check_config(model_class, folder / CONFIG, read_json(folder / CONFIG), files, trial)
    try:
        with quietly(import_diffusers().utils.logging):
            model, info = model_class.from_pretrained(
                folder,
                use_safetensors=True,
                local_files_only=True,
                low_cpu_mem_usage=False,
                output_loading_info=True,
                variant=variant,
                torch_dtype=dtype,
            )
    except Exception as error:  # diffusers and safetensors raise many kinds of errors
        raise UserError(f"{folder}: {one_line(error)}; fetch or save it again") from None
    problems = {key: info[key] for key in ("missing_keys", "mismatched_keys", "unexpected_keys")}
    for what, names in problems.items():
        if names:
            raise UserError(
                f"{folder}: {what.replace('_', ' ')} such as {sorted(map(str, names))[0]}; the "
                "file belongs to another architecture"
            )
    return model
