"""The rules of structure that a machine can hold. `make lint` checks the layers of imports."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import dmkd_fast

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "dmkd_fast"
# Where each library may be imported. Files in integrations/ import their framework on use.
HOMES = {
    "timm": {
        "classifiers/loading.py",
        "classifiers/zero_shot.py",
        "jobs/exchange/export.py",
        "training/optim.py",
    },
    "torchvision": {"classifiers/loading.py", "data/decode.py"},
    "diffusers": {"denoisers/wrappers.py", "denoisers/single_file.py"},
    "transformers": {"denoisers/prompts/encoders.py", "jobs/exchange/zero_shot.py"},
    "xformers": {"denoisers/attention.py"},
    "onnx": {"jobs/exchange/export.py"},
    "onnxruntime": {"jobs/exchange/export.py"},
    "huggingface_hub": {"assets/__init__.py", "jobs/exchange/card.py", "jobs/exchange/hub.py"},
    "pyarrow": {"data/manifest.py", "data/teacher_logits.py"},
    "nvidia": {"data/decode.py", "data/stored.py"},
}
MOST_LINES, MOST_MODULES = 400, 13


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def external(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").split(".")[0])
    return found


def imported_modules(path: Path) -> set[str]:
    """Modules of the package that a file imports, anywhere in it."""
    names = {".".join(p.relative_to(ROOT).with_suffix("").parts) for p in sources()}
    names = {name.removesuffix(".__init__") for name in names}
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dmkd_fast"):
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & names


def test_each_model_library_is_imported_in_one_place() -> None:
    for path in sources():
        place = path.relative_to(PACKAGE).as_posix()
        if not place.startswith("integrations/"):
            for library in external(path) & set(HOMES):
                assert place in HOMES[library], f"{place} imports {library}"


def test_no_module_is_imported_by_tests_alone() -> None:
    used = {"dmkd_fast", "dmkd_fast.cli", "dmkd_fast.__main__"}
    text = "".join(path.read_text(encoding="utf-8") for path in sources())
    for path in [*sources(), *(ROOT / "scripts").rglob("*.py")]:
        used |= imported_modules(path)
    for path in sources():
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        loaded = name in used or f'"{name}"' in text or "integrations" in name
        homes = name.removeprefix("dmkd_fast.") in dmkd_fast._HOMES.values()
        assert loaded or homes or path.name == "__init__.py", f"{name}: nothing imports it"


def test_nothing_is_unpickled() -> None:
    for path in [*sources(), *(ROOT / "benchmarks").rglob("*.py")]:
        text = path.read_text(encoding="utf-8")
        assert "pickle" not in external(path), path
        assert "yaml.load(" not in text, path
        for call in re.findall(r"torch\.load\([^)]*\)", text):
            assert "weights_only=True" in call, path


def test_files_are_short_and_say_what_they_are() -> None:
    code = [*sources(), *(ROOT / "benchmarks").rglob("*.py"), *ROOT.glob("csrc/*")]
    for path in code:
        lines = path.read_text(encoding="utf-8").splitlines()
        assert len(lines) <= MOST_LINES, f"{path.name}: {len(lines)} lines"
        if path.suffix == ".py":
            assert ast.get_docstring(ast.parse("\n".join(lines))), path


def test_folders_are_small() -> None:
    for folder in {path.parent for path in [*sources(), *(ROOT / "benchmarks").rglob("*.py")]}:
        modules = [path for path in folder.glob("*.py") if path.name != "__init__.py"]
        assert len(modules) <= MOST_MODULES, f"{folder}: {len(modules)} modules"


def test_public_names_are_stable_and_importable() -> None:
    assert dmkd_fast.__all__ == [
        "Denoiser",
        "DiffusionSampler",
        "DistillKL",
        "Distiller",
        "EncodedSet",
        "GeneratedImages",
        "GeneratedLoader",
        "Guidance",
        "Guide",
        "ImageSet",
        "InputSpec",
        "LabelStream",
        "Mixer",
        "Objective",
        "RingBuffer",
        "RingPlan",
        "Schedule",
        "Selection",
        "Steps",
        "StudentTrainer",
        "Targets",
        "Teacher",
        "Teachers",
        "UserError",
        "ViewSpec",
        "Views",
        "distill",
        "evaluate",
        "kd_loss",
        "kd_loss_and_grad",
        "kd_loss_topk",
        "linear_kd_loss",
        "load_classifier",
        "load_denoiser",
        "load_idx",
        "measure",
        "open_set",
        "predict",
        "save_classifier",
    ]
    for name in dmkd_fast.__all__:
        assert getattr(dmkd_fast, name).__doc__, name


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda p: p.stem)
def test_every_config_says_its_command_first(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    first = next(line for line in lines if not line.startswith("# yaml-language-server"))
    assert first.startswith("# dmkd ") and str(path.relative_to(ROOT)) in first, path
