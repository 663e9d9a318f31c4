"""`dmkd distill` from images on disk: the student of the online job, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from shard_files import contents
from small_jobs import CONFIG, ROOT, SHORT

from dmkd_fast import cli
from dmkd_fast.config.jobs import DistillConfig
from dmkd_fast.config.loading import load_config
from dmkd_fast.jobs.images import check_count
from dmkd_fast.runtime import errors

NO_DENOISER = ["denoiser=null", "sampler=null", "source.block_images=64"]


def test_the_job_from_disk_ends_with_the_student_of_the_online_job(tmp_path: Path) -> None:
    making = [a for a in SHORT if a.startswith("sampler")]
    rest = [a for a in SHORT if not a.startswith("sampler")]
    settings = [
        *making,
        "num_threads=1",
        "dtype=float32",
        "teacher.path=embedded:fashion_mnist/weak",
    ]
    made = [
        "generate",
        CONFIG,
        *settings,
        "--out",
        str(tmp_path / "set"),
        "--num-images",
        "200",
        "--images-per-shard",
        "64",
    ]
    assert cli.main(made) == 0
    assert cli.main(["distill", CONFIG, f"run_dir={tmp_path}/on", *making, *rest]) == 0
    source = f"source.path={tmp_path}/set"
    off = ["distill", CONFIG, f"run_dir={tmp_path}/off", *rest, *NO_DENOISER, source]
    assert cli.main(off) == 0
    on, off_ = (load_file(tmp_path / r / "student" / "model.safetensors") for r in ("on", "off"))
    assert all(torch.equal(on[name], off_[name]) for name in on)
    text = (tmp_path / "off" / "config.yaml").read_text()
    assert "denoiser" not in text and "sampler" not in text and "kind: shards" in text
    again = load_config(DistillConfig, tmp_path / "off" / "config.yaml")
    assert again.block_images == 64


@pytest.mark.parametrize(
    ("count", "block", "ranks", "words"),
    [
        (300, 256, 1, "blocks of 256 are not .* 212 of them .* twice .* set it to 150, and"),
        (300, 50, 4, "blocks of 50 on each of 4 ranks are not .* 100 of them .* set it to 25, and"),
        (307, 256, 1, "205 of them come into the ring twice and weigh double$"),
        (300, 150, 1, ""),
        (600, 256, 1, ""),  # does not fit
    ],
)
def test_images_that_come_into_the_ring_twice_are_told(
    count: int,
    block: int,
    ranks: int,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(errors, "_warned", set())
    sizes = ["ring.capacity_images=512", "ring.min_fill_images=200", "train.batch_size=64"]
    sizes.append(f"source.block_images={block}")
    check_count(load_config(DistillConfig, ROOT / "configs/from_disk.yaml", sizes), count, ranks)
    assert len(caplog.records) == bool(words)
    assert re.search(words, caplog.text.strip())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["source.path={whole}"], ["denoiser: got it beside source", "denoiser=null"]),
        (["denoiser=null"], ["denoiser: missing", "source"]),
        ([*NO_DENOISER, "source.path={tmp}/nowhere"], ["nowhere", "no such directory"]),
        ([*NO_DENOISER, "source.path={tmp}"], ["neither job.json nor"]),
        ([*NO_DENOISER, "source.path={whole}", "source.kind=paper"], ["no image file"]),
        ([*NO_DENOISER, "source.path={whole}", "source.kind=zip"], ["source.kind", "'zip'"]),
        ([*NO_DENOISER, "source.path={whole}", "source.wait_s=5"], ["wait_s", "follow=true"]),
        ([*NO_DENOISER, "source={path: x, kind: paper, follow: true}"], ["follow", "kind=shards"]),
        ([*NO_DENOISER, "source.path={part}"], ["64 of 200 images", "source.follow=true"]),
        (
            [
                *NO_DENOISER,
                "source.path={part}",
                "source={path: '{tmp}', follow: true, wait_s: 0.1}",
            ],
            ["job.json", "not there after 0.1 s"],
        ),
        (
            [
                *NO_DENOISER,
                "teacher={stored: true}",
                "source={path: '{tmp}', follow: true, wait_s: 0.1}",
            ],
            ["job.json", "not there after 0.1 s"],
        ),
        (
            [*NO_DENOISER, "source.path={whole}", "ring.min_fill_images=1000"],
            ["ring.min_fill_images: got 1000", "200 images"],
        ),
        (
            [*NO_DENOISER, "source.path={whole}", "ring.capacity_images=100"],
            ["source.block_images=64", "raise"],
        ),
        ([*NO_DENOISER, "source.path={whole}", "ring.capacity_images=10240"], ["ring.min_fill"]),
        (
            [*NO_DENOISER, "source.path={whole}", "ring.max_uses=50", "ring.min_fill_images=64"],
            ["ring.max_uses: got 50 with a source of 200 images that fits"],
        ),
        ([*NO_DENOISER, "source.path={names}"], ["class 0 is 'Ankle boot'", "'T-shirt/top'"]),
        (
            [*NO_DENOISER, "source.path={eleven}"],
            ["classes: source.path has 11, teacher.path has 10"],
        ),
    ],
)
def test_a_wrong_source_ends_in_one_line(
    whole: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    words: list[str],
) -> None:
    for name in ("part", "names", "eleven"):
        for file, data in contents(whole).items():
            if name == "part" and file.endswith("parquet") and file[-9] not in "01":
                continue
            target = tmp_path / "copies" / name / file
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
    plans = {name: tmp_path / "copies" / name / "job.json" for name in ("names", "eleven")}
    plan = json.loads(plans["names"].read_text())
    plan["class_names"].reverse()
    plans["names"].write_text(json.dumps(plan))
    plan["class_names"].append("Hat")
    plans["eleven"].write_text(json.dumps(plan | {"num_classes": 11}))
    (tmp_path / "empty").mkdir()
    places = {"{whole}": whole, "{tmp}": tmp_path / "empty"}
    places |= {f"{{{name}}}": tmp_path / "copies" / name for name in ("part", "names", "eleven")}
    for short, place in places.items():
        arguments = [a.replace(short, str(place)) for a in arguments]
    command = ["distill", CONFIG, "dtype=float32", f"run_dir={tmp_path}/run", *arguments]
    assert cli.main(command) == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if not line.startswith("waiting for")]
    assert len(lines) == 1 and captured.out == "", captured.err
    for word in words:
        assert word in lines[0]
    assert not (tmp_path / "run").exists()
