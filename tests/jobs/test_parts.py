"""Labels, solvers, sampler, models, evaluation, optimizer pieces and checkpoints."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoints import restore, save
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from small_jobs import TinyDenoiser, small_classifier, tiny_sampler

from dmkd_fast import DiffusionSampler, Guidance, LabelStream, Schedule, Steps
from dmkd_fast.assets import resolve
from dmkd_fast.checkpoint import step_folders
from dmkd_fast.classifiers.loading import build_classifier, freeze, load_classifier, save_classifier
from dmkd_fast.classifiers.spec import ClassifierSpec
from dmkd_fast.data import test_sets
from dmkd_fast.denoisers.loading import load_denoiser
from dmkd_fast.denoisers.trainable import new_pixel_dit, save_denoiser
from dmkd_fast.jobs.pretrain.denoiser import FLOW, drop_labels
from dmkd_fast.sampling.noise_levels import flow_sigmas
from dmkd_fast.sampling.solvers import solver_table
from dmkd_fast.training import schedule, scoring
from dmkd_fast.training.ema import WeightEMA
from dmkd_fast.training.optim import build_optimizer


def test_every_run_of_labels_is_balanced_shuffled_and_resumable() -> None:
    stream = LabelStream(10, seed=3)
    ids, labels = stream.peek(1000)
    blocks = labels.view(100, 10)
    assert torch.equal(blocks.sort(dim=1).values, torch.arange(10).expand(100, 10))
    assert len({tuple(row) for row in blocks.tolist()}) > 90
    stream.advance(137)
    other = LabelStream(10, seed=3)
    other.load_state_dict(stream.state_dict())
    assert torch.equal(other.peek(20)[1], labels[137:157])
    assert torch.equal(stream.labels_of(ids.flip(0)), labels.flip(0))


@pytest.mark.parametrize("num_steps", [1, 4, 10])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_table_steps_like_the_scheduler(num_steps: int, shift: float) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    sigmas = torch.linspace(1.0, 1 / num_steps, num_steps).tolist()
    scheduler.set_timesteps(sigmas=sigmas)
    table = solver_table(
        dict(scheduler.config) | {"_class_name": type(scheduler).__name__},
        Steps(count=num_steps),
        torch.device("cpu"),
    )
    torch.testing.assert_close(
        table.column("timestep"), scheduler.timesteps.float(), rtol=1e-5, atol=1e-3
    )
    _same_trajectory(scheduler, table)


@pytest.mark.parametrize("num_steps", [4, 10, 50])
@pytest.mark.parametrize("schedule", ["linear", "scaled_linear"])
def test_ddim_table_steps_like_the_scheduler(num_steps: int, schedule: str) -> None:
    scheduler = DDIMScheduler(beta_schedule=schedule, clip_sample=False)
    scheduler.set_timesteps(num_steps)
    table = solver_table(
        dict(scheduler.config) | {"_class_name": type(scheduler).__name__},
        Steps(count=num_steps),
        torch.device("cpu"),
    )
    assert table.column("timestep").tolist() == scheduler.timesteps.tolist()
    _same_trajectory(scheduler, table)


@pytest.mark.parametrize("num_steps", [2, 5, 10])
def test_second_order_table_steps_like_dpm_solver(num_steps: int) -> None:
    """diffusers' multistep solver on the same noise levels, with a model that predicts velocity."""
    scheduler = DPMSolverMultistepScheduler(
        use_flow_sigmas=True,
        prediction_type="flow_prediction",
        solver_order=2,
        final_sigmas_type="zero",
        lower_order_final=True,
    )
    scheduler.set_timesteps(num_steps)
    table = solver_table(FLOW, Steps(count=num_steps, solver="dpm++2m"), torch.device("cpu"))
    torch.manual_seed(0)
    mine = theirs = torch.randn(2, 1, 8, 8)
    sigmas = flow_sigmas(num_steps, 1.0)
    # Its own grid starts just below pure noise; ours starts at it, where the first step is exact.
    scheduler.sigmas = sigmas.float().clamp(max=1 - 1e-6)
    before = torch.zeros_like(mine)
    skip, out, a, b0, b1 = (table.column(name) for name in ("skip", "out", "a", "b0", "b1"))
    for k, timestep in enumerate(scheduler.timesteps):
        newest = skip[k] * mine + out[k] * torch.tanh(mine)
        mine = a[k] * mine + b0[k] * newest + b1[k] * before
        before = newest
        theirs = scheduler.step(torch.tanh(theirs), timestep, theirs).prev_sample
        if k == 0:
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(mine, theirs, rtol=2e-3, atol=2e-3)


