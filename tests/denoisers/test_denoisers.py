"""Every family of diffusion models against its diffusers pipeline, at the same noise."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.pipelines.consistency_models import pipeline_consistency_models
from diffusers.pipelines.dit import pipeline_dit
from diffusers.schedulers import scheduling_consistency_models, scheduling_ddpm
from small_jobs import sampler_from
from small_models import class_unet_folder, dit_folder, small_dit, spread
from text_models import stable_diffusion
from torch import Tensor

from dmkd_fast import Denoiser, DiffusionSampler, Guidance, Steps, load_denoiser
from dmkd_fast.denoisers import attention
from dmkd_fast.denoisers.dit import LeanDiT, lean_dit
from dmkd_fast.denoisers.kernels import has_short_attention
from dmkd_fast.denoisers.upsampling import UpsampleConv
from dmkd_fast.rng import philox
from dmkd_fast.runtime.errors import UserError
from dmkd_fast.runtime.model_files import read_license

CPU = torch.device("cpu")
IDS = torch.arange(4)


def sampler_of(loaded: Denoiser, **changes: Any) -> DiffusionSampler:
    return sampler_from(**(vars(loaded) | {"micro_batch_images": 4} | changes))


def images_of(sampler: DiffusionSampler, loaded: Denoiser, labels: Tensor) -> Tensor:
    out = torch.empty(len(labels), *loaded.image_shape, dtype=torch.uint8)
    return sampler.sample(IDS[: len(labels)], labels, out=out)


def noise_of(step: int, shape: tuple[int, ...]) -> Tensor:
    count = shape[0] * shape[1] * shape[2]
    return philox.normal(0, IDS, step=step, count=count).view(4, *shape)


def same_pixels(got: Tensor, pipeline_images: Any, *, levels: int = 1) -> None:
    """At most `levels` apart; `pipeline_images` are (B, H, W, C) in [0, 1]."""
    expected = (torch.as_tensor(pipeline_images).permute(0, 3, 1, 2) * 255).round()
    difference = (got.float() - expected).abs()
    assert expected.std() > 10  # pictures of nothing would prove nothing
    assert difference.max() <= levels and (difference > 0).float().mean() < 2e-3


def patch_noise(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...]) -> None:
    """Pipelines draw what the sampler draws: step 0 first, then one per solver step."""
    drawn = (noise_of(step, shape) for step in range(10_000))
    for module in (
        pipeline_dit,
        pipeline_consistency_models,
        scheduling_ddpm,
        scheduling_consistency_models,
    ):
        # The DiT pipeline steps guided batches at double size and keeps the first half.
        monkeypatch.setattr(
            module, "randn_tensor", lambda shape, **_: next(drawn).repeat(shape[0] // 4, 1, 1, 1)
        )


@pytest.mark.parametrize("shared", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.DDIMScheduler(clip_sample=False),
        diffusers.DDPMScheduler(clip_sample=False),
        diffusers.DPMSolverMultistepScheduler(),
    ],
    ids=["ddim", "ddpm", "dpm"],
)
def test_dit_pipeline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheduler: Any, guidance: float, shared: bool
) -> None:
    folder = dit_folder(tmp_path, shared=shared, scheduler=scheduler)
    loaded = load_denoiser(folder, CPU)
    assert isinstance(loaded.module, LeanDiT) == shared
    assert (loaded.latent_shape, loaded.image_shape) == ((4, 8, 8), (3, 16, 16))
    labels = torch.tensor([1, 999, 0, 500])
    sampler = sampler_of(loaded, count=6, scale=guidance)
    got = images_of(sampler, loaded, labels)
    patch_noise(monkeypatch, (4, 8, 8))
    pipeline = diffusers.DiTPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        labels.tolist(), guidance_scale=guidance, num_inference_steps=6, output_type="np"
    ).images
    same_pixels(got, theirs)


@pytest.mark.parametrize("scale", [1.0, 2.5])
@pytest.mark.parametrize("name", ["DDPMScheduler", "DDIMScheduler"])
def test_class_conditional_unet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, scale: float
) -> None:
    scheduler = getattr(diffusers, name)()
    folder = class_unet_folder(tmp_path, scheduler, num_class_embeds=11)
    loaded = load_denoiser(folder, CPU, null_class=10)
    labels, nulls = torch.tensor([3, 9, 0, 3]), torch.full((4,), 10)
    states = sampler_of(loaded, count=8, scale=scale).trajectory(IDS, labels)
    patch_noise(monkeypatch, (3, 8, 8))
    unet = diffusers.UNet2DModel.from_pretrained(tmp_path / "unet")
    scheduler.set_timesteps(8)
    x = noise_of(0, (3, 8, 8))
    steps = iter(range(1, 99))
    monkeypatch.setattr(
        scheduling_ddpm, "randn_tensor", lambda *_, **__: noise_of(next(steps), (3, 8, 8))
    )
    for timestep in scheduler.timesteps:
        with torch.no_grad():
            output = unet(x, timestep, class_labels=labels).sample
            if scale != 1:
                none = unet(x, timestep, class_labels=nulls).sample
                output = none + scale * (output - none)
        x = scheduler.step(output, timestep, x).prev_sample
    assert (states[-1] - x).abs().max() < 2e-4


@pytest.mark.parametrize("num_steps", [1, 3])
def test_consistency_pipeline(tmp_path: Path, monkeypatch: Any, num_steps: int) -> None:
    scheduler = diffusers.CMStochasticIterativeScheduler()
    loaded = load_denoiser(class_unet_folder(tmp_path, scheduler), CPU)
    labels = torch.tensor([3, 9, 0, 3])
    got = images_of(sampler_of(loaded, count=num_steps), loaded, labels)
    patch_noise(monkeypatch, (3, 8, 8))
    pipeline = diffusers.ConsistencyModelPipeline(
        unet=diffusers.UNet2DModel.from_pretrained(tmp_path / "unet"), scheduler=scheduler
    )
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        4, class_labels=labels.tolist(), num_inference_steps=num_steps, output_type="np"
    ).images
    same_pixels(got, theirs)


@pytest.mark.parametrize(
    ("solver", "scale", "changes"),
    [
        ("ddim", 3.0, {}),
        pytest.param("ddim", 1.0, {}, marks=pytest.mark.slow),
        pytest.param("dpm++2m", 3.0, {}, marks=pytest.mark.slow),
        ("dpm++2m", 3.0, {"time_cond_proj_dim": 12}),
    ],
)
def test_stable_diffusion_pipeline(
    tmp_path: Path, solver: str, scale: float, changes: dict[str, Any]
) -> None:
    """PNDM's config, as SD 1.5 ships; sampled with another solver of the same noise schedule."""
    prompts = ["a cat", "some dog", "the car", "no"]
    pipeline = stable_diffusion(
        tmp_path, diffusers.PNDMScheduler(skip_prk_steps=True, steps_offset=1), **changes
    )
    loaded = load_denoiser(tmp_path, CPU, prompts=prompts)
    assert loaded.takes_guidance == bool(changes)
    labels = torch.tensor([2, 0, 3, 1])
    sampler = sampler_of(loaded, count=5, solver=solver, scale=scale)
    assert sampler.forwards_per_image == (5 if changes or scale == 1 else 10)
    got = images_of(sampler, loaded, labels)
    kind = {"ddim": diffusers.DDIMScheduler, "dpm++2m": diffusers.DPMSolverMultistepScheduler}
    saved = json.loads((tmp_path / "scheduler" / "scheduler_config.json").read_text())
    pipeline.scheduler = kind[solver].from_config(saved)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        [prompts[i] for i in labels],
        guidance_scale=scale,
        num_inference_steps=5,
        output_type="np",
        latents=noise_of(0, (4, 8, 8)),
    ).images
    same_pixels(got, theirs, levels=2)


