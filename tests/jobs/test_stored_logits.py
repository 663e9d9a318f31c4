"""Stored teacher logits: those of the live teacher, whatever happens to the jobs that make them."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from generate_farm import make_set
from safetensors.torch import load_file
from shard_files import contents
from small_jobs import CONFIG, SHORT, fit_until
from torch import Tensor

from dmkd_fast import Distiller, cli
from dmkd_fast.config.jobs import DistillConfig
from dmkd_fast.config.loading import load_config
from dmkd_fast.data import shards
from dmkd_fast.data.sources import ShardSource
from dmkd_fast.data.teacher_logits import LogitsPlan, LogitsWriter
from dmkd_fast.jobs.build import build
from dmkd_fast.jobs.parts import prepare
from dmkd_fast.jobs.stored_logits import Wanted, _check_loss, plan_of
from dmkd_fast.training.objective import TopLogits
from dmkd_fast.training.stored_teacher import StoredTeacher
from dmkd_fast.training.targets import Targets

NO_DENOISER = ["denoiser=null", "sampler=null", "source.block_images=64"]
VIEWS = 4
REST = [a for a in SHORT if not a.startswith("sampler")]
LIVE = [*REST, *NO_DENOISER, "ring.samples_per_insert=3", "ring.capacity_images=128"]
STORED = [*LIVE, "teacher={stored: true}"]


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 images with all logits of four views each."""
    folder = tmp_path_factory.mktemp("stored") / "full"
    make_set(folder, logits=Wanted(None, VIEWS))
    return folder


@pytest.fixture(scope="module")
def top(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 images with the three largest logits of four views each."""
    folder = tmp_path_factory.mktemp("stored") / "top"
    make_set(folder, logits=Wanted(3, VIEWS))
    return folder


def job(folder: Path, run_dir: Path, *overrides: str, base: list[str] = STORED) -> Distiller:
    settings = [*base, f"source.path={folder}", f"run_dir={run_dir}", *overrides]
    return build(*prepare(load_config(DistillConfig, CONFIG, settings)), show=False)


def test_stored_logits_are_those_of_the_live_teacher_in_float16(full: Path, tmp_path: Path) -> None:
    """Bit for bit in the micro-batches that they were made in, else within a step of float16."""
    live, source = job(full, tmp_path, base=LIVE), ShardSource(full)
    images = torch.empty((200, 1, 28, 28), dtype=torch.uint8)
    ids, labels = live.images.next_block(200)
    live.images.write(ids, labels, images, progress=0.0)
    rows = np.stack([source.read_logits(i)["logits"] for i in range(200)])
    stored = torch.from_numpy(rows)  # (N, V, C)
    assert stored.shape == (200, VIEWS, 10) and stored.dtype == torch.float16

    def logits(places: Tensor, view: int) -> Tensor:
        uses = torch.full_like(places, view)
        views = live.targets.render(images, places, ids[places], uses, progress=0.0)
        return live.targets.logits(views, labels[places], progress=0.0)

    for view in range(VIEWS):
        made = [logits(torch.arange(i, min(i + 16, 200)), view) for i in range(0, 200, 16)]
        assert torch.equal(torch.cat(made).half(), stored[:, view])
        mixed = torch.randperm(200)
        other = logits(mixed, view)
        step = torch.finfo(torch.float16).eps * other.abs().amax()
        assert (other - stored[mixed, view].float()).abs().max() <= step
    assert not torch.equal(stored[:, 0], stored[:, 1])


def test_other_readers_find_plain_values(full: Path, top: Path) -> None:
    table = pq.read_table(full / "shard-000001.logits.parquet").to_pydict()
    assert table["id"] == list(range(32, 64))
    logits = np.frombuffer(b"".join(table["logits"]), "<f2").reshape(32, VIEWS, 10)
    assert len(table["logits"][0]) == VIEWS * 10 * 2
    table = pq.read_table(top / "shard-000001.logits.parquet").to_pydict()
    assert sum(len(table[name][0]) for name in ("values", "indices")) == VIEWS * 3 * (2 + 2)
    values = np.frombuffer(b"".join(table["values"]), "<f2").reshape(32, VIEWS, 3)
    indices = np.frombuffer(b"".join(table["indices"]), "<u2").reshape(32, VIEWS, 3)
    total = np.frombuffer(b"".join(table["logsumexp"]), "<f4").reshape(32, VIEWS)
    assert np.array_equal(values, -np.sort(-logits, axis=-1)[..., :3])
    assert np.array_equal(np.take_along_axis(logits, indices.astype(np.int64), -1), values)
    wanted = torch.from_numpy(logits.copy()).float().div(4).logsumexp(-1)
    np.testing.assert_allclose(total, wanted, rtol=1e-6)
    rows = pq.read_table(full / shards.MANIFEST).to_pydict()
    assert len(set(rows["logits_sha256"])) == 200


def test_a_run_is_given_the_logits_and_crops_of_its_views(full: Path, tmp_path: Path) -> None:
    """The crops of a live run of the shards' seed, and its logits within a step of float16."""
    live = job(full, tmp_path / "live", base=LIVE)
    stored = job(full, tmp_path / "stored")
    other = job(full, tmp_path / "other", "seed=5")
    assert stored.targets.views.seed == other.targets.views.seed == 0
    losses = []
    for distiller in (live, stored):
        given = []
        learn = distiller.student.learn

        def seen(*batch: Any, given: Any = given, learn: Any = learn) -> Tensor:
            given.append(batch)
            loss: Tensor = learn(*batch)
            return loss

        distiller.student.learn = seen  # type: ignore[method-assign]
        for _ in range(6):
            distiller.refill()
            distiller.train_step()
        losses.append(given)
    for ours, theirs in zip(*losses, strict=True):
        assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[2], theirs[2])
        step = torch.finfo(torch.float16).eps * ours[1].abs().max()
        assert theirs[1].dtype == torch.float16
        assert (ours[1] - theirs[1].float()).abs().max() <= step