def _same_trajectory(scheduler, table) -> None:
    torch.manual_seed(0)
    mine = theirs = torch.randn(2, 1, 8, 8)
    skip, out, a, b0, u = (table.column(name) for name in ("skip", "out", "a", "b0", "u"))
    for k, timestep in enumerate(scheduler.timesteps):
        image = skip[k] * mine + out[k] * torch.tanh(mine)
        mine = a[k] * mine + (b0[k] + u[k]) * image
        theirs = scheduler.step(torch.tanh(theirs), timestep, theirs).prev_sample
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_unknown_schedulers_and_too_many_steps_are_refused() -> None:
    with pytest.raises(ValueError, match="EDMEulerScheduler"):
        solver_table({"_class_name": "EDMEulerScheduler"}, Steps(), torch.device("cpu"))
    with pytest.raises(ValueError, match="1 to 1000"):
        solver_table(FLOW, Steps(count=1001), torch.device("cpu"))


def test_an_image_does_not_depend_on_the_others_made_with_it() -> None:
    sampler = tiny_sampler()
    ids, labels = torch.arange(40), torch.arange(40) % 4
    out = sampler.sample(ids, labels, out=torch.empty(40, 1, 8, 8, dtype=torch.uint8))
    order = torch.randperm(40)[:21]
    some = sampler.sample(ids[order], labels[order], out=torch.empty_like(out[:21]))
    assert torch.equal(some, out[order])
    assert not torch.equal(out[0], out[4])  # same class, another id


def test_guidance_is_the_published_formula() -> None:
    sampler = tiny_sampler(count=1, scale=3.0)
    ids, labels = torch.arange(16), torch.arange(16) % 4
    got = sampler.sample(ids, labels, out=torch.empty(16, 1, 8, 8, dtype=torch.uint8))
    model = TinyDenoiser()
    from dmkd_fast.rng import philox

    latents = philox.normal(0, ids, step=0, count=64).view(16, 1, 8, 8)
    times = torch.full((16,), 1000.0)
    with torch.no_grad():
        conditional, free = model(latents, times, labels), model(latents, times, labels * 0 + 4)
    image = latents - (free + 3.0 * (conditional - free))
    expected = (image * 127.5 + 127.5).round().clamp(0, 255)
    assert (got.float() - expected).abs().max() <= 1


def test_guidance_without_a_null_class_is_refused() -> None:
    with pytest.raises(ValueError, match="null class"):
        tiny_sampler(null_class=None)


def test_embedded_dit_matches_an_eager_diffusers_loop() -> None:
    from diffusers import DiTTransformer2DModel

    from dmkd_fast.rng import philox

    folder = resolve("embedded:fashion_mnist/denoiser")
    loaded = load_denoiser(folder, torch.device("cpu"))
    sampler = DiffusionSampler(loaded, Steps(count=4), Guidance(scale=1.5), micro_batch_images=10)
    ids, labels = torch.arange(10), torch.arange(10)
    got = sampler.sample(ids, labels, out=torch.empty(10, 1, 28, 28, dtype=torch.uint8))

    dit = DiTTransformer2DModel.from_pretrained(folder / "transformer").eval()
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler")
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    latents = philox.normal(0, ids, step=0, count=784).view(10, 1, 28, 28)
    both = torch.cat((labels, torch.full_like(labels, 10)))
    for timestep in scheduler.timesteps:
        with torch.no_grad():
            velocity = dit(
                torch.cat((latents, latents)), timestep=timestep.expand(20), class_labels=both
            ).sample
        guided, free = velocity.chunk(2)
        latents = scheduler.step(free + 1.5 * (guided - free), timestep, latents).prev_sample
    expected = (latents * 127.5 + 127.5).round().clamp(0, 255)
    difference = (got.float() - expected).abs()
    assert difference.max() <= 1 and (difference > 0).float().mean() < 1e-3


def test_one_label_mask_reaches_all_blocks_of_the_denoiser() -> None:
    model = new_pixel_dit(
        num_classes=10,
        channels=1,
        image_size=8,
        patch_size=4,
        num_layers=3,
        num_heads=2,
        head_dim=8,
    ).train()
    seen = []
    for block in model.dit.transformer_blocks:
        block.norm1.emb.class_embedder.register_forward_pre_hook(
            lambda _, args: seen.append(args[0])
        )
        assert block.norm1.emb.class_embedder.dropout_prob == 0
    torch.manual_seed(0)
    labels = drop_labels(torch.arange(10).repeat(10), 10, 0.5)
    assert 20 < (labels == 10).sum() < 80
    latents, times = torch.randn(100, 1, 8, 8), torch.rand(100) * 1000
    # In train mode twice with one mask: the same output, so nothing else drops labels.
    first, second = model(latents, times, labels), model(latents, times, labels)
    assert torch.equal(first, second)
    assert len(seen) >= 3 and all(torch.equal(s, labels) for s in seen)


