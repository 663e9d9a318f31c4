"""The settings of a training: loss, mixing, optimizer, length and rhythm.

Stands on floor 0, beside `config.py`, which says what else a job has.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from dmkd_fast.schedule import check_accumulate, check_milestones
from dmkd_fast.settings import Count, Section, Switch


class LossConfig(Section):
    """alpha * T^2 * KL(softmax(teacher / T) || softmax(student / T)) + (1 - alpha) * CE(student,
    label), mean over the batch."""

    temperature: float = Field(4.0, ge=0.01, le=1000)
    """T; within its range neither logits / T nor T^2 overflows in float32."""
    alpha: float = Field(1.0, gt=0, le=1)
    """Share of the teacher's term; the rest is cross-entropy with the class that the image was
    made for. 1, as in the paper: labels are not used."""


class MixConfig(Section):
    """Mixing of views, the same for student and teachers; with both, each half of the time."""

    mixup_alpha: float = Field(0.0, ge=0, le=1000)
    """Whole views, by a share from Beta(alpha, alpha), one for the batch; 0 turns it off."""
    cutmix_alpha: float = Field(0.0, ge=0, le=1000)
    """A square of another view, of an area share from Beta(alpha, alpha); 0 turns it off."""

    @property
    def is_on(self) -> bool:
        """Whether anything is mixed."""
        return self.mixup_alpha > 0 or self.cutmix_alpha > 0


class OptimConfig(Section):
    """Optimizer and learning-rate schedule: linear warm-up, then cosine to zero or milestones.

    The paper's ImageNet recipe is {name: sgd, lr: 0.1, nesterov: false, weight_decay: 1.0e-4,
    warmup: 0, milestones: [0.3, 0.6, 0.9]}, except that it decays biases and normalisation too.
    """

    name: Literal["sgd", "adamw"] = "adamw"
    lr: float = Field(gt=0, le=1000)
    """Peak learning rate."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """Of SGD, or AdamW's beta1."""
    nesterov: bool = True
    """Nesterov's momentum for SGD; false, as in the paper: the plain one."""
    weight_decay: float = Field(0.0, ge=0, le=100)
    """Decoupled for AdamW; never on biases and normalisation, where the paper has it too."""
    warmup: float = Field(0.05, ge=0, lt=1)
    """Share of all steps with a rising learning rate."""
    milestones: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = Field((), max_length=1000)
    """Shares of all steps at which the learning rate is multiplied by `decay`; none: it falls to
    zero by a cosine."""
    decay: float = Field(0.1, gt=0, lt=1)
    """Factor at each milestone."""
    ema_decay: float = Field(0.0, ge=0, lt=1)
    """Decay per step of the averaged weights that are evaluated and saved; 0 turns it off."""
    max_grad_norm: float = Field(0.0, ge=0, le=1e6)
    """Gradients are scaled down to this norm; 0 turns it off."""

    @model_validator(mode="after")
    def _nothing_ignored(self) -> OptimConfig:
        if self.name != "sgd" and not self.nesterov:
            raise ValueError(
                f"nesterov: got false with name={self.name}, which has no such momentum, expected "
                "it to be left out; remove it or set name=sgd"
            )
        if self.decay != OptimConfig.model_fields["decay"].default and not self.milestones:
            raise ValueError(
                f"decay: got {self.decay} without milestones, where it has no effect; add "
                "milestones or remove it"
            )
        check_milestones(self.milestones, warmup=self.warmup)
        return self


class TrainConfig(Section):
    """Length and rhythm of a training."""

    batch_size: int = Field(ge=1, le=10**7)
    """Views per optimizer step."""
    accumulate: int = Field(1, ge=1, le=10**7)
    """Equal parts of a batch that go through the networks one after the other, for less memory;
    batch norm then sees a part at a time."""
    num_views: Count
    """Views seen by the student (or model) in all."""
    compile: Switch = "auto"
    """torch.compile of what is trained and its teacher; auto: on CUDA."""
    max_skipped_steps: int = Field(20, ge=1, le=10**6)
    """A step whose loss or gradient is not finite changes nothing; so many in a row end the run at
    the next log line. More than the 16 by which float16's loss scale falls from 65,536 to 1."""
    checkpoint_every_s: float = Field(600.0, gt=0, le=1e9)
    """Seconds between checkpoints; one is always written at the end and on Ctrl-C."""
    log_every_steps: int = Field(50, ge=1, le=10**9)
    """Optimizer steps between log lines; the only place where the device is waited for."""

    @model_validator(mode="after")
    def _equal_parts(self) -> TrainConfig:
        check_accumulate(self.accumulate, batch_size=self.batch_size)
        return self
