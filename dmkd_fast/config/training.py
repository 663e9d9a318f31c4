"""Settings of the training: loss, mixing, optimizer, length and intervals."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from dmkd_fast.config.loading import Count, Section, Switch
from dmkd_fast.loss.divergences import terms_of
from dmkd_fast.runtime.checks import check_accumulate, check_milestones
from dmkd_fast.runtime.errors import invalid, shortened


def _divergence(value: Any) -> Any:
    """Check a divergence before pydantic does, whose errors would name each form of it."""
    try:
        terms_of(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(shortened(str(error).removeprefix("divergence: "), 300)) from None
    return value


_Name = Literal["forward_kl", "reverse_kl", "jsd", "alpha_beta", "total_variation", "dkd", "dist"]
_Number = Annotated[float, Field(ge=0, le=1e6)]
_Terms = Annotated[dict[_Name, _Number | dict[str, _Number]], Field(min_length=1, max_length=2)]


def _optimizer(value: Any) -> Any:
    if isinstance(value, str) and re.fullmatch(r"sgd|adamw|muon|timm:[a-z0-9]{1,60}", value):
        return value
    raise PydanticCustomError("optimizer", "sgd, adamw, muon or timm:NAME")


class LossConfig(Section):
    """The loss of the student, mean over the batch.

    It is alpha * T^2 * D(softmax(teacher / T), softmax(student / T)) + (1 - alpha) *
    CE(student, class), where D is the divergence.
    """

    temperature: float = Field(4.0, ge=0.01, le=1000)
    """Softmax temperature T."""
    alpha: float = Field(1.0, gt=0, le=1)
    """Weight of the teacher's term. The cross-entropy with the class of the image has weight 1 -
    alpha. 1, as in the paper: classes are not used."""
    divergence: Annotated[_Name | _Terms, BeforeValidator(_divergence)] = "forward_kl"
    """Divergence D. `{jsd: {beta: 0.1}}` sets parameters, and `{forward_kl: 0.9, dkd: 0.1}` adds
    two with weights. dkd uses the class of the image. dist correlates over the views of a
    micro-batch on one rank, so train.accumulate and the number of ranks change it."""
    rest: Literal["bucket", "renormalize"] = "bucket"
    """What becomes of the classes that are not among the teacher's stored top-k logits. bucket:
    they share one probability, at the temperature of the shards. renormalize: both softmaxes are
    over the k classes."""
    standardize_logits: bool = False
    """Give both logits of each view mean 0 and standard deviation 1 before they are divided by
    T."""

    @property
    def uses_classes(self) -> bool:
        """Whether the divergence itself needs the class of each image."""
        return "dkd" in self.divergence

    @property
    def correlates(self) -> bool:
        """Whether the divergence correlates the logits of a class over the views."""
        return "dist" in self.divergence


class MixConfig(Section):
    """Mixing of views, the same for student and teachers.

    With both methods, each is used for half of the steps on average.
    """

    mixup_alpha: float = Field(0.0, ge=0, le=1000)
    """Mixup: whole views, with a weight from Beta(alpha, alpha), one per batch. 0: off."""
    cutmix_alpha: float = Field(0.0, ge=0, le=1000)
    """CutMix: a square of another view, with an area from Beta(alpha, alpha). 0: off."""

    @property
    def is_on(self) -> bool:
        """Whether views are mixed at all."""
        return self.mixup_alpha > 0 or self.cutmix_alpha > 0


class OptimConfig(Section):
    """Optimizer and learning rate: linear warm-up, then a cosine to zero, or milestones."""

    name: Annotated[str, BeforeValidator(_optimizer)] = "adamw"
    """Optimizer: sgd, adamw, muon (which uses AdamW for vectors), or timm:NAME for one of timm's,
    such as timm:lion. timm's check on the host whether a step is finite, so that each step waits
    for the GPU."""
    lr: float = Field(gt=0, le=1000)
    """Peak learning rate."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """Momentum of SGD and Muon, or beta1 of AdamW and the like."""
    nesterov: bool = True
    """Nesterov momentum for SGD. The paper uses plain momentum."""
    weight_decay: float = Field(0.0, ge=0, le=100)
    """Weight decay, decoupled for AdamW and Muon. Biases and normalization are never decayed; the
    paper decays them too."""
    warmup: float = Field(0.05, ge=0, lt=1)
    """Fraction of the steps with a rising learning rate."""
    milestones: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = Field((), max_length=1000)
    """Fractions of the steps at which the learning rate is multiplied by `decay`. Empty: a cosine
    to zero."""
    decay: float = Field(0.1, gt=0, lt=1)
    """Factor at each milestone."""
    ema_decay: float = Field(0.0, ge=0, lt=1)
    """Decay per step of the weight EMA, which is evaluated and saved. 0: off."""
    max_grad_norm: float = Field(0.0, ge=0, le=1e6)
    """Largest norm of the gradient. Larger gradients are scaled down. 0: off."""

    @model_validator(mode="after")
    def _nothing_ignored(self) -> OptimConfig:
        if self.name != "sgd" and not self.nesterov:
            expected = "it to be left out, as only sgd has the choice"
            fix = "remove it or set name=sgd"
            raise invalid("nesterov", f"false with name={self.name}", expected, fix)
        if self.decay != OptimConfig.model_fields["decay"].default and not self.milestones:
            raise ValueError(
                f"decay: got {self.decay} without milestones, where it has no effect; add "
                "milestones or remove it"
            )
        check_milestones(self.milestones, warmup=self.warmup)
        return self


class TrainConfig(Section):
    """Length and intervals of the training."""

    batch_size: int = Field(ge=1, le=10**7)
    """Views per optimizer step."""
    accumulate: int = Field(1, ge=1, le=10**7)
    """Number of equal micro-batches that pass through the networks one after the other, to save
    memory. Batch normalization sees a micro-batch at a time."""
    num_views: Count
    """Views in the whole run."""
    compile: Switch = "auto"
    """Compile the trained network and its teacher with torch.compile. auto: on CUDA, where Triton
    is present; on a CPU compilation pays off in long runs only. true: refused on a machine that
    cannot compile."""
    max_skipped_steps: int = Field(20, ge=1, le=10**6)
    """A step whose loss or gradient is not finite changes nothing. This many in a row end the run
    at the next log line. The default is more than the 16 steps by which float16's loss scale falls
    from 65,536 to 1."""
    checkpoint_every_s: float = Field(600.0, gt=0, le=1e9)
    """Seconds between checkpoints. One is always written at the end and after an interruption."""
    log_every_steps: int = Field(50, ge=1, le=10**9)
    """Optimizer steps between log lines. Only a log line waits for the device."""

    @model_validator(mode="after")
    def _equal_parts(self) -> TrainConfig:
        check_accumulate(self.accumulate, batch_size=self.batch_size)
        return self
