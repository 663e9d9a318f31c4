"""Rewrite a diffusion model into a folder that is safe to load: `dmkd import denoiser`.

Folders in diffusers format with pickled weights are read, whole or sharded, and single files in
the layout of Stable Diffusion's own code. Pickles are read with `torch.load(weights_only=True)`,
which accepts tensors and plain containers, and runs no code. No number changes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from dmkd_fast import assets
from dmkd_fast.data.listing import CLASS_NAMES
from dmkd_fast.denoisers.loading import load_denoiser
from dmkd_fast.denoisers.model_folders import STEM, check_is_pipeline, find_files
from dmkd_fast.denoisers.single_file import split_single_file
from dmkd_fast.jobs.exchange.checkpoints import find_weights, read_checkpoint
from dmkd_fast.jobs.exchange.folders import check_new, new_network
from dmkd_fast.runtime.errors import UserError, invalid
from dmkd_fast.runtime.model_files import CONFIG, PICKLES, WEIGHTS, check_plain, read_json

# Parts with weights, by the names of their files: pickled, and as safetensors.
_NETWORKS = dict.fromkeys(("transformer", "unet", "vae"), (STEM, f"{STEM}.safetensors"))
_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
_NETWORKS |= dict.fromkeys(_ENCODERS, ("pytorch_model", WEIGHTS))
_PARTS = (*_NETWORKS, "scheduler", "tokenizer", "tokenizer_2", "tokenizer_3")
_INDEX, _SCHEDULER = "model_index.json", "scheduler_config.json"
_TEXTS = (".json", ".txt", ".model")


def import_denoiser(
    source: str | Path,
    out: str | Path,
    *,
    config: str | Path | None = None,
    vae: str | Path | None = None,
    scheduler: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Rewrite a diffusion model, and load the result once.

    Args:
        source: Folder in diffusers format, `hf-hub:OWNER/NAME@COMMIT`, or a single file of Stable
            Diffusion.
        out: Folder to create.
        config: Folder in diffusers format with the configs and the tokenizer of a single file; a
            Hub repository as in `source`.
        vae: Folder of another autoencoder to put in, or a Hub repository as in `source`.
        scheduler: Values to set in `scheduler_config.json`.

    Returns:
        path, pickles (number of rewritten files), num_classes (None for text to image),
        image_shape, license.

    Raises:
        UserError: A file cannot be read safely, the model cannot be loaded, or `out` exists.
    """
    target = Path(out)
    check_new(target, "OUT")
    given = Path(source)
    if given.is_file() and config is None:
        got, fix = "none for a single file", "add --config FOLDER"
        raise invalid("--config", got, "a folder with the configs of this model", fix)
    if not given.is_file() and config is not None:
        raise invalid("--config", f"it for {source}", "it for a single file only", "remove it")
    folder = given if given.is_file() else _folder(source)
    configs = folder if config is None else _folder(config)
    check_is_pipeline(configs)
    with new_network(target, source) as partial:
        count = _write(folder, configs, partial)
        if vae is not None:
            shutil.rmtree(partial / "vae", ignore_errors=True)
            count += _rewrite(_folder(vae), partial / "vae", *_NETWORKS["vae"])
        _write_scheduler(partial / "scheduler" / _SCHEDULER, scheduler or {})
        _write_index(configs / _INDEX, partial)
        facts = _loaded(partial)
    return {"path": str(target), "pickles": count, **facts}


def _folder(name: str | Path) -> Path:
    """Return the folder that a path or a Hub repository at a commit means."""
    path, revision = assets.split_commit(str(name))
    folder = assets.resolve(path, revision, pickles=True)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; check the path")
    return folder


def _write(source: Path, configs: Path, out: Path) -> int:
    """Write all parts of a model but the scheduler's changes; return the number of pickles."""
    count = 0
    for name in ("README.md", CLASS_NAMES):
        if (configs / name).is_file():
            shutil.copyfile(configs / name, out / name)
    for part in _PARTS:
        if not (configs / part).is_dir():
            continue
        if part in _NETWORKS and source == configs:
            count += _rewrite(configs / part, out / part, *_NETWORKS[part])
        else:
            _copy_texts(configs / part, out / part)
    if source != configs:
        count = int(source.suffix in PICKLES)
        parts = split_single_file(find_weights(source, read_checkpoint(source))[1], configs)
        for part, weights in parts.items():
            _save(weights, out / part / _NETWORKS[part][1])
    return count


def _copy_texts(folder: Path, out: Path) -> None:
    """Copy configs and vocabularies, without indexes of weights."""
    check_plain(folder)
    out.mkdir()
    for path in folder.iterdir():
        if path.suffix in _TEXTS and path.is_file() and ".index." not in path.name:
            shutil.copyfile(path, out / path.name)


def _rewrite(folder: Path, out: Path, stem: str, name: str) -> int:
    """Write the weights of one part as one safetensors file; return the number of pickles read."""
    _copy_texts(folder, out)
    pickles = sorted(path for path in folder.iterdir() if path.suffix in PICKLES)
    found = find_files(folder, Path(name).stem, ".safetensors") or find_files(folder, stem, ".bin")
    if found is None and len(pickles) == 1:
        found = pickles, None
    if found is None:
        got = f"{len(pickles)} pickles: {', '.join(p.name for p in pickles[:5])}" * bool(pickles)
        raise invalid(folder, got or "no weights", f"{name} or {stem}.bin", "fetch the model again")
    weights: dict[str, Tensor] = {}
    for path in found[0]:
        weights |= find_weights(path, read_checkpoint(path))[1]
    _save(weights, out / name)
    return sum(path.suffix != ".safetensors" for path in found[0])


def _save(weights: dict[str, Tensor], path: Path) -> None:
    """Write weights as safetensors; those that share memory are copied first."""
    if not path.parent.is_dir():
        raise invalid(path.parent.name, "no such folder beside the configs", "its config there")
    seen: set[int] = set()
    result = {}
    for name, value in weights.items():
        storage = value.untyped_storage()
        is_whole = storage.nbytes() == value.nbytes and value.is_contiguous()
        shared = storage.data_ptr() in seen or not is_whole
        seen.add(storage.data_ptr())
        result[name] = value.clone(memory_format=torch.contiguous_format) if shared else value
    save_file(result, path, metadata={"format": "pt"})


def _write_scheduler(path: Path, changes: Mapping[str, Any]) -> None:
    if changes:
        values = {**read_json(path), **changes}
        path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _write_index(path: Path, out: Path) -> None:
    """Write diffusers' own table of parts, without parts that are not kept."""
    if not path.is_file():
        return
    values = read_json(path)
    for part, value in values.items():
        if isinstance(value, list) and not (out / part).is_dir():
            values[part] = [None, None]
    for part, name in (("vae", CONFIG), ("scheduler", _SCHEDULER)):
        if (out / part).is_dir():
            values[part] = ["diffusers", read_json(out / part / name).get("_class_name")]
    if "requires_safety_checker" in values:
        values["requires_safety_checker"] = False
    (out / _INDEX).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _loaded(folder: Path) -> dict[str, Any]:
    """Load the written model, and return what a job has to know."""
    is_text = (folder / "text_encoder").is_dir()
    denoiser = load_denoiser(folder, torch.device("cpu"), prompts=["a"] if is_text else None)
    return {
        "num_classes": None if is_text else denoiser.num_classes,
        "image_shape": list(denoiser.image_shape),
        "license": denoiser.license,
    }
