"""Shards of `dmkd generate` in the readers of timm, WebDataset and `datasets`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from shard_files import make_plan, write_shards

from dmkd_fast.data import dataset_card, shards

NUM_IMAGES, PER_SHARD = 10, 4


@pytest.fixture(params=[1, 3], ids=["gray", "color"])
def made(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, np.ndarray, np.ndarray]:
    """Write three shards of images with known pixels and classes."""
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (NUM_IMAGES, request.param, 6, 5), dtype=np.uint8)
    labels = np.arange(NUM_IMAGES) % 4
    write_shards(tmp_path / "set", images, labels, PER_SHARD)
    return tmp_path / "set", images, labels


def pixels(image: Any, channels: int) -> np.ndarray:
    array = np.asarray(image)
    array = array[..., None] if array.ndim == 2 else array
    return array.transpose(2, 0, 1)[:channels]


def test_both_files_say_what_the_plan_says(made: Any) -> None:
    folder, _, _ = made
    split = json.loads((folder / "_info.json").read_text())["splits"]["train"]
    assert split["filenames"] == [f"shard-00000{number}.tar" for number in range(3)]
    assert split["shard_lengths"] == [4, 4, 2] and split["num_samples"] == NUM_IMAGES
    _, head, body = (folder / "README.md").read_text().split("---\n", 2)
    facts = yaml.safe_load(head)
    assert facts["license"] == "none" and facts["task_categories"] == ["image-classification"]
    assert facts["configs"][0]["data_files"] == [{"split": "train", "path": "shard-*.tar"}]
    assert "| 3 | 3 |" in body and "under this license: none" in body


def test_a_license_that_is_no_identifier_is_named(tmp_path: Path) -> None:
    plan = make_plan(np.zeros((4, 1, 2, 2)), 2)
    plan = plan.model_copy(update={"license": "MIT: see\n[LICENSE]", "class_names": ("a|b",) * 4})
    facts = yaml.safe_load(dataset_card.card(plan).split("---\n", 2)[1])
    assert facts["license"] == "other" and facts["license_name"] == "MIT: see\n[LICENSE]"
    assert "| 0 | a\\|b |" in dataset_card.card(plan)


def test_files_are_written_once_and_again_if_they_are_lost(made: Any) -> None:
    folder, images, _ = made
    card = (folder / "README.md").read_bytes()
    (folder / "README.md").unlink()
    (folder / "_info.json").write_text("changed by hand")
    shards.claim(folder, make_plan(images, PER_SHARD))
    assert (folder / "README.md").read_bytes() == card
    assert (folder / "_info.json").read_text() == "changed by hand"


def test_timm_reads_them(made: Any) -> None:
    pytest.importorskip("webdataset")
    from timm.data import create_dataset

    folder, images, labels = made
    channels = images.shape[1]
    data = create_dataset(
        "wds/set",
        root=str(folder),
        split="train",
        is_training=False,
        input_img_mode="L" if channels == 1 else "RGB",
    )
    assert len(data) == NUM_IMAGES
    found = list(data)
    assert [target for _, target in found] == labels.tolist()
    for (image, _), expected in zip(found, images, strict=True):
        assert np.array_equal(pixels(image, channels), expected)


def test_webdataset_reads_them(made: Any) -> None:
    wds = pytest.importorskip("webdataset")
    folder, images, labels = made
    files = sorted(str(path) for path in folder.glob("shard-*.tar"))
    data = wds.WebDataset(files, shardshuffle=False).decode("pil").to_tuple("png", "cls")
    found = list(data)
    assert [target for _, target in found] == labels.tolist()
    if images.shape[1] == 3:  # its decoder makes gray images color
        assert np.array_equal(pixels(found[4][0], 3), images[4])


def test_datasets_reads_them(made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")
    folder, images, labels = made
    data = datasets.load_dataset(str(folder), split="train", cache_dir=str(tmp_path / "cache"))
    assert data.num_rows == NUM_IMAGES
    assert [int(row["cls"]) for row in data] == labels.tolist()
    assert np.array_equal(pixels(data[7]["png"], images.shape[1]), images[7])