def test_tiny_decoder_in_place_of_the_models_own(tmp_path: Path) -> None:
    folder = dit_folder(tmp_path / "dit")
    tiny = spread(
        diffusers.AutoencoderTiny(
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            num_encoder_blocks=(1, 1),
            num_decoder_blocks=(1, 1),
        )
    )
    tiny.save_pretrained(tmp_path / "tiny")
    loaded = load_denoiser(folder, CPU, decoder=tmp_path / "tiny")
    assert loaded.decoder is not None
    assert any(isinstance(m, UpsampleConv) for m in loaded.decoder.modules())
    assert loaded.image_shape == (3, 16, 16)
    sampler = sampler_of(loaded, count=2)
    got = images_of(sampler, loaded, torch.tensor([1, 2, 3, 4]))
    latents = sampler.trajectory(IDS, torch.tensor([1, 2, 3, 4]))[-1]
    with torch.no_grad():
        image = tiny.decode(latents / tiny.config.scaling_factor).sample
    expected = (image * 127.5 + 127.5).round().clamp(0, 255)
    assert (got.float() - expected).abs().max() <= 1


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 0.06)])
@pytest.mark.parametrize("kind", ["sdpa", "short"])
@pytest.mark.parametrize(
    "changes",
    [{}, {"patch_size": 4, "num_layers": 3}, {"attention_bias": False}, {"out_channels": None}],
    ids=lambda c: "-".join(c) or "plain",
)
def test_lean_dit_equals_diffusers(
    changes: dict[str, Any], kind: attention.Attention, dtype: torch.dtype, tolerance: float
) -> None:
    dit = small_dit(**changes)
    lean = lean_dit(dit)
    assert lean is not None
    if kind == "short" and not has_short_attention(dtype, lean.head_dim):
        pytest.skip("needs a CPU with AVX-512, and AVX512-BF16 for bfloat16")
    lean.attention = kind
    x, t, y = torch.randn(5, 4, 8, 8), torch.tensor([0.0, 1, 500, 999, 250.5]), IDS[:1].expand(5)
    with torch.no_grad():
        expected = dit(x, timestep=t, class_labels=y).sample
        got = lean.to(dtype)(x.to(dtype), t, y).float()
        reference = dit.to(dtype)(x.to(dtype), timestep=t, class_labels=y).sample.float()
    scale = expected.abs().max()
    assert (got - expected).abs().max() < tolerance * scale
    # No further from float32 than diffusers' own module in that dtype is.
    assert (got - expected).square().mean() <= 2 * (reference - expected).square().mean() + 1e-10


