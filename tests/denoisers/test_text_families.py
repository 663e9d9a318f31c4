"""Every family of text-to-image models against its diffusers pipeline, at the same noise."""

from __future__ import annotations

import gc
import json
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.schedulers import scheduling_euler_ancestral_discrete
from pipeline_images import LABELS, images_of, noise_of, run, same_pixels
from small_jobs import sampler_from
from small_models import stable_diffusion
from text_models import PROMPTS, flux, packed, sd3, sdxl
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dmkd_fast import load_denoiser
from dmkd_fast.runtime.errors import UserError

pytestmark = pytest.mark.slow  # run by .ci/run

CPU = torch.device("cpu")
SDXL_BASE = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "timestep_spacing": "leading",
    "steps_offset": 1,
}
SDXL_TURBO = SDXL_BASE | {"timestep_spacing": "trailing"}


@pytest.mark.parametrize("zeros", [True, False], ids=["zeros", "empty prompt"])
@pytest.mark.parametrize("scale", [1.0, 5.0])
def test_sdxl(tmp_path: Path, scale: float, zeros: bool) -> None:
    scheduler = diffusers.EulerDiscreteScheduler(**SDXL_BASE)
    pipeline = sdxl(tmp_path, scheduler, force_zeros_for_empty_prompt=zeros)
    loaded = load_denoiser(tmp_path, CPU, prompts=PROMPTS)
    got = images_of(loaded, count=5, scale=scale)
    latents = noise_of(0, (4, 8, 8))
    same_pixels(got, run(pipeline, guidance_scale=scale, num_inference_steps=5, latents=latents))


@pytest.mark.parametrize("num_steps", [1, 4])
def test_sdxl_turbo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_steps: int) -> None:
    pipeline = sdxl(tmp_path, diffusers.EulerAncestralDiscreteScheduler(**SDXL_TURBO))
    loaded = load_denoiser(tmp_path, CPU, prompts=PROMPTS)
    got = images_of(loaded, count=num_steps)
    drawn = (noise_of(step, (4, 8, 8)) for step in range(1, 9))
    monkeypatch.setattr(
        scheduling_euler_ancestral_discrete, "randn_tensor", lambda *_, **__: next(drawn)
    )
    same_pixels(
        got,
        run(
            pipeline,
            guidance_scale=0.0,
            num_inference_steps=num_steps,
            latents=noise_of(0, (4, 8, 8)),
        ),
    )


def test_sdxl_is_told_another_size(tmp_path: Path) -> None:
    pipeline = sdxl(tmp_path, diffusers.EulerDiscreteScheduler(**SDXL_BASE))
    loaded = load_denoiser(tmp_path, CPU, prompts=PROMPTS, image_size=24)
    assert (loaded.latent_shape, loaded.image_shape) == ((4, 12, 12), (3, 24, 24))
    got = images_of(loaded, count=3, scale=2.0)
    latents = noise_of(0, (4, 12, 12))
    same_pixels(
        got,
        run(
            pipeline,
            guidance_scale=2.0,
            num_inference_steps=3,
            latents=latents,
            height=24,
            width=24,
        ),
    )
    with pytest.raises(UserError, match="image_size: got 25, expected a multiple of 2"):
        load_denoiser(tmp_path, CPU, prompts=PROMPTS, image_size=25)


DYNAMIC = {
    "use_dynamic_shifting": True,
    "base_image_seq_len": 4,
    "max_image_seq_len": 64,
    "base_shift": 0.5,
    "max_shift": 1.15,
}


@pytest.mark.parametrize("scale", [1.0, 4.5])
@pytest.mark.parametrize(
    ("shift", "changes"),
    [({"shift": 3.0}, {}), (DYNAMIC, {"qk_norm": "rms_norm", "dual_attention_layers": (0,)})],
    ids=["3", "3.5"],
)
def test_sd3(tmp_path: Path, shift: dict[str, Any], changes: dict[str, Any], scale: float) -> None:
    pipeline = sd3(tmp_path, diffusers.FlowMatchEulerDiscreteScheduler(**shift), **changes)
    loaded = load_denoiser(tmp_path, CPU, prompts=PROMPTS)
    got = images_of(loaded, count=5, scale=scale)
    latents = noise_of(0, (16, 8, 8))
    same_pixels(got, run(pipeline, guidance_scale=scale, num_inference_steps=5, latents=latents))


