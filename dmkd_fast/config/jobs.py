"""The config of every job, as classes that mirror the YAML files exactly.

Only the command line and `jobs/` read these classes. Lower layers get plain arguments.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from dmkd_fast.config.data import RealImagesConfig, SourceConfig
from dmkd_fast.config.generator import SamplerConfig
from dmkd_fast.config.loading import Count, PathText, Section
from dmkd_fast.config.networks import ClassifierConfig, DenoiserConfig, TeachingConfig
from dmkd_fast.config.training import LossConfig, MixConfig, OptimConfig, TrainConfig
from dmkd_fast.runtime.errors import invalid


class RingConfig(Section):
    """The ring buffer of images."""

    capacity_images: Count
    """Number of slots, rounded up to whole blocks. A slot takes channels * height * width bytes."""
    min_fill_images: Count
    """Images in the ring before the first training step, rounded up to whole blocks."""
    samples_per_insert: float = Field(ge=1e-6, le=1e6)
    """Reuse: views drawn per inserted image. A set on disk that fits into the ring is inserted once
    and then drawn until train.num_views."""
    error_buffer: float | None = Field(None, ge=1e-6, le=1e15)
    """Views by which the reuse may be ahead or behind during the run. null: samples_per_insert *
    min_fill_images, so that views never exceed samples_per_insert * images."""
    order: Literal["shuffled", "equal", "uniform", "balanced"] = "shuffled"
    """Order of drawing. shuffled: passes over all images. equal: passes over the less used half, so
    that late images catch up. uniform: independent draws. balanced: equally often by class."""
    max_uses: int | None = Field(None, ge=1, lt=2**24)
    """Views after which an image is no longer drawn. Only for shuffled and equal."""
    overlap: bool = False
    """Generate the next block on a CUDA stream of its own while the student trains. The block that
    will be overwritten next is then not drawn. Only for images of a denoiser."""


_AreaFraction = Annotated[float, Field(ge=1e-4, le=1)]
_Ratio = Annotated[float, Field(ge=2.0**-15, le=2.0**15)]


class ViewsConfig(Section):
    """Random views of the images, the same crops for teacher and student."""

    size: int = Field(ge=1, le=8192)
    """Side of a view in pixels."""
    scale: tuple[_AreaFraction, _AreaFraction] = (1.0, 1.0)
    """Range of the crop's area, as a fraction of the image's area."""
    ratio: tuple[_Ratio, _Ratio] = (1.0, 1.0)
    """Range of the crop's aspect ratio (width / height)."""
    pad: int = Field(0, ge=0, le=8192)
    """Width of the black border in pixels that a crop may reach into."""
    flip: float = Field(0.5, ge=0.0, le=1.0)
    """Probability of a horizontal flip."""

    @model_validator(mode="after")
    def _ranges(self) -> ViewsConfig:
        for name in ("scale", "ratio"):
            low, high = getattr(self, name)
            if low > high:
                raise invalid(name, f"[{low}, {high}]", "low <= high", "put the smaller first")
        return self


class EvalConfig(Section):
    """The real test set. It is reported and decides nothing."""

    path: PathText
    """Directory with idx files, class folders or WebDataset shards, or `embedded:NAME`."""
    classes: PathText | None = None
    """Text file with one class name per line, in the job's order. null: classes.txt in the
    directory, otherwise the sorted names of the class folders; both in the teacher's order if its
    file states the same names."""
    num_points: int = Field(8, ge=1, le=10_000)
    """Number of evaluations during a run, the last one included."""


