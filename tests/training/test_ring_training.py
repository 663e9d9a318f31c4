"""The ring inside a training: blocks ahead of need, exact resume, and nothing leaves the device."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from on_device import OnDevice
from small_jobs import CONFIG, fit_until, labels_of, sampler_of
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from dmkd_fast import Distiller, RingPlan, cli
from dmkd_fast.jobs import memory
from dmkd_fast.jobs import parts as parts_module
from dmkd_fast.jobs.parts import Parts, load_parts
from dmkd_fast.jobs.resolve import ResolvedJob
from dmkd_fast.loss.functional import kd_loss_and_grad
from dmkd_fast.runtime.errors import UserError
from dmkd_fast.runtime.output.progress import Progress
from dmkd_fast.training.metrics import Metrics

Make = Callable[..., Distiller]
ORDERS: list[dict[str, Any]] = [
    {},
    {"guard_blocks": 1},
    {"order": "equal", "guard_blocks": 1, "max_uses": 6},
    {"order": "uniform", "guard_blocks": 2},
    {"order": "balanced", "num_classes": 4},
]


def weights(distiller: Distiller) -> list[Tensor]:
    return list(distiller.student.model.state_dict().values())


@pytest.mark.parametrize("ring", ORDERS, ids=str)
@pytest.mark.parametrize(
    "stop_at",
    [pytest.param(3, marks=pytest.mark.slow), 8, pytest.param(26, marks=pytest.mark.slow)],
)
def test_resumed_run_ends_like_an_uninterrupted_one(
    make_distiller: Make, ring: dict[str, Any], stop_at: int
) -> None:
    whole, broken = (make_distiller(ring=ring) for _ in range(2))
    whole.fit()
    fit_until(broken, stop_at)
    again = make_distiller(ring=ring, run_dir=broken.run_dir)
    again.restore()
    again.fit()
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(again), strict=True))
    assert torch.equal(whole.ring.ids, again.ring.ids)
    assert torch.equal(whole.ring.uses, again.ring.uses)


def test_blocks_are_made_ahead_of_need_but_none_in_vain(make_distiller: Make) -> None:
    distiller = make_distiller(ring={"guard_blocks": 1}, num_views=1600)
    made_by_step: list[int] = []
    sample = sampler_of(distiller).sample

    def noted(*args: Any, **kwargs: Any) -> Tensor:
        made_by_step.append(distiller.step)
        return sample(*args, **kwargs)

    sampler_of(distiller).sample = noted  # type: ignore[method-assign]
    plain = make_distiller(num_views=1600)
    totals, expected = distiller.fit(), plain.fit()
    assert totals["generated_images"] == expected["generated_images"] == 400
    made_by_step = made_by_step[1:]  # the warm-up
    assert len(made_by_step) == 25  # each block made once and used
    # Two blocks before the first view and one ahead; then one each time the one ahead is taken.
    assert made_by_step[:3] == [0, 0, 0] and made_by_step[3:] == list(range(8, 96, 4))
    # The same images are made whatever the order of drawing.
    for other in (distiller, plain):
        order = other.ring.ids.argsort()
        assert other.ring.ids[order].tolist() == list(range(336, 400))
    a, b = (d.ring.images[d.ring.ids.argsort()] for d in (distiller, plain))
    assert torch.equal(a, b)


def test_settings_that_would_stop_the_loop_are_refused_before_it_starts(
    make_distiller: Make,
) -> None:
    with pytest.raises(ValueError, match=r"error_buffer: got 30.*deadlock"):
        make_distiller(ring={"error_buffer": 30.0})
    with pytest.raises(ValueError, match="batch_size: got 128, expected at most 64"):
        make_distiller(batch_size=128)


RECIPES: list[dict[str, Any]] = [
    {"ema_decay": 0.9, "accumulate": 2, "alpha": 0.5},
    {"name": "sgd", "mix": {"mixup_alpha": 0.8, "cutmix_alpha": 1.0}, "alpha": 0.5, "lr": 1e-2},
    {"dtype": torch.float16, "milestones": (0.5,), "mix": {"cutmix_alpha": 1.0}},
]


@pytest.mark.parametrize(
    "settings",
    [
        *({"ring": ring} for ring in ORDERS[1::2]),
        *(pytest.param({"ring": ring}, marks=pytest.mark.slow) for ring in ORDERS[::2]),
        *RECIPES,
    ],
    ids=lambda s: str(s)[:60],
)
def test_100_steps_read_the_device_at_log_lines_and_checkpoints_only(
    make_distiller: Make, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    distiller = make_distiller(num_views=1600, max_grad_norm=1.0, **settings)
    weight = next(distiller.student.model.parameters())
    # Every seventh step is skipped; that is not read either.
    weight.register_hook(lambda grad: grad * (math.nan if distiller.step % 7 == 3 else 1))
    mode, reads = OnDevice(), 0

    def allowed(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal reads
            reads += 1
            mode.is_allowed = True
            try:
                return real(*args, **kwargs)
            finally:
                mode.is_allowed = False

        return call

    from dmkd_fast.checkpoint.manager import CheckpointManager

    monkeypatch.setattr(Metrics, "flush", allowed(Metrics.flush))
    monkeypatch.setattr(CheckpointManager, "finish", allowed(CheckpointManager.finish))
    monkeypatch.setattr(distiller, "warm_up", lambda: None)
    for name in ("item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__"):
        real = getattr(Tensor, name)

        def read(tensor: Tensor, *args: Any, name: str = name, real: Any = real) -> Any:
            # The writer's thread reads copies that are on the host already.
            is_main = threading.current_thread() is threading.main_thread()
            assert mode.is_allowed or not is_main, f"host read: {name}"
            return real(tensor, *args)

        monkeypatch.setattr(Tensor, name, read)
    with mode:
        distiller.fit()
    assert distiller.step == 100 and reads == 10 + 1  # a line every ten steps, one checkpoint
    assert '"skipped_steps": 14' in (distiller.run_dir / "stats.jsonl").read_text()
    for bad in (lambda: torch.ones(3).nonzero(), lambda: torch.ones(3)[torch.ones(3) > 0]):
        with pytest.raises(AssertionError), OnDevice():
            bad()


@pytest.mark.parametrize("order", ["shuffled", "equal", "uniform", "balanced"])
def test_forward_half_of_a_step_stays_on_cuda(
    make_distiller: Make, order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fake CUDA tensors: sample, decode, ring write, draw, views, teacher, student, loss."""
    distiller = make_distiller(ring={"order": order, "num_classes": 4, "guard_blocks": 1})
    ring, sampler, views = distiller.ring, sampler_of(distiller), distiller.targets.views
    teacher: Any = distiller.targets.networks.networks[0]
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = lambda t: mode.from_tensor(t.detach()).to("cuda")  # noqa: E731
        for module in (sampler._module, teacher, distiller.student.model):
            for part in module.modules():
                for name, value in [*part.named_parameters(recurse=False)]:
                    del part._parameters[name]
                    setattr(part, name, fake(value))
                for name, value in [*part.named_buffers(recurse=False)]:
                    part._buffers[name] = fake(value)
        device = torch.device("cuda")
        sampler.device = labels_of(distiller).device = ring._order._device = device
        object.__setattr__(sampler.table, "rows", fake(sampler.table.rows))
        sampler.num_broken = fake(sampler.num_broken)
        monkeypatch.setattr(sampler, "_images", sampler._make)
        for name in ("images", "labels", "ids", "uses", "stamps", "_retired", "_num_strays"):
            setattr(ring, name, fake(getattr(ring, name)))
        order_: Any = ring._order
        for name in ("_slots", "_places", "_bits", "_labels", "_uses"):
            if isinstance(getattr(order_, name, None), Tensor):
                setattr(order_, name, fake(getattr(order_, name)))
        if order == "shuffled":  # generators of CUDA cannot be faked; the default one can
            order_._generator = None
            monkeypatch.setattr(order_, "_permutation", lambda n: torch.randperm(n, device=device))
        views.spec.mean, views.spec.std = fake(views.spec.mean), fake(views.spec.std)
        with OnDevice(), torch.no_grad():
            for _ in range(5):  # the ring wraps
                block = ring.reserve()
                with ring.producing():
                    ids, labels = labels_of(distiller).peek(16)
                    sampler.sample(ids, labels, out=block.images)
                ring.commit(block, ids=ids, labels=labels)
                labels_of(distiller).advance(16)
                draw = ring.sample(24)
                seen = views(ring.images, draw.indices, draw.ids, draw.uses)
                ring.release()
                loss, grad = kd_loss_and_grad(distiller.student.model(seen), teacher(seen))
                means = ring.statistics().means() | {"faults": ring.num_faults()}
    results = [draw.indices, draw.ids, draw.uses, seen, loss, grad, *means.values()]
    assert all(r.device.type == "cuda" for r in results)
    assert seen.shape == (24, 1, 8, 8) and grad.shape == (24, 4)


