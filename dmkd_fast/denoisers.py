"""Loading of diffusion models: folders in diffusers format become what the sampler takes.

Stands on floor 2; the only file that imports diffusers. Whatever the family, the sampler sees a
module of (latents, timesteps, labels), a scheduler config and, for latent models, a decoder.
B batch, c channels, h w latent cells, H W pixels.

| folder has | family |
|---|---|
| transformer/ (DiTTransformer2DModel), no vae/ | pixel DiT |
| transformer/, vae/ | latent DiT, as facebook/DiT-XL-2-256 |
| unet/ (UNet2DModel with class embeddings) | class-conditional UNet: DDPM, consistency models |
| unet/ (UNet2DConditionModel), vae/, text_encoder/, tokenizer/ | text to image, prompt per class |
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dmkd_fast.dit import lean_dit
from dmkd_fast.upsampling import double_by_phases
from dmkd_fast.weights import CONFIG, check_plain, load_weights, read_json, read_licence

WEIGHTS = "diffusion_pytorch_model.safetensors"


@dataclass(frozen=True, kw_only=True)
class Denoiser:
    """A diffusion model with what the sampler must know about it."""

    module: nn.Module
    """`module(latents (B, c, h, w), timesteps (B,), labels (B,))` -> (B, c or more, h, w)."""
    scheduler: dict[str, Any]
    """The scheduler's own config, `_class_name` included."""
    num_classes: int
    null_class: int | None
    """Label that stands for "no class"; None if the model was not trained with one."""
    latent_shape: tuple[int, int, int]
    """(c, h, w)."""
    image_shape: tuple[int, int, int]
    """(1 or 3, H, W)."""
    decoder: nn.Module | None = None
    """Latents (B, c, h, w) -> images (B, 3, H, W) in [-1, 1]; None for pixel models."""
    takes_guidance: bool = False
    """Whether guidance is an input: `module(latents, timesteps, labels, guidance (B,))`."""
    licence: str = "unknown"
    """Of the weights, as their model card states it."""
    class_map: tuple[int, ...] | None = None
    """The module's own index of each of `num_classes` labels; None: labels are its own."""

    def restricted(self, class_map: tuple[int, ...]) -> Denoiser:
        """The same model for a job of some of its classes, in the job's order.

        Raises:
            ValueError: An entry is not a class of the model, or comes twice.
        """
        repeated = len(set(class_map)) < len(class_map)
        if repeated or min(class_map) < 0 or max(class_map) >= self.num_classes:
            raise ValueError(
                f"denoiser.class_map: got {min(class_map)} to {max(class_map)}"
                f"{', some twice' if repeated else ''}, expected different classes from 0 to "
                f"{self.num_classes - 1}; correct the map"
            )
        return replace(self, num_classes=len(class_map), class_map=class_map)


class PixelDiT(nn.Module):
    """diffusers' DiT with a plain call; what is trained, and the reference for `LeanDiT`."""

    def __init__(self, dit: Any) -> None:
        super().__init__()
        self.dit = dit

    def forward(self, latents: Tensor, timesteps: Tensor, labels: Tensor) -> Tensor:
        """(B, c, h, w), (B,) in [0, 1000), (B,) int64 -> (B, c or 2 c, h, w)."""
        dit: Any = self.dit
        return dit(latents, timestep=timesteps, class_labels=labels).sample


class ClassUNet(nn.Module):
    """diffusers' `UNet2DModel` with class embeddings and a plain call."""

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, latents: Tensor, timesteps: Tensor, labels: Tensor) -> Tensor:
        """(B, c, h, w), (B,), (B,) int64 -> (B, c or 2 c, h, w)."""
        unet: Any = self.unet
        return unet(latents, timesteps, class_labels=labels).sample


