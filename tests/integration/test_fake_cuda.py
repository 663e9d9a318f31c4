"""Refill and training step of a whole job on fake CUDA tensors: no value is read, no copy made.

Everything but the backward pass, which fake tensors cannot run: draw, views for two teachers and
the student, both teachers, autocast, student, loss, averaging; and a guided latent sampler with its
decoder, written into the ring. Fake tensors check where each operator's inputs are.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from on_device import OnDevice
from rings import new_ring
from small_jobs import labels_of, sampler_of
from small_models import VAE, small_dit, spread
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from dmkd_fast import (
    Denoiser,
    DiffusionSampler,
    Distiller,
    GeneratedImages,
    Guidance,
    LabelStream,
    Schedule,
    Steps,
    StudentTrainer,
    Targets,
    Teacher,
    Teachers,
    Views,
    ViewSpec,
)
from dmkd_fast.denoisers.dit import lean_dit
from dmkd_fast.denoisers.wrappers import Decoder
from dmkd_fast.views.spec import InputSpec

CUDA = torch.device("cuda")


class NoCopies(OnDevice):
    """As `OnDevice`, and raises on every copy between host and device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.split(".")[0]
        if name == "_to_copy":
            target = (kwargs or {}).get("device") or args[0].device
            assert target.type == args[0].device.type, f"copied to {target}"
        if name == "copy_":
            assert args[0].device.type == args[1].device.type, "copied between host and device"
        return super().__torch_dispatch__(func, types, args, kwargs)


def classifier(size: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * size**2, 10),
    )


def job(run_dir: Path) -> Distiller:
    import diffusers

    lean = lean_dit(small_dit())
    assert lean is not None
    sampler = DiffusionSampler(
        Denoiser(
            module=lean,
            scheduler={"_class_name": "DDPMScheduler", "variance_type": "learned_range"},
            latent_shape=(4, 8, 8),
            image_shape=(3, 16, 16),
            decoder=Decoder(spread(diffusers.AutoencoderKL(**VAE))),
            num_classes=10,
            null_class=1000,
            class_map=tuple(range(10)),
        ),
        Steps(count=3),
        Guidance(scale=2.0, interval=(0.0, 0.7), channels=3),
        micro_batch_images=16,
        dtype=torch.float16,
    )
    spec = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    teachers = Teachers(
        [Teacher(module=classifier(size), input=InputSpec(size=size, **spec)) for size in (16, 20)]
    )
    return Distiller(
        GeneratedImages(LabelStream(10), sampler),
        new_ring(image_shape=(3, 16, 16), num_classes=10, guard_blocks=1),
        StudentTrainer(
            classifier(16),
            Schedule(batch_size=16, num_views=1600, lr=1e-3, name="sgd", ema_decay=0.9),
            dtype=torch.bfloat16,
        ),
        Targets(
            teachers,
            Views(ViewSpec(size=16, **spec), scale=(0.3, 1.0), ratio=(0.75, 1.33)),
            dtype=torch.bfloat16,
        ),
        run_dir,
        show=False,
    )


class Moved:
    """Turns the tensors and devices of an object and its parts into fake ones of cuda, in place."""

    def __init__(self, mode: FakeTensorMode) -> None:
        self.mode, self.made, self.seen = mode, {}, set()  # type: ignore[var-annotated]
        self.count = 0

    def __call__(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            if id(value) not in self.made:  # shared tensors stay shared
                fake = self.mode.from_tensor(value.detach()).to(CUDA)
                self.made[id(value)] = value, fake
                self.count += 1
            return self.made[id(value)][1]
        if isinstance(value, torch.device):
            return CUDA
        if isinstance(value, dict):
            for key in value:
                value[key] = self(value[key])
        elif isinstance(value, list):
            value[:] = [self(item) for item in value]
        elif isinstance(value, tuple) and type(value) is tuple:
            return tuple(self(item) for item in value)
        elif self._is_ours(value) and id(value) not in self.seen:
            self.seen.add(id(value))
            self(vars(value))
        return value

    @staticmethod
    def _is_ours(value: Any) -> bool:
        home = type(value).__module__.split(".")[0]
        is_part = home in ("dmkd_fast", "diffusers") or isinstance(value, nn.Module)
        return is_part and hasattr(value, "__dict__") and not isinstance(value, type)


def no_new_tensors(real: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        caller = sys._getframe(1).f_code.co_filename
        assert "dmkd_fast" not in caller, f"a tensor made from host values in {caller}"
        return real(*args, **kwargs)

    return call


def test_refill_and_step_of_a_whole_job_stay_on_cuda(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = job(tmp_path)
    sampler, ring = sampler_of(run), run.ring
    run.targets._dtype = torch.float16  # which a CPU's run would refuse
    for network in run.targets.networks.networks:
        network.to(torch.float16)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        moved = Moved(mode)
        for part in (
            sampler,
            ring,
            labels_of(run),
            run.targets.views,
            run.targets,
            run.student.model,
            run.student,
            run.student.average,
            run.targets.teachers,
        ):
            moved(part)
        run.device = CUDA
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "is_available", lambda: True)
            run.student.autocast = torch.autocast("cuda", dtype=torch.float16)
        # Generators, graphs and streams of CUDA cannot be faked.
        order: Any = ring._order
        order._generator = None
        monkeypatch.setattr(order, "_permutation", lambda n: torch.randperm(n, device=CUDA))
        monkeypatch.setattr(sampler, "_images", sampler._make)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
        monkeypatch.setattr(Tensor, "record_stream", lambda tensor, stream: None)
        made: list[Tensor] = []
        monkeypatch.setattr(Tensor, "backward", lambda logits, grad: made.extend((logits, grad)))
        monkeypatch.setattr(run.student, "finish", lambda: None)  # There are no gradients.
        for name in ("tensor", "as_tensor", "from_numpy"):
            monkeypatch.setattr(torch, name, no_new_tensors(getattr(torch, name)))
        with NoCopies(), torch.no_grad():
            for _ in range(30):
                run.refill()
                made.append(run.train_step())
    assert moved.count > 100 and ring.num_inserted > ring.capacity
    assert all(isinstance(t, FakeTensor) and t.device.type == "cuda" for t in made)
    assert [t.dtype for t in made[:3]] == [torch.float16, torch.float16, torch.float32]
    assert made[0].shape == made[1].shape == (16, 10)


def test_what_would_wait_is_noticed() -> None:
    with FakeTensorMode():
        here, there = torch.zeros(3), torch.zeros(3, device=CUDA)
        for wait in (
            there.cpu,
            lambda: here.to(CUDA),
            lambda: there.copy_(here),
            there.nonzero,
            lambda: there[there > 0],
        ):
            with pytest.raises(AssertionError), NoCopies():
                wait()