def test_a_run_whose_images_have_strange_labels_stops_at_the_next_row(make_distiller: Make) -> None:
    """As on a GPU, whose labels are not read when they are committed."""
    distiller = make_distiller(ring={"num_classes": 4})
    distiller.ring._num_strays += 3
    with pytest.raises(UserError, match=r"^ring: got 3 labels outside of 0 to 3 "):
        distiller.fit()
    assert distiller.step == 10


def test_a_block_ahead_is_forgotten_by_a_restore(make_distiller: Make) -> None:
    """The ring has no open block then, and needs one at once."""
    whole, part = (make_distiller(ring={"guard_blocks": 1}) for _ in range(2))
    whole.fit()
    part._save_last()
    part.feed.write_ahead(progress=0.0)
    part.restore()
    part.fit()
    assert all(torch.equal(*pair) for pair in zip(weights(whole), weights(part), strict=True))


def test_sums_of_a_row_that_was_interrupted_join_counts_on_a_gpu(tmp_path: Path) -> None:
    """A checkpoint brings the sums back on the host; no step comes before the row is written."""
    seen: list[Tensor] = []

    def total(values: Tensor) -> Any:
        seen.append(values)
        return SimpleNamespace(tolist=lambda: [[3.0, 3.0], [4.0, 2.0]])

    ranks: Any = SimpleNamespace(is_first=False, world_size=1, total=total)
    metrics = Metrics(tmp_path, Progress(show=False), ranks=ranks)
    with FakeTensorMode():
        metrics.load_state_dict({"sums": {"loss": torch.zeros(2)}, "written": 0, "waiting": ""})
        counts = {"skipped_steps": torch.zeros((), device="cuda")}
        assert metrics.flush(views=16, counts=counts) == {"skipped_steps": 3}
    assert seen[0].device.type == "cuda" and seen[0].shape == (2, 2)


