"""Several prompts a class: how they are written, which one an image has, and banks on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pyarrow.parquet as pq
import pytest
import torch
from small_jobs import CONFIG, SHORT, sampler_from, tiny_sampler
from text_models import stable_diffusion
from torch import Tensor, nn

from dmkd_fast import load_denoiser
from dmkd_fast.config.jobs import DistillConfig
from dmkd_fast.config.loading import load_config
from dmkd_fast.config.networks import DenoiserConfig
from dmkd_fast.data import manifest
from dmkd_fast.denoisers import loading
from dmkd_fast.denoisers.prompts import bank
from dmkd_fast.denoisers.prompts.by_class import prompts_by_class, read_captions
from dmkd_fast.denoisers.prompts.encoders import TextEncoder, encode
from dmkd_fast.jobs.images import job_class_names, open_denoiser
from dmkd_fast.runtime.errors import UserError
from dmkd_fast.sampling.sampler import DiffusionSampler

CPU = torch.device("cpu")
NAMES = ("tabby_cat", "dog")
STYLES = {"style": ["oil", "ink"], "place": ["home", "a park"]}


def test_a_template_has_every_class_and_every_combination() -> None:
    found = prompts_by_class(["a {name}, {style}", "{name} in {place}, {style}"], NAMES, STYLES)
    assert found[0] == (
        "a tabby cat, oil",
        "a tabby cat, ink",
        "tabby cat in home, oil",
        "tabby cat in home, ink",
        "tabby cat in a park, oil",
        "tabby cat in a park, ink",
    )
    assert len(found) == 2 and found[1][0] == "a dog, oil"


def test_prompts_without_a_name_are_one_class_each() -> None:
    assert prompts_by_class(["a cat", "a dog"], (), {}) == (("a cat",), ("a dog",))
    found = prompts_by_class(["a cat, {style}", "a dog"], (), {"style": ["oil", "ink"]})
    assert found == (("a cat, oil", "a cat, ink"), ("a dog",))


@pytest.mark.parametrize(
    ("prompts", "names", "attributes", "message"),
    [
        (["a {name}", "a dog"], NAMES, {}, "1 of 2 prompts with {name}, expected all or none"),
        (["a {name}"], (), {}, "{name} without class names"),
        (["a {name}"], ("0", "1"), {}, "{name} without class names"),
        (["a {name}, {stile}"], NAMES, {"style": ["x"]}, "'style', for which no prompt"),
        (["a {name}, {style}"], NAMES, {}, "add it to denoiser.prompt_attributes as style"),
        (["a {a}{b}{c}{d}"], (), {k: ["x"] * 100 for k in "abcd"}, "at most 1,000,000"),
        (["a {name} {a}{b}"], ("n",) * 1000, {k: ["x"] * 50 for k in "ab"}, "got 2,500,000"),
    ],
)
def test_prompts_that_do_not_fit_are_refused(
    prompts: list[str], names: tuple[str, ...], attributes: dict[str, list[str]], message: str
) -> None:
    with pytest.raises(UserError) as raised:
        prompts_by_class(prompts, names, attributes)
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_captions_by_name_or_in_order(tmp_path: Path) -> None:
    path = tmp_path / "captions.json"
    path.write_text(json.dumps({"dog": ["a dog", "dogs"], "tabby_cat": ["a cat"]}))
    assert read_captions(path, NAMES) == (("a cat",), ("a dog", "dogs"))
    path.write_text(json.dumps([["one"], ["two", "three"]]))
    assert read_captions(path, ()) == (("one",), ("two", "three"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "No such file"),
        ("[[", "give a JSON file"),
        ("3", "got int, expected captions by class"),
        ("[]", "got list, expected captions by class"),
        ('[["a"], []]', "no list of captions for class 1"),
        ('[["a"], ["b", 3]]', "a caption of class 1 that is no text"),
        ('{"dog": ["x"]}', "no captions for 'tabby_cat'"),
        ('{"dog": ["x"], "tabby_cat": ["y"], "cow": ["z"]}', "captions for 'cow'"),
    ],
)
def test_wrong_captions_are_one_line(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "captions.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError) as raised:
        read_captions(path, NAMES)
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_class_names_come_from_the_test_set_or_the_teacher(tmp_path: Path) -> None:
    config = load_config(DistillConfig, CONFIG, SHORT)
    assert job_class_names(config, ("a", "b")) == ("a", "b") and job_class_names(config, None) == ()
    mapped = load_config(DistillConfig, CONFIG, [*SHORT, "teacher.class_map=[1, 0]"])
    assert job_class_names(mapped, ("a", "b")) == ("b", "a")
    (tmp_path / "names").write_text("x\ny\n")
    listed = load_config(DistillConfig, CONFIG, [*SHORT, f"eval.classes={tmp_path / 'names'}"])
    assert job_class_names(listed, ("a", "b")) == ("x", "y")


class Table(nn.Module):
    """A module whose prediction is a number of its own for each prompt."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.prompts = nn.Buffer(torch.linspace(-1, 1, rows)[:, None])

    def forward(self, latents: Tensor, timesteps: Tensor, labels: Tensor) -> Tensor:
        del timesteps
        return latents - self.prompts[labels][:, :, None, None]


