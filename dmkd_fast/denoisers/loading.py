"""Load diffusion models from folders in diffusers format.

For every family, the sampler gets a module of (latents, timesteps, labels), a scheduler config and,
for latent models, a decoder. B batch, c channels, h x w latent cells, H x W pixels.

| folder has | family |
|---|---|
| transformer/ (DiTTransformer2DModel), no vae/ | pixel DiT |
| transformer/, vae/ | latent DiT, for example facebook/DiT-XL-2-256 |
| unet/ (UNet2DModel with class embeddings) | class-conditional UNet: DDPM, consistency models |
| unet/ (UNet2DConditionModel), vae/, text_encoder/, tokenizer/ | text to image, a prompt a class |
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from dmkd_fast.denoisers import model_folders
from dmkd_fast.denoisers.dit import lean_dit
from dmkd_fast.denoisers.model_folders import STEM, one_line
from dmkd_fast.denoisers.prompts import encode_prompts
from dmkd_fast.denoisers.wrappers import ClassUNet, TextUNet
from dmkd_fast.denoisers.wrappers import Decoder as Decoder
from dmkd_fast.denoisers.wrappers import PixelDiT as PixelDiT
from dmkd_fast.runtime.errors import UserError
from dmkd_fast.runtime.model_files import CONFIG, check_plain, read_json, read_license


@dataclass(frozen=True, kw_only=True)
class Denoiser:
    """A diffusion model and the facts about it that the sampler needs."""

    module: nn.Module
    """`module(latents (B, c, h, w), timesteps (B,), labels (B,))` -> (B, c or more, h, w)."""
    scheduler: dict[str, Any]
    """The scheduler's own config, `_class_name` included."""
    num_classes: int
    null_class: int | None
    """Label that stands for "no class"; None if the model was not trained with one."""
    latent_shape: tuple[int, int, int]
    """Shape of one image's latents, (c, h, w)."""
    image_shape: tuple[int, int, int]
    """Shape of one image, (1 or 3, H, W)."""
    decoder: nn.Module | None = None
    """Latents (B, c, h, w) -> images (B, 3, H, W) in [-1, 1]; None for pixel models."""
    takes_guidance: bool = False
    """Whether guidance is an input: `module(latents, timesteps, labels, guidance (B,))`."""
    license: str = "unknown"
    """License of the weights, as their model card states it."""
    class_map: tuple[int, ...] | None = None
    """The module's own index of each of `num_classes` labels; None if both are the same."""

    def restricted(self, class_map: tuple[int, ...]) -> Denoiser:
        """Return the same model for a job with some of its classes, in job order.

        Raises:
            UserError: An entry is not a class of the model, or is repeated.
        """
        own = self.class_map or range(self.num_classes)
        repeated = len(set(class_map)) < len(class_map)
        if repeated or not set(class_map) <= set(own):
            without = "" if self.class_map is None else f" without {self.null_class}"
            raise UserError(
                f"denoiser.class_map: got {min(class_map)} to {max(class_map)}"
                f"{', some twice' if repeated else ''}, expected different classes from "
                f"{min(own)} to {max(own)}{without}; correct the map"
            )
        return replace(self, num_classes=len(class_map), class_map=class_map)


