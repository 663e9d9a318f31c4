"""Hooks of tests: a constant guide, the brightest candidate, the examples of the guide's page."""

from __future__ import annotations

import re
from typing import Any

import torch
from small_jobs import ROOT, small_classifier, tiny_sampler
from torch import Tensor, nn

from dmkd_fast import GeneratedImages, InputSpec, LabelStream, Selection

SPEC = InputSpec(size=8, mean=(0.5,), std=(0.5,))


class Shift:
    """Adds a constant, and records its arguments."""

    is_function_of_id = True

    def __init__(self, value: float = 0.0) -> None:
        self.value, self.seen = value, []  # type: ignore[var-annotated]

    def __call__(self, image_estimate: Tensor, labels: Tensor, step: Tensor) -> Tensor:
        self.seen.append((image_estimate, labels, step))
        return torch.full_like(image_estimate, self.value)


def of_docs(name: str) -> Any:
    """Return an object that the page about hooks defines."""
    text = (ROOT / "docs" / "guides" / "hooks.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    names: dict[str, Any] = {}
    for block in blocks:
        if re.search(r"^(class|def) ", block, re.M):
            exec(block, names)
    return names[name]


def brightness(images: Tensor, labels: Tensor) -> Tensor:
    assert images.dtype == torch.uint8 and len(images) == len(labels)
    return images.float().mean((1, 2, 3))


def brightest(**changes: Any) -> Selection:
    settings: dict[str, Any] = {"score": brightness, "num_candidates": 3, "is_function_of_id": True}
    return Selection(**(settings | changes))


def student() -> nn.Module:
    torch.manual_seed(11)
    return small_classifier()


def stream(selection: Selection | None, **changes: Any) -> GeneratedImages:
    return GeneratedImages(LabelStream(4), tiny_sampler(**changes), selection=selection)


def written(images: GeneratedImages, ids: Tensor, labels: Tensor) -> Tensor:
    out = torch.empty((len(ids), 1, 8, 8), dtype=torch.uint8)
    images.write(ids, labels, out, progress=0.0)
    return out


def looks_at_the_student(model: nn.Module) -> GeneratedImages:
    guide = of_docs("EntropyGuide")(model, SPEC, strength=2.0)

    def score(images: Tensor, labels: Tensor) -> Tensor:
        del labels
        was, _ = model.training, model.eval()
        scores = model(images.float() / 127.5 - 1).max(1).values
        model.train(was)
        return scores

    return stream(brightest(score=score, is_function_of_id=False), guide=guide)
