"""Distill a student from generated images in an ordinary PyTorch loop.

python examples/plain_loop.py configs/fashion_mnist.yaml student.pt
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
from timm import create_model
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from dmkd_fast import GeneratedLoader, kd_loss


def train(student: nn.Module, loader: GeneratedLoader, epochs: int) -> Iterator[nn.Module]:
    """Train the student, and yield its averaged weights after each epoch."""
    student = student.train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(student.parameters(), lr=2e-3, weight_decay=0.05, fused=True)
    schedule = OneCycleLR(optimizer, 2e-3, epochs * len(loader), pct_start=0.05)
    average = AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(0.99), use_buffers=True)
    for epoch in range(epochs):
        loader.set_epoch(epoch)
        for views, _, teacher_logits in loader:
            with torch.autocast(views.device.type, dtype=torch.bfloat16):
                student_logits = student(views)
            # Logits of several teachers are combined at loss.temperature: it must be the same.
            loss = kd_loss(student_logits, teacher_logits, temperature=4.0)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            average.update_parameters(student)
        yield average.module


if __name__ == "__main__":
    stream = GeneratedLoader(sys.argv[1], batch_size=64, steps_per_epoch=500, teacher_logits=True)
    network = create_model("resnet18", num_classes=stream.num_classes, in_chans=1)  # 3: color
    for trained in train(network, stream, epochs=6):
        torch.save(trained.state_dict(), sys.argv[2])
