"""What every family of denoisers reads of a folder in diffusers format."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dmkd_fast.denoisers.config_values import sides, whole
from dmkd_fast.denoisers.networks import load_network
from dmkd_fast.denoisers.prompts.encoders import TextEncoder, encode
from dmkd_fast.runtime.errors import invalid
from dmkd_fast.runtime.model_files import CONFIG, read_json


@dataclass(frozen=True, kw_only=True)
class ModelFolder:
    """A folder in diffusers format, and what is wanted of the denoiser in it."""

    path: Path
    part: str
    """Folder of the denoiser: `transformer` or `unet`."""
    vae: Path
    """Folder of the autoencoder; a pixel model has none."""
    device: torch.device
    """Device that text is encoded on."""
    prompts: tuple[str, ...] = ()
    """Prompts of all classes in order, for text-to-image models."""
    image_size: int | None = None
    """Wanted side of the images, for models that make any size; None: that of the config."""
    dtype: torch.dtype = torch.float32
    """Dtype of the weights of text-to-image models, which are large."""
    lean: bool = True
    """Whether a DiT becomes the faster module for inference."""

    @property
    def config_path(self) -> Path:
        """Path of the denoiser's config, for messages."""
        return self.path / self.part / CONFIG

    @cached_property
    def config(self) -> dict[str, Any]:
        """Content of the denoiser's config.json."""
        return read_json(self.config_path)

    @cached_property
    def scheduler(self) -> dict[str, Any]:
        """Content of scheduler_config.json."""
        return read_json(self.path / "scheduler" / "scheduler_config.json")

    @property
    def pipeline(self) -> dict[str, Any]:
        """Content of model_index.json, or nothing."""
        index = self.path / "model_index.json"
        return read_json(index) if index.is_file() else {}

    def channels(self, default: int | None = None) -> int:
        """Return the number of channels of the latents.

        Raises:
            UserError: The denoiser has other inputs than latents, or outputs other than them.
        """
        channels = whole(self.config_path, self.config, "in_channels", default)
        made = self.config.get("out_channels") or channels
        if made not in (channels, 2 * channels):
            got = f"{channels} input and {made!r:.60} output channels"
            fix = "use a model that is not for inpainting or upscaling"
            raise invalid(f"{self.config_path}", got, "as many or twice as many", fix)
        return channels

    def pixels_per_latent(self) -> int:
        """Return how many pixels one latent is wide."""
        return pixels_per_latent(self.vae / CONFIG) if self.vae.is_dir() else 1

    def sides(self, default: int | None = None, *, multiple: int = 1) -> tuple[int, int]:
        """Return height and width of the latents, from `image_size` or the config's sample_size.

        Args:
            default: Value of a `sample_size` that is not there; None means that it is required.
            multiple: Number that both sides must be a multiple of.

        Raises:
            UserError: The sides are no multiple of it, or the config has no valid sample_size.
        """
        if self.image_size is None:
            height, width = sides(self.config_path, self.config, "sample_size", default)
            if height % multiple or width % multiple:
                got, expected = f"{height} x {width}", f"a multiple of the patch size {multiple}"
                raise invalid(f"{self.config_path}: sample_size", got, expected, "fetch it again")
            return height, width
        pixels = self.pixels_per_latent() * multiple
        if self.image_size % pixels:
            raise invalid("image_size", self.image_size, f"a multiple of {pixels}", "change it")
        side = self.image_size // pixels * multiple
        return side, side

    def load(self, name: str, trial: Callable[[Any], object]) -> Any:
        """Load the denoiser as a class of diffusers; the arguments are those of `load_network`."""
        dtype = self.dtype if self.prompts else torch.float32
        return load_network(name, self.path / self.part, trial, dtype)

    def encode(self, encoder: TextEncoder) -> dict[str, Tensor]:
        """Encode the prompts, and the empty one as the last row; see `prompts.encoders.encode`."""
        return encode(self.path, encoder, [*self.prompts, ""], self.device)

    def check_width(self, embeddings: Tensor, width: int) -> Tensor:
        """Return embeddings of prompts whose last dimension is what the denoiser takes.

        Raises:
            UserError: The text encoders make others.
        """
        if embeddings.shape[-1] != width:
            got = f"text encoders that make embeddings of width {embeddings.shape[-1]}"
            fix = "use the encoders that belong to it"
            raise invalid(f"{self.path}", got, f"{width}, as {self.part}/ takes", fix)
        return embeddings


def pixels_per_latent(path: Path) -> int:
    """Return how many pixels an autoencoder decodes each latent to, along one side.

    Args:
        path: config.json of the autoencoder.

    Raises:
        UserError: The config does not have the levels of an autoencoder.
    """
    config = read_json(path)
    count = {"AutoencoderTiny": 4, "AutoencoderDC": 6}.get(str(config.get("_class_name")))
    key = "block_out_channels" if count is None else "decoder_block_out_channels"
    levels = config.get(key, [64] * (count or 1))
    if not isinstance(levels, list) or not 1 <= len(levels) <= 8:
        got = f"{levels!r:.60} for its levels"
        raise invalid(f"{path}", got, "a list of 1 to 8 widths", "fetch it again")
    return int(2 ** (len(levels) - 1))