def test_sd3_without_t5(tmp_path: Path) -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipeline = sd3(tmp_path, scheduler, with_t5=False)
    loaded = load_denoiser(tmp_path, CPU, prompts=PROMPTS, image_size=24)
    got = images_of(loaded, count=3, scale=4.5)
    latents = noise_of(0, (16, 12, 12))
    same_pixels(
        got,
        run(
            pipeline,
            guidance_scale=4.5,
            num_inference_steps=3,
            latents=latents,
            height=24,
            width=24,
        ),
    )


@pytest.mark.parametrize(
    ("guidance_embeds", "shift", "scale", "num_steps"),
    [
        (False, {"shift": 1.0}, 1.0, 4),
        (True, DYNAMIC, 3.5, 5),
        (True, DYNAMIC | {"time_shift_type": "linear"}, 1.0, 3),
    ],
    ids=["schnell", "dev", "linear shift"],
)
def test_flux(
    tmp_path: Path, guidance_embeds: bool, shift: dict[str, Any], scale: float, num_steps: int
) -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**shift)
    pipeline = flux(tmp_path, scheduler, guidance_embeds=guidance_embeds)
    loaded = load_denoiser(tmp_path, CPU, prompts=PROMPTS, image_size=16)
    assert loaded.takes_guidance == guidance_embeds
    got = images_of(loaded, count=num_steps, scale=scale)
    same_pixels(
        got,
        run(
            pipeline,
            guidance_scale=scale,
            num_inference_steps=num_steps,
            latents=packed(noise_of(0, (16, 8, 8))),
            height=16,
            width=16,
            max_sequence_length=512 if guidance_embeds else 256,
        ),
    )


def test_flux_makes_images_of_128_latents_by_default(tmp_path: Path) -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0)
    flux(tmp_path, scheduler, guidance_embeds=False)
    loaded = load_denoiser(tmp_path, CPU, prompts=PROMPTS)
    assert (loaded.latent_shape, loaded.image_shape) == ((16, 128, 128), (3, 256, 256))
    with pytest.raises(UserError, match="without a null class"):
        sampler_from(**vars(loaded), scale=2.0)


BUILD: dict[str, Callable[[Path], Any]] = {
    "sdxl": lambda folder: sdxl(folder, diffusers.EulerDiscreteScheduler(**SDXL_BASE)),
    "sd3": lambda folder: sd3(folder, diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)),
    "flux": lambda folder: flux(
        folder, diffusers.FlowMatchEulerDiscreteScheduler(**DYNAMIC), guidance_embeds=True
    ),
}
SIZES: dict[str, int | None] = {"sdxl": None, "sd3": None, "flux": 16}


@pytest.mark.parametrize("family", BUILD)
def test_an_image_depends_on_its_id_alone(tmp_path: Path, family: str) -> None:
    BUILD[family](tmp_path)
    loaded = load_denoiser(tmp_path, CPU, prompts=PROMPTS, image_size=SIZES[family])
    settings = {"count": 2, "scale": 2.0}
    got = images_of(loaded, **settings)
    sampler = sampler_from(**vars(loaded), micro_batch_images=4, **settings)
    alone = torch.empty(1, *loaded.image_shape, dtype=torch.uint8)
    sampler.sample(torch.tensor([1]), LABELS[1:2], out=alone)
    assert torch.equal(alone[0], got[1])
    other = images_of(loaded, micro_batch=7, **settings)
    assert (other.float() - got.float()).abs().max() <= 1


