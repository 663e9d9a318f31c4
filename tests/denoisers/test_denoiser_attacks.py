"""Diffusion models from strangers: nothing that a folder names is run or read elsewhere."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from small_models import class_unet_folder, dit_folder
from text_models import stable_diffusion

from dmkd_fast.denoisers.loading import load_denoiser
from dmkd_fast.runtime.errors import UserError
from dmkd_fast.runtime.model_files import RUNS_CODE

CPU = torch.device("cpu")


def canary(folder: Path) -> dict[str, Any]:
    """Code and a pickle in the folder that would make `folder/canary`."""
    (folder / "evil.py").write_text(f"import os\nos.mkdir({str(folder / 'canary')!r})\n")

    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(folder / "canary"),)

    (folder / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    return {
        "AutoModel": "evil.Model",
        "AutoConfig": "evil.Config",
        "AutoTokenizer": ["evil.T", None],
    }


def edit(path: Path, **changes: Any) -> None:
    values = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(values | changes))


def parts(folder: Path) -> dict[str, tuple[Path, Callable[[], object]]]:
    """Every part of every family that is loaded, with the call that loads it."""
    dit = dit_folder(folder / "dit")
    unet = class_unet_folder(folder / "unet", diffusers.DDPMScheduler())
    stable_diffusion(folder / "sd", diffusers.DDIMScheduler())
    loaders = {
        "dit": lambda: load_denoiser(dit, CPU),
        "unet": lambda: load_denoiser(unet, CPU),
        "sd": lambda: load_denoiser(folder / "sd", CPU, prompts=["a"]),
    }
    places = (
        "dit/transformer",
        "dit/vae",
        "unet/unet",
        "sd/unet",
        "sd/vae",
        "sd/text_encoder",
        "sd/tokenizer",
    )
    return {place: (folder / place, loaders[place.split("/")[0]]) for place in places}


def refused(load: Callable[[], object], word: str) -> None:
    with pytest.raises(UserError) as error:
        load()
    assert type(error.value) is UserError, error
    assert word in str(error.value) and "\n" not in str(error.value), error


# Stable Diffusion's UNet is built before its other parts are read, which takes half a minute.
@pytest.mark.parametrize("family", ["dit", "unet", pytest.param("sd", marks=pytest.mark.slow)])
def test_parts_that_name_code_or_other_files_are_refused(family: str, tmp_path: Path) -> None:
    for place, (folder, load) in parts(tmp_path).items():
        if not place.startswith(family):
            continue
        config = folder / ("tokenizer_config.json" if "tokenizer" in place else "config.json")
        code, before = canary(folder), config.read_text()
        for key in RUNS_CODE:
            edit(config, **{key: code if key == "auto_map" else "evil"})
            refused(load, key)
            config.write_text(before)
        for name in ("../../secret.safetensors", "/etc/passwd", "..", 3, None):
            index = folder / "diffusion_pytorch_model.safetensors.index.json"
            index.write_text(json.dumps({"metadata": {}, "weight_map": {"a": name}}))
            if name is not None:
                refused(load, "file name")
            index.unlink()
        for key in ("vocab_file", "merges_file", "tokenizer_file"):
            edit(config, **{key: "/etc/passwd"})
            refused(load, "'/etc/passwd'")
            config.write_text(before)
        edit(folder / "adapter_config.json", base_model_name_or_path="evil/model")
        refused(load, "adapter_config.json")
        (folder / "adapter_config.json").unlink()
        load()  # The folder is whole again, and the pickle beside the weights is not read.
        assert not (folder / "canary").exists()


@pytest.mark.parametrize("name", ["os.system", "FluxPipeline", "DiffusionPipeline", 3, None, ["x"]])
def test_other_classes_are_refused(name: Any, tmp_path: Path) -> None:
    for place, (folder, load) in parts(tmp_path).items():
        if place.split("/")[1] in ("transformer", "vae", "unet"):
            before = (folder / "config.json").read_text()
            edit(folder / "config.json", _class_name=name)
            refused(load, "_class_name")
            (folder / "config.json").write_text(before)
