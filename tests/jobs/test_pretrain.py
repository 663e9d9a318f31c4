"""Pretraining on a small idx folder: it learns, resumes exactly, and keeps its word on splits."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import signal
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_models import spread
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dmkd_fast import cli
from dmkd_fast.config.jobs import TeacherConfig
from dmkd_fast.config.loading import load_config
from dmkd_fast.data import test_sets
from dmkd_fast.denoisers.loading import load_denoiser
from dmkd_fast.denoisers.trainable import new_pixel_dit, save_denoiser, zero_modulations
from dmkd_fast.jobs.pretrain import classifier as classifier_job
from dmkd_fast.jobs.pretrain import denoiser as denoiser_job
from dmkd_fast.jobs.pretrain import loop
from dmkd_fast.jobs.pretrain.classifier import pretrain_teacher
from dmkd_fast.jobs.pretrain.denoiser import FLOW, _sample_grids, training_attention
from dmkd_fast.jobs.pretrain.real_data import load_real
from dmkd_fast.runtime.errors import UserError
from dmkd_fast.runtime.output.progress import Progress

CONFIGS = Path(__file__).parents[2] / "configs" / "pretrain"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """5,400 training and 200 test images: the class is where the bright square lies."""
    folder = tmp_path_factory.mktemp("data")
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 5400), ("t10k", 200)):
        labels = torch.arange(count) % 10
        images = torch.randint(0, 60, (count, 28, 28), generator=generator)
        for i, label in enumerate(labels.tolist()):
            row, column = 14 * (label // 5), 5 * (label % 5)
            images[i, row : row + 10, column : column + 5] += 180
        for kind, values in (("images-idx3", images), ("labels-idx1", labels)):
            header = struct.pack(">HBB", 0, 8, values.ndim)
            header += struct.pack(f">{values.ndim}I", *values.shape)
            body = values.to(torch.uint8).numpy().tobytes()
            (folder / f"{split}-{kind}-ubyte.gz").write_bytes(gzip.compress(header + body))
    return folder


def run(kind: str, name: str, data: Path, out: Path, *changes: str) -> dict:
    arguments = [
        str(CONFIGS / f"{name}.yaml"),
        f"run_dir={out}",
        "num_threads=1",
        "dtype=float32",
        "train.compile=false",
        "train.log_every_steps=10",
        *changes,
    ]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert cli.main(["pretrain", kind, *arguments, "--data", str(data)]) == 0
    return json.loads(printed.getvalue().splitlines()[-1])


def test_the_last_5000_training_images_are_held_out(data: Path) -> None:
    real = load_real(data, torch.device("cpu"))
    full = test_sets.load_idx(data, "train")
    assert torch.equal(real.train.images, full.images[:-5000])
    assert torch.equal(real.held_out.labels, full.labels[-5000:])


@pytest.mark.parametrize("smoothing", [0.0, 0.4])
def test_label_smoothing_reaches_the_loss(
    smoothing: float, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bias, losses = torch.arange(10.0), []

    def train(_: Any, model: Any, loss_of: Any, *__: Any) -> None:
        for weight in (weights := list(model.parameters())):
            weight.data.zero_()
        weights[-1].data.copy_(bias)  # logits of every image
        losses.append(loss_of(torch.arange(8), torch.zeros(8, dtype=torch.int64)).item())
        raise UserError("seen")

    monkeypatch.setattr(loop, "train", train)
    settings = [f"label_smoothing={smoothing}", "dtype=float32", f"run_dir={tmp_path / 'run'}"]
    config = load_config(TeacherConfig, CONFIGS / "lenet5.yaml", settings)
    with pytest.raises(UserError, match="seen"):
        pretrain_teacher(config, data, show=False)
    log_p, labels = bias.log_softmax(dim=0), torch.arange(8)
    expected = -((1 - smoothing) * log_p[labels] + smoothing * log_p.mean()).mean()
    assert losses == pytest.approx([expected.item()])


def test_weights_orders_and_crops_follow_the_seed(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds: dict[str, int] = {}
    views = classifier_job.Views

    def spied(*given: Any, **settings: Any) -> Any:
        seeds["views"] = settings["seed"]
        return views(*given, **settings)

    def stopped(*_: Any, **settings: Any) -> None:
        seeds.update(steps=settings["seed"], weights=torch.initial_seed())
        raise UserError("seen")

    monkeypatch.setattr(classifier_job, "Views", spied)
    monkeypatch.setattr(loop, "Pretraining", stopped)
    settings = ["seed=7", "dtype=float32", f"run_dir={tmp_path / 'run'}"]
    config = load_config(TeacherConfig, CONFIGS / "lenet5.yaml", settings)
    with pytest.raises(UserError, match="seen"):
        pretrain_teacher(config, data, show=False)
    assert seeds == {"views": 7, "steps": 7, "weights": 7}


@pytest.mark.slow
def test_teacher_learns_and_resumes_exactly(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    views = "train.num_views=12800"
    facts = run("teacher", "lenet5", data, tmp_path / "whole", views)
    assert facts["held_out_top1"] > 0.9 and facts["test_top1"] > 0.9
    assert "held_out_top1" in (tmp_path / "whole" / "model" / "README.md").read_text()

    # A run that was interrupted after 6,400 of the same 12,800 views.
    run("teacher", "lenet5", data, tmp_path / "cut", views)
    folder = tmp_path / "cut" / "checkpoints"
    for path in folder.glob("step-*"):
        path.rename(folder / "gone")
    (tmp_path / "cut" / "model" / "model.safetensors").unlink()
    half = pretrain_state(data, tmp_path, views)
    half.rename(folder / half.name)
    hint = f"to go on: dmkd pretrain teacher {tmp_path}/half/config.yaml --resume --data DIR\n"
    assert hint in capsys.readouterr().err
    again = [str(CONFIGS / "lenet5.yaml"), f"run_dir={tmp_path}/cut", "--data", str(data)]
    assert cli.main(["pretrain", "teacher", *again, "--resume"]) == 0
    first, second = (
        load_file(tmp_path / r / "model" / "model.safetensors") for r in ("whole", "cut")
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


def pretrain_state(data: Path, tmp_path: Path, views: str) -> Path:
    """The checkpoint that an interrupted run leaves at step 50 of 100."""
    from dmkd_fast.training.ema import WeightEMA

    update, count = WeightEMA.update, 0

    def interrupted(self: WeightEMA, taken: torch.Tensor) -> None:
        nonlocal count
        update(self, taken)
        count += 1
        if count == 50:
            signal.raise_signal(signal.SIGINT)

    WeightEMA.update = interrupted  # type: ignore[method-assign]
    try:
        arguments = [
            str(CONFIGS / "lenet5.yaml"),
            f"run_dir={tmp_path}/half",
            "num_threads=1",
            "dtype=float32",
            views,
            "--data",
            str(data),
        ]
        assert cli.main(["pretrain", "teacher", *arguments]) == 130
    finally:
        WeightEMA.update = update  # type: ignore[method-assign]
    return tmp_path / "half" / "checkpoints" / "step-000000050"


@pytest.mark.slow
def test_a_teacher_that_learns_nothing_stops_and_batches_may_come_in_parts(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ends = []
    for parts in (1, 4):
        out = tmp_path / f"parts{parts}"
        changes = [
            "train.num_views=2560",
            f"train.accumulate={parts}",
            "optim.name=sgd",
            "optim.milestones=[0.5]",
            "optim.lr=0.01",
        ]
        run("teacher", "lenet5", data, out, *changes)
        ends.append(load_file(out / "model" / "model.safetensors"))
    for name, value in ends[0].items():
        torch.testing.assert_close(value, ends[1][name], rtol=1e-3, atol=1e-4)
    entropy = torch.nn.functional.cross_entropy
    monkeypatch.setattr(
        torch.nn.functional, "cross_entropy", lambda *a, **k: entropy(*a, **k) * float("inf")
    )
    arguments = [
        str(CONFIGS / "lenet5.yaml"),
        f"run_dir={tmp_path}/bad",
        "dtype=float32",
        "train.log_every_steps=10",
        "--data",
        str(data),
    ]
    assert cli.main(["pretrain", "teacher", *arguments]) == 2
    assert "dmkd: 20 steps in a row had a loss or gradient that" in capsys.readouterr().err


@pytest.mark.slow
def test_denoiser_learns_and_its_samples_follow_the_label(data: Path, tmp_path: Path) -> None:
    facts = run(
        "denoiser",
        "denoiser",
        data,
        tmp_path / "run",
        "num_layers=2",
        "num_heads=2",
        "train.num_views=32000",
        "train.batch_size=64",
        "optim.ema_decay=0.98",
        "optim.lr=4e-3",
        "patch_size=7",
    )
    assert facts["held_out_loss"] < 0.35  # predicting zero gives 1 + the images' own variance
    folder = tmp_path / "run" / "model"
    for name in ("README.md", "samples_guidance_1.png", "samples_guidance_2.png"):
        assert (folder / name).stat().st_size > 0
    loaded = load_denoiser(folder, torch.device("cpu"))
    silent = Progress(show=False)
    grids = dict(_sample_grids(folder, range(loaded.num_classes), torch.device("cpu"), silent))
    images = grids[2.0].flatten(0, 1)
    bright = torch.stack(
        [
            images[:, 0, r : r + 10, c : c + 5].float().mean((1, 2))
            for r in (0, 14)
            for c in (0, 5, 10, 15, 20)
        ],
        dim=1,
    )
    labels = torch.arange(10).repeat_interleave(8)
    assert (bright.argmax(1) == labels).float().mean() > 0.8


def test_too_few_images_are_refused(data: Path, tmp_path: Path, capsys) -> None:
    small = tmp_path / "small"
    small.mkdir()
    for name in ("images-idx3", "labels-idx1"):
        content = (data / f"t10k-{name}-ubyte.gz").read_bytes()
        (small / f"train-{name}-ubyte.gz").write_bytes(content)
    arguments = ["pretrain", "teacher", str(CONFIGS / "weak.yaml"), "--data", str(small)]
    assert cli.main([*arguments, f"run_dir={tmp_path}/out"]) == 2
    assert "got 200 training images, expected more than the 5000" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


FEWSTEP = [
    "num_threads=1",
    "dtype=float32",
    "train.compile=false",
    "sampler.compile=false",
    "sampler={num_steps: 4, solver: dpm++2m, guidance_scale: 1.5, micro_batch_images: 32}",
    "num_steps=2",
    "pool_images=64",
    "reuse=4",
    "train.batch_size=32",
    "train.log_every_steps=4",
]


def fewstep(out: Path, *changes: str) -> dict:
    arguments = [str(CONFIGS / "fewstep.yaml"), f"run_dir={out}", *FEWSTEP, *changes]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert cli.main(["pretrain", "fewstep", *arguments]) == 0
    return json.loads(printed.getvalue().splitlines()[-1])


@pytest.mark.parametrize(("count", "expected"), [(501, 1 / 501), (1000, 0.001), (9, 1 / 9)])
def test_each_held_out_image_has_the_same_weight(
    count: int, expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(denoiser_job, "flow_loss", lambda model, x, y, job: y.float().mean())
    labels = torch.zeros(count, dtype=torch.int64)
    labels[-1] = 1
    images = torch.zeros(count, 1, 1, 1, dtype=torch.uint8)
    held_out = test_sets.ImageSet(images=images, labels=labels, class_names=("a", "b"))
    job: Any = SimpleNamespace(display=Progress(show=False), device=torch.device("cpu"))
    found = denoiser_job._held_out_loss(torch.nn.Identity(), held_out, job)
    assert found == round(expected, 5)


def test_training_starts_from_blocks_that_are_the_identity() -> None:
    sizes = {"num_classes": 3, "channels": 1, "image_size": 8, "patch_size": 4}
    dit = new_pixel_dit(**sizes, num_layers=2, num_heads=2, head_dim=8).dit
    tokens, times = torch.randn(2, 4, 16), torch.tensor([10, 900])
    for block in dit.transformer_blocks:
        assert not torch.equal(block(tokens, timestep=times, class_labels=times % 3), tokens)
    zero_modulations(dit)
    for block in dit.transformer_blocks:
        assert torch.equal(block(tokens, timestep=times, class_labels=times % 3), tokens)


def test_attention_trains_in_the_dtype_of_its_inputs_on_a_cpu() -> None:
    before = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
    heads = torch.randn(2, 2, 5, 8, dtype=torch.bfloat16, requires_grad=True)
    with Dtypes() as seen, training_attention(torch.device("cpu")):
        mixed = torch.nn.functional.scaled_dot_product_attention(heads, heads, heads)
        mixed.sum().backward()
    assert seen.dtypes == {torch.bfloat16}
    assert torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed() == before


class Dtypes(TorchDispatchMode):
    """Collect the dtypes of all results of matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.bmm.default, torch.ops.aten.mm.default):
            self.dtypes.add(result.dtype)
        return result


