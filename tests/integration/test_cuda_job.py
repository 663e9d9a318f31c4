"""A whole small job on a GPU: streams, graphs, exact resume, no waiting, test images, files.

Marked cuda; benchmarks/gpu.sh runs it. Without a GPU the same lines run under
benchmarks/fake_cuda.py (test_gpu_rehearsal.py), so each works on whatever says it is cuda.
"""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rings import new_ring
from run_state import fingerprint, rows
from safetensors.torch import load_file
from small_jobs import fit_until, sampler_of
from small_models import small_dit
from torch import Tensor, nn

from dmkd_fast import (
    Denoiser,
    DiffusionSampler,
    Distiller,
    GeneratedImages,
    Guidance,
    ImageSet,
    LabelStream,
    Schedule,
    Steps,
    StudentTrainer,
    Targets,
    Views,
    ViewSpec,
    measure,
    open_set,
)
from dmkd_fast.data import test_sets
from dmkd_fast.data.listing import Item
from dmkd_fast.data.test_sets import EncodedSet
from dmkd_fast.denoisers.dit import lean_dit
from dmkd_fast.denoisers.wrappers import Decoder
from dmkd_fast.ring.cuda_sync import ProducerStream, SingleStream
from dmkd_fast.runtime.device import set_repeatable
from dmkd_fast.views.spec import InputSpec

pytestmark = pytest.mark.cuda
HAS_DRIVER = torch._C._cuda_getDeviceCount() > 0


@pytest.fixture(autouse=True)
def repeatable() -> None:
    """As the command line sets it."""
    set_repeatable()