COUNTS = (3, 1, 4)
BY_CLASS = [[f"{label} {i}" for i in range(count)] for label, count in enumerate(COUNTS)]


def table_sampler(**changes: Any) -> DiffusionSampler:
    settings = {"module": Table(9), "num_classes": 8, "null_class": 8, "count": 1, "scale": 1.0}
    plain = tiny_sampler(**(settings | changes))
    loaded = plain.denoiser.with_prompts(BY_CLASS)
    kept = {"count": 1, "scale": plain.guidance.scale, "seed": plain.seed}
    return sampler_from(**vars(loaded), **kept, micro_batch_images=plain.micro_batch_images)


def test_the_prompt_of_an_image_is_a_function_of_seed_and_id() -> None:
    sampler = table_sampler()
    ids = torch.arange(900)
    labels = ids % 3
    own = sampler.own_indices(ids, labels)
    first = torch.tensor([0, 3, 4])[labels]
    assert (own >= first).all() and (own < first + torch.tensor(COUNTS)[labels]).all()
    shares = torch.bincount(own, minlength=8) / 300
    assert torch.allclose(shares, torch.tensor([1 / 3] * 3 + [1.0] + [1 / 4] * 4), atol=0.1)
    order = torch.randperm(900)
    assert torch.equal(sampler.own_indices(ids[order], labels[order]), own[order])
    assert not torch.equal(table_sampler(seed=1).own_indices(ids, labels), own)
    out = torch.empty(900, 1, 8, 8, dtype=torch.uint8)
    sampler.sample(ids, labels, out=out)
    expected = (torch.linspace(-1, 1, 9)[own] * 127.5 + 127.5).round()
    assert (out[:, 0].float().mean((1, 2)) - expected).abs().max() <= 1


def test_one_prompt_a_class_changes_nothing() -> None:
    loaded = tiny_sampler().denoiser.with_prompts([["a"], ["b"], ["c"], ["d"]])
    assert loaded.class_map is None and loaded.num_prompts is None
    assert loaded.prompts == ("a", "b", "c", "d")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sd") / "model"
    stable_diffusion(path, diffusers.DDIMScheduler(clip_sample=False))
    return path


def test_a_config_with_a_template_opens_a_model_of_as_many_classes(folder: Path) -> None:
    config = DenoiserConfig(
        path=str(folder), prompts="a {name}, {style}", prompt_attributes={"style": ("oil", "ink")}
    )
    assert load_config(
        DistillConfig, CONFIG, [*SHORT, "denoiser.prompts='a {name}'"]
    ).denoiser.prompts == ("a {name}",)
    opened = open_denoiser(config, CPU, class_names=NAMES)
    assert (opened.num_classes, opened.num_prompts, opened.null_class) == (2, (2, 2), 4)
    assert opened.prompts[2:] == ("a dog, oil", "a dog, ink")
    chosen = open_denoiser(config.model_copy(update={"class_map": (1,)}), CPU, class_names=NAMES)
    assert chosen.prompts == ("a dog, oil", "a dog, ink") and chosen.num_classes == 1
    with pytest.raises(UserError, match=r"denoiser.class_map: got .* those with prompts"):
        open_denoiser(config.model_copy(update={"class_map": (2,)}), CPU, class_names=NAMES)


