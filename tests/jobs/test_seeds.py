"""Everything random in a job follows its seed: the figures over several seeds rest on that."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from small_jobs import CONFIG, SHORT, labels_of, sampler_of
from torch import Tensor

from dmkd_fast.config.jobs import DistillConfig
from dmkd_fast.config.loading import load_config
from dmkd_fast.jobs.build import build
from dmkd_fast.jobs.parts import prepare
from dmkd_fast.jobs.pretrain.loop import ShuffledPasses
from dmkd_fast.runtime.distributed import Ranks
from dmkd_fast.sampling.labels import LabelStream
from dmkd_fast.sampling.sampler import DiffusionSampler

MIXED = [
    "mix={mixup_alpha: 0.8}",
    "views.flip=0.5",
    "loss.alpha=0.9",
    "teacher.path=embedded:fashion_mnist/weak",
]


def numbers(seed: int, folder: Path) -> dict[str, Tensor]:
    """What each random part of one config gives with a seed."""
    config = load_config(
        DistillConfig,
        CONFIG,
        [*SHORT, *MIXED, f"seed={seed}", f"run_dir={folder}", "student={arch: lenet5_half}"],
    )
    torch.manual_seed(99)  # What came before in the process must not matter.
    job, parts = prepare(config)
    distiller = build(job, parts, show=False)
    sampler, labels, ring = sampler_of(distiller), labels_of(distiller), distiller.ring
    mixer = distiller.targets.mixer
    assert isinstance(sampler, DiffusionSampler) and isinstance(labels, LabelStream) and mixer
    ids = torch.arange(64)
    ring.commit(ring.reserve(), ids=ids, labels=ids % 10)
    boxes, flips = distiller.targets.views.parameters(ids, torch.zeros_like(ids), 28, 28)
    return {
        "noise": sampler._noise(ids, 0),
        "labels": labels.labels_of(ids),
        "draws": ring.sample(32).indices,
        "crops": boxes,
        "flips": flips,
        "partners": mixer.partners(0, 32, torch.device("cpu")),
        "share": torch.tensor(mixer.parameters(0, 28, 28)[0]),
        "weights": torch.cat([p.detach().flatten() for p in parts.student.parameters()]),
    }


def test_every_random_part_of_a_job_follows_the_seed(tmp_path: Path) -> None:
    first, same, other = (numbers(seed, tmp_path / "run") for seed in (0, 0, 1))
    for name, value in first.items():
        assert value.numel() and torch.equal(value, same[name]), name
        assert not torch.equal(value, other[name]), name


def test_each_rank_draws_and_drops_out_with_a_seed_of_its_own() -> None:
    seeds = [Ranks(rank=rank, world_size=3).seed(seed) for seed in (0, 1) for rank in range(3)]
    assert len(set(seeds)) == 6 and (seeds[0], seeds[3]) == (0, 1)


@pytest.mark.parametrize("batch", [10, 16])
def test_passes_over_real_images_have_orders_of_their_own_and_follow_the_seed(batch: int) -> None:
    def passes(seed: int, first: int = 0) -> list[tuple[int, list[int], list[int]]]:
        examples, found = ShuffledPasses(40, seed=seed), []
        for step in range(first, 4 * 40 // batch):
            indices, uses = examples.batch(step * batch, batch)
            found.append((step, indices.tolist(), uses.tolist()))
        return found

    found = passes(0)
    order = list(itertools.chain.from_iterable(indices for _, indices, _ in found))
    turns = list(itertools.chain.from_iterable(uses for _, _, uses in found))
    orders = [order[40 * turn : 40 * (turn + 1)] for turn in range(4)]
    assert turns == [turn for turn in range(4) for _ in range(40)]
    assert all(sorted(one) == list(range(40)) for one in orders)
    assert len({tuple(one) for one in [*orders, list(range(40))]}) == 5
    assert passes(0, first=3) == found[3:]
    assert passes(1)[0][1] != found[0][1]
