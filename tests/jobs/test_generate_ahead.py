"""`dmkd generate` on a GPU: one micro-batch is being made while the host encodes another."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from generate_farm import SETTINGS
from small_jobs import CONFIG

from benchmarks.fake_cuda import pretended
from dmkd_fast.config.jobs import DistillConfig
from dmkd_fast.config.loading import load_config
from dmkd_fast.jobs import generate
from dmkd_fast.jobs.image_maker import Maker, Started
from dmkd_fast.jobs.stored_logits import Wanted


@pytest.mark.parametrize(
    ("device", "order"), [("cuda:0", "s0 s1 f0 s2 f1 f2"), ("cpu", "s0 f0 s1 f1 s2 f2")]
)
def test_a_gpu_has_one_batch_in_flight_and_a_cpu_none(
    device: str, order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def start(self: Maker, ids: range) -> Any:
        calls.append(f"s{ids.start}")
        return SimpleNamespace(ids=ids)

    def finish(self: Maker, batch: Any) -> Any:
        calls.append(f"f{batch.ids.start}")
        return [batch.ids]

    monkeypatch.setattr(Maker, "start", start)
    monkeypatch.setattr(Maker, "finish", finish)
    maker = Maker(
        sampler=SimpleNamespace(device=torch.device(device)),  # type: ignore[arg-type]
        **dict.fromkeys(
            ("labels", "teachers", "logits", "image_shape", "row", "attention", "pool")
        ),  # type: ignore[arg-type]
    )
    made: list[Any] = list(maker.make([range(i, i + 1) for i in range(3)]))
    assert made == [[range(i, i + 1)] for i in range(3)] and " ".join(calls) == order


def test_a_batch_is_queued_without_a_wait_and_equals_the_one_of_a_cpu() -> None:
    logits = Wanted(top_k=3, views_per_image=1)
    small = ["sampler.attention=sdpa", "sampler.micro_batch_images=4"]

    def made(device: str) -> list[generate.Image]:
        config = load_config(DistillConfig, CONFIG, [*SETTINGS, *small, f"device={device}"])
        with ThreadPoolExecutor(1) as pool:
            maker, _ = generate._prepare(config, 8, None, logits, pool)
            maker.finish(maker.start(range(4)))  # builds the graph
            if device == "cuda":
                torch.cuda.set_sync_debug_mode("error")
            first: Started = maker.start(range(4))
            second = maker.start(range(4, 8))
            if device == "cuda":
                assert first.done is not None and second.done is not None
                torch.cuda.set_sync_debug_mode("default")
            return [*maker.finish(first), *maker.finish(second)]

    expected = made("cpu")
    with pretended():
        assert made("cuda") == expected