class TextUNet(nn.Module):
    """diffusers' `UNet2DConditionModel`, conditioned on one prompt per class, encoded once.

    Args:
        unet: The model.
        prompts: (num_classes + 1, L, D) embeddings; the last one is the empty prompt.
    """

    def __init__(self, unet: Any, prompts: Tensor) -> None:
        super().__init__()
        self.unet, self.prompts = unet, nn.Buffer(prompts)
        self.guidance_width = int(unet.config.time_cond_proj_dim or 0)

    def forward(
        self, latents: Tensor, timesteps: Tensor, labels: Tensor, guidance: Tensor | None = None
    ) -> Tensor:
        """(B, c, h, w), (B,), (B,) int64, guidance scales (B,) -> (B, c, h, w)."""
        unet: Any = self.unet
        condition = None
        if guidance is not None:
            condition = _guidance_waves(guidance - 1, self.guidance_width).to(latents.dtype)
        return unet(
            latents, timesteps, encoder_hidden_states=self.prompts[labels],
            timestep_cond=condition,
        ).sample  # fmt: skip


class Decoder(nn.Module):
    """An autoencoder's decoder, from the sampler's latents to pixels; changes `vae` in place."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        from diffusers.models.upsampling import Upsample2D

        self.vae = vae
        double_by_phases(vae.decoder, Upsample2D)
        self.scale = float(vae.config.scaling_factor)
        self.shift = float(vae.config.get("shift_factor") or 0.0)

    def forward(self, latents: Tensor) -> Tensor:
        """(B, c, h, w) -> (B, 3, H, W) in [-1, 1]."""
        vae: Any = self.vae
        return vae.decode(latents / self.scale + self.shift).sample


def load_denoiser(
    folder: Path, device: torch.device, *, prompts: Sequence[str] | None = None,
    decoder: Path | None = None, lean: bool = True,
) -> Denoiser:  # fmt: skip
    """Read a diffusion model in diffusers format; float32, frozen.

    Args:
        folder: See the table at the top of this file.
        device: Where to put it.
        prompts: One for each class; for text-to-image models only.
        decoder: Folder of another autoencoder to decode with, such as a tiny one.
        lean: Sample DiTs with our own module; False keeps diffusers' (the reference, trainable).

    Raises:
        ValueError: A part is missing, damaged, or of a kind that is not supported.
    """
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    part = next((name for name in ("transformer", "unet") if (folder / name).is_dir()), None)
    if part is None:
        raise ValueError(f"{folder}: got neither transformer/ nor unet/, expected one of them")
    check_plain(folder / part)
    config = read_json(folder / part / CONFIG)
    kind = config.get("_class_name")
    builders = {
        "DiTTransformer2DModel": _load_dit,
        "UNet2DModel": _load_class_unet,
        "UNet2DConditionModel": _load_text_unet,
    }
    if not isinstance(kind, str) or kind not in builders:
        raise ValueError(
            f"{folder / part / CONFIG}: got _class_name {kind!r}, expected one of "
            f"{', '.join(builders)}; use a class-conditional or text-to-image model"
        )
    if (prompts is not None) != (kind == "UNet2DConditionModel"):
        got = "no prompts" if prompts is None else f"{len(prompts)} prompts"
        raise ValueError(
            f"prompts: got {got} for a {kind}, expected one per class for text-to-image models "
            "and none for others; change denoiser.prompts"
        )
    denoiser = builders[kind](folder, config, scheduler, list(prompts or []), lean)
    vae = decoder if decoder is not None else folder / "vae"
    if vae.is_dir():
        denoiser = _with_decoder(denoiser, vae)
    elif decoder is not None:
        raise ValueError(f"decoder: {decoder}: no such folder; check denoiser.decoder")
    elif denoiser.latent_shape[0] not in (1, 3):
        raise ValueError(
            f"{folder}: got a model of {denoiser.latent_shape[0]}-channel latents without vae/, "
            "expected an autoencoder there; fetch it, or set denoiser.decoder"
        )
    for module in (denoiser.module, denoiser.decoder):
        if module is not None:
            module.to(device).eval().requires_grad_(False)
    return replace(denoiser, licence=read_licence(folder))


def new_pixel_dit(
    *, num_classes: int, channels: int, image_size: int, patch_size: int,
    num_layers: int, num_heads: int, head_dim: int,
) -> PixelDiT:  # fmt: skip
    """A class-conditional `DiTTransformer2DModel` on pixels, with one embedder for all blocks.

    diffusers gives every block its own timestep and label embedder, each of which drops labels
    by itself in train mode. Here all blocks share one embedder and never drop: the caller drops
    labels once per example, by passing class `num_classes`.
    """
    dit = _diffusers().DiTTransformer2DModel(
        num_attention_heads=num_heads, attention_head_dim=head_dim, num_layers=num_layers,
        in_channels=channels, out_channels=channels, sample_size=image_size,
        patch_size=patch_size, num_embeds_ada_norm=num_classes, dropout=0.0,
    )  # fmt: skip
    share_embedder(dit)
    return PixelDiT(dit)


def share_embedder(dit: Any) -> None:
    """Let all blocks use the first block's timestep and label embedder, without dropout."""
    embedder = dit.transformer_blocks[0].norm1.emb
    embedder.class_embedder.dropout_prob = 0.0
    for block in dit.transformer_blocks:
        block.norm1.emb = embedder