def test_a_dit_that_the_lean_module_cannot_be_keeps_diffusers() -> None:
    assert lean_dit(small_dit(shared=False)) is None
    assert lean_dit(small_dit(activation_fn="gelu")) is None
    assert lean_dit(small_dit(norm_elementwise_affine=True)) is None


def test_xformers_is_refused_where_it_cannot_run() -> None:
    shapes: dict[str, Any] = {"device": CPU, "num_tokens": 16, "num_heads": 2, "head_dim": 8}
    able = has_short_attention(torch.bfloat16, 8)
    assert attention.resolve("auto", dtype=torch.bfloat16, **shapes) == (
        "short" if able else "sdpa"
    )
    shapes["num_tokens"] = 2048
    assert attention.resolve("auto", dtype=torch.bfloat16, **shapes) == "sdpa"
    with pytest.raises(ValueError, match="attention: got xformers"):
        attention.resolve("xformers", dtype=torch.float16, **shapes)


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def breakages(folder: Path) -> dict[str, Any]:
    transformer, vae = folder / "transformer", folder / "vae"
    weights = transformer / "diffusion_pytorch_model.safetensors"
    flux, video = "FluxTransformer2DModel", "AutoencoderKLWan"
    return {
        "no scheduler": (lambda: shutil.rmtree(folder / "scheduler"), "scheduler_config.json"),
        "no model": (lambda: shutil.rmtree(transformer), "neither transformer/ nor unet/"),
        "no config": ((transformer / "config.json").unlink, "config.json"),
        "no weights": (weights.unlink, "no such file"),
        "cut weights": (lambda: weights.write_bytes(weights.read_bytes()[:-99]), "damaged"),
        "no vae": (lambda: shutil.rmtree(vae), "4-channel latents without vae/"),
        "pickled vae": (
            lambda: next(vae.glob("*.safetensors")).rename(vae / "diffusion_pytorch_model.bin"),
            "no .safetensors",
        ),
        "other vae": (lambda: edit(vae / "config.json", latent_channels=16), "latent channels"),
        "video vae": (lambda: edit(vae / "config.json", _class_name=video), "AutoencoderTiny"),
        "cut vae": (lambda: next(vae.glob("*.safetensors")).write_bytes(b"x" * 99), "vae"),
        "text model": (lambda: edit(transformer / "config.json", _class_name=flux), "FluxPipeline"),
        "other size": (lambda: edit(transformer / "config.json", num_layers=3), "blocks.2"),
        "bad json": (lambda: (transformer / "config.json").write_text("{"), "not valid JSON"),
    }


