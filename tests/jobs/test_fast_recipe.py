"""configs/imagenet_fast.yaml: what it says of itself, and a dry run with small networks."""

from __future__ import annotations

import re
from typing import Any

import diffusers
import paper_models
import pytest
import torch
from diffusers import DDPMScheduler
from small_jobs import ROOT
from small_models import VAE, dit_folder, spread

from dmkd_fast import Denoiser, cli
from dmkd_fast.classifiers.loading import build_classifier
from dmkd_fast.classifiers.spec import ClassifierSpec
from dmkd_fast.config.jobs import DistillConfig
from dmkd_fast.config.loading import load_config
from dmkd_fast.denoisers.dit import LeanDiT
from dmkd_fast.denoisers.wrappers import Decoder
from dmkd_fast.jobs.inspect import gpus
from dmkd_fast.jobs.inspect.flops import Flops, count, generator_flops

pytestmark = pytest.mark.slow  # run by .ci/run

PATH = ROOT / "configs" / "imagenet_fast.yaml"
PAPER = ROOT / "configs" / "paper" / "imagenet.yaml"


def test_only_the_making_of_images_differs_from_the_published_recipe() -> None:
    fast, paper = (load_config(DistillConfig, path) for path in (PATH, PAPER))
    theirs = paper.model_dump() | {"name": fast.name, "sampler": fast.sampler.model_dump()}
    assert paper.denoiser is not None and fast.denoiser is not None
    theirs["denoiser"] = paper.denoiser.model_dump() | {"decoder": fast.denoiser.decoder}
    ours = fast.model_dump()
    assert {name: ours[name] for name in ours if name != "run_dir"} == {
        name: theirs[name] for name in ours if name != "run_dir"
    }
    assert not fast.sampler.experimental_fp8 and fast.dtype == "auto"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides that put small networks and images in place of those of ImageNet."""
    root = tmp_path_factory.mktemp("fast")
    make_scheduler: Any = DDPMScheduler
    scheduler = make_scheduler(
        variance_type="learned_range", clip_sample=False, timestep_spacing="linspace"
    )
    dit_folder(root / "dit", scheduler=scheduler)
    make_tiny: Any = diffusers.AutoencoderTiny
    tiny = make_tiny(
        encoder_block_out_channels=(8,) * len(VAE["block_out_channels"]),
        decoder_block_out_channels=(8,) * len(VAE["block_out_channels"]),
        num_encoder_blocks=(1,) * len(VAE["block_out_channels"]),
        num_decoder_blocks=(1,) * len(VAE["block_out_channels"]),
    )
    spread(tiny).save_pretrained(root / "taesd")
    teacher = paper_models.classifier(root / "teacher", "torchvision:resnet18", num_classes=1000)
    images = paper_models.write_test_images(root / "test", num_classes=1000)
    return [
        f"denoiser.path={root / 'dit'}",
        f"denoiser.decoder={root / 'taesd'}",
        f"teacher.path={teacher}",
        "teacher.arch=null",
        "teacher.pretrained=false",
        f"eval.path={images}",
        "device=cpu",
        "views.size=16",
    ]


def test_it_dry_runs_with_30_evaluations_per_image(
    small: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["distill", str(PATH), *small, "--dry-run"]) == 0
    assert "200,000 images of 30 denoiser forwards" in capsys.readouterr().out
    assert cli.main(["plan", str(PATH), *small, "--gpu", "h100"]) == 0
    assert "rates (estimates for one h100" in capsys.readouterr().out


def test_the_hours_in_its_header_are_those_of_the_table() -> None:
    text = PATH.read_text(encoding="utf-8")
    assert text.splitlines()[1].startswith("# Predicted, never run.")
    hours = [float(found) for found in re.findall(r"predicts (\d+\.\d)", text)]
    forwards, decoders = (30, 200), (diffusers.AutoencoderTiny, diffusers.AutoencoderKL)
    assert hours == [_hours(*case) for case in zip(forwards, decoders, strict=True)]


def _hours(forwards: int, decoder: Any) -> float:
    sizes = paper_models.VAE if decoder is diffusers.AutoencoderKL else {}
    with torch.device("meta"):
        denoiser = Denoiser(
            module=LeanDiT(paper_models.DIT),
            scheduler={},
            latent_shape=(4, 32, 32),
            image_shape=(3, 256, 256),
            decoder=Decoder(decoder(**sizes)),
        )
        spec = ClassifierSpec(
            architecture="torchvision:resnet18",
            num_classes=1000,
            in_chans=3,
            input_size=224,
            **paper_models.IMAGENET,
        )
        network = build_classifier(spec)
        views = (torch.empty(2, 3, 224, 224),)
    of_denoiser, of_decoder = generator_flops(denoiser)
    forward, step = (count(network, views, backward=b) for b in (False, True))
    assert forward and step
    flops = Flops(
        denoiser=of_denoiser,
        decoder=of_decoder,
        teachers=forward // 2,
        student=forward // 2,
        student_step=step // 2,
    )
    h100 = gpus.GPUS["h100"]
    images, views_per_s = gpus.images_per_s(h100, flops, forwards), gpus.views_per_s(h100, flops)
    assert images and views_per_s
    return round((200_000 / images + 20e6 / views_per_s) / 3600, 1)
