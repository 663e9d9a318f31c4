"""The examples of docstrings and of pages run, and docstrings show what examples return."""

from __future__ import annotations

import contextlib
import doctest
import importlib
import re
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from small_jobs import SHORT
from torch import nn

import dmkd_fast
from dmkd_fast import Views, ViewSpec, distill, load_classifier
from dmkd_fast.assets import resolve
from dmkd_fast.config.jobs import DistillConfig
from dmkd_fast.config.loading import load_config

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
MODULES = sorted(
    path.relative_to(ROOT).with_suffix("")
    for path in (ROOT / "dmkd_fast").rglob("*.py")
    if ">>> " in path.read_text(encoding="utf-8")
)
# Pages whose examples have a test of their own, or stand for a program of several processes.
ELSEWHERE = {"loss.md": "tests/loss/test_kd_loss_docs.py", "several-processes.md": "compiled"}
PAGES = sorted(
    path.relative_to(DOCS)
    for path in DOCS.rglob("*.md")
    if "```python" in path.read_text(encoding="utf-8") and path.name not in ELSEWHERE
)


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_examples_of_docstrings_return_what_they_show(path: Path) -> None:
    failed, count = doctest.testmod(importlib.import_module(".".join(path.parts)))
    assert count and not failed


def test_docstrings_of_common_entry_points_have_examples() -> None:
    schedule = dmkd_fast.Schedule.lr_at
    for entry in (dmkd_fast.Views, dmkd_fast.Mixer, dmkd_fast.load_classifier, schedule):
        assert ">>> " in (entry.__doc__ or ""), entry


def shortened(config: str, **changes: Any) -> dict[str, Any]:
    """Run the job of a page with few images and views; its other changes stay."""
    job = load_config(DistillConfig, config, [*SHORT, "sampler.num_steps=4"])
    return distill(job, **changes | {"train": {"num_views": 320}})


def prepare(folder: Path) -> dict[str, Any]:
    """Write the files that pages name, and return the objects that they assume."""
    weak, denoiser = (resolve(f"embedded:fashion_mnist/{n}") for n in ("weak", "denoiser"))
    shutil.copytree(weak, folder / "runs" / "NAME" / "student")
    shutil.copytree(denoiser, folder / "models" / "my_dit")
    for label in range(10):
        (folder / "data" / "test" / str(label)).mkdir(parents=True)
        Image.new("L", (28, 28), 20 * label).save(folder / "data" / "test" / str(label) / "0.png")
    Image.new("L", (28, 28)).save(folder / "photo.jpg")
    (folder / "teachers" / "mine").mkdir(parents=True)
    (folder / "images" / "fashion_mnist").mkdir(parents=True)
    pq.write_table(pa.table({"id": [0]}), folder / "images" / "fashion_mnist" / "manifest")
    (folder / "images" / "stored").mkdir()
    logits = pa.table({"logits": [bytes(8 * 10 * 2)]})
    pq.write_table(logits, folder / "images" / "stored" / "shard-000000.logits.parquet")
    model, spec = load_classifier(weak, torch.device("cpu"))
    ids = torch.arange(4)
    nets = {name: nn.Conv2d(3, 10, 3) for name in ("student", "teacher", "first", "second")}
    return {
        **nets,
        "torch": torch,
        "my_module": nn.Identity(),
        "model": model,
        "spec": spec,
        "MEAN": (0.5,) * 3,
        "STD": (0.25,) * 3,
        "Mixer": dmkd_fast.Mixer,
        "ViewSpec": ViewSpec,
        "slots": torch.zeros(4, 3, 256, 256, dtype=torch.uint8),
        "views": Views(ViewSpec(size=224, mean=(0.5,) * 3, std=(0.25,) * 3)),
        "ids": ids,
        "indices": ids,
        "uses": torch.zeros_like(ids),
        "step": 0,
        "student_logits": torch.randn(8, 10, requires_grad=True),
        "teacher_logits": torch.randn(8, 10),
        "target": torch.arange(8),
    }


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=pytest.mark.slow) if page.name == "hooks.md" else page
        for page in PAGES
    ],
    ids=str,
)
def test_examples_of_pages_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    space = prepare(tmp_path)
    monkeypatch.setattr(dmkd_fast, "distill", shortened)
    if page.name == "performance.md":
        space["views"] = torch.zeros(1, 3, 8, 8)
    text = (DOCS / page).read_text(encoding="utf-8")
    with contextlib.chdir(tmp_path):
        for indent, block in re.findall(r"^( *)```python\n(.*?)^ *```", text, re.M | re.S):
            exec(re.sub(rf"^{indent}", "", block, flags=re.M), space)
