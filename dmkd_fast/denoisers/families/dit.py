"""Class-conditional DiTs, of pixels or of latents, for example facebook/DiT-XL-2-256."""

from __future__ import annotations

import torch

from dmkd_fast.denoisers.config_values import number, whole
from dmkd_fast.denoisers.denoiser import Denoiser
from dmkd_fast.denoisers.dit import lean_dit
from dmkd_fast.denoisers.families.folder import ModelFolder
from dmkd_fast.denoisers.model_folders import load_strictly, weight_files
from dmkd_fast.denoisers.networks import check_config
from dmkd_fast.denoisers.wrappers import PixelDiT, import_diffusers


def load(model: ModelFolder) -> Denoiser:
    """Load a `DiTTransformer2DModel`, as a `LeanDiT` where that computes the same."""
    path, config = model.config_path, model.config
    files, _ = weight_files(path.parent)
    size, _ = model.sides(32, multiple=whole(path, config, "patch_size", 2))
    model_class = import_diffusers().DiTTransformer2DModel
    shape = (model.channels(4), size, size)
    check_config(
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
        module=(lean_dit(dit) if model.lean else None) or PixelDiT(dit),
        scheduler=model.scheduler,
        num_classes=num_classes,
        null_class=num_classes,
        latent_shape=shape,
    )