def test_saved_denoiser_loads_equal_here_and_in_diffusers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = new_pixel_dit(
        num_classes=3, channels=1, image_size=8, patch_size=4, num_layers=2, num_heads=2, head_dim=8
    )
    save_denoiser(model.dit, FLOW, tmp_path)
    loaded = load_denoiser(tmp_path, torch.device("cpu"))
    assert (loaded.num_classes, loaded.null_class, loaded.image_shape) == (3, 3, (1, 8, 8))
    inputs = torch.randn(4, 1, 8, 8), torch.rand(4) * 1000, torch.tensor([0, 1, 2, 3])
    with torch.no_grad():
        # Weights are stored in float16.
        torch.testing.assert_close(loaded.module(*inputs), model(*inputs), rtol=0, atol=5e-3)


def spec(**changes: object) -> ClassifierSpec:
    base = {
        "architecture": "lenet5",
        "num_classes": 10,
        "in_chans": 1,
        "input_size": 28,
        "mean": (0.3,),
        "std": (0.4,),
    }
    return ClassifierSpec(**(base | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"architecture": "lenet5_half"},
        {
            "architecture": "resnet18",
            "stem": "conv3_stride2",
            "model_args": {"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 8]},
        },
    ],
)
def test_saved_classifier_gives_the_same_logits(tmp_path: Path, changes: dict) -> None:
    model = build_classifier(spec(**changes)).eval()
    save_classifier(model, spec(**changes), tmp_path)
    loaded, read = load_classifier(tmp_path, torch.device("cpu"))
    images = torch.randn(2, 1, 28, 28)
    assert read == spec(**changes)
    assert torch.equal(loaded(images), model(images))


def test_timm_itself_loads_a_saved_timm_student(tmp_path: Path) -> None:
    import timm

    args = {"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 8]}
    saved = spec(architecture="resnet18", model_args=args)
    model = build_classifier(saved).eval()
    save_classifier(model, saved, tmp_path)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    images = torch.randn(2, 1, 28, 28)
    assert torch.equal(loaded(images), model(images))


def test_lenets_have_the_published_sizes() -> None:
    count = lambda m: sum(p.numel() for p in m.parameters())  # noqa: E731
    assert count(build_classifier(spec())) == 61_706
    assert count(build_classifier(spec(architecture="lenet5_half"))) == 15_738


def test_frozen_models_get_no_gradient_and_stay_in_eval_mode() -> None:
    model = freeze(small_classifier())
    assert not model.training and not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "low", "high", "num_images"),
    [
        ("strong", 0.93, 1.0, 500),
        pytest.param("strong", 0.93, 1.0, 10_000, marks=pytest.mark.slow),
        ("lenet5", 0.903, 0.913, 10_000),
        ("weak", 0.85, 0.87, 10_000),
    ],
)
def test_embedded_teachers_reach_their_accuracy(
    name: str, low: float, high: float, num_images: int
) -> None:
    device = torch.device("cpu")
    teacher, read = load_classifier(resolve(f"embedded:fashion_mnist/{name}"), device)
    test = test_sets.load_idx(resolve("embedded:fashion_mnist/test"), "t10k")
    assert len(test.labels) == 10_000 and test.labels.bincount().tolist() == [1000] * 10
    few = replace(test, images=test.images[:num_images], labels=test.labels[:num_images])
    scores = scoring.measure(teacher, few.batches([read.input]), input=read.input, num_classes=10)
    card = (resolve(f"embedded:fashion_mnist/{name}") / "README.md").read_text()
    recorded = float(card.partition("test_top1 | ")[2].split()[0])
    assert low <= recorded <= high
    # Of fewer images, within three standard errors.
    tolerance = 0 if num_images == 10_000 else 3 * (recorded * (1 - recorded) / num_images) ** 0.5
    assert scores.result()["top1"] == pytest.approx(recorded, abs=tolerance)


def test_assets_are_whole_licensed_and_small() -> None:
    from dmkd_fast.assets import ROOT, file_sha256

    manifest = json.loads((ROOT / "manifest.json").read_text())
    listed = {ROOT / name / file for name, entry in manifest.items() for file in entry["sha256"]}
    on_disk = {p for p in (ROOT / "fashion_mnist").rglob("*") if p.is_file()}
    assert listed == on_disk
    assert sum(p.stat().st_size for p in on_disk) <= 25_000_000
    for name, entry in manifest.items():
        assert entry["license"] and entry["source"]
        for file, digest in entry["sha256"].items():
            assert file_sha256(ROOT / name / file) == digest
    # The published hashes of the test set.
    test = manifest["fashion_mnist/test"]["sha256"]
    assert test["t10k-images-idx3-ubyte.gz"].startswith("cc1d090a")
    assert test["t10k-labels-idx1-ubyte.gz"].startswith("8d3605d1")


