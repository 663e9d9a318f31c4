"""Loading and saving of every network: denoisers, teachers, students.

Stands on floor 2; the only file that imports diffusers or timm. A classifier on disk is a folder
with `config.json` (timm's hub layout) and `model.safetensors`; a denoiser is a diffusers folder
with `transformer/` and `scheduler/`. Weights are safetensors only: nothing is ever unpickled.
"""

from __future__ import annotations

import json
import logging
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

WEIGHTS, CONFIG = "model.safetensors", "config.json"


class LeNet5(nn.Module):
    """LeNet-5 as the zero-shot distillation literature uses it: ReLU, max-pooling, 32x32 input.

    Smaller images are padded with zeros. `width=0.5` is LeNet-5-half.
    Source: LeCun et al. 1998; Nayak et al. 2019 (arXiv 1905.08114).
    """

    def __init__(self, *, num_classes: int, in_chans: int, width: float = 1.0) -> None:
        super().__init__()
        c1, c2, c3, hidden = (int(n * width) for n in (6, 16, 120, 84))
        self.features = nn.Sequential(
            nn.Conv2d(in_chans, c1, 5), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(c1, c2, 5), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(c2, c3, 5), nn.ReLU(),
        )  # fmt: skip
        self.classifier = nn.Sequential(
            nn.Linear(c3, hidden), nn.ReLU(), nn.Linear(hidden, num_classes)
        )

    def forward(self, images: Tensor) -> Tensor:
        """(B, in_chans, H, W) with H, W <= 32 -> logits (B, num_classes)."""
        rows, columns = 32 - images.shape[-2], 32 - images.shape[-1]
        padding = (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2)
        return self.classifier(self.features(nn.functional.pad(images, padding)).flatten(1))


@dataclass(frozen=True, kw_only=True)
class ClassifierSpec:
    """What is needed to rebuild a classifier and to feed it."""

    architecture: str
    num_classes: int
    in_chans: int
    input_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    model_args: dict[str, Any] = field(default_factory=dict)
    stem: str = "own"

    def to_json(self) -> dict[str, Any]:
        """The spec in timm's hub layout (`local-dir:` reads it where the stem is its own)."""
        shape = [self.in_chans, self.input_size, self.input_size]
        return {
            "architecture": self.architecture,
            "num_classes": self.num_classes,
            "model_args": {"in_chans": self.in_chans, **self.model_args},
            "stem": self.stem,
            "pretrained_cfg": {
                "input_size": shape, "mean": list(self.mean), "std": list(self.std),
                "num_classes": self.num_classes, "interpolation": "bilinear",
            },
        }  # fmt: skip

    @staticmethod
    def from_json(values: dict[str, Any]) -> ClassifierSpec:
        """Inverse of `to_json`."""
        args = dict(values["model_args"])
        inputs = values["pretrained_cfg"]
        return ClassifierSpec(
            architecture=values["architecture"],
            num_classes=values["num_classes"],
            in_chans=args.pop("in_chans", inputs["input_size"][0]),
            input_size=inputs["input_size"][1],
            mean=tuple(inputs["mean"]),
            std=tuple(inputs["std"]),
            model_args=args,
            stem=values.get("stem", "own"),
        )


@dataclass(frozen=True, kw_only=True)
class Denoiser:
    """A diffusion model with what the sampler must know about it."""

    module: nn.Module
    """`module(latents, timesteps, labels)` -> prediction of the same shape."""
    scheduler: dict[str, Any]
    """The scheduler's own config, `_class_name` included."""
    num_classes: int
    null_class: int | None
    channels: int
    image_size: int


def build_classifier(spec: ClassifierSpec) -> nn.Module:
    """A new classifier with random weights.

    Raises:
        ValueError: timm knows no such architecture, or refuses the arguments.
    """
    if spec.architecture in ("lenet5", "lenet5_half"):
        width = 0.5 if spec.architecture == "lenet5_half" else 1.0
        return LeNet5(num_classes=spec.num_classes, in_chans=spec.in_chans, width=width)
    import timm

    if not timm.is_model(spec.architecture):
        close = timm.list_models(f"*{spec.architecture}*")[:5]
        raise ValueError(
            f"arch: got {spec.architecture!r}, expected lenet5, lenet5_half or a timm model"
            + (f" such as {', '.join(close)}" if close else "; see timm.list_models()")
        )
    try:
        model = timm.create_model(
            spec.architecture, pretrained=False, num_classes=spec.num_classes,
            in_chans=spec.in_chans, **spec.model_args,
        )  # fmt: skip
    except TypeError as error:
        raise ValueError(f"model_args of {spec.architecture}: {error}; change or remove") from None
    if spec.stem != "own":
        _use_small_stem(model, spec)
    return model


def save_classifier(model: nn.Module, spec: ClassifierSpec, folder: Path) -> None:
    """Write `config.json` and `model.safetensors` into an existing folder."""
    weights = {
        name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()
    }
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(spec.to_json(), indent=2) + "\n", encoding="utf-8")


