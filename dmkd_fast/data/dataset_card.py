"""Describe a directory of shards for other readers: timm's `_info.json` and a Hugging Face card.

Both files are functions of the plan, so that every job of a directory writes the same bytes.
"""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dmkd_fast.runtime.files import discard, sync

if TYPE_CHECKING:
    from dmkd_fast.data.shards import Plan

INFO, CARD = "_info.json", "README.md"
MOST_LISTED = 10**6
"""Largest number of shards for which `_info.json` is written, as it names all of them."""


def write(folder: Path, plan: Plan) -> None:
    """Write both files, unless they are there."""
    texts = {CARD: card(plan)}
    if plan.num_shards <= MOST_LISTED:
        texts[INFO] = json.dumps(info(plan), indent=1) + "\n"
    for name, text in texts.items():
        if (folder / name).exists():
            continue
        partial = folder / f".{name}.{secrets.token_hex(8)}.partial"  # other jobs may write theirs
        try:
            partial.write_text(text, encoding="utf-8")
            sync(partial)
            os.replace(partial, folder / name)
        finally:
            discard(partial)


def info(plan: Plan) -> dict[str, Any]:
    """Return what timm's WebDataset reader wants to know about the split `train`."""
    numbers = range(plan.num_shards)
    split = {
        "name": "train",
        "filenames": [f"shard-{number:06d}.tar" for number in numbers],
        "shard_lengths": [len(plan.ids(number)) for number in numbers],
        "num_samples": plan.num_images,
    }
    return {"splits": {"train": split}, "license": plan.license}


def card(plan: Plan) -> str:
    """Return the data card, whose head tells `datasets.load_dataset` which files to read."""
    known = re.fullmatch(r"[a-z0-9][a-z0-9.-]*", plan.license.lower()) is not None
    head = {
        "license": plan.license.lower() if known else "other",
        **({} if known else {"license_name": plan.license}),
        "task_categories": ["image-classification"],
        "tags": ["synthetic", "webdataset"],
        "configs": [
            {"config_name": "default", "data_files": [{"split": "train", "path": "shard-*.tar"}]}
        ],
    }
    lines = [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in head.items()]
    channels, height, width = plan.image_shape
    size = f"{width} x {height} pixels, {'gray' if channels == 1 else 'color'}"
    denoiser = plan.settings.get("denoiser")
    path = denoiser.get("path") if isinstance(denoiser, Mapping) else None
    classes = "".join(f"| {i} | {_cell(name)} |\n" for i, name in enumerate(plan.class_names))
    return f"""---
{chr(10).join(lines)}
---

# {plan.num_images:,} generated images of {plan.num_classes:,} classes

`dmkd generate` made the images ({size}) with the diffusion model `{_cell(path or "unknown")}`,
whose weights are under this license: {_cell(plan.license)}. No image is a photo. `job.json` has all
settings, `manifest/` one row per image: class, guidance, the teacher's prediction and probability.

| class | name |
| --- | --- |
{classes}"""


def _cell(text: str) -> str:
    """Return a text that neither ends a table's cell nor a line."""
    return " ".join(text.split()).replace("|", "\\|")
