"""`dmkd import teacher --zero-shot`: CLIP and prompts become a teacher with equal logits."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from classifier_folders import edit
from command_line import one_line
from real_sets import NAMES as CLASSES
from text_encoders import clip_folder

from dmkd_fast import cli
from dmkd_fast.classifiers.loading import for_inference, load_classifier
from dmkd_fast.config.networks import TeachingConfig
from dmkd_fast.jobs import networks

transformers = pytest.importorskip("transformers")
NAMES = ("red_square", "blue_ring", "star")


def names_file(folder: Path) -> Path:
    (folder / "names.txt").write_text("\n".join(NAMES))
    return folder / "names.txt"


def command(folder: Path, classes: Path, out: Path, *options: str) -> list[str]:
    words = ["import", "teacher", "--zero-shot", str(folder), "--classes", str(classes)]
    return [*words, "--out", str(out), *options]


def their_logits(folder: Path, images: torch.Tensor, prompt: str) -> torch.Tensor:
    model = transformers.CLIPModel.from_pretrained(folder).eval()
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
    texts = [prompt.format(name=name.replace("_", " ")) for name in NAMES]
    tokens = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.inference_mode():
        logits: torch.Tensor = model(pixel_values=images, **tokens).logits_per_image
    return logits


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_logits_are_those_of_transformers(activation: str, tmp_path: Path) -> None:
    clip_folder(tmp_path / "clip", hidden_act=activation)
    out, images = tmp_path / "out", torch.randn(5, 3, 24, 24)
    assert cli.main(command(tmp_path / "clip", names_file(tmp_path), out)) == 0
    model, spec = load_classifier(out)
    assert spec.label_names == NAMES and spec.input_size == 24
    assert (spec.mean, spec.std) == ((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
    assert (spec.interpolation, spec.input.short_side) == ("bicubic", 28)
    expected = their_logits(tmp_path / "clip", images, "a photo of a {name}")
    assert expected.std() > 1
    with torch.inference_mode():
        torch.testing.assert_close(model(images), expected, rtol=0, atol=1e-4)
    assert "license: mit" in (out / "README.md").read_text()
    importlib.import_module("dmkd_fast.integrations.timm")
    timm = importlib.import_module("timm")
    again = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    with torch.inference_mode():
        assert torch.equal(again(images), model(images))


def test_a_prompt_of_ones_own_and_several_prompts(tmp_path: Path) -> None:
    clip_folder(tmp_path / "clip")
    classes, images = names_file(tmp_path), torch.randn(5, 3, 24, 24)
    prompts = ("a {name}", "one {name} more")
    for number, given in enumerate((prompts[:1], prompts)):
        out = tmp_path / str(number)
        options = [word for prompt in given for word in ("--prompt", prompt)]
        assert cli.main(command(tmp_path / "clip", classes, out, *options)) == 0
    with torch.inference_mode():
        one, both = (load_classifier(tmp_path / name)[0](images) for name in "01")
    first, second = (their_logits(tmp_path / "clip", images, prompt) for prompt in prompts)
    torch.testing.assert_close(one, first, rtol=0, atol=1e-4)
    mean = (first + second) / 2  # per class, the mean embedding is shorter than 1
    torch.testing.assert_close((both / mean).std(dim=0), torch.zeros(3), rtol=0, atol=1e-2)
    assert (both.abs() >= mean.abs() - 1e-4).all()


def test_the_teacher_of_a_job_is_read_from_the_folder(
    tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clip_folder(tmp_path / "clip")
    (tmp_path / "names.txt").write_text("\n".join(CLASSES))
    out = tmp_path / "out"
    options = ["--data", str(folder)]
    assert cli.main(command(tmp_path / "clip", tmp_path / "names.txt", out, *options)) == 0
    facts = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert facts["num_images"] == 23 and 0 <= facts["top1"] <= 1
    loaded = networks.load_teachers(
        {"teacher": TeachingConfig(path=str(out))}, temperature=1.0, device=torch.device("cpu")
    )
    assert loaded.class_names["teacher"] == CLASSES and loaded.license == "mit"
    model, spec = load_classifier(out)
    images = torch.randn(4, 3, 24, 24)
    with torch.inference_mode():
        fast = for_inference(model, torch.float32, spec.input)(images)
        torch.testing.assert_close(fast, model(images), rtol=1e-4, atol=1e-4)


def test_mistakes_end_in_one_line_and_leave_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clip_folder(tmp_path / "clip")
    classes, out = names_file(tmp_path), tmp_path / "out"

    def changed(name: str, change: dict[str, Any]) -> Path:
        shutil.copytree(tmp_path / "clip", tmp_path / name)
        edit(tmp_path / name, change)
        return tmp_path / name

    kind = changed("kind", {"model_type": "siglip"})
    code = changed("code", {"vision_config._attn_implementation": "someone/kernel"})
    act = changed("act", {"vision_config.hidden_act": "relu"})
    eps = changed("eps", {"vision_config.layer_norm_eps": 1e-3})
    deep = changed("deep", {"vision_config.num_hidden_layers": 10**9})
    more = changed("more", {"vision_config.num_hidden_layers": 4})
    cut = changed("cut", {})
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:999])
    (tmp_path / "open").mkdir()
    (tmp_path / "open" / "open_clip_config.json").write_text("{}")
    bad = changed("bad", {})
    (bad / "preprocessor_config.json").write_text('{"image_mean": "dark"}')
    cases: list[tuple[list[str], list[str]]] = [
        (command(tmp_path / "none", classes, out), ["config.json"]),
        (command(tmp_path / "open", classes, out), ["open_clip", "transformers"]),
        (command(kind, classes, out), ["siglip", "clip"]),
        (command(code, classes, out), ["_attn_implementation", "run code"]),
        (command(act, classes, out), ["hidden_act", "quick_gelu"]),
        (command(eps, classes, out), ["layer_norm_eps"]),
        (command(deep, classes, out), ["num_hidden_layers", "256"]),
        (command(more, classes, out), ["no weights for"]),
        (command(cut, classes, out), ["cut"]),
        (command(bad, classes, out), ["image_mean"]),
        (command(tmp_path / "clip", tmp_path / "no names", out), ["no such file"]),
        (command(tmp_path / "clip", classes, out, "--prompt", "a photo"), ["--prompt", "{name}"]),
        (command(tmp_path / "clip", classes, out, "--arch", "resnet18"), ["--arch", "--zero-shot"]),
        (command(tmp_path / "clip", classes, tmp_path), ["exists already"]),
        (["import", "teacher", "--zero-shot", str(kind), "--out", str(out)], ["--classes"]),
        (["import", "teacher", "--arch", "resnet18", "--out", str(out)], ["CHECKPOINT"]),
        (["import", "teacher", "a.pth", "--out", str(out)], ["--arch"]),
    ]
    for words, said in cases:
        capsys.readouterr()
        assert cli.main(words) == 2, words
        one_line(capsys, said)
        assert not out.exists() and not list(tmp_path.glob(".*")), words