def load_denoiser(
    folder: Path,
    device: torch.device,
    *,
    prompts: Sequence[str] | None = None,
    decoder: Path | None = None,
    null_class: int | None = None,
    lean: bool = True,
) -> Denoiser:
    """Load a diffusion model in diffusers format, float32 and frozen.

    Args:
        folder: Model folder; see the table at the top of this file.
        device: Device of the modules.
        prompts: Prompts, one per class; for text-to-image models only.
        decoder: Folder of another autoencoder to decode with, for example a tiny one.
        null_class: Class that stood for dropped labels when a UNet was trained, which its files do
            not record. The model then has one class less.
        lean: Whether to use `LeanDiT` for DiTs; False keeps diffusers' module, which is trainable.

    Raises:
        UserError: A part is missing, damaged, or of a kind that is not supported.
    """
    model_folders.check_is_pipeline(folder)
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    part = next((name for name in ("transformer", "unet") if (folder / name).is_dir()), None)
    if part is None:
        raise UserError(f"{folder}: got neither transformer/ nor unet/, expected one of them")
    check_plain(folder / part)
    config = read_json(folder / part / CONFIG)
    kind = config.get("_class_name")
    builders = {
        "DiTTransformer2DModel": _load_dit,
        "UNet2DModel": _load_class_unet,
        "UNet2DConditionModel": _load_text_unet,
    }
    if not isinstance(kind, str) or kind not in builders:
        raise UserError(
            f"{folder / part / CONFIG}: got _class_name {kind!r:.60}, expected one of "
            f"{', '.join(builders)}; use a class-conditional or text-to-image model"
        )
    if (prompts is not None) != (kind == "UNet2DConditionModel"):
        got = "no prompts" if prompts is None else f"{len(prompts)} prompts"
        raise UserError(
            f"prompts: got {got} for a {kind}, expected one per class for text-to-image models "
            "and none for others; change denoiser.prompts"
        )
    denoiser = builders[kind](folder, config, scheduler, list(prompts or []), lean)
    if null_class is not None:
        denoiser = _with_null_class(denoiser, null_class)
    vae = decoder if decoder is not None else folder / "vae"
    if vae.is_dir():
        denoiser = _with_decoder(denoiser, vae)
    elif decoder is not None:
        raise UserError(f"decoder: {decoder}: no such folder; check denoiser.decoder")
    elif denoiser.latent_shape[0] not in (1, 3):
        raise UserError(
            f"{folder}: got a model of {denoiser.latent_shape[0]}-channel latents without vae/, "
            "expected an autoencoder there; fetch it, or set denoiser.decoder"
        )
    for module in (denoiser.module, denoiser.decoder):
        if module is not None:
            module.to(device).eval().requires_grad_(False)
    return replace(denoiser, license=read_license(folder))


def new_pixel_dit(
    *,
    num_classes: int,
    channels: int,
    image_size: int,
    patch_size: int,
    num_layers: int,
    num_heads: int,
    head_dim: int,
) -> PixelDiT:
    """Build a class-conditional `DiTTransformer2DModel` for pixels.

    In diffusers, every block has its own timestep and label embedder, and each drops labels
    independently in train mode. Here all blocks share one embedder that never drops labels; the
    caller drops a label once per example by passing class `num_classes`.
    """
    dit = _diffusers().DiTTransformer2DModel(
        num_attention_heads=num_heads,
        attention_head_dim=head_dim,
        num_layers=num_layers,
        in_channels=channels,
        out_channels=channels,
        sample_size=image_size,
        patch_size=patch_size,
        num_embeds_ada_norm=num_classes,
        dropout=0.0,
    )
    share_embedder(dit)
    return PixelDiT(dit)


def share_embedder(dit: Any) -> None:
    """Make all blocks share the embedder of the first block, without dropout."""
    embedder = dit.transformer_blocks[0].norm1.emb
    embedder.class_embedder.dropout_prob = 0.0
    for block in dit.transformer_blocks:
        block.norm1.emb = embedder


def save_denoiser(dit: Any, scheduler: dict[str, Any], folder: Path) -> None:
    """Write `transformer/` (float16) and `scheduler/` for diffusers to load."""
    target = folder / "transformer"
    target.mkdir(parents=True, exist_ok=True)
    # Shared embedders are written once per block, as diffusers expects to read them.
    weights = {k: v.detach().cpu().clone().half() for k, v in dit.state_dict().items()}
    save_file(weights, target / f"{STEM}.safetensors", metadata={"format": "pt"})
    dit.save_config(target)
    (folder / "scheduler").mkdir(exist_ok=True)
    (folder / "scheduler" / "scheduler_config.json").write_text(
        json.dumps(scheduler, indent=2) + "\n", encoding="utf-8"
    )


def _load_dit(
    folder: Path, config: dict[str, Any], scheduler: dict[str, Any], prompts: list[str], lean: bool
) -> Denoiser:
    del prompts
    path = folder / "transformer" / CONFIG
    files, _ = model_folders.weight_files(folder / "transformer")
    size, _ = model_folders.sides(path, {"sample_size": 32} | config, "sample_size")
    patch = model_folders.whole(path, {"patch_size": 2} | config, "patch_size")
    if size % patch:
        raise UserError(
            f"{path}: sample_size: got {size}, expected a multiple of the patch "
            f"size {patch}; fetch it again"
        )
    model_class = _diffusers().DiTTransformer2DModel
    channels = _channels(path, {"in_channels": 4} | config)
    inputs = (1, channels, size, size)
    _check_config(
        model_class,
        path,
        config,
        files,
        lambda dit: dit(torch.zeros(inputs), torch.zeros(1), torch.zeros(1, dtype=torch.int64)),
    )
    dit = model_class.from_config(config)
    model_folders.number(path, dit.config, "norm_eps", 1e-5)
    model_folders.load_strictly(dit, files)
    for block in dit.transformer_blocks:
        block.norm1.emb.class_embedder.dropout_prob = 0.0
    num_classes = model_folders.whole(path, dit.config, "num_embeds_ada_norm")
    return Denoiser(
        module=(lean_dit(dit) if lean else None) or PixelDiT(dit),
        scheduler=scheduler,
        num_classes=num_classes,
        null_class=num_classes,
        latent_shape=(channels, size, size),
        image_shape=(channels, size, size),
    )


def _load_class_unet(
    folder: Path, config: dict[str, Any], scheduler: dict[str, Any], prompts: list[str], lean: bool
) -> Denoiser:
    del prompts, lean
    path = folder / "unet" / CONFIG
    num_classes, kind = config.get("num_class_embeds"), config.get("class_embed_type")
    if not num_classes or kind is not None:
        raise UserError(
            f"{path}: got num_class_embeds={num_classes!r:.60}, class_embed_type={kind!r:.60}, "
            "expected a table of classes; use a class-conditional model"
        )
    num_classes = model_folders.whole(path, config, "num_class_embeds")
    shape = (_channels(path, config), *model_folders.sides(path, config, "sample_size"))
    unet = _pretrained(
        "UNet2DModel",
        folder / "unet",
        lambda unet: unet(
            torch.zeros(1, *shape), torch.zeros(1), class_labels=torch.zeros(1, dtype=torch.int64)
        ),
    )
    return Denoiser(
        module=ClassUNet(unet),
        scheduler=scheduler,
        num_classes=num_classes,
        null_class=None,
        latent_shape=shape,
        image_shape=shape,
    )


def _load_text_unet(
    folder: Path, config: dict[str, Any], scheduler: dict[str, Any], prompts: list[str], lean: bool
) -> Denoiser:
    del lean
    path = folder / "unet" / CONFIG
    if not prompts:
        raise UserError("prompts: got none, expected one per class; set denoiser.prompts")
    shape = (_channels(path, config), *model_folders.sides(path, config, "sample_size"))
    width = model_folders.whole(path, config, "cross_attention_dim")
    guidance = None
    if config.get("time_cond_proj_dim") is not None:
        guidance = model_folders.whole(path, config, "time_cond_proj_dim")
    unet = _pretrained(
        "UNet2DConditionModel",
        folder / "unet",
        lambda unet: unet(
            torch.zeros(1, *shape),
            torch.zeros(1),
            torch.zeros(1, 8, width),
            timestep_cond=None if guidance is None else torch.zeros(1, guidance),
        ),
    )
    module = TextUNet(unet, encode_prompts(folder, [*prompts, ""]))
    return Denoiser(
        module=module,
        scheduler=scheduler,
        num_classes=len(prompts),
        null_class=len(prompts),
        latent_shape=shape,
        image_shape=shape,
        takes_guidance=module.guidance_width > 0,
    )


def _channels(path: Path, config: dict[str, Any]) -> int:
    """Return the number of channels of a denoiser's latents."""
    channels = model_folders.whole(path, config, "in_channels")
    made = config.get("out_channels") or channels
    if made not in (channels, 2 * channels):
        raise UserError(
            f"{path}: got {channels} input and {made!r:.60} output channels, expected as many or "
            "twice as many; models for inpainting or upscaling are not supported"
        )
    return channels