def save_denoiser(dit: Any, scheduler: dict[str, Any], folder: Path) -> None:
    """Write a diffusers folder (`transformer/`, `scheduler/`) that diffusers itself can load."""
    target = folder / "transformer"
    target.mkdir(parents=True, exist_ok=True)
    # Shared embedders are written once per block, as diffusers expects to read them.
    weights = {k: v.detach().cpu().clone().half() for k, v in dit.state_dict().items()}
    save_file(weights, target / WEIGHTS, metadata={"format": "pt"})
    dit.save_config(target)
    (folder / "scheduler").mkdir(exist_ok=True)
    (folder / "scheduler" / "scheduler_config.json").write_text(
        json.dumps(scheduler, indent=2) + "\n", encoding="utf-8"
    )


def _load_dit(
    folder: Path, config: dict[str, Any], scheduler: dict[str, Any], prompts: list[str], lean: bool
) -> Denoiser:
    del prompts
    try:
        dit = _diffusers().DiTTransformer2DModel.from_config(config)
    except (TypeError, ValueError, AttributeError, NotImplementedError) as error:
        raise ValueError(f"{folder / 'transformer' / CONFIG}: {error}; fetch it again") from None
    load_weights(dit, folder / "transformer" / WEIGHTS)
    for block in dit.transformer_blocks:
        block.norm1.emb.class_embedder.dropout_prob = 0.0
    channels, size = int(config["in_channels"]), int(config["sample_size"])
    num_classes = int(config["num_embeds_ada_norm"])
    return Denoiser(
        module=(lean_dit(dit) if lean else None) or PixelDiT(dit), scheduler=scheduler,
        num_classes=num_classes, null_class=num_classes, latent_shape=(channels, size, size),
        image_shape=(channels, size, size),
    )  # fmt: skip


def _load_class_unet(
    folder: Path, config: dict[str, Any], scheduler: dict[str, Any], prompts: list[str], lean: bool
) -> Denoiser:
    del prompts, lean
    num_classes, kind = config.get("num_class_embeds"), config.get("class_embed_type")
    if not num_classes or kind is not None:
        raise ValueError(
            f"{folder / 'unet' / CONFIG}: got num_class_embeds={num_classes}, class_embed_type="
            f"{kind!r}, expected a table of classes; use a class-conditional model"
        )
    unet = _pretrained("UNet2DModel", folder / "unet")
    shape = (int(config["in_channels"]), *_size(config["sample_size"]))
    return Denoiser(
        module=ClassUNet(unet), scheduler=scheduler, num_classes=int(num_classes),
        null_class=None, latent_shape=shape, image_shape=shape,
    )  # fmt: skip


def _load_text_unet(
    folder: Path, config: dict[str, Any], scheduler: dict[str, Any], prompts: list[str], lean: bool
) -> Denoiser:
    del lean
    if not prompts:
        raise ValueError("prompts: got none, expected one per class; set denoiser.prompts")
    unet = _pretrained("UNet2DConditionModel", folder / "unet")
    module = TextUNet(unet, encode_prompts(folder, [*prompts, ""]))
    shape = (int(config["in_channels"]), *_size(config["sample_size"]))
    return Denoiser(
        module=module, scheduler=scheduler, num_classes=len(prompts), null_class=len(prompts),
        latent_shape=shape, image_shape=shape, takes_guidance=module.guidance_width > 0,
    )  # fmt: skip


