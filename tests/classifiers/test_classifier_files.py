"""Classifiers on disk: every student is read back as it was, here and by timm."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from classifier_folders import CPU, RESNET, one_line, saved, spec
from safetensors.torch import load_file, load_model, save_file
from timm.models import save_for_hf
from torch import Tensor, nn

import dmkd_fast.integrations.timm
from dmkd_fast.classifiers.loading import (
    build,
    build_classifier,
    load_classifier,
    save_classifier,
    timm_lines,
)
from dmkd_fast.config.networks import ClassifierConfig, TeachingConfig
from dmkd_fast.jobs import networks
from dmkd_fast.jobs.networks import load_student, load_teachers


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")  # type: ignore[return-value]


def parts_compiled(model: nn.Module) -> nn.Module:
    model.layer1 = compiled(model.layer1)  # type: ignore[assignment, arg-type]
    return model


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "compiled": compiled,
    "data parallel": nn.DataParallel,
    "both": lambda model: compiled(nn.DataParallel(model)),
    "both, the other way round": lambda model: nn.DataParallel(compiled(model)),
    "compiled parts": parts_compiled,
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("saver", ["ours", "another"])
def test_a_wrapped_student_is_read_back(wrapper: str, saver: str, tmp_path: Path) -> None:
    """Written without prefixes; those that another writer left are ignored."""
    made = spec("resnet18", model_args=RESNET)
    torch.manual_seed(0)
    bare = build_classifier(made).eval()
    images = torch.randn(2, 3, 32, 32)
    expected = bare(images)
    wrapped = WRAPPERS[wrapper](bare)
    save_classifier(wrapped, made, tmp_path)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert not [name for name in names if "_orig_mod" in name or "module." in name]
    if saver == "another":
        state = {name: value.contiguous() for name, value in wrapped.state_dict().items()}
        save_file(state, tmp_path / "model.safetensors")
    loaded, _ = load_classifier(tmp_path, CPU)
    assert torch.equal(loaded(images), expected)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)
        self.two.weight = self.one.weight
        self.table = nn.Buffer(torch.randn(4, 4))
        self.empty, self.none = nn.Buffer(torch.zeros(0)), nn.Buffer(torch.zeros(0))

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x))


def test_tied_weights_are_written_once_and_read_into_both(tmp_path: Path) -> None:
    from dmkd_fast.runtime.model_files import load_weights, save_weights

    torch.manual_seed(0)
    model, mine, theirs = Tied(), Tied(), Tied()
    # One buffer that overlaps with another is no tied weight.
    model.row, mine.row = nn.Buffer(model.table[1]), nn.Buffer(torch.zeros(4))
    state = model.state_dict()
    save_weights(model, tmp_path / "w.safetensors")
    assert "two.weight" not in load_file(tmp_path / "w.safetensors")
    load_weights(mine, tmp_path / "w.safetensors")
    del model.row
    save_weights(model, tmp_path / "w.safetensors")
    load_model(theirs, tmp_path / "w.safetensors")  # safetensors' own reader
    for other in (mine, theirs):
        assert all(torch.equal(value, state[name]) for name, value in other.state_dict().items())
    assert mine.two.weight is mine.one.weight


def rewritten(folder: Path, change: Callable[[str, Tensor], dict[str, Tensor]]) -> Path:
    path = folder / "model.safetensors"
    save_file(
        {k: v for name, value in load_file(path).items() for k, v in change(name, value).items()},
        path,
    )
    return folder


def test_counters_of_batch_norms_may_be_missing(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model")
    before = load_classifier(folder, CPU)[0]
    rewritten(folder, lambda k, v: {} if "num_batches" in k else {k: v})
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(load_classifier(folder, CPU)[0](images), before(images))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda k, v: {} if k == "fc.bias" else {k: v}, "fc.bias: got nothing, expected (4,)"),
        (lambda k, v: {k: v, "extra": v.clone()}, "extra: got"),
        (lambda k, v: {k: v, f"module.{k}": v.clone()}, "got it twice"),
        (lambda k, v: {k: v.to(torch.int8) if k == "fc.weight" else v}, "type I8, expected F32"),
        (lambda k, v: {k: v.to(torch.complex64) if k == "fc.weight" else v}, "type C64"),
        (lambda k, v: {k: v.to(torch.bool) if k == "fc.bias" else v}, "type BOOL"),
        (lambda k, v: {k: v.to(torch.float8_e4m3fn) if k == "fc.weight" else v}, "type F8_E4M3"),
        (lambda k, v: {k: v.float() if "num_batches" in k else v}, "expected I64"),
    ],
)
def test_weights_of_other_names_or_types_are_refused(
    change: Callable[[str, Tensor], dict[str, Tensor]], words: str, tmp_path: Path
) -> None:
    folder = rewritten(saved(tmp_path / "model"), change)
    assert words in one_line(lambda: load_classifier(folder, CPU))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_other_precision_are_converted(dtype: torch.dtype, tmp_path: Path) -> None:
    folder = rewritten(saved(tmp_path / "m"), lambda k, v: {k: v.to(dtype) if v.dim() else v})
    loaded, _ = load_classifier(folder, CPU)
    assert {v.dtype for v in loaded.parameters()} == {torch.float32}


STUDENTS = {
    "small stem": ("resnet18", "conv3_stride2", RESNET),
    "pooled stem": ("resnet18", "conv3_pool", {}),
    "timm's own": ("resnet18", "own", RESNET),
    **{
        name: (name, "own", {})
        for name in ("lenet5", "lenet5_half", "cifar_resnet8x4", "cifar_wrn16_2", "cifar_vgg8")
    },
}


@pytest.mark.parametrize("name", STUDENTS)
def test_timm_loads_students_with_the_same_bits(name: str, tmp_path: Path) -> None:
    architecture, stem, args = STUDENTS[name]
    made = spec(
        architecture,
        stem=stem,
        model_args=args,
        in_chans=1,
        mean=(0.3,),
        std=(0.4,),
        label_names=("a", "b", "c", "d"),
    )
    torch.manual_seed(0)
    model = build_classifier(made).eval()
    save_classifier(model, made, tmp_path)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    images = torch.randn(2, 1, 32, 32)
    assert torch.equal(loaded(images), model(images))
    ours, read = load_classifier(tmp_path, CPU)
    assert torch.equal(ours(images), model(images)) and read == made
    cfg = loaded.pretrained_cfg
    assert cfg["input_size"] == (1, 32, 32) and tuple(cfg["mean"]) == (0.3,)
    # What timm saves again is read here again.
    save_for_hf(
        loaded,
        tmp_path / "again",
        safe_serialization=True,
        model_args=getattr(loaded, "_model_args", None),
    )
    assert torch.equal(load_classifier(tmp_path / "again", CPU)[0](images), model(images))


@pytest.mark.slow
def test_the_lines_of_the_model_card_load_the_student(tmp_path: Path) -> None:
    """In a fresh process, with and without the registration."""
    for folder, made in (("own", spec("resnet18", model_args=RESNET)), ("small", spec("lenet5"))):
        (tmp_path / folder).mkdir()
        save_classifier(build_classifier(made), made, tmp_path / folder)
        code = timm_lines(made).split("```python\n")[1].split("```")[0]
        assert ("dmkd_fast" in code) == (folder == "small")
        done = subprocess.run(
            [
                sys.executable,
                "-c",
                code + "print(model.num_classes if hasattr(model, 'num_classes') else 4)",
            ],
            cwd=tmp_path / folder,
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
            check=False,
        )
        assert done.returncode == 0 and done.stdout.strip() == "4", done.stderr
    assert timm_lines(spec("torchvision:resnet18")) == ""


def test_registered_networks_are_built_by_timm() -> None:
    for name in ("lenet5", "cifar_resnet20", "cifar_wrn40_2", "cifar_vgg13", "cifar_resnet32x4"):
        model = timm.create_model(name, num_classes=3, in_chans=1)
        assert type(model) is type(build(name, num_classes=3, in_chans=1))
    assert len(set(dmkd_fast.integrations.timm.SMALL_NETS)) == 92


class Wrong(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.head = kind, nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Any:
        logits = self.head(x.flatten(1))
        return {
            "tuple": (logits, x),
            "dict": {"logits": logits},
            "none": None,
            "classes first": logits.T,
            "pixels": logits[:, :, None, None],
            "too few": logits[:, :3],
            "nan": logits * float("nan"),
        }[self.kind]


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("tuple", "a tuple from forward"),
        ("dict", "a dict from forward"),
        ("none", "a NoneType"),
        ("classes first", "(4, 2) for 2 images, expected (2, 4 classes), classes last"),
        ("pixels", "(2, 4, 1, 1) for 2 images"),
        ("too few", "(2, 3) for 2 images"),
        ("nan", "got NaN or infinite logits"),
    ],
)
def test_networks_that_return_something_else_are_one_line(
    kind: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = spec("resnet18", in_chans=1, mean=(0.5,), std=(0.5,), input_size=8)
    monkeypatch.setattr(networks, "load_classifier", lambda *_: (Wrong(kind), made))
    section = TeachingConfig(path=str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(networks, "classifier_license", lambda _: "none")
    line = one_line(lambda: load_teachers({"teacher": section}, temperature=1.0, device=CPU))
    assert line.startswith("teacher: ") and words in line


def test_a_students_spec_is_that_of_its_teacher(tmp_path: Path) -> None:
    """Equal inputs share one rendering, so the crop mode is copied too."""
    folder = saved(tmp_path / "t", {"pretrained_cfg.crop_mode": "squash"})
    section = TeachingConfig(path=str(folder))
    teachers = load_teachers({"teacher": section}, temperature=1.0, device=CPU)
    _, read = load_student(
        ClassifierConfig(arch="lenet5"), teachers, view_size=32, device=CPU, seed=0
    )
    assert read.input == teachers.specs["teacher"].input
    assert replace(read, architecture="x").label_names is None


def test_a_finished_run_can_be_the_path_of_a_teacher(tmp_path: Path) -> None:
    student = saved(tmp_path / "student")
    (student / "README.md").write_text("---\nlicense: mit\n---\n")
    section = TeachingConfig(path=str(tmp_path))
    teachers = load_teachers({"teacher": section}, temperature=1.0, device=CPU)
    assert teachers.num_classes == {"teacher": 4} and teachers.license == "mit"
    assert networks.load_trained(str(tmp_path), CPU)[2] == "mit"
