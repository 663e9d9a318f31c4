"""`dmkd generate`: the images of online generation, whatever happens to the jobs that make them."""

from __future__ import annotations

import json
import os
import resource
import shutil
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
from generate_farm import SETTINGS
from safetensors.torch import load_file, save_file
from shard_files import contents
from small_jobs import CONFIG, ROOT, SHORT

from dmkd_fast import LabelStream, Views, ViewSpec, cli
from dmkd_fast.assets import resolve
from dmkd_fast.classifiers.loading import load_classifier
from dmkd_fast.config.jobs import DistillConfig
from dmkd_fast.config.loading import load_config
from dmkd_fast.data import shards
from dmkd_fast.data.sources import ShardSource
from dmkd_fast.data.stored import ImageDecoder, StoredImages
from dmkd_fast.jobs import generate
from dmkd_fast.jobs.images import make_sampler, open_denoiser, resolve_sampler
from dmkd_fast.jobs.resolve import resolve as resolve_
from dmkd_fast.runtime.errors import UserError
from dmkd_fast.sampling import sampler


def make(out: Path, *overrides: str, **options: Any) -> dict[str, Any]:
    config = load_config(DistillConfig, CONFIG, [*SETTINGS, *overrides])
    options = {"num_images": 200, "images_per_shard": 32, "show": False} | options
    return generate.run(config, out, **options)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 images made by one job without a break."""
    folder = tmp_path_factory.mktemp("generate") / "whole"
    summary = make(folder)
    assert summary["made_images"] == summary["images"] == 200 and summary["is_complete"]
    return folder


def test_images_and_manifest_are_those_of_online_generation(whole: Path) -> None:
    config = resolve_(load_config(DistillConfig, CONFIG, SETTINGS))
    denoiser = open_denoiser(config.denoiser, torch.device("cpu"))
    sampler = make_sampler(resolve_sampler(config, denoiser), denoiser)
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

    teacher, spec = load_classifier(resolve(config.teacher.path or ""), torch.device("cpu"))
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
        summary = make(tmp_path, part=(part, 3))
        assert summary["is_complete"] == (part == 1)
    assert contents(tmp_path) == contents(whole)
    assert make(tmp_path, part=(1, 2))["made_images"] == 0  # another n finds all of it


def test_broken_images_are_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    advance = sampler.advance

    def overflowing(*args: Any, **kwargs: Any) -> Any:
        return tuple(state * float("inf") for state in advance(*args, **kwargs))

    monkeypatch.setattr(sampler, "advance", overflowing)
    with pytest.raises(UserError, match=r"16 of 16 images have .* dtype=bfloat16"):
        make(tmp_path)
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


def test_five_kills_change_nothing(whole: Path, tmp_path: Path) -> None:
    result = run_farm(tmp_path, 200, 1, 5, 0)
    assert result["kills"] >= 3
    check_complete(tmp_path, 200)
    assert contents(tmp_path) == contents(whole)


@pytest.mark.slow
def test_thirty_kills_change_nothing(tmp_path: Path) -> None:
    make(tmp_path / "whole", num_images=2000)
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


@pytest.mark.parametrize(
    ("changes", "options", "words"),
    [
        (["seed=1"], {}, "seed is 0 there and 1 here"),
        (["sampler.num_steps=2"], {}, "sampler.num_steps is 1 there and 2 here"),
        (["teacher.path=embedded:fashion_mnist/lenet5"], {}, "teacher.path is"),
        (
            [
                "denoiser.path=embedded:fashion_mnist/fewstep",
                "sampler={num_steps: 4, solver: euler, guidance_scale: 1, micro_batch_images: 16}",
            ],
            {},
            "denoiser.path is",
        ),
        ([], {"num_images": 201}, "num_images is 200 there and 201 here"),
        ([], {"images_per_shard": 64}, "images_per_shard is 32 there and 64 here"),
        ([], {"images_per_shard": 40}, "expected a multiple of sampler.micro_batch_images=16"),
        ([], {"num_images": 10**13}, "GiB are free"),
    ],
)
def test_other_settings_are_refused_and_nothing_changes(
    whole: Path, changes: list[str], options: dict[str, Any], words: str
) -> None:
    before = contents(whole)
    with pytest.raises(UserError, match=words) as error:
        make(whole, *changes, **options)
    assert "\n" not in str(error.value) and contents(whole) == before


def test_other_weights_under_the_same_path_are_refused(tmp_path: Path) -> None:
    model = shutil.copytree(resolve("embedded:fashion_mnist/denoiser"), tmp_path / "model")
    settings = [f"denoiser.path={model}"]
    make(tmp_path / "set", *settings, num_images=16)
    file = model / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["proj_out_2.bias"] += 0.5
    save_file(weights, file)
    with pytest.raises(UserError, match="denoiser_sha256"):
        make(tmp_path / "set", *settings, num_images=16)


def test_a_directory_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match=r"holds other files \(thesis\.tex"):
        make(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(UserError, match="cannot write"):
        make(tmp_path / "thesis.tex" / "set")


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
    assert make(folder)["made_images"] == 4 * 32
    assert contents(folder) == contents(whole)
    assert not list(folder.rglob(".*partial"))


def test_a_shard_under_a_second_name_is_refused_and_nothing_changes(
    whole: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "set"
    shutil.copytree(whole, folder)
    part = folder / shards.MANIFEST / "shard-000001.parquet"
    part.rename(part.with_name("shard-0000001.parquet"))
    before = contents(folder)
    with pytest.raises(UserError, match=r"shard-0000001\.parquet: got another name") as error:
        make(folder)
    assert "\n" not in str(error.value) and contents(folder) == before


def test_a_full_disk_is_one_line_and_the_job_can_go_on(whole: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands in for the disk: the same failing writes."""
    make(tmp_path, part=(0, 7))
    before = contents(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, hard))
    try:
        with pytest.raises(UserError, match="every finished shard is kept") as error:
            make(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "File too large" in str(error.value) and "\n" not in str(error.value)
    assert contents(tmp_path) == before and not list(tmp_path.rglob(".*partial"))
    make(tmp_path)
    assert contents(tmp_path) == contents(whole)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["teacher={arch: lenet5}"], "teacher: got arch"),
        (
            [
                "denoiser=null",
                "sampler=null",
                "source={path: x}",
                "ring.capacity_images=512",
                "ring.min_fill_images=64",
            ],
            "source: got it",
        ),
        (["teacher.path=embedded:fashion_mnist/none"], "no such asset"),
        (["sampler.phases=[{start: 0.5, num_steps: 2, guidance_scale: 1}]"], "phases: got some"),
    ],
)
def test_a_config_that_cannot_generate_ends_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    command = ["generate", CONFIG, *arguments, "--out", str(tmp_path / "x"), "--num-images", "9"]
    assert cli.main(command) == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1
    assert not (tmp_path / "x").exists()


def test_two_jobs_with_the_same_part_do_not_meet(whole: Path) -> None:
    with (
        shards.locked(whole, "0-of-1"),
        pytest.raises(UserError, match="another job makes slice 0-of-1"),
    ):
        make(whole)


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
        [sys.executable, "-m", "dmkd_fast.cli", "generate", *arguments],
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


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--num-images", "0"], "expected a positive whole number"),
        (["--num-images", "many"], "expected a positive whole number"),
        (["--num-images", "9", "--shard", "3/3"], "expected i/n with 0 <= i < n"),
        (["--num-images", "9", "--shard", "1"], "expected i/n"),
        (["--num-images", "9", "--shard", "-1/2"], "expected"),
    ],
)
def test_wrong_arguments_are_usage_errors(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["generate", CONFIG, "--out", str(tmp_path / "x"), *arguments])
    assert stop.value.code == 2 and words in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


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