def test_changed_asset_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dmkd_fast import assets

    (tmp_path / "thing").mkdir()
    (tmp_path / "thing" / "file").write_text("as it was")
    monkeypatch.setattr(assets, "ROOT", tmp_path)
    assets.write_manifest({"thing": {"license": "MIT", "source": "here"}})
    assert assets.resolve("embedded:thing") == tmp_path / "thing"
    (tmp_path / "thing" / "file").write_text("as it is")
    with pytest.raises(ValueError, match="differs from the manifest"):
        assets.resolve("embedded:thing")


def test_scores_are_what_counting_gives() -> None:
    logits = torch.tensor([[3.0, 1, 0, 0, 0, 0], [0, 3.0, 2, 1, 0, 0], [9, 8, 7, 6, 5, 4.0]])
    counted = scoring.Scores(6)
    counted.add(logits, torch.tensor([0, 2, 5]), logits.flip(0))
    scores = counted.result()
    assert scores["top1"] == pytest.approx(1 / 3)
    assert scores["top5"] == pytest.approx(2 / 3)
    assert scores["agreement"] == pytest.approx(1)  # 0 1 0 both ways
    confident = torch.tensor([[50.0, 0.0]] * 4)
    counted = scoring.Scores(2)
    counted.add(confident, torch.tensor([0, 0, 0, 1]))
    assert counted.result()["ece"] == pytest.approx(0.25)


def test_learning_rate_rises_then_falls_to_zero() -> None:
    rates = [schedule.lr_at(s, num_steps=100, peak=2.0, warmup=0.1) for s in range(101)]
    assert rates[0] == pytest.approx(0.2) and max(rates) == rates[9] == pytest.approx(2.0)
    assert rates[100] == pytest.approx(0) and rates[55] == pytest.approx(1.0)


def test_average_follows_the_model_and_copies_buffers() -> None:
    model = small_classifier()
    exact, slow = WeightEMA(model, decay=0.0), WeightEMA(model, decay=0.5)
    start = model[0].weight.detach().clone()
    with torch.no_grad():
        model[0].weight += 1
        model[1].running_mean += 2
    for _ in range(30):
        exact.update()
    slow.update()
    assert torch.equal(exact.module[0].weight, model[0].weight)
    torch.testing.assert_close(slow.module[0].weight, start + 0.9)  # first decay is 1 / 10
    assert torch.equal(slow.module[1].running_mean, model[1].running_mean)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_checkpoint_restores_everything_and_keeps_the_last_two(
    tmp_path: Path, layout: torch.memory_format
) -> None:
    model, other = (
        torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3, padding=1), *small_classifier())
        for _ in range(2)
    )
    model[1] = torch.nn.Conv2d(4, 8, 3, padding=1)
    other[1] = torch.nn.Conv2d(4, 8, 3, padding=1)
    model, other = model.to(memory_format=layout), other.to(memory_format=layout)
    optimizer = build_optimizer(model, Schedule(batch_size=1, num_views=1, lr=0.1))
    model(torch.randn(4, 1, 8, 8)).sum().backward()
    optimizer.step()
    twin = build_optimizer(other, Schedule(batch_size=1, num_views=1, lr=0.1))
    for step in (1, 2, 3):
        save(tmp_path, step, {"model": model, "optimizer": optimizer})
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["step-000000002", "step-000000003"]
    assert restore(tmp_path, {"model": other, "optimizer": twin}).step == 3
    for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    for m, o in ((model, optimizer), (other, twin)):
        o.zero_grad()
        torch.manual_seed(0)
        m(torch.randn(4, 1, 8, 8)).square().sum().backward()
        o.step()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b) and a.stride() == b.stride()


def test_damaged_checkpoint_is_noticed(tmp_path: Path) -> None:
    model = small_classifier()
    path = save(tmp_path, 1, {"model": model}) / step_folders.TENSORS
    data = bytearray(path.read_bytes())
    data[-10] ^= 4
    path.write_bytes(bytes(data))
    with pytest.raises(ValueError, match="SHA-256"):
        restore(tmp_path, {"model": model})
    with pytest.raises(ValueError, match="no checkpoint"):
        restore(tmp_path / "none", {"model": model})