@pytest.mark.parametrize("which", ["full", "top"])
def test_a_stopped_run_ends_with_the_same_student(
    which: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(which)
    whole, first = job(folder, tmp_path / "whole"), job(folder, tmp_path / "first")
    whole.fit()
    fit_until(first, 11)
    again = job(folder, tmp_path / "first")
    again.restore()
    again.fit()
    ends = (d.student.average.module.state_dict().values() for d in (whole, again))
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_a_run_that_was_stopped_before_its_first_image_resumes(full: Path, tmp_path: Path) -> None:
    """An interrupt of the warm-up saves an empty ring, whose stored logits are none."""
    first = job(full, tmp_path)
    first.refill = lambda **_: signal.raise_signal(signal.SIGINT)  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        first.fit()
    assert first.ring.num_filled == 0
    again = job(full, tmp_path)
    again.restore()
    again.fit()
    assert again.step == again.schedule.num_steps


def test_all_classes_as_the_largest_ones_train_the_student_of_full_logits(
    full: Path, tmp_path: Path
) -> None:
    make_set(tmp_path / "set", logits=Wanted(10, VIEWS))
    steps = []
    for number, folder in enumerate((full, tmp_path / "set")):
        distiller = job(folder, tmp_path / str(number), "optim.name=sgd", "optim.lr=0.01")
        distiller.refill()
        steps.append([distiller.train_step().item() for _ in range(3)])
    assert steps[0] == pytest.approx(steps[1], rel=1e-5)


def test_passes_over_a_set_use_all_views(full: Path, top: Path) -> None:
    teacher = StoredTeacher(ShardSource(full), 8)
    ids, uses = torch.tensor([3, 203, 403, 199]), torch.tensor([1, 1, 2, 7])
    places, views = teacher.replayed(ids, uses)
    assert places.tolist() == [3, 3, 3, 199] and views.tolist() == [1, 2, 0, 3]
    source = ShardSource(top)
    held = StoredTeacher(source, 8)
    held.insert(slice(2, 4), torch.tensor([203, 199]))
    found = held.logits(torch.tensor([3, 2]), torch.tensor([0, 2]))
    assert isinstance(found, TopLogits)
    for row, (place, view) in enumerate([(199, 0), (3, 2)]):
        wanted = source.read_logits(place)
        assert found.values[row].tolist() == wanted["values"][view].tolist()
        assert found.indices[row].tolist() == wanted["indices"][view].tolist()
        assert found.logsumexp[row].item() == wanted["logsumexp"][view]


def test_slices_and_a_stop_change_no_byte(
    full: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add, count = LogitsWriter.add, 0

    def stopped(self: LogitsWriter, *row: Any) -> str:
        nonlocal count
        count += 1
        if count == 50:
            raise KeyboardInterrupt
        return add(self, *row)

    monkeypatch.setattr(LogitsWriter, "add", stopped)
    wanted = Wanted(None, VIEWS)
    with pytest.raises(KeyboardInterrupt):
        make_set(tmp_path, logits=wanted, job_slice=(0, 2))
    left = tmp_path / ".shard-000002.logits.parquet.0-of-2.partial"
    left.write_bytes(b"of a killed job")
    for part in (1, 0):
        make_set(tmp_path, logits=wanted, job_slice=(part, 2))
    assert contents(tmp_path) == contents(full)
    assert not list(tmp_path.rglob("*.partial"))


def test_damaged_logits_are_named_and_made_again(
    full: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "set"
    shutil.copytree(full, folder)
    file = folder / "shard-000000.logits.parquet"
    data = bytearray(file.read_bytes())
    data[data.index(pq.read_table(file)["logits"][5].as_py())] ^= 1
    file.write_bytes(data)
    command = ["distill", CONFIG, *STORED, f"source.path={folder}", f"run_dir={tmp_path}/run"]
    assert cli.main(command) == 2
    assert "bytes of row 5 are not those of the manifest" in capsys.readouterr().err
    for bad in (b"", file.read_bytes()[:700]):
        file.write_bytes(bad)
        made = make_set(folder, logits=Wanted(None, VIEWS))["made_images"]
        assert made == 32 and contents(folder) == contents(full)
    file.unlink()
    live = job(folder, tmp_path / "live", base=LIVE)  # The images need no logits.
    live.refill()


def test_the_command_line_makes_and_uses_them(tmp_path: Path) -> None:
    made = ["generate", CONFIG, *[a for a in SHORT if a.startswith(("sampler", "num", "dtype"))]]
    made += ["teacher.path=embedded:fashion_mnist/weak", "--out", str(tmp_path / "set")]
    made += ["--num-images", "128", "--images-per-shard", "64", "--quiet"]
    assert cli.main([*made, "--teacher-logits", "topk:2", "--views", "3"]) == 0
    plan = shards.read_plan(tmp_path / "set")
    assert plan.teacher_logits is not None and plan.logits_bytes == 3 * (2 * (2 + 2) + 4)
    settings = [*STORED, f"source.path={tmp_path}/set", "train.num_views=64"]
    command = ["distill", CONFIG, *settings, f"run_dir={tmp_path}/run", "--quiet"]
    assert cli.main(command) == 0
    again = load_config(DistillConfig, tmp_path / "run" / "config.yaml")
    assert again.teacher.stored and again.teacher.path == "embedded:fashion_mnist/weak"
    assert load_file(tmp_path / "run" / "student" / "model.safetensors")


@pytest.mark.parametrize(
    ("folder", "overrides", "words"),
    [
        ("whole", [], ["teacher.stored: got true with", "dmkd generate --teacher-logits"]),
        (
            "full",
            ["teacher={path: 'embedded:fashion_mnist/lenet5', stored: true}"],
            ["teacher: got other weights", "stored: true"],
        ),
        ("full", ["views.pad=1"], ["views.pad: got 1, expected 2, as for the logits in"]),
        ("full", ["views.scale=[0.5, 1]"], ["views.scale: got [0.5, 1.0], expected [1.0, 1.0]"]),
        (
            "full",
            ["source.image_size=14"],
            ["source.image_size: got [1, 14, 14], expected [1, 28, 28]"],
        ),
        ("full", ["loss.rest=renormalize"], ["loss.rest: got renormalize, expected none"]),
        ("full", ["mix.mixup_alpha=1"], ["mix: got mixing with teacher.stored"]),
        (
            "full",
            ["teacher={stored: true, stop: 0.5}"],
            ["teacher: got start=0.0 and stop=0.5 with stored=true"],
        ),
        ("full", ["more_teachers=[{path: x, stored: true}]"], ["more_teachers.0.stored: got true"]),
        ("full", ["more_teachers=[{path: x}]"], ["more_teachers: got some beside teacher.stored"]),
        (
            "full",
            [
                "teacher={path: 'embedded:fashion_mnist/weak', stored: true}",
                f"teacher.teaches={list(range(10))}",
            ],
            ["teacher: got", "'teaches': None"],
        ),
        (
            "top",
            ["loss.temperature=2"],
            ["loss.temperature: got 2, expected 4", "loss.rest=renormalize"],
        ),
        ("top", ["loss.divergence=dkd"], ["loss.divergence: got dkd", "3 largest"]),
        ("top", ["loss.divergence={dist: 0.5, jsd: 0.5}"], ["divergence: got dist", "3 largest"]),
        ("top", ["loss.standardize_logits=true"], ["loss.standardize_logits: got true"]),
        ("nowhere", [], ["job.json", "expected a directory made by dmkd generate"]),
        ("nameless", [], ["teacher.stored: got true without path", "names no teacher"]),
    ],
)
def test_logits_of_something_else_are_refused_in_one_line(
    folder: str,
    overrides: list[str],
    words: list[str],
    request: pytest.FixtureRequest,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if folder == "nameless":
        place = tmp_path / "set"
        shutil.copytree(request.getfixturevalue("full"), place)
        plan = json.loads((place / "job.json").read_text())
        del plan["settings"]["teachers"]
        (place / "job.json").write_text(json.dumps(plan))
    else:
        place = tmp_path if folder == "nowhere" else request.getfixturevalue(folder)
    run = ["distill", CONFIG, *STORED, f"source.path={place}", f"run_dir={tmp_path}/run"]
    assert cli.main([*run, *overrides]) == 2
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert len(lines) == 1 and captured.out == "", captured.err
    for word in words:
        assert word in lines[0]
    assert not (tmp_path / "run").exists()


def test_one_stored_class_is_not_renormalized_and_all_may_be_correlated() -> None:
    plan = LogitsPlan(views_per_image=1, top_k=1, temperature=4.0, views={})
    alone = load_config(DistillConfig, CONFIG, [*STORED, "source.path=x", "loss.rest=renormalize"])
    with pytest.raises(ValueError, match=r"loss\.rest: got renormalize, expected bucket"):
        _check_loss(alone, plan, "x", 10)
    every = load_config(DistillConfig, CONFIG, [*STORED, "source.path=x", "loss.divergence=dist"])
    _check_loss(every, plan.model_copy(update={"top_k": 10}), "x", 10)


def test_renormalized_top_logits_are_for_any_temperature(top: Path, tmp_path: Path) -> None:
    distiller = job(top, tmp_path, "loss.temperature=2", "loss.rest=renormalize")
    distiller.refill()
    assert distiller.train_step().isfinite()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--teacher-logits", "top:3"], "got 'top:3', expected full or topk:K"),
        (["--teacher-logits", "topk:0"], "got 'topk:0'"),
        (["--views", "2"], "--views: got 2 without --teacher-logits"),
        (["--teacher-logits", "topk:11"], "--teacher-logits: got topk:11, expected K from 1 to 10"),
        (
            ["--teacher-logits", "full", "teacher={stored: true}"],
            "teacher.stored: got true without shards",
        ),
    ],
)
def test_a_wrong_request_is_refused_in_one_line(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["generate", CONFIG, "sampler.micro_batch_images=16", "--out", str(tmp_path / "set")]
    try:
        code = cli.main([*command, "--num-images", "16", *arguments])
    except SystemExit as ended:
        code = int(ended.code or 0)
    assert code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and words in lines[0], lines
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize(
    ("wanted", "overrides", "words"),
    [
        (Wanted(11), [], "--teacher-logits: got topk:11, expected K from 1 to 10"),
        (Wanted(None, 2000), [], "--views: got 2000, expected at most 1024"),
        (
            Wanted(None),
            ["teacher.stop=0.5", "more_teachers=[{path: x}]"],
            "teacher: got start=0.0 and stop=0.5, expected the whole run with --teacher-logits",
        ),
    ],
)
def test_what_cannot_be_stored_is_refused(wanted: Wanted, overrides: list[str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        plan_of(load_config(DistillConfig, CONFIG, overrides), wanted, 10)


def test_the_mean_of_several_teachers_belongs_to_a_temperature() -> None:
    two = load_config(DistillConfig, CONFIG, ["more_teachers=[{path: x}]"])
    assert plan_of(two, Wanted(None), 10).temperature == two.loss.temperature
    one = load_config(DistillConfig, CONFIG)
    assert plan_of(one, Wanted(None), 10).temperature is None


def test_the_largest_logits_of_several_teachers_are_for_their_temperature_only() -> None:
    plan = LogitsPlan(views_per_image=1, top_k=3, temperature=4.0, views={})
    changes = [*STORED, "source.path=x", "loss.rest=renormalize", "loss.temperature=2"]
    _check_loss(load_config(DistillConfig, CONFIG, changes), plan, "x", 10)
    two = load_config(DistillConfig, CONFIG, [*changes, "more_teachers=[{path: x}]"])
    with pytest.raises(ValueError, match=r"temperature: got 2, expected 4.*temperature=4$"):
        _check_loss(two, plan, "x", 10)


def test_logits_without_end_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = Targets.logits
    monkeypatch.setattr(Targets, "logits", lambda *a, **k: 1e9 * logits(*a, **k))
    with pytest.raises(ValueError, match="--teacher-logits: got logits that are not finite"):
        make_set(tmp_path, logits=Wanted(None, 1))
    assert not list(tmp_path.rglob("*.tar"))
