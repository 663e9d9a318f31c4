"""`dmkd generate`: the images of online generation, whatever happens to the jobs that make them."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from generate_farm import SETTINGS, make_set
from shard_files import contents
from small_jobs import CONFIG, ROOT

from dmkd_fast import LabelStream, Views, ViewSpec, cli
from dmkd_fast.assets import resolve
from dmkd_fast.classifiers.loading import load_classifier
from dmkd_fast.config.jobs import DistillConfig
from dmkd_fast.config.loading import load_config
from dmkd_fast.data import shards
from dmkd_fast.data.sources import ShardSource
from dmkd_fast.data.stored import ImageDecoder, StoredImages
from dmkd_fast.jobs.build import make_sampler
from dmkd_fast.jobs.images import open_denoiser
from dmkd_fast.jobs.resolve import resolve as resolve_
from dmkd_fast.jobs.resolve import resolve_images
from dmkd_fast.runtime.errors import UserError
from dmkd_fast.sampling import sampler


def test_images_and_manifest_are_those_of_online_generation(whole: Path) -> None:
    job = resolve_(load_config(DistillConfig, CONFIG, SETTINGS))
    denoiser = open_denoiser(job.config.denoiser, torch.device("cpu"))
    sampler = make_sampler(resolve_images(job, denoiser), denoiser)
    ids = torch.arange(200)
    labels = LabelStream(10).labels_of(ids)
    images = torch.empty((200, 1, 28, 28), dtype=torch.uint8)
    sampler.sample(ids, labels, out=images)

    reader = StoredImages(
        ShardSource(whole), ImageDecoder((1, 28, 28)), ring_images=256, show=False
    )
    read_ids, read_labels = reader.next_block(200)
    assert torch.equal(read_ids, ids) and torch.equal(read_labels, labels)
    assert torch.equal(reader.read(ids, labels, out=torch.empty_like(images)), images)

    teacher, spec = load_classifier(resolve(job.config.teacher.path or ""), torch.device("cpu"))
    views = Views(ViewSpec(size=28, mean=spec.mean, std=spec.std))
    with torch.no_grad():
        shares = teacher(views.whole(images, ids)).softmax(dim=1)
    table = pq.read_table(whole / shards.MANIFEST).to_pydict()
    assert table["id"] == ids.tolist() and table["class"] == labels.tolist()
    assert table["teacher_class"] == shares.argmax(dim=1).tolist()
    np.testing.assert_allclose(table["teacher_probability"], shares.amax(dim=1), rtol=1e-5)
    facts = {
        "seed": 0,
        "num_steps": 1,
        "guidance_scale": 1.0,
        "solver": "dpm++2m",
        "denoiser": "embedded:fashion_mnist/denoiser",
        "revision": None,
    }
    assert all(set(table[name]) == {value} for name, value in facts.items())


def test_the_result_does_not_depend_on_the_number_of_jobs(whole: Path, tmp_path: Path) -> None:
    for part in (2, 0, 1):
        summary = make_set(tmp_path, job_slice=(part, 3))
        assert summary["is_complete"] == (part == 1)
    assert contents(tmp_path) == contents(whole)
    assert make_set(tmp_path, job_slice=(1, 2))["made_images"] == 0  # another n finds all of it


def test_broken_images_are_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    advance = sampler.advance

    def overflowing(*args: Any, **kwargs: Any) -> Any:
        return tuple(state * float("inf") for state in advance(*args, **kwargs))

    monkeypatch.setattr(sampler, "advance", overflowing)
    with pytest.raises(UserError, match=r"16 of 16 images have .* dtype=bfloat16"):
        make_set(tmp_path)
    assert not list(tmp_path.rglob("*.tar"))


def run_farm(*arguments: object) -> dict[str, Any]:
    script = [
        sys.executable,
        str(ROOT / "tests" / "helpers" / "generate_farm.py"),
        *map(str, arguments),
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        script, capture_output=True, text=True, check=False, env=environment, timeout=1200
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def check_complete(folder: Path, count: int) -> None:
    table = pq.read_table(folder / shards.MANIFEST)
    assert sorted(table["id"].to_pylist()) == list(range(count))
    source = ShardSource(folder)  # checks tars against the manifest
    assert source.is_complete and all(source.read(i) for i in range(count))


@pytest.mark.slow
def test_five_kills_change_nothing(whole: Path, tmp_path: Path) -> None:
    result = run_farm(tmp_path, 200, 1, 5, 0)
    assert result["kills"] >= 3
    check_complete(tmp_path, 200)
    assert contents(tmp_path) == contents(whole)


@pytest.mark.slow
def test_thirty_kills_change_nothing(tmp_path: Path) -> None:
    make_set(tmp_path / "whole", num_images=2000)
    result = run_farm(tmp_path / "killed", 2000, 1, 30, 1)
    assert result["kills"] >= 25
    check_complete(tmp_path / "killed", 2000)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


@pytest.mark.slow
def test_three_jobs_killed_ten_times_each_feed_a_follower(
    make_distiller: Callable[..., Any], tmp_path: Path
) -> None:
    """The follower trains on the real images, scaled to the small distiller's 8 x 8."""
    out, count = tmp_path / "set", 2048
    script = [
        sys.executable,
        str(ROOT / "tests" / "helpers" / "generate_farm.py"),
        out,
        count,
        3,
        10,
        2,
    ]
    farm = subprocess.Popen(
        [str(a) for a in script],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    while not (out / shards.PLAN).exists():
        time.sleep(0.1)
    reader = StoredImages(
        ShardSource(out), ImageDecoder((1, 8, 8), resize=True), ring_images=64, wait_s=120
    )
    # The tiny teacher has four classes and the images ten; it only looks at pixels.
    distiller = make_distiller(num_views=4 * count, images=reader)
    taken: list[int] = []
    next_block = reader.next_block

    def watched(size: int) -> Any:
        assert distiller.ring.must_insert(16), "waited although sampling was allowed"
        ids, labels = next_block(size)
        taken.extend(ids.tolist())
        return ids, labels

    reader.next_block = watched  # type: ignore[method-assign]
    totals = distiller.fit()
    result = json.loads(farm.communicate()[0].splitlines()[-1])
    assert farm.returncode == 0 and result["kills"] >= 25, result
    assert sorted(taken) == list(range(count))
    assert totals["views"] == 4 * count
    check_complete(out, count)
    print(f"kills {result['kills']}, waits {len(reader.waits)}, {sum(reader.waits):.1f} s in all")


def test_damaged_shards_are_made_again(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    for name, data in contents(whole).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    tar = folder / "shard-000001.tar"
    data = bytearray(tar.read_bytes())
    data[700] ^= 1
    tar.write_bytes(data)
    (folder / "shard-000003.tar").unlink()
    parquet = folder / "manifest" / "shard-000004.parquet"
    parquet.write_bytes(parquet.read_bytes()[:-50])
    (folder / "manifest" / "shard-000005.parquet").unlink()
    (folder / ".shard-000005.tar.0-of-1.partial").write_bytes(b"left by a killed job")
    assert make_set(folder)["made_images"] == 4 * 32
    assert contents(folder) == contents(whole)
    assert not list(folder.rglob(".*partial"))


def test_a_full_disk_is_one_line_and_the_job_can_go_on(whole: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands in for the disk: the same failing writes."""
    make_set(tmp_path, job_slice=(0, 7))
    before = contents(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, hard))
    try:
        with pytest.raises(UserError, match="every finished shard is kept") as error:
            make_set(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "File too large" in str(error.value) and "\n" not in str(error.value)
    assert contents(tmp_path) == before and not list(tmp_path.rglob(".*partial"))
    make_set(tmp_path)
    assert contents(tmp_path) == contents(whole)


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_an_interrupt_keeps_finished_shards_and_says_how_to_go_on(
    whole: Path, tmp_path: Path, number: int
) -> None:
    arguments = [
        CONFIG,
        *SETTINGS,
        "--out",
        str(tmp_path),
        "--num-images",
        "200",
        "--images-per-shard",
        "32",
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "dmkd_fast", "generate", *arguments],
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    while not list(tmp_path.glob("*.tar")) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(number)
    _, said = process.communicate(timeout=20)
    assert process.returncode == 130, said
    assert "to go on: dmkd generate" in said and f"--out {tmp_path}" in said
    assert not list(tmp_path.rglob(".*partial"))
    done = len(shards.finished(tmp_path))
    assert 1 <= done < 7
    assert cli.main(["generate", *arguments]) == 0
    assert contents(tmp_path) == contents(whole)
