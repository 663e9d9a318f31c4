"""Typed, frozen, strict settings; YAML files mirror the classes below exactly.

Stands on floor 0. `load` reads a file and applies `section.field=value` overrides; every mistake
becomes one `ConfigError` line that says where, what was got, what was expected and what to change.
Settings stop at the builders (`distill.py`, `pretrain.py`): nothing below ever sees them.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator


class ConfigError(ValueError):
    """A setting that cannot be used; the message is one line for the user."""


class Section(BaseModel):
    """Base of all settings: frozen, unknown keys refused, defaults checked."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False
    )


class DenoiserConfig(Section):
    """Where the diffusion model comes from."""

    path: str
    """Directory in diffusers format, or `embedded:NAME` for one shipped with the package."""


class SamplerConfig(Section):
    """How images are made."""

    num_steps: int = Field(8, ge=1, le=1000)
    """Denoising steps per image."""
    solver: Literal["euler", "dpm++2m"] = "dpm++2m"
    """First order (Euler for flow models, DDIM for others) or second order at the same cost."""
    guidance_scale: float = Field(1.5, ge=1.0)
    """Classifier-free guidance; 1 means none (and half the cost)."""
    micro_batch_images: int = Field(256, ge=1)
    """Images denoised together; part of what fixes an image's bits."""
    compile: bool | Literal["auto"] = "auto"
    """torch.compile of the denoiser; auto: where the machine has what that needs."""


class RingConfig(Section):
    """The buffer of generated images."""

    capacity_images: int = Field(ge=1)
    """Slots; each takes channels * H * W bytes."""
    min_fill_images: int = Field(ge=1)
    """Images in the ring before the first student step."""
    samples_per_insert: float = Field(gt=0)
    """Reuse: views drawn per generated image."""