def classifier() -> nn.Module:
    """32 x 32 color images to ten classes: convolutions, batch norm, dropout."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.1),
        nn.Linear(32 * 16, 10),
    )


def sampler(seed: int = 0) -> DiffusionSampler:
    """A guided latent DiT with an autoencoder, compiled and captured: 3 x 16 x 16 images."""
    import diffusers
    from small_models import VAE, spread

    lean = lean_dit(small_dit())
    assert lean is not None
    lean.choose_attention("auto", device=torch.device("cuda"), dtype=torch.float16)
    vae = spread(diffusers.AutoencoderKL(**VAE), seed=1)
    return DiffusionSampler(
        Denoiser(
            module=lean,
            scheduler={"_class_name": "DDIMScheduler", "clip_sample": False},
            latent_shape=(4, 8, 8),
            image_shape=(3, 16, 16),
            decoder=Decoder(vae).to(memory_format=torch.channels_last),
            num_classes=1000,
            null_class=1000,
        ),
        Steps(count=3),
        Guidance(scale=2.0),
        micro_batch_images=16,
        dtype=torch.float16,
        device="cuda",
        seed=seed,
        compile=True,
    )


def job(run_dir: Path, *, test_set: ImageSet | None = None, **changes: Any) -> Distiller:
    """40 steps of Muon in float16 with averaged weights; everything compiled."""
    torch._dynamo.reset()  # else it gives up after eight networks of one kind and runs them eagerly
    torch.manual_seed(5)
    teacher = classifier().cuda()
    torch.manual_seed(7)
    student = classifier().cuda().to(memory_format=torch.channels_last)
    schedule = {
        "batch_size": 16,
        "num_views": 640,
        "lr": 3e-3,
        "name": "muon",
        "log_every_steps": 10,
        "ema_decay": 0.9,
    }
    return Distiller(
        GeneratedImages(LabelStream(10, device="cuda"), sampler()),
        new_ring(image_shape=(3, 16, 16), device="cuda", num_classes=10, guard_blocks=1),
        StudentTrainer(
            student, Schedule(**(schedule | changes)), dtype=torch.float16, compile=True
        ),
        Targets(
            teacher,
            Views(ViewSpec(size=16, mean=(0.5,) * 3, std=(0.5,) * 3, device="cuda"), pad=1),
            dtype=torch.float16,
            compile=True,
        ),
        run_dir,
        test_set=test_set,
        show=False,
    )


def stop_after(distiller: Distiller, step: int) -> None:
    torch.manual_seed(0)
    fit_until(distiller, step)


def fitted(distiller: Distiller) -> Distiller:
    torch.manual_seed(0)
    distiller.fit()
    return distiller


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Distiller:
    """A job that ran to its end."""
    set_repeatable()
    return fitted(job(tmp_path_factory.mktemp("whole")))


def test_two_runs_and_a_resumed_one_end_with_the_same_bits(
    whole: Distiller, tmp_path: Path
) -> None:
    expected = fingerprint(whole)
    assert whole._captured is not None
    assert all(row["loss"] > 0 for row in rows(whole.run_dir))
    assert all(w.isfinite().all() for w in whole.student.average.module.state_dict().values())
    assert fingerprint(fitted(job(tmp_path / "again"))) == expected
    for step in (3, 26):
        broken = job(tmp_path / f"broken{step}", checkpoint_every_s=1e-6)
        stop_after(broken, step)
        resumed = job(broken.run_dir)
        torch.manual_seed(99)
        assert resumed.restore() == (step, [])
        resumed.fit()
        assert fingerprint(resumed) == expected
        assert rows(resumed.run_dir) == rows(whole.run_dir)


def test_rows_that_were_due_at_an_interruption_are_those_of_the_whole_run(
    whole: Distiller, tmp_path: Path
) -> None:
    """Right after a step that logs, and inside an evaluation: with sums that lie on the host."""
    generator = torch.Generator().manual_seed(1)
    test_set = ImageSet(
        images=torch.randint(0, 256, (40, 3, 16, 16), generator=generator, dtype=torch.uint8),
        labels=torch.arange(40) % 10,
        class_names=tuple("abcdefghij"),
    ).to(torch.device("cuda"))
    settings: dict[str, Any] = {"test_set": test_set, "num_evaluations": 2}
    first = job(tmp_path / "run", **settings)
    stop_after(first, 10)
    second = job(first.run_dir, **settings)
    assert second.restore() == (10, [])
    second._scores = lambda: signal.raise_signal(signal.SIGINT)  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        second.fit()
    third = job(first.run_dir, **settings)
    assert third.restore() == (20, [])
    third.fit()
    assert fingerprint(third) == fingerprint(whole)
    found = rows(third.run_dir)
    assert ["top1" in row for row in found] == [False, True, False, True]
    assert [{k: v for k, v in row.items() if k != "top1"} for row in found] == rows(whole.run_dir)


def test_a_stream_of_its_own_changes_no_bit(tmp_path: Path) -> None:
    one = job(tmp_path / "one", num_views=1600)
    one.ring._streams = SingleStream()
    expected = fingerprint(fitted(one))
    two = fitted(job(tmp_path / "two", num_views=1600))
    assert isinstance(two.ring._streams, ProducerStream) and fingerprint(two) == expected
    assert one.ring.num_inserted == 400


def test_images_of_a_damaged_block_are_made_again_on_the_gpu(tmp_path: Path) -> None:
    first = job(tmp_path / "run")
    stop_after(first, 17)
    images = first.ring.images.clone()
    block = sorted((first.run_dir / "blocks").glob("block-*"))[-1]
    block.write_bytes(block.read_bytes()[:-1] + b"\0\0")
    again = job(first.run_dir)
    step, notes = again.restore()
    assert step == 17 and len(notes) == 1 and "made again" in notes[0]
    held = again.blocks._named
    assert len(held) >= 3
    for number in held:
        slots = again.blocks.ring.blocks.slots(number)
        assert torch.equal(again.ring.images[slots], images[slots])


def test_blocks_and_checkpoints_hold_what_the_gpu_held(whole: Distiller) -> None:
    newest = sorted((whole.run_dir / "checkpoints").glob("step-*"))[-1]
    saved = load_file(newest / "state.safetensors")
    for name, value in whole.student.model.state_dict().items():
        assert torch.equal(saved[f"student/{name}"], value.cpu()), name
    for path in (whole.run_dir / "blocks").glob("block-*"):
        slots = whole.blocks.ring.blocks.slots(int(path.stem.partition("-")[2]))
        assert torch.equal(load_file(path)["images"], whole.ring.images[slots].cpu())


def test_steps_and_refills_never_wait_for_the_device(tmp_path: Path) -> None:
    run = job(tmp_path / "run", name="adamw", max_grad_norm=1.0)
    run.warm_up()
    for _ in range(10):
        run.refill()
        run.train_step()
    torch.cuda.synchronize()
    before, inserted = torch.cuda.memory_allocated(), run.ring.num_inserted
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(20):
            run.refill()
            loss = run.train_step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert run.ring.num_inserted > inserted and loss.isfinite()
    assert torch.cuda.memory_allocated() - before < 2**22  # nothing piles up
    run.checkpoints.writer.close()


def test_nothing_of_a_run_lies_on_the_host(tmp_path: Path) -> None:
    run = job(tmp_path / "run")
    run.refill()
    draw = run.ring.sample(16)
    seen = run.targets.views(run.ring.images, draw.indices, draw.ids, draw.uses)
    run.ring.release()
    loss = run.train_step()
    tensors = [draw.indices, draw.ids, draw.uses, seen, loss, sampler_of(run).table.rows]
    tensors += [*run.ring._tensors().values(), *run.student.model.state_dict().values()]
    tensors += [
        *run.student.average.module.state_dict().values(),
        *sampler_of(run)._module.parameters(),
    ]
    for state in run.student.optimizer.state.values():
        tensors += [v for v in state.values() if isinstance(v, Tensor)]
    assert all(t.device.type == "cuda" for t in tensors)
    run.checkpoints.writer.close()


def test_the_embedded_job_runs_and_learns_on_a_gpu(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the command line, with everything that `auto` turns on, and the test on real images."""
    from small_jobs import CONFIG

    from dmkd_fast import cli

    small = [
        "sampler.num_steps=4",
        "sampler.guidance_scale=1.5",
        "ring.capacity_images=768",
        "ring.min_fill_images=256",
        "ring.samples_per_insert=8",
        "ring.overlap=true",
        "sampler.micro_batch_images=64",
        "train.batch_size=64",
        "train.num_views=3200",
        "train.log_every_steps=25",
        "eval.num_points=1",
        "train.checkpoint_every_s=1",
        "teacher.path=embedded:fashion_mnist/weak",
        "student={arch: lenet5_half}",
    ]
    if not HAS_DRIVER:
        small += ["dtype=float32", "sampler.num_steps=2"]  # a CPU takes minutes otherwise
    assert cli.main(["distill", CONFIG, *small, f"run_dir={tmp_path / 'run'}"]) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["views"] == 3200 and summary["generated_images"] >= 400
    assert summary["teacher_top1"] > 0.8 and summary["top1"] > 0.3  # 0.1 by chance
    settings = (tmp_path / "run" / "config.yaml").read_text(encoding="utf-8")
    assert "device: cuda" in settings
    assert ("dtype: float16" in settings) == HAS_DRIVER


