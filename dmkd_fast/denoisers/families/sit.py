"""Class-conditional flow transformers in the layout of SiT, for example SiT-XL/2.

The network is a DiT. Its time runs from 0 (noise) to 1 (image), and it predicts image - noise, so
this module reverses the time and the sign.

Shapes: c channels, D width, T tokens, L blocks, p patch size.

Source: Ma et al., SiT (arXiv 2401.08740).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dmkd_fast.denoisers.config_values import MOST_LAYERS, number, whole
from dmkd_fast.denoisers.denoiser import Denoiser
from dmkd_fast.denoisers.dit import LeanDiT
from dmkd_fast.denoisers.families.flow import FLOW
from dmkd_fast.denoisers.families.folder import ModelFolder
from dmkd_fast.denoisers.model_folders import read_weights, weight_files
from dmkd_fast.runtime.errors import invalid

MOST_TIMESTEPS = 1_000_000


def load(model: ModelFolder) -> Denoiser:
    """Load a SiT of any size as a `LeanDiT`."""
    path, config = model.config_path, model.config
    if not model.lean:
        fix = "use a model that dmkd can train"
        raise invalid(f"{path}", "a SiT, which is for sampling only", "a DiT or a UNet", fix)
    kind = model.scheduler.get("_class_name")
    if kind != FLOW:
        fix = "write that scheduler_config.json beside it"
        raise invalid(f"{path}", f"a SiT with {kind!r:.60}", FLOW, fix)
    ratio = number(path, config, "mlp_ratio", 4.0)
    if ratio != 4 or config.get("norm_type", "ln") != "ln":
        got = f"mlp_ratio={ratio}, norm_type={config.get('norm_type')!r:.60}"
        raise invalid(f"{path}", got, "4 and 'ln'", "use another model")
    channels, patch = whole(path, config, "in_channels", 4), whole(path, config, "patch_size", 2)
    size = whole(path, config, "input_size", 32, high=2048)
    width, heads = whole(path, config, "hidden_size", 1152), whole(path, config, "num_heads", 16)
    for name, value, part in (("input_size", size, patch), ("hidden_size", width, heads)):
        if value % part:
            raise invalid(f"{path}: {name}", value, f"a multiple of {part}", "fetch it again")
    classes = whole(path, config, "num_classes", 1000)
    has_null = number(path, config, "class_dropout_prob", 0.1) > 0
    made = 2 * channels if config.get("learn_sigma", True) else channels
    layers = whole(path, config, "depth", 28, high=MOST_LAYERS)
    shapes = _shapes(width, layers, (size // patch) ** 2, classes + has_null, patch, channels, made)
    files, _ = weight_files(path.parent)
    weights = read_weights(files, shapes)
    with torch.device("meta"):
        dit = LeanDiT(
            {
                "num_attention_heads": heads,
                "attention_head_dim": width // heads,
                "num_layers": layers,
                "patch_size": patch,
                "in_channels": channels,
                "sample_size": size,
                "num_embeds_ada_norm": classes + has_null - 1,
                "norm_eps": 1e-6,
            }
        )
    dit.load_state_dict(_renamed(weights, layers, patch, channels), assign=True)
    dit.wave_span = 128
    dit.reversed_time = whole(
        "scheduler", model.scheduler, "num_train_timesteps", 1000, high=MOST_TIMESTEPS
    )
    return Denoiser(
        module=dit,
        scheduler=model.scheduler,
        num_classes=classes,
        null_class=classes if has_null else None,
        latent_shape=(channels, size, size),
    )


def _shapes(
    width: int, layers: int, tokens: int, labels: int, patch: int, channels: int, made: int
) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of all weights, as SiT's own code has them."""
    shapes: dict[str, tuple[int, ...]] = {
        "pos_embed": (1, tokens, width),
        "x_embedder.proj.weight": (width, channels, patch, patch),
        "x_embedder.proj.bias": (width,),
        "y_embedder.embedding_table.weight": (labels, width),
    }
    linear = {
        "t_embedder.mlp.0": (width, 256),
        "t_embedder.mlp.2": (width, width),
        "final_layer.adaLN_modulation.1": (2 * width, width),
        "final_layer.linear": (patch * patch * made, width),
    }
    for i in range(layers):
        linear |= {
            f"blocks.{i}.attn.qkv": (3 * width, width),
            f"blocks.{i}.attn.proj": (width, width),
            f"blocks.{i}.mlp.fc1": (4 * width, width),
            f"blocks.{i}.mlp.fc2": (width, 4 * width),
            f"blocks.{i}.adaLN_modulation.1": (6 * width, width),
        }
    for name, shape in linear.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes


def _renamed(
    weights: Mapping[str, Tensor], layers: int, patch: int, channels: int
) -> dict[str, Tensor]:
    """Return the weights under the names of `LeanDiT`, with the sign of the output reversed."""
    state: dict[str, Any] = {
        "positions": weights["pos_embed"],
        "labels.weight": weights["y_embedder.embedding_table.weight"],
    }
    linear = {
        "patchify": "x_embedder.proj",
        "time_in": "t_embedder.mlp.0",
        "time_out": "t_embedder.mlp.2",
    }
    parts = {"qkv": "attn.qkv", "project": "attn.proj", "up": "mlp.fc1", "down": "mlp.fc2"}
    for i in range(layers):
        linear |= {f"blocks.{i}.{ours}": f"blocks.{i}.{part}" for ours, part in parts.items()}
    for kind in ("weight", "bias"):
        state |= {f"{ours}.{kind}": weights[f"{name}.{kind}"] for ours, name in linear.items()}
        rows = [weights[f"blocks.{i}.adaLN_modulation.1.{kind}"] for i in range(layers)]
        last = weights[f"final_layer.adaLN_modulation.1.{kind}"]
        state[f"modulation.{kind}"] = torch.cat([*rows, last])
        # Further channels of the output are variances, which no sampler of flows reads.
        out = weights[f"final_layer.linear.{kind}"].unflatten(0, (patch * patch, -1))
        state[f"out.{kind}"] = -out[:, :channels].flatten(0, 1)
    state["patchify.weight"] = state["patchify.weight"].flatten(1)
    return state