@pytest.mark.slow
def test_fewstep_comes_closer_to_its_teacher_without_any_data(tmp_path: Path) -> None:
    model = new_pixel_dit(
        num_classes=3, channels=1, image_size=8, patch_size=4, num_layers=2, num_heads=2, head_dim=8
    )
    save_denoiser(spread(model).dit, FLOW, tmp_path / "start")
    facts = fewstep(
        tmp_path,
        f"denoiser.path={tmp_path}/start",
        "train.num_views=65536",
        "optim.lr=5e-3",
        "optim.ema_decay=0.9",
        "pool_images=1024",
        "train.batch_size=64",
    )
    assert facts["rms_to_teacher"] < 0.7 * facts["rms_without_training"]
    loaded = load_denoiser(tmp_path / "model", torch.device("cpu"))
    assert loaded.scheduler["distilled_steps"] == 2
    assert loaded.scheduler["distilled_guidance_scale"] == 1.5
    assert (tmp_path / "model" / "samples.png").stat().st_size > 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["num_steps=3"], "num_steps: got 3, expected a divisor"),
        (["train.batch_size=100"], "train.batch_size: got 100, expected a divisor"),
        (["denoiser.path=embedded:fashion_mnist/none"], "no such asset"),
    ],
)
def test_fewstep_refuses_what_does_not_fit(
    changes: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(CONFIGS / "fewstep.yaml"), f"run_dir={tmp_path}/out", *FEWSTEP, *changes]
    assert cli.main(["pretrain", "fewstep", *arguments]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_sample_grids_are_made_in_micro_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    class Recorder:
        """Take the place of the sampler, and make black images."""

        def __init__(self, *_: Any, micro_batch_images: int, **__: Any) -> None:
            sizes.append(micro_batch_images)

        def sample(self, ids: Tensor, labels: Tensor, *, out: Tensor) -> Tensor:
            assert len(ids) == len(labels) == len(out)
            return out.zero_()

    loaded = SimpleNamespace(image_shape=(1, 2, 2))
    monkeypatch.setattr(denoiser_job, "load_denoiser", lambda *_: loaded)
    monkeypatch.setattr(denoiser_job, "DiffusionSampler", Recorder)
    for count, size in ((2, 16), (100, 64)):
        sizes.clear()
        grids = _sample_grids(Path(), range(count), torch.device("cpu"), Progress(show=False))
        assert [images.shape for _, images in grids] == [(count, 8, 1, 2, 2)] * 3
        assert sizes == [size] * 3