def test_scores_on_a_gpu_are_those_of_the_cpu() -> None:
    torch.manual_seed(3)
    network = classifier().eval()
    images = torch.randint(0, 256, (300, 3, 16, 16), dtype=torch.uint8)
    labels = torch.randint(0, 10, (300,))
    spec = InputSpec(size=16, mean=(0.5,) * 3, std=(0.5,) * 3)
    views = (images.float() / 255 - 0.5) / 0.5
    results = []
    for move in (lambda t: t, lambda t: t.cuda()):
        batches = [({spec: move(views[i : i + 100])}, move(labels[i : i + 100])) for i in (0, 100)]
        results.append(_scores(move(network), batches, spec))
    for name, value in results[0].items():
        assert value == pytest.approx(results[1][name], abs=1e-3), name


def _scores(network: nn.Module, batches: Any, spec: InputSpec) -> dict[str, float]:
    return measure(network, batches, input=spec, num_classes=10).result()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Smooth pictures of several sizes, as PNG and JPEG, in class folders."""
    ramp = np.linspace(0, 255, 90)
    for number in range(6):
        height, width = 40 + 7 * number, 70 - 5 * number
        red = np.add.outer(ramp[:height], ramp[:width]) / 2
        pixels = np.stack([red, red[::-1], red[:, ::-1]], axis=-1).astype(np.uint8)
        path = tmp_path / "set" / str(number % 2) / f"{number}.{('png', 'jpg')[number % 3 == 0]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path, **({"quality": 95} if path.suffix == ".jpg" else {}))
    return tmp_path / "set"


def decoded(folder: Path, device: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, Tensor]:
    spec = InputSpec(size=24, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))
    paths = sorted(folder.rglob("*.*"))
    items = [Item(str(p), int(p.parent.name)) for p in paths]
    images = EncodedSet(items=tuple(items), class_names=("0", "1"), device=torch.device(device))
    monkeypatch.setattr(test_sets, "batch_images", lambda inputs: 4)
    found = [(views[spec], labels) for views, labels in images.batches([spec])]
    assert [len(labels) for _, labels in found] == [4, 2]
    assert all(str(views.device) == device for views, _ in found)
    return torch.cat([v for v, _ in found]).cpu(), torch.cat([x for _, x in found]).cpu()


@pytest.mark.skipif(not HAS_DRIVER, reason="DALI asks for a driver")
def test_image_files_decoded_on_the_gpu_are_those_of_the_cpu(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (there, labels), (here, same) = (decoded(folder, d, monkeypatch) for d in ("cuda:0", "cpu"))
    assert torch.equal(labels, same)
    # JPEG decoders and resampling round differently: by up to 4 of 255 levels, over a std of 0.2.
    difference = (there - here).abs()
    assert difference.max() <= 4 / 255 / 0.2 and difference.mean() <= 1 / 255 / 0.2
    test_set = open_set(folder, torch.device("cuda:0"))
    assert len(test_set.class_names) == 2


@pytest.mark.skipif(not HAS_DRIVER, reason="DALI asks for a driver")
def test_gray_images_read_from_disk_on_a_gpu_are_within_one_level(tmp_path: Path) -> None:
    from shard_files import random_images, write_shards

    from dmkd_fast.data.sources import ShardSource
    from dmkd_fast.data.stored import ImageDecoder, StoredImages

    images, classes = random_images(40)
    write_shards(tmp_path, images, classes, 16)
    decoder = ImageDecoder((1, 8, 8), device=torch.device("cuda:0"))
    reader = StoredImages(ShardSource(tmp_path), decoder, ring_images=64, show=False)
    for start in (0, 16):
        ids, labels = reader.next_block(16)
        reader.advance(16)
        out = torch.empty(16, 1, 8, 8, dtype=torch.uint8, device="cuda")
        reader.read(ids, labels, out=out)
        difference = out.cpu().numpy().astype(int) - images[start : start + 16]
        assert np.abs(difference).max() <= 1
