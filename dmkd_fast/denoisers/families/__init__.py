"""Families of denoisers, one file each.

A family is a function of a `ModelFolder` that returns a `Denoiser` without a decoder. It reads the
config, refuses what it cannot compute with a `UserError` of one line, loads the network with
`ModelFolder.load`, and wraps it in a module with the sampler's call, `module(latents, timesteps,
labels)`. Families of text-to-image models encode the prompts with `ModelFolder.encode` before the
network is loaded; their modules hold the embeddings in the buffers `prompts`, `pooled` and `mask`
with one row per prompt, and the empty prompt is the last row and the null class. No code of the
folder is ever run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dmkd_fast.denoisers.denoiser import Denoiser
from dmkd_fast.denoisers.families import (
    class_unet,
    dit,
    flux,
    gm_dit,
    pixart,
    sana,
    sd3,
    sdxl,
    sit,
    text_unet,
)
from dmkd_fast.denoisers.families.folder import ModelFolder
from dmkd_fast.runtime.errors import invalid


@dataclass(frozen=True)
class Family:
    """How the denoisers of one family are loaded."""

    load: Callable[[ModelFolder], Denoiser]
    pipelines: tuple[str, ...] = ()
    """First parts of the names of its pipelines in diffusers; none if any pipeline may be named."""
    takes_prompts: bool = False
    """Whether the family makes images from prompts."""


def _text(load: Callable[[ModelFolder], Denoiser], *pipelines: str) -> Family:
    return Family(load, pipelines, takes_prompts=True)


_UNETS = ("DDPM", "DDIM", "PNDM", "ConsistencyModel", "KarrasVe", "ScoreSdeVe")
FAMILIES: Mapping[str, Family] = {
    "DiTTransformer2DModel": Family(dit.load, ("DiT",)),
    "SiTTransformer2DModel": Family(sit.load),
    "GMDiTTransformer2DModelV2": Family(gm_dit.load),
    "_GMDiTTransformer2DModelV2": Family(gm_dit.load),
    "UNet2DModel": Family(class_unet.load, _UNETS),
    "UNet2DConditionModel": _text(text_unet.load, "StableDiffusion", "LatentConsistencyModel"),
    "UNet2DConditionModel with text_time": _text(sdxl.load, "StableDiffusionXL"),
    "SD3Transformer2DModel": _text(sd3.load, "StableDiffusion3"),
    "FluxTransformer2DModel": _text(flux.load, "Flux"),
    "PixArtTransformer2DModel": _text(pixart.load, "PixArt"),
    "SanaTransformer2DModel": _text(sana.load, "Sana"),
}
"""Families by the `_class_name` in the config of their network, with the `addition_embed_type` of
a UNet."""
# DiT and PixArt are published under a name that they shared, with the kind of their norms.
PUBLISHED = {
    ("Transformer2DModel", "ada_norm_zero"): "DiTTransformer2DModel",
    ("Transformer2DModel", "ada_norm_single"): "PixArtTransformer2DModel",
}


def find_family(path: Path, config: Mapping[str, Any]) -> tuple[str, Family]:
    """Return the kind of network that a config describes, and its family.

    Args:
        path: Path of the config, for the message.
        config: Content of the config.

    Raises:
        UserError: No family has networks of this class.
    """
    name = published_name(config)
    if config.get("addition_embed_type") is not None:
        name = f"{name} with {config['addition_embed_type']!s:.60}"
    if not isinstance(name, str) or name not in FAMILIES:
        got, fix = f"_class_name {name!r:.60}", "use a class-conditional or text-to-image model"
        raise invalid(f"{path}", got, f"one of {', '.join(FAMILIES)}", fix)
    return name, FAMILIES[name]


def check_index(model: ModelFolder, family: Family) -> None:
    """Check that model_index.json, where there is one, is about this model.

    It says how a pipeline uses the parts, and prompts are encoded in its way.

    Args:
        model: Folder of the model.
        family: Family of its network.

    Raises:
        UserError: It names another kind of pipeline or network, or it is not valid.
    """
    index, path = model.pipeline, model.path / "model_index.json"
    name, fix = index.get("_class_name"), "fetch the whole model again into an empty folder"
    # The longest one that fits is meant: StableDiffusionXL begins as StableDiffusion does.
    known = sorted((p for each in FAMILIES.values() for p in each.pipelines), key=len)
    found = [prefix for prefix in known if isinstance(name, str) and name.startswith(prefix)]
    if family.pipelines and name is not None and found[-1:] not in ([p] for p in family.pipelines):
        names = " or ".join(f"{prefix}Pipeline" for prefix in family.pipelines)
        raise invalid(f"{path}: _class_name", f"{name!r:.60}", names, fix)
    entry, own = index.get(model.part), published_name(model.config)
    if isinstance(entry, list) and len(entry) == 2:
        named = published_name(model.config | {"_class_name": entry[1]})
        if entry[1] is not None and str(named).lstrip("_") != own.lstrip("_"):
            got = f"{entry[1]!r:.60}"
            raise invalid(f"{path}: {model.part}", got, f"{own}, as {model.part}/ has", fix)


def published_name(config: Mapping[str, Any]) -> Any:
    """Return the class that the config of a network names, by its name in diffusers today."""
    name, norm = config.get("_class_name"), config.get("norm_type")
    if isinstance(name, str) and isinstance(norm, str):
        return PUBLISHED.get((name, norm), name)
    return name