@pytest.mark.slow
def test_a_bank_gives_the_same_images(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [f"prompt {i}" for i in range(40)]
    by_class = [prompts[:25], prompts[25:]]
    made, opened = [], []
    for least in (bank.LEAST_BYTES, 1):
        monkeypatch.setattr(bank, "LEAST_BYTES", least)
        loaded = load_denoiser(folder, CPU, prompts=prompts).with_prompts(by_class)
        sampler = sampler_from(**vars(loaded), count=2, scale=2.0, micro_batch_images=4)
        out = torch.empty(10, *loaded.image_shape, dtype=torch.uint8)
        made.append(sampler.sample(torch.arange(10), torch.arange(10) % 2, out=out))
        opened.append(loaded)
    assert torch.equal(*made) and len(made[0].flatten(1).unique(dim=0)) == 10
    plain, banked = opened
    assert plain.bank is None and len(plain.module.prompts) == 41
    assert banked.bank is not None and len(banked.module.prompts) == 5
    (path,) = bank.files.cache_folder().glob("bank-*.safetensors")
    assert (
        len(banked.bank.tables[banked.module, "prompts"]) == 41
        and path.stat().st_size > 41 * 16 * 16 * 4
    )
    assert str(path) in Path("/proc/self/maps").read_text()
    again = load_denoiser(folder, CPU, prompts=prompts)
    assert again.bank is not None
    assert torch.equal(again.bank.tables[again.module, "prompts"], plain.module.prompts)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(1, 1), (1, None), (None, 1)], ids=["both", "one", "weak"])
def test_a_weaker_model_gets_the_prompts_of_a_bank(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sizes: tuple[int | None, ...]
) -> None:
    """Also where the prompts of only one of the two are too many for the device."""
    stable_diffusion(tmp_path / "weak", diffusers.DDIMScheduler(clip_sample=False), seed=9)
    config = DenoiserConfig(
        path=str(folder),
        weak=str(tmp_path / "weak"),
        prompts="a {name}, {style}",
        prompt_attributes={"style": ("oil", "ink", "red", "big", "old")},
    )

    made = []
    for least in ((None, None), sizes):
        rest = list(least)
        monkeypatch.setattr(
            loading, "take_bank", lambda *a, rest=rest: bank.take_bank(*a, least_bytes=rest.pop(0))
        )
        loaded = open_denoiser(config, CPU, class_names=NAMES)
        assert (loaded.bank is not None) == (least == sizes) and loaded.weak is not None
        sampler = sampler_from(**vars(loaded), count=2, scale=3.0, micro_batch_images=4)
        out = torch.empty(10, *loaded.image_shape, dtype=torch.uint8)
        made.append(sampler.sample(torch.arange(10), torch.arange(10) % 2, out=out))
        rows = {len(module.prompts) for module in (loaded.module, loaded.weak)}
        assert rows == {5 if least == sizes else 11}
    assert torch.equal(*made) and len(made[0].flatten(1).unique(dim=0)) == 10


def test_encoded_prompts_carry_no_graph(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # nothing is cached there yet
    assert not encode(folder, TextEncoder(), ["a cat"], CPU)["last"].requires_grad


def test_only_the_tables_of_prompts_enter_a_bank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FLUX also has a table of the places in a prompt, which may have as many rows."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    module = Table(9)
    module.register_buffer("text_places", torch.zeros(9, 3))
    taken = bank.take_bank(module, 9, least_bytes=1)
    assert taken is not None and [name for _, name in taken.tables] == ["prompts"]
    assert len(module.get_buffer("text_places")) == 9


def test_a_damaged_bank_is_written_again_by_the_next_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def held() -> Tensor:
        taken = bank.take_bank(Table(9), 9, least_bytes=1)
        assert taken is not None
        return next(iter(taken.tables.values()))

    expected = Table(9).prompts
    assert torch.equal(held(), expected)
    (path,) = bank.files.cache_folder().glob("bank-*.safetensors")
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    assert torch.equal(held(), expected)  # in memory
    assert torch.equal(held(), expected) and path.read_bytes() == whole


def test_the_manifest_has_the_prompt_of_each_image(tmp_path: Path) -> None:
    row = {"id": 0, "class": 1, "sha256": "x", "prompt": "a dog, oil"}
    manifest.write(tmp_path / "rows.parquet", [row])
    assert pq.read_table(tmp_path / "rows.parquet")["prompt"].to_pylist() == ["a dog, oil"]
    labels, _, _ = manifest.read(tmp_path / "rows.parquet", range(1), 2, with_logits=False)
    assert labels.tolist() == [1]