def test_dry_run_prints_the_exact_bytes_and_allocates_no_ring(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """200,000 images of 3 x 256 x 256 on a machine that has, or has not, room for them."""
    from dataclasses import replace

    from dmkd_fast.ring import buffer

    load = load_parts

    def large(job: ResolvedJob) -> Parts:
        parts = load(job)
        origin = replace(parts.origin)
        object.__setattr__(origin, "image_shape", (3, 256, 256))  # Denoiser would refuse it
        return replace(parts, origin=origin)

    monkeypatch.setattr(parts_module, "load_parts", large)
    monkeypatch.setattr(buffer.RingBuffer, "__init__", lambda *_: pytest.fail("allocated"))
    arguments = [
        "distill",
        CONFIG,
        "--dry-run",
        "ring.capacity_images=200000",
        "sampler.micro_batch_images=64",
        "num_threads=1",
    ]
    monkeypatch.setattr(memory, "available_bytes", lambda device: 10**11)
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    plan = RingPlan(
        capacity_images=200_000,
        image_shape=(3, 256, 256),
        block_images=64,
        samples_per_insert=1.0,
        min_fill_images=64,
    ).num_bytes
    assert plan["images"] == 200_000 * 3 * 256 * 256
    for name, count in plan.items():
        assert f"  ring {name}: {count:,} bytes" in out
    assert "  ring images: 39,321,600,000 bytes (37500.0 MiB)" in out
    fits = int(out.splitlines()[-1].rpartition(" ")[2].replace(",", ""))
    # What the job needs beside the ring depends on the compute dtype of the machine.
    assert math.isclose(fits, 10**11 / (sum(plan.values()) / 200_000), rel_tol=2e-3)
    monkeypatch.setattr(memory, "available_bytes", lambda device: 10**10)
    assert cli.main(arguments) == 2
    out, err = capsys.readouterr()
    assert "ring images: 39,321,600,000 bytes" in out
    assert "ring.capacity_images: got 200000" in err and "lower it to at most" in err
