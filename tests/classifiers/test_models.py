"""Classifiers: published sizes, every way of naming one, and nothing but safetensors."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dmkd_fast.classifiers import small_nets
from dmkd_fast.classifiers.loading import (
    build_classifier,
    load_classifier,
    load_torchvision,
    save_classifier,
)
from dmkd_fast.classifiers.spec import ClassifierSpec
from dmkd_fast.jobs import networks
from dmkd_fast.views.spec import InputSpec

CPU = torch.device("cpu")
COMMIT = "0123456789abcdef0123456789abcdef01234567"
# Trainable parameters for CIFAR-100, as the distillation literature prints them (Tian et al. 2020
# and code that follows it; ResNet-18 and -34: the pair of Li et al. 2023, 11.2 M and 21.3 M).
PUBLISHED = {
    "cifar_resnet8x4": 1_233_540,
    "cifar_resnet32x4": 7_433_860,
    "cifar_resnet20": 278_324,
    "cifar_resnet56": 861_620,
    "cifar_resnet110": 1_736_564,
    "cifar_wrn16_2": 703_284,
    "cifar_wrn40_1": 569_780,
    "cifar_wrn40_2": 2_255_156,
    "cifar_vgg8": 3_965_028,
    "cifar_vgg13": 9_462_180,
    "cifar_vgg11": 9_277_284,
    "cifar_wrn16_1": 180_916,
    "resnet18": 11_220_132,
    "resnet34": 21_328_292,
}


def spec(architecture: str, **changes: object) -> ClassifierSpec:
    base = {
        "architecture": architecture,
        "num_classes": 100,
        "in_chans": 3,
        "input_size": 32,
        "mean": (0.5, 0.5, 0.4),
        "std": (0.3, 0.3, 0.3),
    }
    return ClassifierSpec(**(base | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", PUBLISHED)
def test_cifar_networks_have_the_published_sizes(name: str) -> None:
    stem = "conv3" if name.startswith("resnet") else "own"
    model = build_classifier(spec(name, stem=stem))
    assert sum(p.numel() for p in model.parameters()) == PUBLISHED[name]


@pytest.mark.parametrize("name", ["cifar_resnet8x4", "cifar_wrn16_2", "cifar_vgg8", "resnet18"])
def test_cifar_networks_keep_32_pixels_through_their_first_stage(name: str) -> None:
    model = build_classifier(spec(name, stem="conv3" if name == "resnet18" else "own"))
    widest: list[int] = []
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(lambda _m, _i, out: widest.append(out.shape[-1]))
    with torch.no_grad():
        assert model.eval()(torch.randn(2, 3, 32, 32)).shape == (2, 100)
    assert widest[0] == 32 and (widest[1] == 32 or name == "cifar_vgg8")
    assert min(widest) in (2, 4, 8)


def test_a_residual_network_of_zero_branches_passes_its_stem_through() -> None:
    """With the last norm of every block at 0 a block is its shortcut, as the papers define it."""
    model = small_nets.build("cifar_resnet8", num_classes=5, in_chans=1)
    assert isinstance(model, small_nets.CifarResNet)
    for block in model.blocks:
        torch.nn.init.zeros_(block.norm2.weight)
    images = torch.randn(3, 1, 32, 32)
    with torch.no_grad():
        x = model.eval().stem(images)
        for block in model.blocks:
            x = torch.relu(block.shortcut(x))
        expected = model.classifier(x.mean((2, 3)))
        torch.testing.assert_close(model(images), expected)


def test_a_wide_network_of_zero_branches_projects_what_the_first_relu_of_a_stage_gives() -> None:
    """The shortcuts of pre-activation: each new width comes from the activated input."""
    torch.manual_seed(0)
    model: Any = small_nets.build("cifar_wrn16_2", num_classes=5, in_chans=1)
    assert isinstance(model, small_nets.WideResNet)
    for module in model.eval().modules():
        if isinstance(module, nn.BatchNorm2d):
            for values in (module.weight.data, module.bias.data, module.running_mean):
                values.copy_(torch.randn(values.shape))
    *blocks, norm, _ = model.blocks
    for block in blocks:
        block.conv2.weight.data.zero_()
    images = torch.randn(2, 1, 16, 16)
    with torch.no_grad():
        x = model.stem(images)
        for stage, block in enumerate(blocks[::2]):  # the first of two, which has another width
            x = block.norm1(x).relu()
            x = nn.functional.conv2d(x, block.project.weight, stride=2 if stage else 1)
        features = norm(x).relu().mean((2, 3))
        torch.testing.assert_close(model(images), model.classifier(features))


def test_lenet5_takes_images_of_up_to_32_pixels() -> None:
    model = small_nets.build("lenet5", num_classes=5, in_chans=1)
    assert model is not None
    for height, width in ((32, 32), (28, 21)):
        assert model(torch.zeros(2, 1, height, width)).shape == (2, 5)
    with pytest.raises(ValueError, match=r"^images: got 32 x 33 pixels, expected at most 32 x 32$"):
        model(torch.zeros(2, 1, 32, 33))


@pytest.mark.parametrize(
    "name",
    ["cifar_resnet21", "cifar_wrn17_2", "cifar_vgg9", "cifar_x", "cifar_resnet2", "cifar_wrn16_0"],
)
def test_depths_that_do_not_exist_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"got '{name}', expected cifar_resnetD"):
        build_classifier(spec(name))


@pytest.mark.parametrize("name", ["torchvision:resnet18", "torchvision:googlenet"])
def test_torchvision_models_are_saved_and_loaded(name: str, tmp_path: Path) -> None:
    import torchvision

    torch.manual_seed(0)
    made = build_classifier(spec(name, num_classes=7, input_size=64)).eval()
    save_classifier(made, spec(name, num_classes=7, input_size=64), tmp_path)
    loaded, read = load_classifier(tmp_path, CPU)
    theirs = torchvision.models.get_model(
        name.removeprefix("torchvision:"),
        weights=None,
        num_classes=7,
        **({"aux_logits": False, "init_weights": False} if "goog" in name else {}),
    )
    theirs.load_state_dict(made.state_dict())
    images = torch.randn(2, 3, 64, 64)
    assert read.architecture == name and torch.equal(loaded(images), theirs.eval()(images))
    assert made.train()(images).shape == (2, 7)  # a tensor, not logits with auxiliary ones


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architecture": "torchvision:resnet81"}, "torchvision:resnet81.*resnet18"),
        ({"architecture": "torchvision:resnet18", "in_chans": 1}, "1 channel.*expected 3"),
        ({"architecture": "torchvision:resnet18", "model_args": {"wings": 2}}, "model_args.*wings"),
        (
            {"architecture": "cifar_vgg8", "model_args": {"drop_rate": 0.1}},
            "takes none, got drop_rate",
        ),
        ({"architecture": "cifar_vgg8", "stem": "conv3"}, "stem.*cifar_vgg8"),
        ({"architecture": "resnet1800"}, "resnet1800.*timm"),
    ],
)
def test_wrong_architectures_end_in_one_clear_line(changes: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build_classifier(spec(**changes))


def timm_hub_folder(folder: Path) -> torch.nn.Module:
    """What timm itself puts on the Hub, config and safetensors."""
    import timm
    from timm.models import save_for_hf

    torch.manual_seed(1)
    model = timm.create_model("resnet18", num_classes=6, in_chans=3, channels=(8, 8, 8, 8))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_()
    save_for_hf(model, folder, safe_serialization=True)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    return model.eval()


def test_what_timm_puts_on_the_hub_is_read(tmp_path: Path) -> None:
    model = timm_hub_folder(tmp_path)
    loaded, read = load_classifier(tmp_path, CPU)
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(loaded(images), model(images))
    cfg = model.pretrained_cfg
    assert read.input == InputSpec(
        size=224,
        mean=cfg["mean"],
        std=cfg["std"],
        crop_pct=cfg["crop_pct"],
        interpolation=cfg["interpolation"],
    )


def test_hub_classifiers_are_fetched_by_commit_and_never_unpickled(tmp_path: Path) -> None:
    """The Hub's own client on a cache that holds the snapshot; a pickle lies in wait there."""
    snapshot = tmp_path / "hub" / "models--acme--tiny" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    model = timm_hub_folder(snapshot)

    class Trap:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(tmp_path / "sprung"),)

    (snapshot / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    script = (
        "import os, sys, torch; from dmkd_fast.jobs import networks\n"
        "def load(name):\n"
        "    try:\n"
        "        return networks.load_trained(name, torch.device('cpu'))\n"
        "    except ValueError as error:\n"
        "        print(error)\n"
        "weights, *names = sys.argv[1:]\n"
        "model, spec, license = load(names[0])\n"
        "torch.manual_seed(0)\nprint(license)\n"
        "print(model(torch.randn(1, 3, 64, 64)).double().sum().item())\n"
        "os.unlink(weights)\n"
        "for name in names:\n"
        "    assert load(name) is None\n"
    )
    names = [f"hf-hub:acme/tiny@{COMMIT}", f"hf-hub:acme/tiny@{COMMIT[::-1]}", "resnet18.a1_in1k"]
    # In a process of its own: the Hub's client reads the environment on import.
    done = subprocess.run(
        [sys.executable, "-c", script, str(snapshot / "model.safetensors"), *names],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"},
        cwd=Path(__file__).parents[2],
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    license, total, pickled, absent, published = done.stdout.splitlines()
    # timm's config carries the license of the architecture's published weights before the card's.
    assert license.endswith(f"(hf-hub:acme/tiny at {COMMIT})") and "unknown" not in license
    torch.manual_seed(0)
    with torch.no_grad():
        expected = model(torch.randn(1, 3, 64, 64)).double().sum().item()
    assert float(total) == pytest.approx(expected, rel=1e-5)
    assert "model.safetensors: no such file, but there is pytorch_model.bin" in pickled
    assert not (tmp_path / "sprung").exists()
    assert absent.startswith("hf-hub:acme/tiny at") and "network" in absent
    assert published.startswith("hf-hub:timm/resnet18.a1_in1k") and "network" in published


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("hf-hub:acme/tiny", "revision '', expected hf-hub:acme/tiny@COMMIT"),
        ("hf-hub:acme/tiny@main", "revision 'main'"),
        ("resnet1800", "resnet1800.*timm"),
        ("resnet18.nobody", "resnet18.nobody.*resnet18.a1_in1k"),
        ("torchvision:resnet81", "torchvision:resnet81"),
        ("some/folder", "config.json"),
    ],
)
def test_wrong_names_end_in_one_clear_line(name: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        networks.load_trained(name, CPU)


def test_published_torchvision_weights_are_checked_before_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cached file of the right name with other bytes, one of them a pickle, is not believed."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # discard port: no network
    with pytest.raises(ValueError, match=r"cannot have https://download.pytorch.org/models/resnet"):
        load_torchvision("torchvision:resnet18", CPU)

    class Trap:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(tmp_path / "sprung"),)

    cache = tmp_path / "hub" / "checkpoints"
    cache.mkdir(parents=True, exist_ok=True)
    torch.save({"fc.weight": Trap()}, cache / "resnet18-f37072fd.pth")
    with pytest.raises(ValueError, match=r"cannot have .*Weights only load failed"):
        load_torchvision("torchvision:resnet18", CPU)
    assert not (tmp_path / "sprung").exists()