@torch.no_grad()
def encode_prompts(folder: Path, prompts: list[str]) -> Tensor:
    """CLIP embeddings of prompts, as Stable Diffusion takes them: (N, L, D) float32."""
    try:
        from transformers import CLIPTextModel, CLIPTokenizer
    except ImportError:
        raise ValueError(
            "prompts: text-to-image models need transformers; pip install 'dmkd_fast[text]'"
        ) from None
    for part in ("tokenizer", "text_encoder"):
        check_plain(folder / part)
    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
        encoder = CLIPTextModel.from_pretrained(
            folder / "text_encoder", use_safetensors=True, local_files_only=True
        ).eval()
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{folder}: text_encoder/ or tokenizer/: {_line(error)}") from None
    tokens = tokenizer(
        prompts, padding="max_length", max_length=tokenizer.model_max_length, truncation=True,
        return_tensors="pt",
    )  # fmt: skip
    return encoder(tokens.input_ids)[0].float()


def _with_decoder(denoiser: Denoiser, folder: Path) -> Denoiser:
    """Latents become pixels through the autoencoder in `folder`."""
    config = read_json(folder / CONFIG)
    name = config.get("_class_name")
    if name not in ("AutoencoderKL", "AutoencoderTiny"):
        raise ValueError(
            f"{folder / CONFIG}: got _class_name {name!r}, expected AutoencoderKL or "
            "AutoencoderTiny; use another decoder"
        )
    channels, height, width = denoiser.latent_shape
    if config.get("latent_channels", 4) != channels:
        raise ValueError(
            f"{folder / CONFIG}: got {config.get('latent_channels', 4)} latent channels, expected "
            f"the denoiser's {channels}; use the autoencoder that belongs to it"
        )
    vae = _pretrained(name, folder)
    levels = len(config.get("block_out_channels") or config["decoder_block_out_channels"])
    pixels = 2 ** (levels - 1)
    decoder = Decoder(vae).to(memory_format=torch.channels_last)
    shape = (int(config.get("out_channels", 3)), height * pixels, width * pixels)
    return replace(denoiser, decoder=decoder, image_shape=shape)


def _pretrained(name: str, folder: Path) -> Any:
    """A diffusers model from a folder, safetensors only, with every weight accounted for."""
    check_plain(folder)
    if not any(folder.glob("*.safetensors")):
        raise ValueError(
            f"{folder}: no .safetensors file; fetch the weights in that format (others can run "
            "code when read)"
        )
    try:
        model, info = getattr(_diffusers(), name).from_pretrained(
            folder, use_safetensors=True, local_files_only=True, low_cpu_mem_usage=False,
            output_loading_info=True,
        )  # fmt: skip
    except Exception as error:  # diffusers and safetensors raise many kinds for a damaged folder.
        raise ValueError(f"{folder}: {_line(error)}; fetch or save it again") from None
    problems = {key: info[key] for key in ("missing_keys", "mismatched_keys", "unexpected_keys")}
    for what, names in problems.items():
        if names:
            raise ValueError(
                f"{folder}: {what.replace('_', ' ')} such as {sorted(map(str, names))[0]}; the "
                "file belongs to another architecture"
            )
    return model


def _size(size: int | Sequence[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _guidance_waves(guidance: Tensor, width: int) -> Tensor:
    """Sinusoids of guidance scale - 1 (B,), as guidance-distilled UNets take them: (B, width)."""
    half = width // 2
    places = torch.arange(half, dtype=torch.float32, device=guidance.device)
    angles = 1000 * guidance[:, None] * torch.exp(places * (-math.log(10_000) / (half - 1)))
    return nn.functional.pad(torch.cat((angles.sin(), angles.cos()), dim=1), (0, width % 2))


def _line(error: Exception) -> str:
    """The first sentence of a library's message."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def _diffusers() -> Any:
    """Import diffusers without the warnings of packages it tries on the way."""
    # xformers, where installed for another torch build, prints a page about its missing kernels.
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    logging.getLogger("xformers").setLevel(logging.ERROR)
    import diffusers

    return diffusers
