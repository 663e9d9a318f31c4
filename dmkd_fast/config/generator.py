"""Settings of how a diffusion model generates images."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from dmkd_fast.config.loading import MAX_CLASSES, Fraction, Section, Switch
from dmkd_fast.runtime.errors import invalid, shown

# `python -m benchmarks fidelity` measures cost and student accuracy of each preset.
FIDELITY: dict[str, dict[str, Any]] = {
    "low": {"num_steps": 4, "solver": "dpm++2m", "guidance_scale": 1.5},
    "medium": {"num_steps": 8, "solver": "dpm++2m", "guidance_scale": 1.5},
    "high": {"num_steps": 32, "solver": "dpm++2m", "guidance_scale": 2.0},
}

_Steps = Annotated[int, Field(ge=1, le=1000)]
_Scale = Annotated[float, Field(ge=1, le=1000)]
NUM_STEPS, GUIDANCE_SCALE = 8, 1.5


def _auto_or(kind: str) -> BeforeValidator:
    """Accept auto, or a number whose range the type states, with one message for both."""

    def check(value: Any) -> Any:
        wanted = int if kind == "integer" else int | float
        if value != "auto" and (isinstance(value, bool) or not isinstance(value, wanted)):
            raise PydanticCustomError("auto", f"auto or a valid {kind}")
        return value

    return BeforeValidator(check)


class BlockCacheConfig(Section):
    """Which blocks of a DiT are reused at which steps."""

    every: int = Field(2, ge=2, le=1000)
    """The blocks are computed at one step of this many, and reused at the others."""
    blocks: tuple[Fraction, Fraction] = (0.2, 0.8)
    """Blocks between these fractions of the depth are reused."""
    steps: tuple[Fraction, Fraction] = (0.0, 1.0)
    """Blocks are reused between these fractions of the steps."""

    @model_validator(mode="after")
    def _rising(self) -> BlockCacheConfig:
        for name, (start, stop) in (("blocks", self.blocks), ("steps", self.steps)):
            if start >= stop:
                raise ValueError(f"{name}: got [{start}, {stop}], expected start < stop")
        return self


class SamplerConfig(Section):
    """How images are generated."""

    fidelity: Literal["low", "medium", "high"] | None = None
    """Preset of num_steps, solver and guidance_scale. Lower is cheaper."""
    num_steps: Annotated[_Steps | Literal["auto"], _auto_or("integer")] = "auto"
    """Denoising steps per image. auto: the number that the model was distilled to; that of the
    model's pipeline in diffusers for other text-to-image models; 8 for all others."""
    solver: Literal[
        "auto", "ddpm", "ddim", "dpm++2m", "euler", "euler_ancestral", "consistency"
    ] = "auto"
    """Solver of a step. auto: that of the model's own scheduler."""
    guidance_scale: Annotated[_Scale | Literal["auto"], _auto_or("number")] = "auto"
    """Scale of classifier-free guidance. 1: no guidance, at half the cost. auto: 1 for models that
    have guidance folded in or take none; that of the model's pipeline in diffusers for other
    text-to-image models; 1.5 for all others."""
    class_guidance: dict[str, _Scale] = Field({}, max_length=MAX_CLASSES)
    """Guidance scale of single classes or ranges of classes, for example {3: 1, 10-19: 2.5}. All
    images then cost as much as guided ones."""
    guidance_interval: tuple[Fraction, Fraction] = (0.0, 1.0)
    """Guidance is applied between these fractions of the steps. A step outside costs half."""
    guidance_channels: int | None = Field(None, ge=1, le=1024)
    """Guide only the first channels (3 in the original DiT code). null: all channels."""
    block_cache: BlockCacheConfig | None = None
    """Blocks of a DiT that are reused at some steps, which is cheaper and changes the images.
    null: every step computes all blocks."""
    attention: Literal["auto", "xformers", "sdpa", "short"] = "auto"
    """Attention of DiTs. auto: by capability (xFormers on CUDA where possible, otherwise PyTorch's;
    short sequences on a CPU use the package's own)."""
    micro_batch_images: int = Field(256, ge=1, le=10**6)
    """Images denoised together. It is one of the things that fix the bits of an image."""
    compile: Switch = "auto"
    """Compile the denoiser with torch.compile. auto: on CUDA, where Triton is present. true:
    refused on a machine that cannot compile."""
    experimental_fp8: bool = False
    """Run the products of a DiT's blocks in 8-bit floating point. It needs a GPU of compute
    capability 8.9 or more and dtype bfloat16, and has not been run on one."""
    phases: tuple[PhaseConfig, ...] = Field((), max_length=100)
    """Other steps and guidance later in the run. A phase ends where the next one starts."""

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, values: Any) -> Any:
        if not isinstance(values, dict) or values.get("fidelity") not in list(FIDELITY):
            return values
        preset = FIDELITY[values["fidelity"]]
        for name, value in preset.items():
            if values.get(name, value) != value:
                raise ValueError(
                    f"{name}: got {shown(values[name])} beside fidelity={values['fidelity']}, "
                    f"which sets it to {value}; remove one of the two"
                )
        return preset | values

    @field_validator("class_guidance", mode="before")
    @classmethod
    def _class_names(cls, values: Any) -> Any:
        # YAML reads a key such as 3 as a number, but the keys are strings here.
        if not isinstance(values, dict):
            return values
        named = {str(k): v for k, v in values.items()}
        if len(named) < len(values):
            raise ValueError("got a class twice, as 3 and '3', expected it once; remove one")
        return named

    @property
    def steps(self) -> int:
        """`num_steps`; 8 as long as no denoiser has replaced "auto"."""
        return self.num_steps if isinstance(self.num_steps, int) else NUM_STEPS

    @property
    def scale(self) -> float:
        """`guidance_scale`; 1.5 as long as no denoiser has replaced "auto"."""
        return GUIDANCE_SCALE if isinstance(self.guidance_scale, str) else self.guidance_scale

    @property
    def guidance_of_classes(self) -> dict[int, float]:
        """The guidance scale of each single class that `class_guidance` covers."""
        return {
            label: scale for key, scale in self.class_guidance.items() for label in _classes_in(key)
        }

    @property
    def is_guided(self) -> bool:
        """Whether any phase or class has a guidance scale other than 1."""
        scales = {self.guidance_scale, *self.class_guidance.values()}
        return scales | {phase.guidance_scale for phase in self.phases} != {1}

    @model_validator(mode="after")
    def _class_guidance(self) -> SamplerConfig:
        ranges = sorted((_classes_in(key) for key in self.class_guidance), key=lambda r: r.start)
        for before, after in pairwise(ranges):
            if after.start < before.stop:
                got = f"class {after.start} twice"
                raise invalid("class_guidance", got, "it once", "change a range")
        return self

    @model_validator(mode="after")
    def _interval(self) -> SamplerConfig:
        start, stop = self.guidance_interval
        if start >= stop:
            raise ValueError(f"guidance_interval: got [{start}, {stop}], expected start < stop")
        if not self.is_guided and (
            self.guidance_channels is not None or self.guidance_interval != (0.0, 1.0)
        ):
            raise ValueError(
                "got guidance_interval or guidance_channels with guidance_scale=1, which turns "
                "guidance off; remove them or raise guidance_scale"
            )
        starts = [phase.start for phase in self.phases]
        if sorted(set(starts)) != starts:
            raise ValueError(f"phases: got starts {starts}, expected them to rise; sort the phases")
        return self


class PhaseConfig(Section):
    """Sampler settings from some point of the run on."""

    start: float = Field(gt=0, lt=1)
    """Progress of the run at which the phase starts."""
    num_steps: int = Field(ge=1, le=1000)
    """Denoising steps per image in this phase."""
    guidance_scale: _Scale
    """Guidance scale in this phase, for the classes that class_guidance does not name."""


def _classes_in(key: str) -> range:
    """Parse a key of `class_guidance`: `7` means class 7, `10-19` classes 10 to 19."""
    found = re.fullmatch(r"([0-9]{1,5})(?:-([0-9]{1,5}))?", key)  # below MAX_CLASSES
    if not found or int(found[2] or found[1]) < int(found[1]):
        expected = f"a class or a range of classes such as 3 or 10-19, below {MAX_CLASSES:,}"
        raise invalid("class_guidance", shown(key), expected, "correct it")
    return range(int(found[1]), int(found[2] or found[1]) + 1)