class ViewsConfig(Section):
    """Random views that teacher and student see."""

    size: int = Field(ge=1)
    """Side of a view, in pixels."""
    scale: tuple[float, float] = (1.0, 1.0)
    """Range of the crop's area as a share of the image's area."""
    ratio: tuple[float, float] = (1.0, 1.0)
    """Range of the crop's aspect ratio (width / height)."""
    pad: int = Field(0, ge=0)
    """Black pixels on each side that a crop may reach into."""
    flip: float = Field(0.5, ge=0.0, le=1.0)
    """Probability of a horizontal flip."""

    @model_validator(mode="after")
    def _ranges(self) -> ViewsConfig:
        for name in ("scale", "ratio"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(
                    f"{name}: got [{low}, {high}], expected 0 < low <= high; put the smaller first"
                )
        return self


class ClassifierConfig(Section):
    """A classifier: a saved one (`path`) or a new one (`arch`)."""

    path: str | None = None
    """Directory with config.json and model.safetensors, or `embedded:NAME`."""
    arch: str | None = None
    """`lenet5`, `lenet5_half` or any timm model name."""
    model_args: dict[str, Any] = {}
    """Further keyword arguments of the timm model."""
    stem: Literal["own", "conv3_pool", "conv3_stride2"] = "own"
    """First layers of a timm ResNet: its own (for 224 pixels); for small images a 3x3 convolution
    with stride 1 and the pooling after it, or a 3x3 convolution with stride 2 without pooling."""

    @model_validator(mode="after")
    def _one_source(self) -> ClassifierConfig:
        if (self.path is None) == (self.arch is None):
            raise ValueError(
                f"got path={self.path!r} and arch={self.arch!r}, expected exactly one of the two; "
                "set path for saved weights or arch for a new model"
            )
        if self.path is not None and (self.model_args or self.stem != "own"):
            raise ValueError(
                "got model_args or stem beside path, expected neither: a saved model "
                "carries its own; remove them or set arch"
            )
        return self


class LossConfig(Section):
    """T^2 * KL(softmax(teacher / T) || softmax(student / T)), mean over the batch."""

    temperature: float = Field(4.0, gt=0)


class OptimConfig(Section):
    """Optimizer and learning-rate schedule (linear warm-up, then cosine to zero)."""

    name: Literal["sgd", "adamw"] = "adamw"
    lr: float = Field(gt=0)
    """Peak learning rate."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """SGD momentum (Nesterov), or AdamW's beta1."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled for AdamW; never on biases and normalisation."""
    warmup: float = Field(0.05, ge=0, lt=1)
    """Share of all steps with a rising learning rate."""
    ema_decay: float = Field(0.0, ge=0, lt=1)
    """Decay per step of the averaged weights that are evaluated and saved; 0 turns it off."""
    max_grad_norm: float = Field(0.0, ge=0)
    """Gradients are scaled down to this norm; 0 turns it off."""


class TrainConfig(Section):
    """Length and rhythm of a training."""

    batch_size: int = Field(ge=1)
    """Views per optimizer step."""
    num_views: int = Field(ge=1)
    """Views seen by the student (or model) in all."""
    compile: bool | Literal["auto"] = "auto"
    """torch.compile of what is trained and its teacher; auto: on CUDA."""
    checkpoint_every_s: float = Field(600.0, gt=0)
    """Seconds between checkpoints; one is always written at the end and on Ctrl-C."""
    log_every_steps: int = Field(50, ge=1)
    """Optimizer steps between log lines; the only place where the device is waited for."""


class EvalConfig(Section):
    """The real test set; it decides nothing, it only reports."""

    path: str
    """Directory with idx files, or `embedded:NAME`."""
    num_points: int = Field(8, ge=1)
    """Evaluations during a run, the last one included."""


class RunConfig(Section):
    """What every job has."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the job; run directories start with it."""
    seed: int = Field(0, ge=0, lt=2**63)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Compute dtype of models; auto: float16 on CUDA, bfloat16 on a CPU that multiplies it."""
    num_threads: int = Field(0, ge=0)
    """CPU threads; 0 means all cores this process may use."""
    run_dir: str = "auto"
    """Where results go; auto: runs/NAME-DATE-TIME."""


class DistillConfig(RunConfig):
    """Online generate-and-distill: `dmkd distill`."""

    denoiser: DenoiserConfig
    sampler: SamplerConfig = SamplerConfig()
    ring: RingConfig
    views: ViewsConfig
    teacher: ClassifierConfig
    student: ClassifierConfig
    loss: LossConfig = LossConfig()
    optim: OptimConfig
    train: TrainConfig
    eval: EvalConfig

    @model_validator(mode="after")
    def _fits_together(self) -> DistillConfig:
        block, ring = self.sampler.micro_batch_images, self.ring
        if ring.capacity_images < 2 * block:
            raise ValueError(
                f"ring.capacity_images: got {ring.capacity_images}, expected at least two blocks "
                f"of sampler.micro_batch_images={block}; raise the capacity to {2 * block} or "
                "lower micro_batch_images"
            )
        if ring.capacity_images < self.train.batch_size:
            raise ValueError(
                f"ring.capacity_images: got {ring.capacity_images}, expected at least "
                f"train.batch_size={self.train.batch_size}; raise the capacity or lower the batch"
            )
        if ring.min_fill_images > ring.capacity_images - block:
            raise ValueError(
                f"ring.min_fill_images: got {ring.min_fill_images}, expected at most "
                f"{ring.capacity_images - block} (capacity_images less one block); lower it"
            )
        if ring.min_fill_images < self.train.batch_size:
            raise ValueError(
                f"ring.min_fill_images: got {ring.min_fill_images}, expected at least "
                f"train.batch_size={self.train.batch_size}; raise it"
            )
        if ring.min_fill_images * ring.samples_per_insert < self.train.batch_size:
            raise ValueError(
                f"ring.samples_per_insert: got {ring.samples_per_insert}, which allows fewer views "
                "than one batch after the first fill and would wait for ever; raise it or "
                "min_fill_images"
            )
        return self


class PretrainConfig(RunConfig):
    """What all kinds of pretraining share."""

    optim: OptimConfig
    train: TrainConfig


class TeacherConfig(PretrainConfig):
    """A classifier on real images: `dmkd pretrain teacher`."""

    mean: float = 0.0
    """Pixel mean (of values in [0, 1]) that inputs are normalised with."""
    std: float = Field(1.0, gt=0)
    model: ClassifierConfig
    views: ViewsConfig
    label_smoothing: float = Field(0.0, ge=0, lt=1)


class PretrainDenoiserConfig(PretrainConfig):
    """A class-conditional pixel DiT on real images: `dmkd pretrain denoiser`."""

    patch_size: int = Field(4, ge=1)
    num_layers: int = Field(ge=1)
    num_heads: int = Field(ge=1)
    head_dim: int = Field(ge=2)
    label_dropout: float = Field(0.1, gt=0, lt=1)
    """Share of examples trained with the null class, which guidance needs."""


class PretrainFewstepConfig(PretrainConfig):
    """A denoiser taught to make in few steps what it makes in many: `dmkd pretrain fewstep`."""

    denoiser: DenoiserConfig
    """Where to start from; it is the teacher as well."""
    sampler: SamplerConfig
    """How the teacher makes its trajectories; its guidance is folded into the result."""
    num_steps: int = Field(4, ge=1)
    """Steps of the result; sampler.num_steps must be a multiple."""
    pool_images: int = Field(8192, ge=1)
    """Trajectories kept at a time, float16 on the device."""
    reuse: int = Field(4, ge=1)
    """Passes over the pool before it is made anew."""

    @model_validator(mode="after")
    def _fits_together(self) -> PretrainFewstepConfig:
        if self.sampler.num_steps % self.num_steps:
            raise ValueError(
                f"num_steps: got {self.num_steps}, expected a divisor of "
                f"sampler.num_steps={self.sampler.num_steps}; change one of the two"
            )
        if self.pool_images * self.num_steps % self.train.batch_size:
            raise ValueError(
                f"train.batch_size: got {self.train.batch_size}, expected a divisor of "
                f"pool_images * num_steps={self.pool_images * self.num_steps}; change one"
            )
        return self


C = TypeVar("C", bound=RunConfig)


def load(kind: type[C], path: str | Path, overrides: list[str] | None = None) -> C:
    """Read a YAML file as `kind` and apply overrides.

    Args:
        kind: The settings class the file mirrors.
        path: YAML file.
        overrides: `section.field=value` strings; values are parsed as YAML.

    Raises:
        ConfigError: The file is missing or not YAML, a key is unknown, a value has the wrong type
            or range, or settings contradict each other.
    """
    return _validate(kind, apply_overrides(_read_yaml(Path(path)), overrides or []), str(path))


@contextmanager
def user_errors() -> Iterator[None]:
    """Errors of loading what the settings name become ConfigError: one line, no traceback."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise ConfigError(" ".join(str(error).split())) from None


def dump(config: RunConfig) -> str:
    """All settings as YAML that `load` reads back unchanged."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def apply_overrides(values: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """Set `section.field=value` entries in nested dictionaries."""
    for text in overrides:
        key, equals, raw = text.partition("=")
        if not equals or not key:
            raise ConfigError(
                f"override {text!r}: expected section.field=value, for example sampler.num_steps=4"
            )
        *sections, field = key.split(".")
        target = values
        for name in sections:
            target = target.setdefault(name, {})
            if not isinstance(target, dict):
                raise ConfigError(f"override {text!r}: {name} is a value, not a section")
        try:
            target[field] = yaml.safe_load(raw)
        except yaml.YAMLError:
            raise ConfigError(f"override {text!r}: the value is not valid YAML; quote it") from None
    return values


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"config {path}: {error.strerror or error}; give the path of a YAML file (see configs/)"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()
        raise ConfigError(
            f"config {path}: not valid YAML ({reason[0]} ... {reason[-1].strip()})"
        ) from None
    if not isinstance(values, dict):
        raise ConfigError(f"config {path}: got {type(values).__name__}, expected key: value lines")
    return values


def _validate(kind: type[C], values: dict[str, Any], where: str) -> C:
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{where}: {_explain(kind, error.errors()[0])}") from None


def _explain(kind: type[Section], problem: Any) -> str:
    """One line for one pydantic error."""
    location = [str(part) for part in problem["loc"]]
    name = ".".join(location)
    if problem["type"] == "extra_forbidden":
        known = _fields_at(kind, location[:-1])
        close = difflib.get_close_matches(location[-1], known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(known)}"
        return f"unknown key {name!r}; {hint}"
    if problem["type"] == "missing":
        return f"{name}: missing; add it or pass {name}=VALUE"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return f"{name}: {message}" if name else message
    expected = message.removeprefix("Input should be ")
    return f"{name}: got {problem['input']!r}, expected {expected}; change it or pass {name}=VALUE"


def _fields_at(kind: type[Section], location: list[str]) -> list[str]:
    """Field names of the section at `location`."""
    section: Any = kind
    for name in location:
        field = getattr(section, "model_fields", {}).get(name)
        section = field.annotation if field is not None else None
    return list(getattr(section, "model_fields", {}))