class RunConfig(Section):
    """Settings that every job has."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)
    """Name of the job. Run directories start with it."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of all random numbers."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of all networks and of the ring. auto: cuda if one is visible."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Compute dtype of the networks. auto: float16 on CUDA, bfloat16 on a CPU with bfloat16
    products, otherwise float32. float16 on a CPU is refused."""
    repeatable: bool = True
    """Use only CUDA kernels that give the same bits each time. false: cuDNN and torch.compile
    choose kernels by measuring them, which is faster, but exact resume is lost: a resumed or
    repeated run ends with other weights, and damaged blocks of images are made again with other
    last bits. No effect on a CPU, where every run is repeatable."""
    num_threads: int = Field(0, ge=0, le=1024)
    """CPU threads. 0: all cores that this process may use."""
    run_dir: PathText = "auto"
    """Directory of the results. auto: runs/NAME-DATE-TIME."""


class DistillConfig(RunConfig):
    """Distillation from generated images: `dmkd distill`, `dmkd generate`.

    Images come from a denoiser and its sampler, or from a source: on disk, or procedural.
    """

    denoiser: DenoiserConfig | None = None
    sampler: SamplerConfig = SamplerConfig()
    source: SourceConfig | None = None
    ring: RingConfig
    views: ViewsConfig
    mix: MixConfig = MixConfig()
    teacher: TeachingConfig
    more_teachers: tuple[TeachingConfig, ...] = Field((), max_length=100)
    """Further teachers. The target of an image is the mean probability of all teachers that are
    active and teach the image's class."""
    student: ClassifierConfig
    loss: LossConfig = LossConfig()
    optim: OptimConfig
    train: TrainConfig
    eval: EvalConfig
    hooks: tuple[Annotated[str, Field(max_length=1000)], ...] = Field((), max_length=10)
    """Names of the objects that dmkd_fast.distill got as `guide` and `selection`. A run records
    them, and its config is refused where the objects are missing."""

    @property
    def block_images(self) -> int:
        """Number of images that enter the ring together."""
        if self.source is not None:
            return self.source.block_images
        return self.sampler.micro_batch_images

    @property
    def block_name(self) -> str:
        """Name of the setting that `block_images` comes from."""
        return "source.block_images" if self.source else "sampler.micro_batch_images"

    @model_validator(mode="before")
    @classmethod
    def _one_origin(cls, values: Any) -> Any:
        # An unknown key may be a misspelled `denoiser`; the error for unknown keys says so.
        if not isinstance(values, dict) or not set(values) <= set(cls.model_fields):
            return values
        if values.get("source") is None and values.get("denoiser") is None:
            raise ValueError(
                "denoiser: missing; add it, or source for images on disk, or source.kind=priors "
                "for procedural images"
            )
        if values.get("source") is not None:
            for name in ("denoiser", "sampler"):
                if values.get(name) is not None:
                    got = "it beside source"
                    expected = "one of the two"
                    raise invalid(name, got, expected, f"remove one, for example with {name}=null")
            values = {k: v for k, v in values.items() if k not in ("denoiser", "sampler")}
        return values

    @model_serializer(mode="wrap")
    def _without_the_other(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = handler(self)
        for name in ("denoiser", "sampler") if self.source is not None else ("source",):
            del values[name]
        return values

    @property
    def teachers(self) -> dict[str, TeachingConfig]:
        """All teachers by the name of their section."""
        more = {f"more_teachers.{i}": teacher for i, teacher in enumerate(self.more_teachers)}
        return {"teacher": self.teacher, **more}

    @model_validator(mode="after")
    def _fits_together(self) -> DistillConfig:
        block, ring = self.block_images, self.ring
        if ring.capacity_images < 2 * block:
            where = self.block_name
            expected = f"at least two blocks of {where}={block}"
            fix = f"raise the capacity to {2 * block} or lower {where.partition('.')[2]}"
            raise invalid("ring.capacity_images", ring.capacity_images, expected, fix)
        if self.source is not None and ring.overlap:
            expected = "false, as only images of a denoiser are made ahead"
            raise invalid("ring.overlap", "true with a source", expected, "remove it")
        if self.denoiser is not None and self.denoiser.weak and not self.sampler.is_guided:
            fix = "raise sampler.guidance_scale or remove the weak model"
            raise invalid("denoiser.weak", "a model with guidance_scale=1", "guidance", fix)
        if ring.overlap and self.sampler.phases:
            got = "true with sampler.phases"
            expected = "false, as a block made ahead would be of the phase before"
            raise invalid("ring.overlap", got, expected, "remove one of the two")
        if ring.min_fill_images < self.train.batch_size <= ring.capacity_images:
            expected = f"at least train.batch_size={self.train.batch_size}"
            raise invalid("ring.min_fill_images", ring.min_fill_images, expected, "raise it")
        for name, teacher in self.teachers.items():
            if self.mix.is_on and teacher.teaches is not None:
                got, expected = "classes with mix", "none, as a mixed view is of two classes"
                raise invalid(f"{name}.teaches", got, expected, "remove one of the two")
        if self.mix.is_on and self.loss.uses_classes:
            expected = "one without classes, as a mixed view is of two"
            raise invalid("loss.divergence", "dkd with mix", expected, "remove one of the two")
        self._check_stored()
        self._check_priors()
        return self

    def _check_priors(self) -> None:
        """Refuse settings that need the class of an image, which procedural images do not have."""
        if self.source is None or self.source.is_on_disk:
            return
        if self.ring.order == "balanced":
            expected = "an order without classes, as priors have none"
            raise invalid("ring.order", "balanced", expected, "remove it")
        if self.loss.alpha < 1:
            expected = "1, as priors have no classes"
            raise invalid("loss.alpha", self.loss.alpha, expected, "remove it")
        if self.loss.uses_classes:
            expected = "a divergence without classes, as priors have none"
            raise invalid("loss.divergence", "dkd", expected, "use another one")
        for name, teacher in self.teachers.items():
            if teacher.teaches is not None:
                got, expected = "classes", "none, as priors have no classes"
                raise invalid(f"{name}.teaches", got, expected, "remove it")

    def _check_stored(self) -> None:
        """Check the settings of stored teacher logits."""
        for name, teacher in self.teachers.items():
            if teacher.stored and name != "teacher":
                expected = "it for the first teacher, which stands for all"
                raise invalid(f"{name}.stored", "true", expected, "set teacher.stored")
        if not self.teacher.stored:
            if self.loss.rest != "bucket":
                expected = "it with teacher.stored=true, whose top-k logits it is for"
                raise invalid("loss.rest", self.loss.rest, expected, "remove it")
            return
        if self.source is None or not self.source.is_on_disk:
            expected = "false, or source with shards that have teacher logits"
            raise invalid("teacher.stored", "true without shards", expected, "change one")
        if self.mix.is_on:
            got, expected = (
                "mixing with teacher.stored",
                "none, as stored logits are of whole views",
            )
            raise invalid("mix", got, expected, "remove one of the two")
        if any((t.start, t.stop) != (0.0, 1.0) for t in self.more_teachers):
            got = "start or stop of a teacher with teacher.stored"
            raise invalid("more_teachers", got, "the whole run", "remove them")


class PretrainConfig(RunConfig):
    """Settings that all kinds of pretraining have."""

    optim: OptimConfig
    train: TrainConfig


class TeacherConfig(PretrainConfig):
    """A classifier trained on real images: `dmkd pretrain teacher`."""

    mean: float = Field(0.0, ge=0, le=1)
    """Mean of the pixels, in [0, 1], that inputs are normalized with."""
    std: float = Field(1.0, ge=1e-3, le=1)
    """Standard deviation of the pixels that inputs are normalized with."""
    data: RealImagesConfig = RealImagesConfig()
    model: ClassifierConfig
    views: ViewsConfig
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Fraction of the target that is spread over all classes."""


class PretrainDenoiserConfig(PretrainConfig):
    """A class-conditional DiT trained on real images: `dmkd pretrain denoiser`."""

    data: RealImagesConfig = RealImagesConfig()
    vae: PathText | None = None
    """Folder of an AutoencoderKL in diffusers format. The DiT is trained on its latents, and the
    autoencoder is saved with it. null: on pixels."""
    patch_size: int = Field(4, ge=1, le=8192)
    """Side of a patch in pixels, or in cells of the latents. It must divide their side."""
    num_layers: int = Field(ge=1, le=1000)
    """Number of transformer blocks."""
    num_heads: int = Field(ge=1, le=1024)
    """Number of attention heads."""
    head_dim: int = Field(ge=2, le=1024)
    """Width of an attention head."""
    label_dropout: float = Field(0.1, gt=0, lt=1)
    """Fraction of the examples trained with the null class, which guidance needs."""


_USED = {
    "denoiser": ("path", "revision", "null_class"),
    "sampler": (
        "fidelity",
        "num_steps",
        "solver",
        "guidance_scale",
        "micro_batch_images",
        "compile",
    ),
}
"""Settings of these sections that few-step training uses. It refuses all others."""


class PretrainFewstepConfig(PretrainConfig):
    """A denoiser trained to make an image in few steps: `dmkd pretrain fewstep`."""

    denoiser: DenoiserConfig
    """The denoiser to start from. It is the teacher as well."""
    sampler: SamplerConfig
    """How the teacher makes its trajectories. Its guidance becomes part of the result."""
    num_steps: int = Field(4, ge=1, le=1000)
    """Number of steps of the result. sampler.num_steps must be a multiple."""
    pool_images: Count = 8192
    """Trajectories kept at a time, as float16 on the device."""
    reuse: int = Field(4, ge=1, le=10**6)
    """Passes over the pool before it is generated again."""

    @model_validator(mode="after")
    def _fits_together(self) -> PretrainFewstepConfig:
        for section, used in _USED.items():
            given = getattr(self, section)
            for name, field in type(given).model_fields.items():
                got = getattr(given, name)
                if name not in used and got != field.get_default(call_default_factory=True):
                    expected = "none, as it has no effect on a few-step denoiser's training"
                    raise invalid(f"{section}.{name}", got, expected, "remove it")
        if self.sampler.steps % self.num_steps:
            expected = f"a divisor of sampler.num_steps={self.sampler.steps}"
            raise invalid("num_steps", self.num_steps, expected, "change one of the two")
        if self.pool_images * self.num_steps % self.train.batch_size:
            expected = f"a divisor of pool_images * num_steps={self.pool_images * self.num_steps}"
            raise invalid("train.batch_size", self.train.batch_size, expected, "change one")
        return self