def load_classifier(folder: Path, device: torch.device) -> tuple[nn.Module, ClassifierSpec]:
    """Read a classifier that `save_classifier` wrote; float32, in eval mode.

    Raises:
        ValueError: A file is missing, damaged or does not fit the architecture.
    """
    config = _read_json(folder / CONFIG)
    try:
        spec = ClassifierSpec.from_json(config)
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(
            f"{folder / CONFIG}: incomplete ({error!r}); save the model again"
        ) from None
    model = build_classifier(spec)
    load_weights(model, folder / WEIGHTS)
    return model.to(device).eval(), spec


def freeze(model: nn.Module) -> nn.Module:
    """Eval mode, and no parameter asks for a gradient."""
    return model.eval().requires_grad_(False)


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


class PixelDiT(nn.Module):
    """diffusers' DiT with a plain call: (latents, timesteps, labels) -> prediction."""

    def __init__(self, dit: Any) -> None:
        super().__init__()
        self.dit = dit

    def forward(self, latents: Tensor, timesteps: Tensor, labels: Tensor) -> Tensor:
        """(B, c, h, w), (B,) in [0, 1000), (B,) int64 -> (B, c, h, w)."""
        dit: Any = self.dit
        return dit(latents, timestep=timesteps, class_labels=labels).sample


def save_denoiser(dit: Any, scheduler: dict[str, Any], folder: Path) -> None:
    """Write a diffusers folder (`transformer/`, `scheduler/`) that diffusers itself can load."""
    target = folder / "transformer"
    target.mkdir(parents=True, exist_ok=True)
    # Shared embedders are written once per block, as diffusers expects to read them.
    weights = {k: v.detach().cpu().clone().half() for k, v in dit.state_dict().items()}
    save_file(weights, target / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    dit.save_config(target)
    (folder / "scheduler").mkdir(exist_ok=True)
    (folder / "scheduler" / "scheduler_config.json").write_text(
        json.dumps(scheduler, indent=2) + "\n", encoding="utf-8"
    )


def load_denoiser(folder: Path, device: torch.device) -> Denoiser:
    """Read a class-conditional pixel DiT in diffusers format; float32, frozen.

    Raises:
        ValueError: A file is missing, damaged, or of a model class that is not supported.
    """
    scheduler = _read_json(folder / "scheduler" / "scheduler_config.json")
    config = _read_json(folder / "transformer" / CONFIG)
    name = config.get("_class_name")
    if name != "DiTTransformer2DModel":
        raise ValueError(
            f"{folder / 'transformer' / CONFIG}: got _class_name {name!r}, "
            "expected DiTTransformer2DModel; use a class-conditional DiT"
        )
    if (folder / "vae").exists():
        raise ValueError(f"{folder}: got a latent model (vae/), expected one on pixels")
    dit = _diffusers().DiTTransformer2DModel.from_config(config)
    load_weights(dit, folder / "transformer" / "diffusion_pytorch_model.safetensors")
    for block in dit.transformer_blocks:
        block.norm1.emb.class_embedder.dropout_prob = 0.0
    num_classes = int(config["num_embeds_ada_norm"])
    return Denoiser(
        module=freeze(PixelDiT(dit).to(device)),
        scheduler=scheduler,
        num_classes=num_classes,
        null_class=num_classes,
        channels=int(config["in_channels"]),
        image_size=int(config["sample_size"]),
    )


def load_weights(model: nn.Module, path: Path) -> None:
    """Fill `model` from a safetensors file, strictly.

    Raises:
        ValueError: The file is missing, damaged, or its names or shapes differ from the model's.
    """
    if not path.is_file():
        raise ValueError(f"weights {path}: no such file; check the model's folder")
    try:
        weights = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"weights {path}: damaged ({error}); fetch or save them again") from None
    expected = model.state_dict()
    for name in expected.keys() | weights.keys():
        got = tuple(weights[name].shape) if name in weights else "nothing"
        want = tuple(expected[name].shape) if name in expected else "nothing"
        if got != want:
            raise ValueError(
                f"weights {path}: {name}: got {got}, expected {want}; "
                "the file belongs to another architecture or class count"
            )
    model.load_state_dict({name: value.to(expected[name].dtype) for name, value in weights.items()})


def _use_small_stem(model: Any, spec: ClassifierSpec) -> None:
    """Replace a ResNet's 7x7 stride-2 first convolution by a 3x3 one."""
    first = getattr(model, "conv1", None)
    if not isinstance(first, nn.Conv2d) or spec.stem not in ("conv3_pool", "conv3_stride2"):
        raise ValueError(
            f"stem: got {spec.stem!r} for {spec.architecture!r}, expected own, or conv3_pool or "
            "conv3_stride2 for a timm ResNet with a single first convolution; set stem=own"
        )
    stride = 2 if spec.stem == "conv3_stride2" else 1
    model.conv1 = nn.Conv2d(
        spec.in_chans, first.out_channels, 3, stride=stride, padding=1, bias=False
    )
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    if stride == 2:
        model.maxpool = nn.Identity()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}; check the model's folder") from None
    except ValueError:
        raise ValueError(f"{path}: not valid JSON; fetch or save the model again") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: got a JSON {type(values).__name__}, expected an object")
    return values


def _diffusers() -> Any:
    """Import diffusers without the warnings of packages it tries on the way."""
    # xformers, where installed for another torch build, prints a page about its missing kernels.
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    logging.getLogger("xformers").setLevel(logging.ERROR)
    import diffusers

    return diffusers
