"""Load diffusion models from folders in diffusers format.

`families/` has one file for each kind of denoiser. For all of them, the sampler gets a module of
(latents, timesteps, labels), a scheduler config and, for latent models, a decoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dmkd_fast.denoisers.config_values import number, whole
from dmkd_fast.denoisers.denoiser import Denoiser
from dmkd_fast.denoisers.families import check_index, find_family
from dmkd_fast.denoisers.families.folder import ModelFolder, pixels_per_latent
from dmkd_fast.denoisers.model_folders import check_is_pipeline
from dmkd_fast.denoisers.networks import load_network
from dmkd_fast.denoisers.prompts.bank import take_bank
from dmkd_fast.denoisers.wrappers import Decoder, Encoder
from dmkd_fast.runtime import checks
from dmkd_fast.runtime.errors import UserError, invalid
from dmkd_fast.runtime.model_files import CONFIG, read_json, read_license


def load_denoiser(
    folder: Path,
    device: torch.device,
    *,
    prompts: Sequence[str] | None = None,
    decoder: Path | None = None,
    null_class: int | None = None,
    image_size: int | None = None,
    dtype: torch.dtype = torch.float32,
    lean: bool = True,
) -> Denoiser:
    """Load a diffusion model in diffusers format, frozen.

    Args:
        folder: Folder with `scheduler/` and a network of one of the `families` in `transformer/` or
            `unet/`; `vae/` for a model of latents, encoders and their tokenizers for text.
        device: Device of the modules.
        prompts: Prompts, for text-to-image models only. Each is a class of the result until
            `Denoiser.with_prompts` groups them.
        decoder: Folder of another autoencoder to decode with, for example a tiny one.
        null_class: Class that stood for dropped labels when a UNet was trained, which its files do
            not record. The model then has one class less.
        image_size: Side of the images in pixels, for text-to-image models; None: that of the model.
        dtype: Dtype of the weights of a text-to-image model, so that no float32 copy of a large one
            is made. All other networks are float32.
        lean: Whether to replace a DiT by a faster module for inference; False keeps diffusers'
            module, which is trainable.

    Raises:
        UserError: A part is missing, damaged, or of a kind that is not supported.
    """
    check_is_pipeline(folder)
    part = next((name for name in ("transformer", "unet") if (folder / name).is_dir()), None)
    if part is None:
        raise invalid(f"{folder}", "neither transformer/ nor unet/", "one of them")
    if decoder is not None and not decoder.is_dir():
        raise UserError(f"decoder: {decoder}: no such folder; check denoiser.decoder")
    vae = decoder if decoder is not None else folder / "vae"
    model = ModelFolder(
        path=folder,
        part=part,
        vae=vae,
        device=device,
        prompts=tuple(prompts or ()),
        image_size=image_size,
        dtype=dtype,
        lean=lean,
    )
    kind, family = find_family(model.config_path, model.config)
    check_index(model, family)
    if not (prompts if family.takes_prompts else prompts is None):
        got = f"{len(prompts or ()) or 'no'} prompts for a {kind}"
        expected = "one per class for text-to-image models and none for others"
        raise invalid("prompts", got, expected, "change denoiser.prompts")
    if image_size is not None:
        checks.whole("image_size", image_size, low=1, high=16_384)
        if not family.takes_prompts:
            got, expected = f"{image_size} for a {kind}", "none, as it makes images of one size"
            raise invalid("image_size", got, expected, "remove denoiser.image_size")
    denoiser = family.load(model)
    if prompts:
        num_rows = len(prompts) + (denoiser.null_class is not None)
        denoiser = replace(denoiser, bank=take_bank(denoiser.module, num_rows))
    if null_class is not None:
        denoiser = _with_null_class(denoiser, null_class)
    if vae.is_dir():
        denoiser = _with_decoder(denoiser, vae)
    elif denoiser.latent_shape[0] not in (1, 3):
        got = f"a model of {denoiser.latent_shape[0]}-channel latents without vae/"
        raise invalid(f"{folder}", got, "an autoencoder there", "fetch it, or set denoiser.decoder")
    for module in (denoiser.module, denoiser.decoder):
        if module is not None:
            module.to(device).eval().requires_grad_(False)
    return replace(denoiser, license=read_license(folder))


def _with_null_class(denoiser: Denoiser, null_class: int) -> Denoiser:
    """Return the same model with one of its classes used as the null class."""
    name, count = "denoiser.null_class", denoiser.num_classes
    if denoiser.null_class is not None:
        if null_class == denoiser.null_class:
            return denoiser
        got = f"{null_class} for a model whose null class is {denoiser.null_class}"
        raise invalid(name, got, "that class", f"remove {name}")
    if not 0 <= null_class < count or count < 2:
        expected = f"0 to {count - 1}, one of the classes that the UNet has embeddings for"
        raise invalid(name, null_class, expected, "correct it")
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
    if name not in (known := ("AutoencoderKL", "AutoencoderTiny", "AutoencoderDC")):
        got, expected = f"_class_name {name!r:.60}", f"one of {', '.join(known)}"
        raise invalid(f"{path}", got, expected, "use another decoder")
    channels, height, width = denoiser.latent_shape
    default = 32 if name == "AutoencoderDC" else 4
    if (given := config.get("latent_channels", default)) != channels:
        got, expected = f"{given!r:.60} latent channels", f"the denoiser's {channels}"
        raise invalid(f"{path}", got, expected, "use the autoencoder that belongs to it")
    vae = load_network(name, folder, lambda vae: vae.decode(torch.zeros(1, *denoiser.latent_shape)))
    _check_scaling(path, vae)
    made = whole(path, vae.config, "in_channels" if name == "AutoencoderDC" else "out_channels")
    if made not in (1, 3):
        raise invalid(f"{path}: out_channels", made, "1 or 3", "use another decoder")
    pixels = pixels_per_latent(path)
    decoder = Decoder(vae).to(memory_format=torch.channels_last)
    return replace(denoiser, decoder=decoder, image_shape=(made, height * pixels, width * pixels))


def load_encoder(
    folder: Path, device: torch.device, image_shape: tuple[int, int, int]
) -> tuple[Encoder, tuple[int, int, int]]:
    """Load an `AutoencoderKL` in diffusers format, float32 and frozen.

    Args:
        folder: Folder with config.json and safetensors weights.
        device: Device of the module.
        image_shape: Shape of the images to encode, (c, S, S).

    Returns:
        The encoder, and the shape of one image's latents.

    Raises:
        UserError: The folder has no such autoencoder, or it does not fit the images.
    """
    path, (channels, side, _) = folder / CONFIG, image_shape
    config = read_json(path)
    if (name := config.get("_class_name")) != "AutoencoderKL":
        got, fix = f"_class_name {name!r:.60}", "use another autoencoder"
        raise invalid(f"{path}", got, "AutoencoderKL", fix)
    if (given := config.get("in_channels", 3)) != channels:
        fix = f"set data.channels={given}"
        raise invalid("vae", f"{given!r:.60} input channels", f"the images' {channels}", fix)
    trial = torch.zeros(1, *image_shape, device="meta")
    vae = load_network(name, folder, lambda vae: vae.encode(trial))
    _check_scaling(path, vae)
    pixels = pixels_per_latent(path)
    if side % pixels:
        raise invalid("data.image_size", side, f"a multiple of {pixels}, for vae", "change it")
    latent_shape = whole(path, vae.config, "latent_channels"), side // pixels, side // pixels
    return Encoder(vae).to(device).eval().requires_grad_(False), latent_shape


def _check_scaling(path: Path, vae: Any) -> None:
    """Refuse latents that are scaled by channel or by a factor of 0."""
    for key in ("latents_mean", "latents_std"):
        if (given := vae.config.get(key)) is not None:
            fix = "use an autoencoder whose latents are not normalized by channel"
            raise invalid(f"{path}: {key}", f"{given!r:.60}", "none", fix)
    if number(path, vae.config, "scaling_factor") == 0:
        raise invalid(f"{path}: scaling_factor", 0, "another number", "fetch it again")
    if vae.config.get("shift_factor") is not None:
        number(path, vae.config, "shift_factor")
