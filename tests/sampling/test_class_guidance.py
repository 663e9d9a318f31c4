"""Guidance by class: what a sampler of that scale alone would make, and the settings for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from compute_dtypes import NATIVE_FIRST
from sampler_cases import Counts, dit_sampler, embedded, make
from small_jobs import CONFIG, SHORT, tiny_sampler
from torch import Tensor, nn

from dmkd_fast import GeneratedImages, Guidance, cli
from dmkd_fast.config.jobs import DistillConfig
from dmkd_fast.config.loading import dump_config, load_config
from dmkd_fast.data import shards
from dmkd_fast.jobs import generate
from dmkd_fast.jobs.build import make_stream
from dmkd_fast.jobs.images import card_sentence
from dmkd_fast.jobs.parts import prepare

IDS = torch.arange(8)
MANY = {0: 1.0, 3: 3.0, 4: 3.0, 9: 1.25}


@pytest.mark.parametrize("dtype", NATIVE_FIRST)
@pytest.mark.parametrize("scale", [1.5, 1.0])
def test_each_class_gets_the_images_of_its_own_scale(scale: float, dtype: torch.dtype) -> None:
    """To the bit where something is guided; unguided ones pass the denoiser in other batches."""
    labels = torch.tensor([0, 3, 1, 4, 9, 2, 0, 3])
    mixed = embedded(scale=scale, by_class=MANY, dtype=dtype)
    out = torch.empty(8, 1, 28, 28, dtype=torch.uint8)
    got = mixed.sample(IDS, labels, out=out)
    for label, own in {1: scale, 2: scale, **MANY}.items():
        alone = embedded(scale=own, dtype=dtype)
        expected = alone.sample(IDS, labels, out=torch.empty_like(out))
        rows = labels == label
        if own == 1.0:
            assert (got[rows].int() - expected[rows].int()).abs().max() <= 1
        else:
            assert torch.equal(got[rows], expected[rows])
        if own != scale:  # the scale shows
            usual = embedded(scale=scale, dtype=dtype)
            usual_images = usual.sample(IDS, labels, out=torch.empty_like(out))
            assert (got[rows] != usual_images[rows]).float().mean() > 0.05


def test_scale_1_is_the_conditional_prediction_to_the_bit() -> None:
    """Beside guided rows, whose unconditional half must not show."""
    one = tiny_sampler(scale=1.0, by_class={2: 4.0})
    other = tiny_sampler(scale=1.0, by_class={2: 4.0})
    module: Any = other._module
    with torch.no_grad():
        module.embed.weight[4] += 100.0  # of the null class
    labels = IDS % 4
    got, expected = one.trajectory(IDS, labels), other.trajectory(IDS, labels)
    assert torch.equal(got[:, labels != 2], expected[:, labels != 2])
    assert not torch.equal(got[:, labels == 2], expected[:, labels == 2])


def test_classes_are_the_jobs_under_a_class_map() -> None:
    labels = torch.tensor([0, 1, 1, 0, 0, 1, 0, 1])
    mapped = embedded(class_map=(7, 2), num_classes=2, by_class={1: 3.0})
    whole = embedded(by_class={2: 3.0})
    out = torch.empty(8, 1, 28, 28, dtype=torch.uint8)
    got = mapped.sample(IDS, labels, out=out)
    expected = whole.sample(IDS, torch.tensor([7, 2])[labels], out=torch.empty_like(out))
    assert torch.equal(got, expected)


def test_a_model_that_takes_guidance_gets_each_images_scale() -> None:
    class Takes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[Tensor] = []

        def forward(self, x: Tensor, t: Tensor, labels: Tensor, guidance: Tensor) -> Tensor:
            self.seen.append(guidance)
            return torch.zeros_like(x)

    takes = Takes()
    sampler = dit_sampler(module=takes, by_class={5: 1.0, 6: 3.5}, takes_guidance=True)
    make(sampler, torch.tensor([5, 6, 7, 5]), 1000)
    assert len(takes.seen) == 4
    for seen in takes.seen:
        assert seen.tolist() == [1.0, 3.5, 2.0, 1.0]


def test_guidance_channels_and_interval_hold_for_every_class() -> None:
    labels = torch.tensor([5, 6, 7, 5])
    settings: dict[str, Any] = {"channels": 3, "interval": (0.0, 0.5)}
    mixed = dit_sampler(by_class={6: 4.0}, **settings)
    got = mixed.trajectory(labels, labels)
    for scale, rows in ((2.0, [0, 2, 3]), (4.0, [1])):
        expected = dit_sampler(scale=scale, **settings).trajectory(labels, labels)
        assert torch.equal(got[:, rows], expected[:, rows])
    assert mixed.forwards_per_image == 6


def test_nothing_waits_for_the_device() -> None:
    sampler = dit_sampler(by_class={1: 4.0})
    with Counts(ban=True), torch.inference_mode():
        sampler._make(torch.arange(4), torch.arange(4))


def test_compiled_steps_take_a_scale_for_each_image() -> None:
    settings: dict[str, Any] = {"count": 1, "scale": 1.5, "by_class": {2: 4.0}}
    labels = torch.arange(16) % 4
    eager = tiny_sampler(**settings).trajectory(torch.arange(16), labels)
    compiled = tiny_sampler(**settings, compile=True)
    torch.testing.assert_close(compiled.trajectory(torch.arange(16), labels), eager)


def test_ranges_of_classes_are_read_and_survive_saving(tmp_path: Path) -> None:
    override = "sampler.class_guidance={3: 1, 5-7: 2.5}"
    config = load_config(DistillConfig, CONFIG, [override])
    assert config.sampler.guidance_of_classes == {3: 1.0, 5: 2.5, 6: 2.5, 7: 2.5}
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert load_config(DistillConfig, tmp_path / "config.yaml") == config


def test_later_phases_keep_the_scales_of_named_classes() -> None:
    phases = "sampler.phases=[{start: 0.5, num_steps: 2, guidance_scale: 2}]"
    overrides = [*SHORT, phases, "sampler.class_guidance={3: 3}"]
    job, parts = prepare(load_config(DistillConfig, CONFIG, overrides))
    stream = make_stream(job, parts.origin, ring_images=1, show=False)
    assert isinstance(stream, GeneratedImages)
    _, (start, later) = stream.samplers
    assert (start, later.guidance) == (0.5, Guidance(scale=2.0, by_class={3: 3.0}))
    assert "3 for class 3" in card_sentence(job.config)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("{3: 0.5}", "class_guidance.3: got 0.5, expected greater than or equal to 1"),
        ("{3-1: 2}", "class_guidance: got '3-1', expected a class or a range"),
        ("{cat: 2}", "class_guidance: got 'cat'"),
        ("{2-5: 2, 4: 3}", "class_guidance: got class 4 twice"),
        ("{8-10: 2}", "sampler.class_guidance: got class 10, expected 0 to 9"),
    ],
)
def test_wrong_settings_end_in_one_line(
    setting: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = [*SHORT, f"run_dir={tmp_path / 'run'}", f"sampler.class_guidance={setting}"]
    assert cli.main(["distill", CONFIG, *overrides]) == 2
    error = capsys.readouterr().err
    assert words in error and "Traceback" not in error
    assert not (tmp_path / "run").exists()


def test_the_manifest_has_each_images_scale(tmp_path: Path) -> None:
    overrides = [*SHORT, "sampler.class_guidance={3: 3, 8-9: 1.5}"]
    config = load_config(DistillConfig, CONFIG, overrides)
    generate.run(config, tmp_path / "out", 64, images_per_shard=64, show=False)
    table = pq.read_table(tmp_path / "out" / shards.MANIFEST).to_pydict()
    scales = {3: 3.0, 8: 1.5, 9: 1.5}
    expected = [scales.get(label, 1.0) for label in table["class"]]
    assert table["guidance_scale"] == expected and len(set(expected)) == 3
