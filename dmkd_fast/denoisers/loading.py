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

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dmkd_fast.denoisers.config_values import check_values, number, sides, whole
from dmkd_fast.denoisers.denoiser import Denoiser
from dmkd_fast.denoisers.dit import lean_dit
from dmkd_fast.denoisers.model_folders import (
    check_is_pipeline,
    load_strictly,
    num_stored,
    weight_files,
)
from dmkd_fast.denoisers.prompts import encode_prompts
from dmkd_fast.denoisers.wrappers import (
    ClassUNet,
    Decoder,
    Encoder,
    PixelDiT,
    TextUNet,
    import_diffusers,
)
from dmkd_fast.runtime.errors import UserError, invalid, one_line
from dmkd_fast.runtime.model_files import CONFIG, read_json, read_license


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
        folder: Folder with `scheduler/` and a class-conditional DiT in `transformer/` or a UNet in
            `unet/`; `vae/` for a model of latents, `text_encoder/` and `tokenizer/` for text.
        device: Device of the modules.
        prompts: Prompts, one per class; for text-to-image models only.
        decoder: Folder of another autoencoder to decode with, for example a tiny one.
        null_class: Class that stood for dropped labels when a UNet was trained, which its files do
            not record. The model then has one class less.
        lean: Whether to replace a DiT by a faster module for inference; False keeps diffusers'
            module, which is trainable.

    Raises:
        UserError: A part is missing, damaged, or of a kind that is not supported.
    """
    check_is_pipeline(folder)
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    part = next((name for name in ("transformer", "unet") if (folder / name).is_dir()), None)
    if part is None:
        raise invalid(f"{folder}", "neither transformer/ nor unet/", "one of them")
    config = read_json(folder / part / CONFIG)
    kind = config.get("_class_name")
    builders: dict[Any, Callable[..., Denoiser]] = {
        "DiTTransformer2DModel": partial(_load_dit, lean=lean),
        "UNet2DModel": _load_class_unet,
        "UNet2DConditionModel": partial(_load_text_unet, prompts=prompts or ()),
    }
    if not isinstance(kind, str) or kind not in builders:
        got, fix = f"_class_name {kind!r:.60}", "use a class-conditional or text-to-image model"
        raise invalid(f"{folder / part / CONFIG}", got, f"one of {', '.join(builders)}", fix)
    is_text = kind == "UNet2DConditionModel"
    if not (prompts if is_text else prompts is None):
        got = f"{len(prompts or ()) or 'no'} prompts for a {kind}"
        expected = "one per class for text-to-image models and none for others"
        raise invalid("prompts", got, expected, "change denoiser.prompts")
    denoiser = builders[kind](folder, config, scheduler)
    if null_class is not None:
        denoiser = _with_null_class(denoiser, null_class)
    vae = decoder if decoder is not None else folder / "vae"
    if vae.is_dir():
        denoiser = _with_decoder(denoiser, vae)
    elif decoder is not None:
        raise UserError(f"decoder: {decoder}: no such folder; check denoiser.decoder")
    elif denoiser.latent_shape[0] not in (1, 3):
        got = f"a model of {denoiser.latent_shape[0]}-channel latents without vae/"
        raise invalid(f"{folder}", got, "an autoencoder there", "fetch it, or set denoiser.decoder")
    for module in (denoiser.module, denoiser.decoder):
        if module is not None:
            module.to(device).eval().requires_grad_(False)
    return replace(denoiser, license=read_license(folder))


def _load_dit(
    folder: Path, config: dict[str, Any], scheduler: dict[str, Any], *, lean: bool
) -> Denoiser:
    path = folder / "transformer" / CONFIG
    files, _ = weight_files(folder / "transformer")
    size, _ = sides(path, config, "sample_size", 32)
    patch = whole(path, config, "patch_size", 2)
    if size % patch:
        multiple = f"a multiple of the patch size {patch}"
        raise invalid(f"{path}: sample_size", size, multiple, "fetch it again")
    model_class = import_diffusers().DiTTransformer2DModel
    shape = (_channels(path, {"in_channels": 4} | config), size, size)
    _check_config(
        model_class,
        path,
        config,
        files,
        lambda dit: dit(torch.zeros(1, *shape), torch.zeros(1), torch.zeros(1, dtype=torch.int64)),
    )
    dit = model_class.from_config(config)
    number(path, dit.config, "norm_eps")
    load_strictly(dit, files)
    for block in dit.transformer_blocks:
        block.norm1.emb.class_embedder.dropout_prob = 0.0
    num_classes = whole(path, dit.config, "num_embeds_ada_norm")
    return Denoiser(
        module=(lean_dit(dit) if lean else None) or PixelDiT(dit),
        scheduler=scheduler,
        num_classes=num_classes,
        null_class=num_classes,
        latent_shape=shape,
    )


def _load_class_unet(folder: Path, config: dict[str, Any], scheduler: dict[str, Any]) -> Denoiser:
    path = folder / "unet" / CONFIG
    num_classes, kind = config.get("num_class_embeds"), config.get("class_embed_type")
    if not num_classes or kind is not None:
        got = f"num_class_embeds={num_classes!r:.60}, class_embed_type={kind!r:.60}"
        raise invalid(f"{path}", got, "a table of classes", "use a class-conditional model")
    num_classes = whole(path, config, "num_class_embeds")
    shape = (_channels(path, config), *sides(path, config, "sample_size"))
    unet = _pretrained(
        "UNet2DModel",
        folder / "unet",
        lambda unet: unet(
            torch.zeros(1, *shape), torch.zeros(1), class_labels=torch.zeros(1, dtype=torch.int64)
        ),
    )
    return Denoiser(
        module=ClassUNet(unet), scheduler=scheduler, num_classes=num_classes, latent_shape=shape
    )


def _load_text_unet(
    folder: Path, config: dict[str, Any], scheduler: dict[str, Any], *, prompts: Sequence[str]
) -> Denoiser:
    path = folder / "unet" / CONFIG
    shape = (_channels(path, config), *sides(path, config, "sample_size"))
    width = whole(path, config, "cross_attention_dim")
    guidance = None
    if config.get("time_cond_proj_dim") is not None:
        guidance = whole(path, config, "time_cond_proj_dim")
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
    return Denoiser(
        module=TextUNet(unet, encode_prompts(folder, [*prompts, ""])),
        scheduler=scheduler,
        num_classes=len(prompts),
        null_class=len(prompts),
        latent_shape=shape,
        takes_guidance=guidance is not None,
    )


def _channels(path: Path, config: dict[str, Any]) -> int:
    """Return the number of channels of a denoiser's latents."""
    channels = whole(path, config, "in_channels")
    made = config.get("out_channels") or channels
    if made not in (channels, 2 * channels):
        got = f"{channels} input and {made!r:.60} output channels"
        fix = "use a model that is not for inpainting or upscaling"
        raise invalid(f"{path}", got, "as many or twice as many", fix)
    return channels


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
    if name not in ("AutoencoderKL", "AutoencoderTiny"):
        got, expected = f"_class_name {name!r:.60}", "AutoencoderKL or AutoencoderTiny"
        raise invalid(f"{path}", got, expected, "use another decoder")
    channels, height, width = denoiser.latent_shape
    if (given := config.get("latent_channels", 4)) != channels:
        got, expected = f"{given!r:.60} latent channels", f"the denoiser's {channels}"
        raise invalid(f"{path}", got, expected, "use the autoencoder that belongs to it")
    vae = _pretrained(name, folder, lambda vae: vae.decode(torch.zeros(1, *denoiser.latent_shape)))
    _check_scaling(path, vae)
    made = whole(path, vae.config, "out_channels")
    if made not in (1, 3):
        raise invalid(f"{path}: out_channels", made, "1 or 3", "use another decoder")
    pixels = 2 ** (len(vae.config.block_out_channels) - 1)
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
    vae = _pretrained(name, folder, lambda vae: vae.encode(trial))
    _check_scaling(path, vae)
    pixels = 2 ** (len(vae.config.block_out_channels) - 1)
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
    check_values(path, config, model_class)
    try:
        with torch.device("meta"):
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


def _pretrained(name: str, folder: Path, trial: Callable[[Any], object]) -> Any:
    """Load a diffusers model from safetensors files that fit it exactly."""
    files, variant = weight_files(folder)
    model_class = getattr(import_diffusers(), name)
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
