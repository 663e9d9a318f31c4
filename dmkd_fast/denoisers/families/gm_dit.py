"""One-step class-conditional models of pi-Flow: a DiT that predicts a Gaussian mixture.

The network is called once, at the noise level 1. Its mixture of velocities is a mixture of images,
whose posterior mean has a closed form at every lower noise level, so many small Euler steps from
noise to image need no further call.

Shapes: B batch, c channels, h x w latent cells, G Gaussians, D width, L blocks, p patch size.

Source: Chen et al., pi-Flow (arXiv 2510.14974), section 4 and appendix B.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dmkd_fast.denoisers.config_values import MOST_LAYERS, number, whole
from dmkd_fast.denoisers.denoiser import Denoiser
from dmkd_fast.denoisers.dit import LeanDiT, lean_state
from dmkd_fast.denoisers.families.flow import FLOW
from dmkd_fast.denoisers.families.folder import ModelFolder
from dmkd_fast.denoisers.model_folders import read_weights, weight_files
from dmkd_fast.denoisers.wrappers import import_diffusers
from dmkd_fast.runtime.errors import invalid

# Euler steps from noise to image, as the published configs have them.
SUBSTEPS = 128
_TRANSFORMER = {"num_attention_heads": 16, "attention_head_dim": 72, "num_layers": 28}
_LATENTS = {"in_channels": 4, "patch_size": 2, "num_embeds_ada_norm": 1000}
SIZES = {"num_gaussians": 16, "logstd_inner_dim": 1024, **_TRANSFORMER, **_LATENTS}


class GMDiT(LeanDiT):
    """A DiT that predicts a Gaussian mixture, followed to the image.

    Args:
        config: Config of the network.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        count, channels = int(config["num_gaussians"]), int(config["in_channels"])
        super().__init__(config | {"out_channels": count * (channels + 1)})
        self.num_gaussians, self.channels = count, channels
        width, inner = self.num_heads * self.head_dim, int(config["logstd_inner_dim"])
        layers = [nn.SiLU(), nn.Linear(width, inner), nn.SiLU(), nn.Linear(inner, 1)]
        self.deviation = nn.Sequential(*layers)
        self.wave_span = 128

    def forward(self, latents: Tensor, timesteps: Tensor, labels: Tensor) -> Tensor:
        """Return the average velocity from noise to image, (B, c, h, w) float32.

        Args:
            latents: Noise, (B, c, h, w).
            timesteps: (B,).
            labels: (B,) int64.
        """
        count = self.num_gaussians * self.channels
        output = super().forward(latents, timesteps, labels).float()
        noise = latents.float()
        means = output[:, :count].unflatten(1, (self.num_gaussians, self.channels))
        means = noise[:, None] - means  # of images, (B, G, c, h, w)
        logits = output[:, count:, None].log_softmax(dim=1)  # (B, G, 1, h, w)
        logs = self.deviation(self._condition(timesteps, labels)).float()
        variance = (2 * logs).exp()[:, :, None, None]  # (B, 1, 1, 1), the same for all Gaussians
        squares = means.square().sum(dim=2, keepdim=True)
        x = noise
        for step in range(SUBSTEPS):
            level = 1 - step / SUBSTEPS
            ratio = (1 - level) / level
            pull = ratio / level * x  # precision-weighted state
            spread = variance * ratio**2 + 1
            fit = (means * pull[:, None]).sum(dim=2, keepdim=True) - 0.5 * ratio**2 * squares
            weights = (logits + fit / spread[:, None]).softmax(dim=1)
            image = (variance * pull + (weights * means).sum(dim=1)) / spread
            x = x + (image - x) / (level * SUBSTEPS)
        return noise - x


def load(model: ModelFolder) -> Denoiser:
    """Load a `GMDiTTransformer2DModelV2`, which makes images in one step without guidance."""
    path, config = model.config_path, model.config
    kind = model.scheduler.get("_class_name")
    given = model.lean, kind, config.get("constant_logstd"), config.get("gm_num_logstd_layers", 2)
    if given != (True, FLOW, None, 2):
        got = f"pi-Flow with {kind!r:.60}, constant_logstd={given[2]!r:.60}"
        expected = f"{FLOW} and no constant_logstd, for sampling only"
        raise invalid(f"{path}", got, expected, "use another model")
    values: dict[str, Any] = {
        key: whole(path, config, key, default, high=MOST_LAYERS if key == "num_layers" else 65_536)
        for key, default in SIZES.items()
    }
    patch, channels = values["patch_size"], values["in_channels"]
    size, _ = model.sides(32, multiple=patch)
    values |= {"sample_size": size, "norm_eps": number(path, config, "norm_eps", 1e-5)}
    width = values["num_attention_heads"] * values["attention_head_dim"]
    weights = read_weights(weight_files(path.parent)[0], _shapes(values, width))
    embed = import_diffusers().models.embeddings.PatchEmbed(
        height=size, width=size, patch_size=patch, in_channels=channels, embed_dim=width
    )
    state = lean_state(weights, embed.pos_embed, "emb.", values["num_layers"])
    for kind in ("weight", "bias"):
        parts = [weights[f"proj_out_{part}.{kind}"] for part in ("means", "logweights")]
        rows = [part.unflatten(0, (patch * patch, -1)) for part in parts]
        state[f"out.{kind}"] = torch.cat(rows, dim=1).flatten(0, 1)
        for place in (1, 3):
            state[f"deviation.{place}.{kind}"] = weights[f"proj_out_logstds.{place}.{kind}"]
    with torch.device("meta"):
        dit = GMDiT(values)
    dit.load_state_dict(state, assign=True)
    return Denoiser(
        module=dit,
        scheduler=model.scheduler | {"distilled_steps": 1},
        num_classes=values["num_embeds_ada_norm"],
        latent_shape=(channels, size, size),
        num_steps=1,
    )


def _shapes(values: dict[str, Any], width: int) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of all weights, as pi-Flow's own code has them."""
    cells, channels = values["patch_size"] ** 2, values["in_channels"]
    inner, count = values["logstd_inner_dim"], values["num_gaussians"]
    shapes: dict[str, tuple[int, ...]] = {
        "pos_embed.proj.weight": (width, channels, values["patch_size"], values["patch_size"]),
        "pos_embed.proj.bias": (width,),
        "emb.class_embedder.embedding_table.weight": (values["num_embeds_ada_norm"] + 1, width),
    }
    linear = {
        "emb.timestep_embedder.linear_1": (width, 256),
        "emb.timestep_embedder.linear_2": (width, width),
        "proj_out_1": (2 * width, width),
        "proj_out_means": (cells * count * channels, width),
        "proj_out_logweights": (cells * count, width),
        "proj_out_logstds.1": (inner, width),
        "proj_out_logstds.3": (1, inner),
    }
    for i in range(values["num_layers"]):
        block = f"transformer_blocks.{i}."
        linear |= {f"{block}attn1.{part}": (width, width) for part in ("to_q", "to_k", "to_v")}
        linear |= {
            f"{block}norm1.linear": (6 * width, width),
            f"{block}attn1.to_out.0": (width, width),
            f"{block}ff.net.0.proj": (4 * width, width),
            f"{block}ff.net.2": (width, 4 * width),
        }
    for name, shape in linear.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes
