"""Read, check and write a classifier's `config.json`.

Every value is checked before it reaches a library. The layout is timm's
(`timm.models.save_for_hf`), in both of its forms: with `pretrained_cfg`, or with all fields on one
level. Arguments for the constructor of a network come from an allow-list, and their values are
numbers, booleans, short names or lists of those, because some arguments of timm and torchvision
load a file whose path they contain.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dmkd_fast.runtime.errors import UserError, invalid
from dmkd_fast.views.spec import InputSpec

SMALL_STEM = "small_stem_resnet"
"""Architecture name in files for a ResNet with a small stem; see `integrations/timm.py`."""
Stem = Literal["own", "conv3", "conv3_pool", "conv3_stride2"]
STEMS = get_args(Stem)[1:]

# Arguments of timm and torchvision that only shape the network, by the largest value allowed.
_RATES = """attention_dropout attn_drop_rate bn_eps drop_block_rate drop_connect_rate drop_path_rate
    drop_rate dropout head_init_scale norm_eps patch_drop_rate pos_drop_rate proj_drop_rate
    stochastic_depth_prob"""
_KINDS = """act_layer aa_layer always_partition aux_logits avg_down class_token conv_mlp distilled
    dynamic_img_pad dynamic_img_size fc_norm final_norm fused_attn global_pool head_norm_first
    init_weights layer_scale mlp_layer no_embed_class norm_layer pad_type patch_norm pool_type
    pos_embed pre_norm qk_norm qkv_bias scale_mlp scriptable stem_type strict_img_size swiglu_mlp
    transform_input use_abs_pos_emb use_fc_norm use_grn use_pos_embed use_rel_pos_bias
    use_rot_pos_emb zero_init_last"""
_COUNTS = """block_config block_reduce_first cardinality depth depths heads layers num_blocks
    num_heads output_stride reg_tokens"""
_SIZES = """base_width channel_multiplier channels depth_multiplier dims embed_dim embed_dims
    expand_ratio growth_rate head_dim head_hidden_size img_size init_values kernel_size kernel_sizes
    layer_scale_init_value ls_init_value mlp_ratio mlp_ratios num_features patch_size
    projection_dim stem_chs stem_size stem_width width width_factor width_mult widths window_ratio
    window_size"""
MODEL_ARGS = {
    name: largest
    for names, largest in ((_RATES, 1), (_KINDS, 1), (_COUNTS, 256), (_SIZES, 8192))
    for name in names.split()
}

Channels = Annotated[int, Field(ge=1, le=1024)]
Side = Annotated[int, Field(ge=1, le=8192)]
Shape = tuple[Channels, Side, Side]


@dataclass(frozen=True, kw_only=True)
class ClassifierSpec:
    """All that is needed to rebuild a classifier and to prepare its input."""

    architecture: str
    num_classes: int
    in_chans: int
    input_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float = 1.0
    interpolation: str = "bilinear"
    crop_mode: str = "center"
    model_args: dict[str, Any] = field(default_factory=dict)
    stem: str = "own"
    test_input_size: int | None = None
    """Input size of timm's published accuracy; kept for the file, otherwise unused."""
    label_names: tuple[str, ...] | None = None
    """Class names in the order of the outputs, if the file states them."""

    @property
    def input(self) -> InputSpec:
        """The images that the classifier expects."""
        return InputSpec(
            size=self.input_size,
            mean=self.mean,
            std=self.std,
            crop_pct=self.crop_pct,
            interpolation=self.interpolation,  # type: ignore[arg-type]  # InputSpec checks both
            crop_mode=self.crop_mode,  # type: ignore[arg-type]
        )

    def to_json(self) -> dict[str, Any]:
        """Return the spec in timm's hub layout, for `timm.create_model("local-dir:FOLDER")`."""
        name, args = self.architecture, {"in_chans": self.in_chans, **self.model_args}
        if self.stem != "own":
            name, args = SMALL_STEM, args | {"base": self.architecture, "stem": self.stem}
        inputs: dict[str, Any] = {
            "input_size": [self.in_chans, self.input_size, self.input_size],
            "mean": list(self.mean),
            "std": list(self.std),
            "num_classes": self.num_classes,
            "interpolation": self.interpolation,
            "crop_pct": self.crop_pct,
            "crop_mode": self.crop_mode,
        }
        if self.test_input_size is not None:
            inputs["test_input_size"] = [self.in_chans, *[self.test_input_size] * 2]
        names = {} if self.label_names is None else {"label_names": list(self.label_names)}
        return {
            "architecture": name,
            "num_classes": self.num_classes,
            "model_args": args,
            "stem": self.stem,
            **names,
            "pretrained_cfg": inputs,
        }

    @staticmethod
    def from_json(values: dict[str, Any]) -> ClassifierSpec:
        """Build a spec from the content of a `config.json`, written by `to_json` or by timm.

        Raises:
            UserError: A field is missing, or has an unexpected type or value.
        """
        file = _read(values)
        inputs, extra = file.pretrained_cfg, dict(file.model_args.model_extra or {})
        name, stem = file.architecture, file.stem
        if name == SMALL_STEM:
            name, stem = file.model_args.base or "", file.model_args.stem
        in_chans = file.model_args.in_chans or inputs.input_size[0]
        mean, std = inputs.mean, inputs.std
        if in_chans == 1 and len(mean) == len(std) == 3:  # timm writes three for gray images too
            mean, std = (sum(mean) / 3,), (sum(std) / 3,)
        if len(mean) != in_chans:
            expected = f"one for each of {in_chans} channels"
            raise invalid("mean", f"{len(mean)} numbers", expected)
        # Default of crop_pct: 0.875 in timm's files, the whole image in files of this package.
        default_crop = 1.0 if "stem" in values else 0.875
        tested = inputs.test_input_size
        sizes = [_square("input_size", inputs.input_size)]
        if tested is not None:
            sizes.append(_square("test_input_size", tested))
        names = file.label_names or inputs.label_names
        if names is not None and len(names) != file.num_classes:
            raise invalid("label_names", len(names), f"num_classes={file.num_classes}")
        check_model_args(extra)
        spec = ClassifierSpec(
            architecture=name,
            num_classes=file.num_classes,
            in_chans=in_chans,
            input_size=sizes[0],
            mean=mean,
            std=std,
            crop_pct=default_crop if inputs.crop_pct is None else inputs.crop_pct,
            interpolation=inputs.interpolation or "bilinear",
            crop_mode=inputs.crop_mode or "center",
            model_args=extra,
            stem=stem,
            test_input_size=sizes[1] if len(sizes) > 1 else None,
            label_names=names,
        )
        spec.input  # noqa: B018  # checks the ranges
        return spec