@pytest.mark.parametrize("name", sorted(breakages(Path())))
def test_a_wrong_or_missing_part_is_one_clear_line(tmp_path: Path, name: str) -> None:
    folder = dit_folder(tmp_path)
    spoil, words = breakages(folder)[name]
    spoil()
    with pytest.raises(UserError) as error:
        load_denoiser(folder, CPU)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_prompts_belong_to_text_to_image_models_only(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="prompts: got 1 prompts"):
        load_denoiser(dit_folder(tmp_path / "dit"), CPU, prompts=["a cat"])
    stable_diffusion(tmp_path / "sd", diffusers.DDIMScheduler())
    with pytest.raises(ValueError, match="prompts: got no prompts"):
        load_denoiser(tmp_path / "sd", CPU)
    shutil.rmtree(tmp_path / "sd" / "text_encoder")
    with pytest.raises(ValueError, match="text_encoder"):
        load_denoiser(tmp_path / "sd", CPU, prompts=["a cat"])


def test_unconditional_unet_and_absent_decoder_are_refused(tmp_path: Path) -> None:
    folder = class_unet_folder(tmp_path / "a", diffusers.DDPMScheduler(), num_class_embeds=None)
    with pytest.raises(ValueError, match="class-conditional"):
        load_denoiser(folder, CPU)
    with pytest.raises(ValueError, match="no such folder"):
        load_denoiser(dit_folder(tmp_path / "b"), CPU, decoder=tmp_path / "nothing")


def test_classes_and_guidance_are_checked(tmp_path: Path) -> None:
    loaded = load_denoiser(class_unet_folder(tmp_path, diffusers.DDPMScheduler()), CPU)
    with pytest.raises(ValueError, match="labels: got 10, expected 0 to 9"):
        images_of(sampler_of(loaded), loaded, torch.tensor([0, 10]))
    with pytest.raises(ValueError, match="labels: got -1"):
        images_of(sampler_of(loaded), loaded, torch.tensor([0, -1]))
    with pytest.raises(ValueError, match="without a null class"):
        sampler_of(loaded, scale=2.0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("---\nlicense: cc-by-nc-4.0\ntags: [a]\n---\n# Card", "cc-by-nc-4.0"),
        ("---\ntags: [a]\n---\nlicense: no header\n", "unknown"),
        ("# Card\n", "unknown"),
        ("---\nlicense:\n- mit\n---\n", "unknown"),
        ("---\nlicense:\ntags: [a]\n---\n", "unknown"),
    ],
)
def test_license_is_read_from_the_cards_header(tmp_path: Path, text: str, expected: str) -> None:
    (tmp_path / "README.md").write_text(text)
    assert read_license(tmp_path) == expected


@pytest.mark.slow
def test_dit_xl_2_with_its_autoencoder_makes_256_pixel_images() -> None:
    """The published shapes with random weights: 675 M parameters, 3 x 256 x 256 uint8."""
    from dmkd_fast.denoisers.trainable import share_embedder
    from dmkd_fast.denoisers.wrappers import Decoder

    torch.manual_seed(0)
    dit = diffusers.DiTTransformer2DModel(
        num_attention_heads=16,
        attention_head_dim=72,
        num_layers=28,
        in_channels=4,
        out_channels=8,
        sample_size=32,
        patch_size=2,
        num_embeds_ada_norm=1000,
    )
    share_embedder(dit)
    lean = lean_dit(dit)
    assert lean is not None
    assert 670e6 < sum(p.numel() for p in lean.parameters()) < 680e6
    vae = diffusers.AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        sample_size=256,
    )
    sampler = DiffusionSampler(
        Denoiser(
            module=lean,
            scheduler={"_class_name": "DDIMScheduler", "clip_sample": False},
            latent_shape=(4, 32, 32),
            image_shape=(3, 256, 256),
            decoder=Decoder(vae).to(memory_format=torch.channels_last),
            null_class=1000,
            num_classes=1000,
        ),
        Steps(count=2),
        Guidance(scale=4.0),
        micro_batch_images=2,
        dtype=torch.bfloat16,
    )
    out = torch.zeros(2, 3, 256, 256, dtype=torch.uint8)
    sampler.sample(torch.tensor([5, 6]), torch.tensor([207, 360]), out=out)
    assert out.float().std() > 1 and not torch.equal(out[0], out[1])
