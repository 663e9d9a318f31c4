"""Give the weights in a single file the names of a folder: Stable Diffusion 1.x and SiT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from dmkd_fast.denoisers.config_values import check_values, whole
from dmkd_fast.denoisers.wrappers import import_diffusers
from dmkd_fast.runtime.errors import UserError, invalid
from dmkd_fast.runtime.model_files import CONFIG, read_json

SIT = "SiTTransformer2DModel"


def split_single_file(weights: dict[str, Tensor], configs: Path) -> dict[str, dict[str, Tensor]]:
    """Return the weights of each part: transformer/ of SiT, or unet/, vae/ and text_encoder/.

    Args:
        weights: Content of a file in the layout of Stable Diffusion's or SiT's own code.
        configs: Folder in diffusers format whose configs belong to the file.

    Raises:
        UserError: The file has another layout, or the configs do not belong to it.
    """
    transformer = configs / "transformer" / CONFIG
    if transformer.is_file() and read_json(transformer).get("_class_name") == SIT:
        return {"transformer": weights}  # `load_denoiser` checks the names
    diffusers = import_diffusers()
    from diffusers.loaders import single_file_utils

    names: Any = single_file_utils

    for prefix in ("model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer."):
        if not any(name.startswith(prefix) for name in weights):
            first = next(iter(weights))
            fix = "load it with diffusers' from_single_file and call save_pretrained(FOLDER)"
            raise invalid("single file", f"{first!r:.60}", f"weights below {prefix[:-1]}", fix)
    config: dict[str, dict[str, Any]] = {}
    for part, kind in (("unet", "UNet2DConditionModel"), ("vae", "AutoencoderKL")):
        path = configs / part / CONFIG
        config[part] = read_json(path)
        check_values(path, config[part], getattr(diffusers, kind))
    config["unet"]["layers_per_block"] = whole(
        configs / "unet" / CONFIG, config["unet"], "layers_per_block", 2
    )
    try:
        return {
            "unet": names.convert_ldm_unet_checkpoint(dict(weights), config["unet"]),
            "vae": names.convert_ldm_vae_checkpoint(dict(weights), config["vae"]),
            "text_encoder": names.convert_ldm_clip_checkpoint(dict(weights)),
        }
    except (KeyError, IndexError, AttributeError) as error:
        raise UserError(
            f"{configs}: got configs of another model than the single file ({error}); give those "
            "of this model"
        ) from None
