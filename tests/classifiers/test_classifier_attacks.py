"""Classifier folders from strangers: nothing in them runs, and what is wrong is one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from classifier_folders import CPU, RESNET, edit, one_line, saved, spec, trap
from timm.models import save_for_hf
from torch import nn

from dmkd_fast import cli
from dmkd_fast.classifiers import loading
from dmkd_fast.classifiers.loading import build_classifier, load_classifier
from dmkd_fast.classifiers.spec import MODEL_ARGS, ClassifierSpec
from dmkd_fast.jobs.networks import load_trained


@pytest.mark.parametrize(
    "name",
    [
        "checkpoint_path",
        "pretrained",
        "pretrained_cfg",
        "pretrained_cfg_overlay",
        "cache_dir",
        "pretrained_model_args",
        "pretrained_strict",
        "features_only",
        "feature_cfg",
        "model_cfg",
        "pruned",
        "weights",
        "weights_backbone",
        "device",
        "pretrained_filter_fn",
    ],
)
@pytest.mark.parametrize("architecture", ["resnet18", "torchvision:resnet18"])
def test_arguments_that_load_something_are_refused_and_nothing_runs(
    name: str, architecture: str, tmp_path: Path
) -> None:
    pickled = trap(tmp_path / "weights.pth", tmp_path / "canary")
    value: Any = str(pickled)
    if name in ("pretrained_cfg", "pretrained_cfg_overlay"):
        value = {"file": str(pickled)}
    folder = saved(tmp_path / "model", {f"model_args.{name}": value, "architecture": architecture})
    line = one_line(lambda: load_classifier(folder, CPU))
    assert name in line and "config.json" in line
    # The same from settings, for a new student.
    settings = spec(architecture, model_args={name: value})
    assert name in one_line(lambda: build_classifier(settings))
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    "value",
    [
        "../weights.pth",
        "/etc/passwd",
        "a" * 33,
        "x y",
        {"a": 1},
        [[[1]]],
        [1] * 257,
        8193,
        10**400,
        1e9,
        float("nan"),
        float("inf"),
        ["/etc/passwd"],
    ],
)
def test_values_that_are_not_plain_are_refused(value: Any, tmp_path: Path) -> None:
    assert "img_size" in one_line(
        lambda: build_classifier(spec("resnet18", model_args={"img_size": value}))
    )


@pytest.mark.parametrize(
    "args",
    [
        {
            "img_size": 64,
            "patch_size": 8,
            "embed_dim": 24,
            "depth": 2,
            "num_heads": 3,
            "global_pool": "avg",
            "drop_path_rate": 0.1,
            "init_values": 1e-5,
            "class_token": False,
        },
        {"img_size": [64, 64], "dynamic_img_size": True, "act_layer": "gelu", "reg_tokens": 4},
    ],
)
def test_arguments_that_hub_configs_have_are_passed_on(args: dict, tmp_path: Path) -> None:
    model = timm.create_model("vit_tiny_patch16_224", num_classes=5, **args).eval()
    save_for_hf(model, tmp_path, model_args=args, safe_serialization=True)
    loaded, read = load_classifier(tmp_path, CPU)
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(loaded(images), model(images))
    assert args.keys() <= read.model_args.keys() <= MODEL_ARGS.keys()


@pytest.mark.parametrize(
    "name",
    [
        "hf-hub:evil/model",
        "local-dir:/tmp",
        "../model",
        "/etc/passwd",
        "resnet18.a1_in1k\n",
        "small_stem_resnet",
        "cifar_resnet999998",
        "cifar_resnet9998",
        "cifar_wrn16_9999",
        "torchvision:../x",
        "",
        "__import__('os')",
    ],
)
def test_architectures_that_are_no_names_are_refused(name: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", {"architecture": name})
    one_line(lambda: load_classifier(folder, CPU))
    edit(
        folder,
        {"architecture": "small_stem_resnet", "model_args.base": name, "model_args.stem": "conv3"},
    )
    one_line(lambda: load_classifier(folder, CPU))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_classes": "ten"}, "num_classes: got 'ten'"),
        ({"num_classes": 0}, "num_classes: got 0"),
        ({"num_classes": 4.0}, "num_classes"),
        ({"num_classes": True}, "num_classes"),
        ({"num_classes": 10**9}, "num_classes"),
        ({"num_classes": 900_000}, "expected .900000"),
        ({"architecture": None}, "architecture"),
        ({"architecture": ["resnet18"]}, "architecture"),
        ({"model_args": [1]}, "model_args"),
        ({"model_args.in_chans": "3"}, "in_chans"),
        ({"stem": "conv9"}, "stem"),
        ({"pretrained_cfg": 3}, "pretrained_cfg|valid"),
        ({"pretrained_cfg.input_size": [3, 256, 128]}, "input_size: got 256 x 128"),
        ({"pretrained_cfg.test_input_size": [3, 256, 128]}, "test_input_size: got 256 x 128"),
        ({"pretrained_cfg.input_size": 224}, "input_size"),
        ({"pretrained_cfg.input_size": [3, 224]}, "input_size"),
        ({"pretrained_cfg.mean": 0.5}, "mean"),
        ({"pretrained_cfg.mean": [0.5, 0.5]}, "mean: got 2"),
        ({"pretrained_cfg.std": [0.0, 0.1, 0.1]}, "std"),
        ({"pretrained_cfg.std": [float("nan"), 0.1, 0.1]}, "std"),
        ({"pretrained_cfg.crop_pct": "all"}, "crop_pct"),
        ({"pretrained_cfg.crop_mode": "border"}, "crop_mode: got 'border'"),
        ({"pretrained_cfg.crop_mode": "random"}, "crop_mode"),
        ({"pretrained_cfg.interpolation": "lanczos"}, "interpolation"),
        ({"label_names": ["a", "b"]}, "label_names: got 2"),
        ({"model_args.depth": 3}, "model_args of resnet18: .*depth"),
        ({"model_args.layers": "deep"}, "model_args of resnet18"),
    ],
)
def test_a_wrong_field_of_config_json_is_one_line(
    changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    import re

    line = one_line(lambda: load_classifier(saved(tmp_path / "m", changes), CPU))
    assert re.search(words, line), line


def test_a_value_that_a_constructor_refuses_is_one_line() -> None:
    made = spec("vit_tiny_patch16_224", model_args={"pos_drop_rate": -0.5})
    line = one_line(lambda: build_classifier(made))
    assert line.startswith("model_args of vit_tiny_patch16_224: dropout probability has to be")


def test_sizes_are_compared_before_memory_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(tmp_path / "model", {"num_classes": 900_000})
    build, devices = build_classifier, []

    def watched(made: ClassifierSpec) -> nn.Module:
        devices.append(torch.empty(0).device.type)
        return build(made)

    monkeypatch.setattr(loading, "build_classifier", watched)
    assert "(900000,)" in one_line(lambda: load_classifier(folder, CPU))
    assert devices == ["meta"]


def test_loading_takes_the_random_numbers_of_one_new_network(tmp_path: Path) -> None:
    """What comes after has the bits of a build alone."""
    folder = saved(tmp_path / "model")
    torch.manual_seed(3)
    build_classifier(spec("resnet18", model_args=RESNET))
    expected = torch.get_rng_state()
    torch.manual_seed(3)
    load_classifier(folder, CPU)
    assert torch.equal(torch.get_rng_state(), expected)


def test_crop_mode_and_test_size_are_read(tmp_path: Path) -> None:
    folder = saved(
        tmp_path / "model",
        {
            "pretrained_cfg.crop_mode": "squash",
            "pretrained_cfg.test_input_size": [3, 48, 48],
            "label_names": ["a", "b", "c", "d"],
        },
    )
    _, read = load_classifier(folder, CPU)
    assert read.input.crop_mode == "squash" and read.test_input_size == 48
    assert read.label_names == ("a", "b", "c", "d")
    assert ClassifierSpec.from_json(json.loads(json.dumps(read.to_json()))) == read


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda f: (f / "model.safetensors").rename(f / "w.safetensors"), "no such file"),
        (lambda f: (f / "model.safetensors").write_bytes(b""), "damaged"),
        (lambda f: (f / "config.json").write_text("["), "not valid JSON"),
        (lambda f: (f / "config.json").write_text("[" * 100_000), "not valid JSON"),
        (lambda f: (f / "config.json").write_text("[]"), "JSON list"),
        (lambda f: (f / "config.json").write_text('{"architectures": ["X"]}'), "transformers"),
        (lambda f: (f / "config.json").unlink(), "config.json: No such file"),
        (lambda f: (f / "config.json").write_bytes(b"\xff\xfe{}"), "not valid JSON"),
    ],
)
def test_damaged_folders_are_one_line(
    make: Callable[[Path], object], words: str, tmp_path: Path
) -> None:
    folder = saved(tmp_path / "model")
    make(folder)
    assert words in one_line(lambda: load_trained(str(folder), CPU))


def test_a_run_that_is_not_finished_is_called_one(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    assert "once it is finished" in one_line(lambda: load_classifier(tmp_path))


def test_pickles_are_named_with_what_to_do_and_never_read(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    train = tmp_path / "train"  # what timm's train.py leaves
    train.mkdir()
    (train / "args.yaml").write_text("model: resnet18\n")
    best = trap(train / "model_best.pth.tar", canary)
    folder = saved(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    trap(folder / "pytorch_model.bin", canary)
    for name in (best, train, folder, folder / "pytorch_model.bin"):
        line = one_line(lambda name=name: load_trained(str(name), CPU))
        assert "pickle" in line and "save_for_hf" in line
    assert cli.main(["evaluate", str(train), "--data", str(tmp_path)]) == 2
    assert not canary.exists()
    # Beside safetensors they are ignored.
    folder = saved(tmp_path / "both")
    trap(folder / "pytorch_model.bin", canary)
    load_trained(str(folder), CPU)
    assert not canary.exists()