def _with_null_class(denoiser: Denoiser, null_class: int) -> Denoiser:
    """Return the same model with one of its classes used as the null class."""
    if denoiser.null_class is not None:
        if null_class == denoiser.null_class:
            return denoiser
        raise UserError(
            f"denoiser.null_class: got {null_class} for a model whose null class is "
            f"{denoiser.null_class}; remove denoiser.null_class"
        )
    count = denoiser.num_classes
    if not 0 <= null_class < count or count < 2:
        raise UserError(
            f"denoiser.null_class: got {null_class}, expected 0 to {count - 1}, one of the classes "
            "that the UNet has embeddings for; correct it"
        )
    others = tuple(label for label in range(count) if label != null_class)
    return replace(
        denoiser,
        num_classes=count - 1,
        null_class=null_class,
        class_map=None if null_class == count - 1 else others,
    )


def _with_decoder(denoiser: Denoiser, folder: Path) -> Denoiser:
    """Return the same model with the autoencoder in `folder` as its decoder."""
    path = folder / CONFIG
    config = read_json(path)
    name = config.get("_class_name")
    if name not in ("AutoencoderKL", "AutoencoderTiny"):
        raise UserError(
            f"{path}: got _class_name {name!r:.60}, expected AutoencoderKL or "
            "AutoencoderTiny; use another decoder"
        )
    channels, height, width = denoiser.latent_shape
    if config.get("latent_channels", 4) != channels:
        raise UserError(
            f"{path}: got {config.get('latent_channels', 4)!r:.60} latent channels, expected "
            f"the denoiser's {channels}; use the autoencoder that belongs to it"
        )
    vae = _pretrained(name, folder, lambda vae: vae.decode(torch.zeros(1, *denoiser.latent_shape)))
    for key in ("latents_mean", "latents_std"):
        if vae.config.get(key) is not None:
            raise UserError(
                f"{path}: {key}: got {vae.config[key]!r:.60}, expected none; latents "
                "normalized by channel are not supported"
            )
    if model_folders.number(path, vae.config, "scaling_factor", 0.0) == 0:
        raise UserError(f"{path}: scaling_factor: got 0, expected another number; fetch it again")
    model_folders.number(path, vae.config, "shift_factor", 0.0)
    made = model_folders.whole(path, vae.config, "out_channels")
    if made not in (1, 3):
        raise UserError(f"{path}: out_channels: got {made}, expected 1 or 3; use another decoder")
    pixels = 2 ** (len(vae.config.block_out_channels) - 1)
    decoder = Decoder(vae).to(memory_format=torch.channels_last)
    return replace(denoiser, decoder=decoder, image_shape=(made, height * pixels, width * pixels))


def _check_config(
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
    model_folders.check_values(path, config, model_class)
    try:
        with torch.device("meta"):
            described = model_class.from_config(config).eval()
    except Exception as error:  # diffusers checks little, so errors of many kinds can occur
        raise UserError(f"{path}: {one_line(error)}; fetch it again") from None
    wanted = sum(p.numel() for p in described.parameters())
    stored = model_folders.num_stored(files)
    if wanted > 2 * stored:
        raise UserError(
            f"{path}: got a config of {wanted:,} weights, but {files[0].name} holds {stored:,}; "
            "the file belongs to another architecture"
        )
    try:
        with torch.device("meta"), torch.no_grad():
            trial(described)
    except Exception as error:
        raise UserError(f"{path}: a trial call failed: {one_line(error)}; fetch it again") from None


def _pretrained(name: str, folder: Path, trial: Callable[[Any], object]) -> Any:
    """Load a diffusers model from safetensors files that fit it exactly."""
    check_plain(folder)
    files, variant = model_folders.weight_files(folder)
    model_class = getattr(_diffusers(), name)
    _check_config(model_class, folder / CONFIG, read_json(folder / CONFIG), files, trial)
    try:
        model, info = model_class.from_pretrained(
            folder,
            use_safetensors=True,
            local_files_only=True,
            low_cpu_mem_usage=False,
            output_loading_info=True,
            variant=variant,
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


def _diffusers() -> Any:
    """Import diffusers without the warnings of packages that it tries to import."""
    # An xFormers that was built for another torch logs long warnings about missing kernels.
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    logging.getLogger("xformers").setLevel(logging.ERROR)
    import diffusers

    return diffusers
