"""Classifiers on disk: nothing in a folder runs, and every student is read back, by timm too."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, load_model, save_file
from timm.models import save_for_hf
from torch import Tensor, nn

import dmkd_fast.integrations.timm
from dmkd_fast import cli, config, models
from dmkd_fast.classifier_spec import MODEL_ARGS, ClassifierSpec
from dmkd_fast.classifiers import check_names, load_student, load_teachers, load_trained

CPU = torch.device("cpu")
RESNET = {"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 8]}


def spec(architecture: str = "cifar_resnet8", **changes: Any) -> ClassifierSpec:
    base: dict[str, Any] = {
        "architecture": architecture, "num_classes": 4, "in_chans": 3, "input_size": 32,
        "mean": (0.5, 0.5, 0.4), "std": (0.3, 0.3, 0.3),
    }  # fmt: skip
    return ClassifierSpec(**(base | changes))


def saved(folder: Path, changes: dict[str, Any] | None = None, **fields: Any) -> Path:
    """A small ResNet as `save_classifier` writes it, with changes to its config.json."""
    folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    made = spec("resnet18", model_args=RESNET, **fields)
    models.save_classifier(models.build_classifier(made), made, folder)
    edit(folder, changes or {})
    return folder


def edit(folder: Path, changes: dict[str, Any]) -> None:
    path = folder / "config.json"
    values = json.loads(path.read_text())
    for name, value in changes.items():
        *parents, last = name.split(".")
        place = values
        for parent in parents:
            place = place[parent]
        place[last] = value
    path.write_text(json.dumps(values))


def trap(path: Path, canary: Path) -> Path:
    """A pickle that makes a folder when it is read."""

    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(canary),)

    path.write_bytes(pickle.dumps(Trap()))
    return path


def one_line(call: Callable[[], object]) -> str:
    with pytest.raises(ValueError) as error:
        call()
    assert type(error.value) is ValueError and "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", [
    "checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir",
    "pretrained_model_args", "pretrained_strict", "features_only", "feature_cfg", "model_cfg",
    "pruned", "weights", "weights_backbone", "device", "pretrained_filter_fn",
])  # fmt: skip
@pytest.mark.parametrize("architecture", ["resnet18", "torchvision:resnet18"])
def test_arguments_that_load_something_are_refused_and_nothing_runs(
    name: str, architecture: str, tmp_path: Path
) -> None:
    pickled = trap(tmp_path / "weights.pth", tmp_path / "canary")
    value: Any = str(pickled)
    if name in ("pretrained_cfg", "pretrained_cfg_overlay"):
        value = {"file": str(pickled)}
    folder = saved(tmp_path / "model", {f"model_args.{name}": value, "architecture": architecture})
    line = one_line(lambda: models.load_classifier(folder, CPU))
    assert name in line and "config.json" in line
    # The same from settings, for a new student.
    settings = spec(architecture, model_args={name: value})
    assert name in one_line(lambda: models.build_classifier(settings))
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("value", [
    "../weights.pth", "/etc/passwd", "a" * 33, "x y", {"a": 1}, [[[1]]], [1] * 257, 8193,
    10**400, 1e9, float("nan"), float("inf"), ["/etc/passwd"],
])  # fmt: skip
def test_values_that_are_not_plain_are_refused(value: Any, tmp_path: Path) -> None:
    assert "img_size" in one_line(
        lambda: models.build_classifier(spec("resnet18", model_args={"img_size": value}))
    )


@pytest.mark.parametrize("args", [
    {"img_size": 64, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3,
     "global_pool": "avg", "drop_path_rate": 0.1, "init_values": 1e-5, "class_token": False},
    {"img_size": [64, 64], "dynamic_img_size": True, "act_layer": "gelu", "reg_tokens": 4},
])  # fmt: skip
def test_arguments_that_hub_configs_have_are_passed_on(args: dict, tmp_path: Path) -> None:
    model = timm.create_model("vit_tiny_patch16_224", num_classes=5, **args).eval()
    save_for_hf(model, tmp_path, model_args=args, safe_serialization=True)
    loaded, read = models.load_classifier(tmp_path, CPU)
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(loaded(images), model(images))
    assert args.keys() <= read.model_args.keys() <= MODEL_ARGS.keys()


@pytest.mark.parametrize("name", [
    "hf-hub:evil/model", "local-dir:/tmp", "../model", "/etc/passwd", "resnet18.a1_in1k\n",
    "small_stem_resnet", "cifar_resnet999998", "cifar_wrn16_9999", "torchvision:../x", "",
    "__import__('os')",
])  # fmt: skip
def test_architectures_that_are_no_names_are_refused(name: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", {"architecture": name})
    one_line(lambda: models.load_classifier(folder, CPU))
    edit(folder, {"architecture": "small_stem_resnet", "model_args.base": name,
                  "model_args.stem": "conv3"})  # fmt: skip
    one_line(lambda: models.load_classifier(folder, CPU))


@pytest.mark.parametrize(("changes", "words"), [
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
])  # fmt: skip
def test_a_wrong_field_of_config_json_is_one_line(
    changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    import re

    line = one_line(lambda: models.load_classifier(saved(tmp_path / "m", changes), CPU))
    assert re.search(words, line), line


def test_crop_mode_and_test_size_are_read(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", {
        "pretrained_cfg.crop_mode": "squash", "pretrained_cfg.test_input_size": [3, 48, 48],
        "label_names": ["a", "b", "c", "d"],
    })  # fmt: skip
    _, read = models.load_classifier(folder, CPU)
    assert read.input.crop_mode == "squash" and read.test_input_size == 48
    assert read.label_names == ("a", "b", "c", "d")
    assert ClassifierSpec.from_json(json.loads(json.dumps(read.to_json()))) == read


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")  # type: ignore[return-value]


def parts_compiled(model: nn.Module) -> nn.Module:
    model.layer1 = compiled(model.layer1)  # type: ignore[assignment, arg-type]
    return model


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "compiled": compiled, "data parallel": nn.DataParallel,
    "both": lambda model: compiled(nn.DataParallel(model)),
    "both, the other way round": lambda model: nn.DataParallel(compiled(model)),
    "compiled parts": parts_compiled,
}  # fmt: skip


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("saver", ["ours", "another"])
def test_a_wrapped_student_is_read_back(wrapper: str, saver: str, tmp_path: Path) -> None:
    """Written without prefixes; those that another writer left are ignored."""
    made = spec("resnet18", model_args=RESNET)
    torch.manual_seed(0)
    bare = models.build_classifier(made).eval()
    images = torch.randn(2, 3, 32, 32)
    expected = bare(images)
    wrapped = WRAPPERS[wrapper](bare)
    models.save_classifier(wrapped, made, tmp_path)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert not [name for name in names if "_orig_mod" in name or "module." in name]
    if saver == "another":
        state = {name: value.contiguous() for name, value in wrapped.state_dict().items()}
        save_file(state, tmp_path / "model.safetensors")
    loaded, _ = models.load_classifier(tmp_path, CPU)
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
    from dmkd_fast.weights import load_weights, save_weights

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
    save_file({k: v for name, value in load_file(path).items()
               for k, v in change(name, value).items()}, path)  # fmt: skip
    return folder


def test_counters_of_batch_norms_may_be_missing(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model")
    before = models.load_classifier(folder, CPU)[0]
    rewritten(folder, lambda k, v: {} if "num_batches" in k else {k: v})
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(models.load_classifier(folder, CPU)[0](images), before(images))


@pytest.mark.parametrize(("change", "words"), [
    (lambda k, v: {} if k == "fc.bias" else {k: v}, "fc.bias: got nothing, expected (4,)"),
    (lambda k, v: {k: v, "extra": v.clone()}, "extra: got"),
    (lambda k, v: {k: v, f"module.{k}": v.clone()}, "got it twice"),
    (lambda k, v: {k: v.to(torch.int8) if k == "fc.weight" else v}, "type I8, expected F32"),
    (lambda k, v: {k: v.to(torch.complex64) if k == "fc.weight" else v}, "type C64"),
    (lambda k, v: {k: v.to(torch.bool) if k == "fc.bias" else v}, "type BOOL"),
    (lambda k, v: {k: v.to(torch.float8_e4m3fn) if k == "fc.weight" else v}, "type F8_E4M3"),
    (lambda k, v: {k: v.float() if "num_batches" in k else v}, "expected I64"),
])  # fmt: skip
def test_weights_of_other_names_or_types_are_refused(
    change: Callable[[str, Tensor], dict[str, Tensor]], words: str, tmp_path: Path
) -> None:
    folder = rewritten(saved(tmp_path / "model"), change)
    assert words in one_line(lambda: models.load_classifier(folder, CPU))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_other_precision_are_converted(dtype: torch.dtype, tmp_path: Path) -> None:
    folder = rewritten(saved(tmp_path / "m"), lambda k, v: {k: v.to(dtype) if v.dim() else v})
    loaded, _ = models.load_classifier(folder, CPU)
    assert {v.dtype for v in loaded.parameters()} == {torch.float32}


STUDENTS = {
    "small stem": ("resnet18", "conv3_stride2", RESNET),
    "pooled stem": ("resnet18", "conv3_pool", {}),
    "timm's own": ("resnet18", "own", RESNET),
    **{name: (name, "own", {}) for name in ("lenet5", "lenet5_half", "cifar_resnet8x4",
                                           "cifar_wrn16_2", "cifar_vgg8")},
}  # fmt: skip


@pytest.mark.parametrize("name", STUDENTS)
def test_timm_loads_students_with_the_same_bits(name: str, tmp_path: Path) -> None:
    architecture, stem, args = STUDENTS[name]
    made = spec(architecture, stem=stem, model_args=args, in_chans=1, mean=(0.3,), std=(0.4,),
                label_names=("a", "b", "c", "d"))  # fmt: skip
    torch.manual_seed(0)
    model = models.build_classifier(made).eval()
    models.save_classifier(model, made, tmp_path)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    images = torch.randn(2, 1, 32, 32)
    assert torch.equal(loaded(images), model(images))
    ours, read = models.load_classifier(tmp_path, CPU)
    assert torch.equal(ours(images), model(images)) and read == made
    cfg = loaded.pretrained_cfg
    assert cfg["input_size"] == (1, 32, 32) and tuple(cfg["mean"]) == (0.3,)
    # What timm saves again is read here again.
    save_for_hf(loaded, tmp_path / "again", safe_serialization=True,
                model_args=getattr(loaded, "_model_args", None))  # fmt: skip
    assert torch.equal(models.load_classifier(tmp_path / "again", CPU)[0](images), model(images))


@pytest.mark.slow
def test_the_lines_of_the_model_card_load_the_student(tmp_path: Path) -> None:
    """In a fresh process, with and without the registration."""
    for folder, made in (("own", spec("resnet18", model_args=RESNET)), ("small", spec("lenet5"))):
        (tmp_path / folder).mkdir()
        models.save_classifier(models.build_classifier(made), made, tmp_path / folder)
        code = models.timm_lines(made).split("```python\n")[1].split("```")[0]
        assert ("dmkd_fast" in code) == (folder == "small")
        done = subprocess.run(
            [sys.executable, "-c", code + "print(model.num_classes if hasattr(model, "
             "'num_classes') else 4)"], cwd=tmp_path / folder, capture_output=True, text=True,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}, check=False,
        )  # fmt: skip
        assert done.returncode == 0 and done.stdout.strip() == "4", done.stderr
    assert models.timm_lines(spec("torchvision:resnet18")) == ""


def test_registered_networks_are_built_by_timm() -> None:
    for name in ("lenet5", "cifar_resnet20", "cifar_wrn40_2", "cifar_vgg13", "cifar_resnet32x4"):
        model = timm.create_model(name, num_classes=3, in_chans=1)
        assert type(model) is type(models.build(name, num_classes=3, in_chans=1))
    assert len(set(dmkd_fast.integrations.timm.SMALL_NETS)) == 92


@pytest.mark.parametrize(("make", "words"), [
    (lambda f: (f / "model.safetensors").rename(f / "w.safetensors"), "no such file"),
    (lambda f: (f / "model.safetensors").write_bytes(b""), "damaged"),
    (lambda f: (f / "config.json").write_text("["), "not valid JSON"),
    (lambda f: (f / "config.json").write_text("[" * 100_000), "not valid JSON"),
    (lambda f: (f / "config.json").write_text("[]"), "JSON list"),
    (lambda f: (f / "config.json").write_text('{"architectures": ["X"]}'), "transformers"),
    (lambda f: (f / "config.json").unlink(), "config.json: No such file"),
    (lambda f: (f / "config.json").write_bytes(b"\xff\xfe{}"), "not valid JSON"),
])  # fmt: skip
def test_damaged_folders_are_one_line(
    make: Callable[[Path], object], words: str, tmp_path: Path
) -> None:
    folder = saved(tmp_path / "model")
    make(folder)
    assert words in one_line(lambda: load_trained(str(folder), CPU))


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


class Wrong(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.head = kind, nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Any:
        logits = self.head(x.flatten(1))
        return {
            "tuple": (logits, x), "dict": {"logits": logits}, "none": None,
            "classes first": logits.T, "pixels": logits[:, :, None, None],
            "too few": logits[:, :3], "nan": logits * float("nan"),
        }[self.kind]  # fmt: skip


@pytest.mark.parametrize(("kind", "words"), [
    ("tuple", "a tuple from forward"), ("dict", "a dict from forward"), ("none", "a NoneType"),
    ("classes first", "(4, 2) for 2 images, expected (2, 4 classes), classes last"),
    ("pixels", "(2, 4, 1, 1) for 2 images"), ("too few", "(2, 3) for 2 images"),
    ("nan", "got NaN or infinite logits"),
])  # fmt: skip
def test_networks_that_return_something_else_are_one_line(
    kind: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = spec("resnet18", in_chans=1, mean=(0.5,), std=(0.5,), input_size=8)
    monkeypatch.setattr(models, "load_classifier", lambda *_: (Wrong(kind), made))
    section = config.TeachingConfig(path=str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(models, "classifier_licence", lambda _: "none")
    line = one_line(lambda: load_teachers({"teacher": section}, temperature=1.0, device=CPU))
    assert line.startswith("teacher: ") and words in line


def test_class_names_in_another_order_are_refused() -> None:
    check = lambda names, tested: check_names("m", names, tested, fix="--classes")  # noqa: E731
    check(None, ["a", "b"])
    check(("T-shirt/top", "Ankle boot"), ["t_shirt top", "ankle-boot"])
    check(("cat", "dog"), ["0", "1"])
    check(("0", "1"), ["cat", "dog"])
    line = one_line(lambda: check(("cat", "dog"), ["dog", "cat"]))
    assert "class 0 is 'cat' in m and 'dog'" in line and "--classes" in line


def test_a_students_spec_is_that_of_its_teacher(tmp_path: Path) -> None:
    """Equal inputs share one rendering, so the crop mode is copied too."""
    folder = saved(tmp_path / "t", {"pretrained_cfg.crop_mode": "squash"})
    section = config.TeachingConfig(path=str(folder))
    teachers = load_teachers({"teacher": section}, temperature=1.0, device=CPU)
    _, read = load_student(
        config.ClassifierConfig(arch="lenet5"), teachers, view_size=32, device=CPU, seed=0
    )
    assert read.input == teachers.specs["teacher"].input
    assert replace(read, architecture="x").label_names is None