@pytest.mark.parametrize("family", BUILD)
def test_a_class_map_chooses_among_the_prompts(tmp_path: Path, family: str) -> None:
    BUILD[family](tmp_path)
    loaded = load_denoiser(tmp_path, CPU, prompts=PROMPTS, image_size=SIZES[family])
    sampler = sampler_from(**vars(loaded), micro_batch_images=4, count=2, scale=2.0)
    some = sampler_from(**vars(loaded.restricted((3, 1))), micro_batch_images=4, count=2, scale=2.0)
    ids = torch.arange(4)
    whole = sampler.trajectory(ids, torch.tensor([3, 1, 1, 3]))
    assert torch.equal(some.trajectory(ids, torch.tensor([0, 1, 1, 0])), whole)


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def breakages(folder: Path, family: str) -> dict[str, tuple[Callable[[], object], str]]:
    part = "unet" if family == "sdxl" else "transformer"
    weights = folder / part / "diffusion_pytorch_model.safetensors"
    width = "cross_attention_dim" if family == "sdxl" else "joint_attention_dim"
    scheduler = folder / "scheduler" / "scheduler_config.json"
    last = {"sdxl": "text_encoder_2", "sd3": "text_encoder_2", "flux": "text_encoder_2"}[family]
    return {
        "no encoder": (lambda: shutil.rmtree(folder / last), last),
        "no tokenizer": (lambda: shutil.rmtree(folder / "tokenizer_2"), "tokenizer_2"),
        "other encoder": (lambda: edit(folder / part / "config.json", **{width: 40}), "40"),
        "cut weights": (lambda: weights.write_bytes(weights.read_bytes()[:-99]), "damaged"),
        "other scheduler": (lambda: edit(scheduler, _class_name="EDMEulerScheduler"), "EDMEuler"),
        "no vae": (lambda: shutil.rmtree(folder / "vae"), "vae"),
    }


