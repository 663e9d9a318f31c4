"""Families of denoisers, one file each.

A family is a function of a `ModelFolder` that returns a `Denoiser` without a decoder. It reads the
config, refuses what it cannot compute with a `UserError` of one line, loads the network with
`ModelFolder.load`, and wraps it in a module with the sampler's call, `module(latents, timesteps,
labels)`. Families of text-to-image models encode the prompts with `ModelFolder.encode` before the
network is loaded; their modules hold the embeddings in `prompts` and other buffers with one row a
class, and the empty prompt is the last row and the null class. No code of the folder is ever run.
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
    takes_prompts: bool = False
    """Whether a class is a prompt."""


FAMILIES: Mapping[str, Family] = {
    "DiTTransformer2DModel": Family(dit.load),
    "SiTTransformer2DModel": Family(sit.load),
    "GMDiTTransformer2DModelV2": Family(gm_dit.load),
    "_GMDiTTransformer2DModelV2": Family(gm_dit.load),
    "UNet2DModel": Family(class_unet.load),
    "UNet2DConditionModel": Family(text_unet.load, takes_prompts=True),
    "UNet2DConditionModel with text_time": Family(sdxl.load, takes_prompts=True),
    "SD3Transformer2DModel": Family(sd3.load, takes_prompts=True),
    "FluxTransformer2DModel": Family(flux.load, takes_prompts=True),
    "PixArtTransformer2DModel": Family(pixart.load, takes_prompts=True),
    "SanaTransformer2DModel": Family(sana.load, takes_prompts=True),
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


def published_name(config: Mapping[str, Any]) -> Any:
    """Return the class that the config of a network names, by its name in diffusers today."""
    name, norm = config.get("_class_name"), config.get("norm_type")
    is_text = isinstance(name, str) and isinstance(norm, str)
    return PUBLISHED.get((name, norm), name) if is_text else name
