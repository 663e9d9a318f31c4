"""Settings that name networks: the denoiser, teachers and the student."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from dmkd_fast.config.loading import MAX_CLASSES, ClassMap, PathText, Section
from dmkd_fast.runtime.errors import invalid

_Prompt = Annotated[str, Field(max_length=10_000)]


class DenoiserConfig(Section):
    """The diffusion model."""

    path: PathText
    """Directory in diffusers format, `embedded:NAME` for a model of the package, or
    `hf-hub:OWNER/NAME`."""
    revision: str | None = Field(None, pattern=r"^[0-9a-f]{40}$")
    """Commit of an `hf-hub:` path, 40 hexadecimal digits."""
    prompts: tuple[_Prompt, ...] | None = Field(None, max_length=MAX_CLASSES)
    """One prompt per class, or prompts with `{name}`, each for every class, such as
    ["a photo of a {name}, {style}"]. For text-to-image models only."""
    prompt_attributes: dict[str, Annotated[tuple[_Prompt, ...], Field(min_length=1)]] = Field(
        {}, max_length=20
    )
    """Values for further places in the prompts, such as {style: [oil painting, snapshot]}. A prompt
    stands for all combinations; which one an image has is a function of (seed, id)."""
    captions: PathText | None = None
    """JSON file of several prompts per class, a list of lists or an object by class name, in place
    of prompts."""
    decoder: PathText | None = None
    """Path of another autoencoder that decodes the latents, such as an AutoencoderTiny."""
    decoder_tile: int | None = Field(None, ge=64, le=2**16)
    """Side in pixels of the overlapping tiles in which larger images are decoded, to save memory.
    null: whole images."""
    weak: PathText | None = None
    """Directory of a weaker model of the same latents and classes, such as a smaller one, or one
    that was trained for less time. Guidance then steers away from it, and no longer from the null
    class; sampler.guidance_scale is the strength."""
    image_size: int | None = Field(None, ge=8, le=16_384)
    """Side of the images in pixels, for text-to-image models, which make several sizes. null: that
    of the model."""
    null_class: int | None = Field(None, ge=0, lt=2**31)
    """Class of a UNet2DModel that stood for "no class" in its training, which guidance needs. The
    job has the other classes. DiTs and text-to-image models need no setting."""
    class_map: ClassMap | None = None
    """The generator's index of each class of the job. null: the job has all classes of the
    generator."""

    @model_validator(mode="after")
    def _pinned(self) -> DenoiserConfig:
        _check_pinned(self.path, self.revision)
        if self.captions is not None and (self.prompts or self.prompt_attributes):
            expected = "one of captions and prompts"
            raise invalid("captions", "a file beside prompts", expected, "remove one")
        return self

    @field_validator("prompt_attributes", mode="before")
    @classmethod
    def _tuples(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}

    @field_validator("prompts", mode="before")
    @classmethod
    def _one_text(cls, values: Any) -> Any:
        return (values,) if isinstance(values, str) else values


class ClassifierConfig(Section):
    """A classifier: saved weights (`path`) or a new network (`arch`)."""

    path: PathText | None = None
    """Directory with config.json and model.safetensors, `embedded:NAME`, or `hf-hub:OWNER/NAME` in
    timm's layout."""
    revision: str | None = Field(None, pattern=r"^[0-9a-f]{40}$")
    """Commit of an `hf-hub:` path, 40 hexadecimal digits."""
    arch: PathText | None = None
    """A small network (`lenet5`, `cifar_resnet20`, `cifar_wrn16_2`, `cifar_vgg8`, ...),
    `torchvision:NAME`, or a timm name."""
    model_args: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of the timm or torchvision model."""
    stem: Literal["own", "conv3", "conv3_pool", "conv3_stride2"] = "own"
    """First layers of a ResNet. own: those of the architecture, for 224 pixels. conv3: a 3x3
    convolution with stride 1, without pooling. conv3_pool: the same with pooling. conv3_stride2: a
    3x3 convolution with stride 2, without pooling."""

    @property
    def is_named_by_source(self) -> bool:
        """Whether the images on disk name the classifier, so that the config need not."""
        return False

    @model_validator(mode="after")
    def _one_source(self) -> ClassifierConfig:
        if (self.path is None) == (self.arch is None) and not self.is_named_by_source:
            raise ValueError(
                f"got path={self.path!r} and arch={self.arch!r}, expected exactly one of the two; "
                "set path for saved weights or arch for a new model"
            )
        if self.path is not None and (self.model_args or self.stem != "own"):
            raise ValueError(
                "got model_args or stem beside path, expected neither: a saved model "
                "carries its own; remove them or set arch"
            )
        _check_pinned(self.path, self.revision)
        return self


class TeachingConfig(ClassifierConfig):
    """A teacher: saved weights (`path`) or published weights (`arch` with `pretrained`)."""

    pretrained: bool = False
    """Download the weights that timm or torchvision publishes for `arch`. timm's weights are pinned
    to the newest commit in the saved settings."""
    class_map: ClassMap | None = None
    """The teacher's index of each class of the job. null: the same classes in the same order."""
    teaches: ClassMap | None = None
    """Classes of the job whose images this teacher labels. null: all."""
    start: float = Field(0.0, ge=0, lt=1)
    """Progress of the run at which this teacher starts."""
    stop: float = Field(1.0, gt=0, le=1)
    """Progress of the run at which this teacher stops."""
    stored: bool = False
    """Read the logits of all teachers from the shards of source.path, made by `dmkd generate
    --teacher-logits`, instead of running the teachers. Without path or arch, the teachers are those
    that the shards were made with."""

    @property
    def is_named_by_source(self) -> bool:
        """Whether the shards of source.path name the teachers."""
        return self.stored and self.path is None and self.arch is None

    @model_validator(mode="after")
    def _trained(self) -> TeachingConfig:
        if self.stored and (self.start, self.stop) != (0.0, 1.0):
            got = f"start={self.start} and stop={self.stop} with stored=true"
            raise ValueError(f"got {got}, expected the whole run; remove them")
        if self.pretrained != (self.arch is not None):
            raise ValueError(
                f"got arch={self.arch!r} and pretrained={self.pretrained}, expected path, or arch "
                "with pretrained=true; a teacher needs trained weights"
            )
        if self.pretrained and (self.model_args or self.stem != "own"):
            raise ValueError(
                "got model_args or stem with pretrained=true, expected neither; remove them"
            )
        if self.start >= self.stop:
            raise ValueError(
                f"got start={self.start} and stop={self.stop}, expected start < stop; change one"
            )
        return self


def _check_pinned(path: str | None, revision: str | None) -> None:
    if (path or "").startswith("hf-hub:") != (revision is not None):
        raise ValueError(
            f"got path={path!r} and revision={revision!r}, expected a revision "
            "(40 hexadecimal digits) with an hf-hub: path and none with others"
        )
