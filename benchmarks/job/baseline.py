"""The paper's way of working, for a pixel DiT: eager pipeline, PNG files, DataLoader, eager loss.

Written from what paper and published code do (arXiv 2305.12954): diffusers' module and
scheduler in fp32 with a doubled batch for guidance, one PNG per image in class folders, an
ImageFolder with torchvision's transforms, the loss and two accuracies in plain PyTorch, each read
on every step. What only slows the published code down is left out: features nobody uses, a
validation set of its own size, workers started again for each epoch, images opened in color.
B batch, C classes, N images.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from dmkd_fast.config.jobs import ViewsConfig
from dmkd_fast.views.spec import InputSpec

# Images per call, each doubled for guidance; 10 is the published number.
BATCHES = (10, 32, 128, 256)
WORKERS = (0, 1, 2)


class Ensemble(nn.Module):
    """Teachers of the same views, combined as those of a job: the mean of their probabilities.

    Args:
        members: Views -> logits.
        temperature: Of the loss.
    """

    def __init__(self, members: Sequence[nn.Module], temperature: float) -> None:
        super().__init__()
        self.members, self.temperature = nn.ModuleList(members), temperature

    def forward(self, views: Tensor) -> Tensor:
        """Return logits (B, C)."""
        tempered = [member(views) / self.temperature for member in self.members]
        mean = torch.stack([F.softmax(each.float(), dim=1) for each in tempered]).mean(0)
        return mean.log() * self.temperature


def make_images(
    module: Any, noise: Tensor, labels: Tensor, *, num_steps: int, guidance_scale: float, batch: int
) -> Tensor:
    """Images (N, c, H, W) uint8 from noise of that shape, by DPM-Solver++(2M) on flow levels.

    Args:
        module: diffusers' DiT; its dtype is the dtype of the computation.
        noise: (N, c, H, W) float32.
        labels: (N,) int64.
        num_steps: Of the solver.
        guidance_scale: Of classifier-free guidance.
        batch: Images per call.
    """
    import diffusers

    from benchmarks.parts.sampler_models import guided_loop

    kind: Any = diffusers.DPMSolverMultistepScheduler
    scheduler = kind(use_flow_sigmas=True, prediction_type="flow_prediction")
    parts = []
    for x, classes in zip(noise.split(batch), labels.split(batch), strict=True):
        scheduler.set_timesteps(num_steps)
        parts.append(guided_loop(module, scheduler, x.to(module.dtype), classes, guidance_scale))
    return torch.cat(parts)


def write_pngs(images: Tensor, labels: Tensor, folder: Path) -> None:
    """One file per grey image, in a folder per class."""
    for label in labels.unique().tolist():
        (folder / str(label)).mkdir(parents=True)
    for number, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        Image.fromarray(image[0].numpy()).save(folder / str(label) / f"{number:06d}.png")


def transform(views: ViewsConfig, input: InputSpec, convert: Callable[..., Tensor]) -> Any:
    """torchvision's transforms of one image for the job's views.

    Args:
        views: Of the job: padding and crop of the same size.
        input: What the networks take.
        convert: From what comes in to float32 in [0, 1].
    """
    return transforms.Compose(
        [
            transforms.RandomCrop(views.size, padding=views.pad),
            *([transforms.RandomHorizontalFlip(views.flip)] if views.flip else []),
            convert,
            transforms.Normalize(input.mean, input.std),
        ]
    )


def png_batches(
    folder: Path, views: ViewsConfig, input: InputSpec, *, batch: int, workers: int, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Views (B, c, S, S) and labels (B,) of shuffled epochs, without end."""
    loader: DataLoader[Any] = DataLoader(
        ImageFolder(str(folder), transform(views, input, transforms.ToTensor()), loader=_open_grey),
        batch_size=batch,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=workers > 0,
        generator=torch.Generator().manual_seed(seed),
    )
    while True:
        yield from loader


def kd_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """T^2 * KL(softmax(teacher / T) || softmax(student / T)), mean over the batch."""
    log_q = F.log_softmax(student_logits / temperature, dim=1)  # (B, C)
    p = F.softmax(teacher_logits / temperature, dim=1)  # (B, C)
    return F.kl_div(log_q, p, reduction="batchmean") * temperature**2


def read_figures(loss: Tensor, student_logits: Tensor, labels: Tensor) -> tuple[float, ...]:
    """Loss, top-1 and top-5 of a step as numbers: three waits for the device."""
    hits = student_logits.topk(min(5, student_logits.shape[1])).indices == labels[:, None]  # (B, 5)
    top1, top5 = hits[:, 0].float().mean(), hits.any(1).float().mean()
    return loss.item(), top1.item(), top5.item()


def fastest(options: Sequence[int], run: Callable[[int], object]) -> int:
    """The option with which `run` takes least time, after one call that does not count."""
    run(options[0])
    spent = {}
    for option in options:
        started = time.perf_counter()
        run(option)
        spent[option] = time.perf_counter() - started
    return min(spent, key=lambda option: spent[option])


def _open_grey(path: str) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("L")
