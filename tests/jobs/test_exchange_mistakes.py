"""Wrong inputs to predict, export and import: one line, exit code 2, and nothing half-written."""

from __future__ import annotations

import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from classifier_folders import CPU, edit, saved, trap
from command_line import one_line
from real_sets import NAMES
from small_jobs import few_test_images

from dmkd_fast import cli
from dmkd_fast.classifiers.loading import build, load_classifier
from dmkd_fast.config.jobs import (
    DistillConfig,
    PretrainDenoiserConfig,
    PretrainFewstepConfig,
    RunConfig,
    TeacherConfig,
)
from dmkd_fast.config.loading import load_config
from dmkd_fast.config.shipped import CONFIGS
from dmkd_fast.jobs import run_dir

WEAK = "embedded:fashion_mnist/weak"
Case = tuple[list[str], list[str]]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Good and damaged classifiers and checkpoints, which no test changes."""
    place = tmp_path_factory.mktemp("mistakes")
    saved(place / "good")
    for name in ("cut", "pickle", "config", "code", "size"):
        shutil.copytree(place / "good", place / name)
    weights = place / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    (place / "pickle" / "model.safetensors").unlink()
    trap(place / "pickle" / "pytorch_model.bin", place / "canary")
    (place / "config" / "config.json").write_text("[1]")
    edit(place / "code", {"model_args": {"checkpoint_path": "/tmp/x"}})
    edit(place / "size", {"pretrained_cfg.input_size": [3, 10**9, 10**9]})
    trap(place / "trap.pth", place / "canary")
    model = build("cifar_resnet8", num_classes=3, in_chans=3)
    torch.save(model.state_dict(), place / "net.pth")
    nan = {k: v.float() * torch.nan for k, v in model.state_dict().items()}
    torch.save(nan, place / "nan.pth")
    (place / "half.pth").write_bytes((place / "net.pth").read_bytes()[:3000])
    (place / "empty.pth").write_bytes(b"")
    (place / "two names").write_text("a\nb\n")
    (place / "three names").write_text("a\nb\nc\n")
    (place / "run").mkdir()
    (place / "run" / "config.yaml").write_text("name: x\n")
    (place / "file").write_text("text")
    return place


def check(capsys: pytest.CaptureFixture[str], place: Path, cases: list[Case]) -> None:
    before = sorted(place.rglob("*"))
    for words, said in cases:
        capsys.readouterr()
        assert cli.main([word.replace("@", str(place)) for word in words]) == 2, words
        one_line(capsys, said)
        assert sorted(place.rglob("*")) == before, words


def test_predict(place: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photo = str(next(path for path in sorted(folder.rglob("*")) if path.is_file()))
    check(
        capsys,
        place,
        [
            (["predict", "@/none", photo], ["@/none".replace("@", str(place))]),
            (["predict", "@/run", photo], ["run"]),
            (["predict", "@/cut", photo], ["damaged"]),
            (["predict", "@/pickle", photo], ["a pickle"]),
            (["predict", "@/config", photo], ["expected an object"]),
            (["predict", "@/code", photo], ["checkpoint_path"]),
            (["predict", "@/size", photo], ["input_size"]),
            (["predict", "@/trap.pth", photo], ["a pickle"]),
            (["predict", "resnet_that_is_none", photo], ["resnet_that_is_none"]),
            (["predict", "hf-hub:a/b@main", photo], ["40 hexadecimal digits"]),
            (["predict", WEAK, "@/none.png"], ["no such file"]),
            (["predict", WEAK, "@"], ["a folder"]),
            (["predict", WEAK, "@/file"], ["not an image"]),
        ],
    )


def test_export(place: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, out = ["--data", str(folder)], ["--out", "@/out"]
    few = ["--data", str(few_test_images(5))]
    timm = ["--to", "timm"]
    check(
        capsys,
        place,
        [
            (["export", "@/none", *timm, *out, *data], ["none"]),
            (["export", "@/good", *timm], ["--out"]),
            (["export", "@/good", *timm, *out], ["--data"]),
            (["export", "@/run", *timm], ["run"]),
            (["export", "@/cut", *timm, *out, *data], ["damaged"]),
            (["export", "@/good", *timm, *out, "--data", "@/none"], ["none"]),
            (["export", "@/good", *timm, *out, *few], ["classes", "expected the same"]),
            (["export", WEAK, *timm, *out, *few, "--classes", "@/two names"], ["two names"]),
            (["export", WEAK, *timm, *out, *few, "--normalize"], ["--normalize"]),
            (["export", WEAK, *timm, "--out", "@/good", *few], ["exists already"]),
            (["export", WEAK, *timm, "--out", "@/file/out", *few], ["file"]),
        ],
    )


@pytest.mark.parametrize(
    ("kind", "name", "words"),
    [
        (DistillConfig, "demo", ["not finished", "dmkd distill {run}/config.yaml --resume"]),
        (
            TeacherConfig,
            "pretrain/lenet5",
            ["not finished", "dmkd pretrain teacher {run}/config.yaml --resume --data DIR"],
        ),
        (PretrainDenoiserConfig, "pretrain/denoiser", ["a denoiser", "expected a classifier"]),
        (PretrainFewstepConfig, "pretrain/fewstep", ["a denoiser", "expected a classifier"]),
    ],
)
def test_a_run_without_a_classifier(
    kind: type[RunConfig],
    name: str,
    words: list[str],
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    run_dir.claim(load_config(kind, CONFIGS / f"{name}.yaml", [f"run_dir={run}"]))
    said = [word.replace("{run}", str(run)) for word in words]
    photo = str(next(folder.rglob("*.png")))
    commands = [
        ["evaluate", "@", "--data", str(folder)],
        ["evaluate", "@"],
        ["predict", "@", photo],
        ["export", "@", "--to", "timm"],
    ]
    check(capsys, run, [(command, [str(run), *said]) for command in commands])
    if "not finished" in words:
        (run / "checkpoints" / "rank-0").mkdir(parents=True)
        check(capsys, run, [(command, ["torchrun (as before) dmkd"]) for command in commands])
        with run_dir.locked(run):
            check(capsys, run, [(command, ["not finished", "wait"]) for command in commands])


def test_import_teacher(place: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net = ["import", "teacher", "@/net.pth", "--arch", "cifar_resnet8", "--out", "@/out"]
    scale = ["--mean", "0.5", "--std", "0.2"]

    def of(file: str, arch: str = "cifar_resnet8") -> list[str]:
        return ["import", "teacher", f"@/{file}", "--arch", arch, "--out", "@/out", *scale]

    check(
        capsys,
        place,
        [
            (of("none.pth"), ["no such file"]),
            (of("good"), ["no such file"]),
            (of("trap.pth"), ["weights_only", "runs no code"]),
            (of("half.pth"), ["half.pth"]),
            (of("empty.pth"), ["empty.pth"]),
            (of("file"), ["file"]),
            (of("net.pth", "no_such_net"), ["no_such_net"]),
            (of("net.pth", "cifar_resnet14"), ["cifar_resnet14"]),
            (of("net.pth", "resnet18"), ["net.pth"]),
            (net, ["--mean"]),
            ([*net, "--mean", "0.5", "0.5", "--std", "0.2"], ["mean"]),
            ([*net, "--mean", "0.5", "--std", "0"], ["std"]),
            ([*net, "--mean", "nan", "--std", "0.2"], ["mean"]),
            ([*net, *scale, "--input-size", "99999"], ["input_size"]),
            ([*net, *scale, "--classes", "@/none"], ["no such file"]),
            ([*net, *scale, "--classes", "@/two names"], ["2 names", "3"]),
            ([*net, *scale, "--data", "@/none"], ["none"]),
            ([*net, *scale, "--data", str(few_test_images(5))], ["classes"]),
            ([*net, *scale, "--prompt", "a {name}"], ["--prompt"]),
        ],
    )
    # Warnings about the images may stand above the error.
    assert (
        cli.main([w.replace("@", str(place)) for w in [*of("nan.pth"), "--data", str(folder)]]) == 2
    )
    assert "got NaN or infinite logits" in capsys.readouterr().err.splitlines()[-1]
    assert not (place / "canary").exists() and not (place / "out").exists()


def test_the_accuracy_belongs_to_the_folder_that_is_kept(
    place: Path, folder: Path, tmp_path: Path
) -> None:
    names = tmp_path / "names"
    names.write_text("\n".join(NAMES))
    words = ["import", "teacher", str(place / "net.pth"), "--arch", "cifar_resnet8"]
    words += ["--mean", "0.5", "--std", "0.2", "--classes", str(names), "--data", str(folder)]
    assert cli.main([*words, "--out", str(tmp_path / "out")]) == 0
    assert load_classifier(tmp_path / "out", CPU)[1].label_names == NAMES
    assert not list(tmp_path.glob(".*"))


def test_any_error_of_a_download_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The Hub's client raises errors of its HTTP library, and not all of them are an OSError."""

    class ProxyError(Exception):
        pass

    def refuse(*_: object, **__: object) -> None:
        raise ProxyError("403 Forbidden")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    name = f"hf-hub:acme/tiny@{'a' * 40}"
    assert cli.main(["evaluate", name, "--data", "embedded:fashion_mnist/test"]) == 2
    one_line(capsys, ["hf-hub:acme/tiny at aaaa", "403 Forbidden", "check name, revision, network"])