def stated_license(values: dict[str, Any]) -> str | None:
    """Return the license that a config.json states for its weights."""
    return _read(values).pretrained_cfg.license


def check_model_args(args: dict[str, Any]) -> None:
    """Reject constructor arguments that do more than shape the network.

    Raises:
        UserError: A name is not on the allow-list, or a value has another type or is too large.
    """
    for name, value in args.items():
        if name not in MODEL_ARGS:
            expected = "arguments that only shape the network, such as img_size or drop_path_rate"
            raise invalid("model_args", repr(name[:60]), expected, "remove it")
        if not _is_plain(value, MODEL_ARGS[name]):
            raise invalid(
                f"model_args: {name}",
                repr(str(value)[:60]),
                f"numbers up to {MODEL_ARGS[name]}, true, false, a short name, or a list of those",
            )


def _is_plain(value: Any, largest: float, depth: int = 2) -> bool:
    if isinstance(value, list | tuple):
        return (
            depth > 0
            and len(value) <= 256
            and all(_is_plain(each, largest, depth - 1) for each in value)
        )
    if isinstance(value, str):
        return re.fullmatch(r"\w{0,32}", value, re.ASCII) is not None
    if isinstance(value, int | float):
        return -largest <= value <= largest
    return value is None


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class _Args(_Part):
    model_config = ConfigDict(extra="allow")

    in_chans: Channels | None = None
    num_classes: int | None = None  # a duplicate of the top-level field in timm's files
    base: str | None = None
    stem: Stem = "own"


class _Inputs(_Part):
    input_size: Shape
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float | None = None
    crop_mode: Literal["center", "squash", "border"] | None = None
    interpolation: str | None = None
    test_input_size: Shape | None = None
    label_names: tuple[str, ...] | None = None
    license: str | None = None


class _File(_Part):
    architecture: Annotated[str, Field(max_length=200)]
    num_classes: Annotated[int, Field(ge=1, le=1_000_000)]
    model_args: _Args = _Args()
    stem: Stem = "own"
    label_names: tuple[str, ...] | None = None
    pretrained_cfg: _Inputs


def _read(values: dict[str, Any]) -> _File:
    if "architecture" not in values and "architectures" in values:
        raise UserError(
            "got the config of a transformers model, expected timm's layout; use timm's model of "
            "that kind, or save yours with timm.models.save_for_hf"
        )
    if values.get("num_classes") == 0:
        got = "0 classes, which is a feature extractor"
        raise invalid("num_classes", got, "a classifier", "use one with a trained head")
    if "pretrained_cfg" not in values:  # timm's first layout
        values = {**values, "pretrained_cfg": values, "label_names": values.get("labels")}
    try:
        return _File.model_validate_json(json.dumps(values))
    except ValidationError as error:
        problem = error.errors(include_input=True, include_url=False)[0]
        name = ".".join(map(str, problem["loc"])).removeprefix("pretrained_cfg.")
        if problem["type"] == "missing":
            raise UserError(f"{name}: missing") from None
        expected = problem["msg"].removeprefix("Input should be ")
        raise invalid(name, repr(str(problem["input"])[:60]), expected) from None


def _square(name: str, shape: tuple[int, int, int]) -> int:
    if shape[1] != shape[2]:
        got, fix = f"{shape[1]} x {shape[2]}", "use a model for square images"
        raise invalid(name, got, "a square, as views are square", fix)
    return shape[1]