@pytest.mark.parametrize("name", sorted(breakages(Path(), "sdxl")))
@pytest.mark.parametrize("family", BUILD)
def test_a_wrong_folder_is_one_clear_line(tmp_path: Path, family: str, name: str) -> None:
    BUILD[family](tmp_path)
    spoil, words = breakages(tmp_path, family)[name]
    spoil()

    def use() -> None:
        loaded = load_denoiser(tmp_path, CPU, prompts=PROMPTS, image_size=SIZES[family])
        sampler_from(**vars(loaded), count=2)

    with pytest.raises(UserError) as error:
        use()
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("family", BUILD)
def test_no_encoder_is_alive_while_images_are_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    import transformers

    BUILD[family](tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    alive: list[weakref.ref[Any]] = []
    for kind in ("CLIPTextModel", "CLIPTextModelWithProjection", "T5EncoderModel"):
        own = getattr(transformers, kind)

        def noted(*arguments: Any, own: Any = own, **settings: Any) -> Any:
            made = type(own).__getattribute__(own, "from_pretrained")(*arguments, **settings)
            alive.extend(weakref.ref(p) for p in made[0].parameters())
            return made

        stand_in = type(kind, (), {"from_pretrained": staticmethod(noted)})
        monkeypatch.setattr(transformers, kind, stand_in)
    gc.disable()
    try:
        loaded = load_denoiser(tmp_path, CPU, prompts=PROMPTS, image_size=SIZES[family])
    finally:
        gc.enable()
    assert len(alive) > 20 and all(parameter() is None for parameter in alive)
    made = len(alive)
    again = load_denoiser(tmp_path, CPU, prompts=PROMPTS, image_size=SIZES[family])
    assert len(alive) == made  # read from the cache
    for a, b in zip(loaded.module.buffers(), again.module.buffers(), strict=True):
        assert torch.equal(a, b)
    load_denoiser(tmp_path, CPU, prompts=["a house"], image_size=SIZES[family])
    assert len(alive) == 2 * made  # other prompts are encoded


@pytest.mark.parametrize("family", BUILD)
def test_parts_that_name_code_are_refused(tmp_path: Path, family: str) -> None:
    BUILD[family](tmp_path)
    for part in sorted(p for p in tmp_path.iterdir() if p.name.startswith(("text_", "token"))):
        config = part / ("tokenizer_config.json" if "tokenizer" in part.name else "config.json")
        before = config.read_text()
        code = {"AutoModel": "evil.Model"}
        for key, value, word in (
            ("auto_map", code, "auto_map"),
            ("vocab_file", "/etc/a", "/etc/a"),
        ):
            edit(config, **{key: value})
            with pytest.raises(UserError, match=word):
                load_denoiser(tmp_path, CPU, prompts=PROMPTS, image_size=SIZES[family])
            config.write_text(before)


def test_weights_may_be_loaded_in_the_dtype_of_the_job(tmp_path: Path) -> None:
    sdxl(tmp_path, diffusers.EulerDiscreteScheduler(**SDXL_BASE))
    whole = load_denoiser(tmp_path, CPU, prompts=PROMPTS)
    half = load_denoiser(tmp_path, CPU, prompts=PROMPTS, dtype=torch.bfloat16)
    for a, b in zip(whole.module.parameters(), half.module.parameters(), strict=True):
        assert b.dtype == torch.bfloat16 and torch.equal(a.bfloat16(), b)


def test_a_damaged_file_of_the_cache_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    sdxl(tmp_path / "model", diffusers.EulerDiscreteScheduler(**SDXL_BASE))
    first = load_denoiser(tmp_path / "model", CPU, prompts=PROMPTS)
    kept = sorted((tmp_path / "cache").rglob("prompts-*.safetensors"))
    assert len(kept) == 2
    whole = [path.read_bytes() for path in kept]
    for path, data in zip(kept, whole, strict=True):
        path.write_bytes(data[:-9])
    second = load_denoiser(tmp_path / "model", CPU, prompts=PROMPTS)
    assert torch.equal(first.module.prompts, second.module.prompts)  # type: ignore[arg-type]
    assert [path.read_bytes() for path in kept] == whole
    monkeypatch.setenv("XDG_CACHE_HOME", str(kept[0]))  # a file, so that nothing can be kept
    load_denoiser(tmp_path / "model", CPU, prompts=PROMPTS)


@pytest.mark.parametrize(
    ("build", "own"),
    [
        (BUILD["sdxl"], (50, 5.0)),
        (BUILD["sd3"], (28, 7.0)),
        (BUILD["flux"], (28, 3.5)),
        (
            lambda path: sdxl(path, diffusers.EulerAncestralDiscreteScheduler(**SDXL_TURBO)),
            (4, 1.0),
        ),
        (
            lambda path: flux(
                path, diffusers.FlowMatchEulerDiscreteScheduler(), guidance_embeds=False
            ),
            (4, 1.0),
        ),
        (lambda path: stable_diffusion(path, diffusers.PNDMScheduler()), (50, 7.5)),
    ],
    ids=["sdxl", "sd3", "dev", "turbo", "schnell", "sd"],
)
def test_steps_and_guidance_are_those_of_the_model(
    tmp_path: Path, build: Callable[[Path], Any], own: tuple[int, float]
) -> None:
    build(tmp_path)
    size = 16 if (tmp_path / "transformer").is_dir() else None
    loaded = load_denoiser(tmp_path, CPU, prompts=PROMPTS, image_size=size)
    assert (loaded.own_steps, loaded.own_guidance_scale) == own


class Places(TorchDispatchMode):
    """Notes the devices of all tensors that operators return."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        made = function(*args, **(kwargs or {}))
        leaves = torch.utils._pytree.tree_leaves(made)
        self.seen |= {x.device.type for x in leaves if isinstance(x, Tensor)}
        return made


@pytest.mark.parametrize("family", BUILD)
def test_a_forward_pass_is_one_graph_and_makes_no_tensor_on_the_host(
    tmp_path: Path, family: str
) -> None:
    """On CUDA, the sampler compiles a step as one graph and captures it."""
    BUILD[family](tmp_path)
    module = load_denoiser(tmp_path, CPU, prompts=PROMPTS, image_size=SIZES[family]).module
    channels = 4 if family == "sdxl" else 16
    inputs = [torch.randn(4, channels, 8, 8), torch.full((4,), 500.0), LABELS]
    inputs += [torch.full((4,), 3.5)] * (family == "flux")
    graph = torch.compile(module, fullgraph=True, dynamic=False, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(graph(*inputs), module(*inputs), rtol=1e-4, atol=1e-4)
        with Places() as places:
            module.to("meta")(*(value.to("meta") for value in inputs))
    assert places.seen == {"meta"}
