"""The rules of docs/design/layers.md that a machine can hold: floors and sizes."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import dmkd_fast

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "dmkd_fast"
FLOORS = {
    name: floor
    for floor, names in enumerate((
        """settings config config_source sampler_config model_config training_config schedule inputs
        limiter runtime ranks run_dir durable assets yaml_text container checks""",
        """solvers noise_levels sampler_arguments prompts model_folders denoiser_modules attention
        dit upsampling weights small_nets classifier_spec encoded_images listing tar_files shards
        sources capacity draws fences ring_statistics optim state_tree
        ops.extension ops.noise ops.noise_triton ops.transformer ops.reference
        ops.kd_loss ops.kd_loss_ops ops.kd_loss_problem ops.kd_loss_triton ops.kd_loss_kernels
        ops.views ops.views_triton""",
        """sampler image_reader ring_buffer views mix labels models teachers denoisers learner
        image_sets evaluate metrics pictures blocks checkpoint""",
        """distill phases keeper supervision job results memory origin classifiers evaluation
        generate pretrain pretrain_diffusion integrations.timm""",
        """cli config_reference""",
    ))
    for name in names.split()
}  # fmt: skip
# Floor 3 is where settings end; `run_dir` is about settings itself.
MAY_SEE_CONFIG = {
    "run_dir", "job", "results", "memory", "origin", "classifiers", "evaluation", "generate",
    "pretrain", "pretrain_diffusion", "cli", "config_reference",
}  # fmt: skip


def modules() -> dict[str, Path]:
    found = {}
    for path in PACKAGE.rglob("*.py"):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = path
    for name in ("__init__", "ops", "integrations"):
        found.pop(name)
    return found


def imports(path: Path) -> set[str]:
    """Modules of the package that a file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "dmkd_fast":
            base = (node.module or "").removeprefix("dmkd_fast").lstrip(".")
            for alias in node.names:
                name = f"{base}.{alias.name}".lstrip(".")
                found.add(name if name in FLOORS else base)
    return found - {""}


def external(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").split(".")[0])
    return found


def test_every_module_has_a_floor() -> None:
    assert set(modules()) == set(FLOORS)


@pytest.mark.parametrize("name", sorted(FLOORS))
def test_imports_point_down_only(name: str) -> None:
    for other in imports(modules()[name]):
        assert FLOORS[other] <= FLOORS[name], f"{name} imports {other} from above"
        if FLOORS[name] == 2:
            assert FLOORS[other] < 2, f"{name} and {other} are on floor 2 and must not meet"
        if other == "config":
            assert name in MAY_SEE_CONFIG, f"{name} sees settings"


def test_each_model_library_is_imported_in_one_place() -> None:
    homes = {"timm": "models", "diffusers": "denoisers", "transformers": "prompts",
             "xformers": "attention", "huggingface_hub": "assets", "pyarrow": "shards",
             "torchvision": "models"}  # fmt: skip
    for name, path in modules().items():
        if name.startswith("integrations."):
            continue  # each imports its framework
        for library in external(path) & set(homes):
            is_home = homes[library] == name or (name, library) == ("denoiser_modules", "diffusers")
            assert is_home, f"{name} imports {library}"
        if "nvidia" in external(path):  # images for the ring, and for tests
            assert name in {"image_reader", "encoded_images"}


def test_nothing_is_unpickled() -> None:
    for path in [*PACKAGE.rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]:
        text = path.read_text(encoding="utf-8")
        assert "pickle" not in external(path), path
        assert "torch.load(" not in text and "yaml.load(" not in text, path


def test_files_are_short_and_say_what_they_are() -> None:
    code = [*PACKAGE.rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py"), *ROOT.glob("csrc/*")]
    for path in code:
        lines = path.read_text(encoding="utf-8").splitlines()
        assert len(lines) <= 400, f"{path.name}: {len(lines)} lines"
        if path.suffix == ".py":
            assert ast.get_docstring(ast.parse("\n".join(lines))), path


def test_public_names_are_stable_and_importable() -> None:
    assert dmkd_fast.__all__ == [
        "DiffusionSampler", "DistillKL", "Distiller", "EncodedSet", "ImageSet", "InputSpec",
        "LabelStream", "Mixer", "RingBuffer", "Schedule", "Teacher", "Teachers", "ViewSpec",
        "Views", "kd_loss", "kd_loss_and_grad", "load_classifier", "load_denoiser", "load_idx",
        "measure", "open_set", "save_classifier",
    ]  # fmt: skip
    for name in dmkd_fast.__all__:
        assert getattr(dmkd_fast, name).__doc__, name


def test_every_config_says_its_command_first() -> None:
    for path in (ROOT / "configs").rglob("*.yaml"):
        first = path.read_text(encoding="utf-8").splitlines()[0]
        assert first.startswith("# dmkd ") and str(path.relative_to(ROOT)) in first, path