def test_published_torchvision_weights_give_torchvisions_logits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stand-in weights in torchvision's cache: names, head, normalisation and crop are theirs."""
    import torchvision

    torch.manual_seed(0)
    theirs = torchvision.models.get_model("squeezenet1_1", weights=None).eval()
    cache = tmp_path / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    url = torchvision.models.SqueezeNet1_1_Weights.DEFAULT.url
    torch.save(theirs.state_dict(), cache / url.rsplit("/", 1)[1])
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    mine, read, identity = load_torchvision("torchvision:squeezenet1_1", CPU)
    images = torch.randn(2, 3, 224, 224)
    assert torch.equal(mine(images), theirs(images))
    assert identity == "SqueezeNet1_1_Weights.IMAGENET1K_V1" and read.num_classes == 1000
    assert (read.input.size, read.input.short_side) == (224, 256)
    assert read.input.mean == (0.485, 0.456, 0.406)


@pytest.mark.parametrize(
    ("values", "expected"),
    [({"stem": "own"}, 1.0), ({}, 0.875), ({"pretrained_cfg": {"crop_pct": 0.95}}, 0.95)],
)
def test_the_crop_of_an_old_config_is_what_its_writer_meant(values: dict, expected: float) -> None:
    inputs = {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.5] * 3}
    config = {"architecture": "cifar_vgg8", "num_classes": 4, **values}
    config["pretrained_cfg"] = inputs | config.get("pretrained_cfg", {})
    assert ClassifierSpec.from_json(config).crop_pct == expected
    again = ClassifierSpec.from_json(json.loads(json.dumps(spec("cifar_vgg8").to_json())))
    assert again == spec("cifar_vgg8")


@pytest.mark.parametrize(
    "changes",
    [
        {"std": (0.3, 0.0, 0.3)},
        {"mean": (0.5,)},
        {"size": 0},
        {"crop_pct": 1.5},
        {"interpolation": "nearest"},
    ],
)
def test_impossible_inputs_are_refused(changes: dict) -> None:
    good = {"size": 32, "mean": (0.5,) * 3, "std": (0.3,) * 3}
    with pytest.raises(ValueError, match=r"got .*expected"):
        InputSpec(**(good | changes))
