"""The device of a rank has its index everywhere: `cuda` alone means device 0 to some libraries."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from small_jobs import CONFIG, ROOT, SHORT

from benchmarks.fake_cuda import pretended
from dmkd_fast.config.data import SourceConfig
from dmkd_fast.config.jobs import DistillConfig, TeacherConfig
from dmkd_fast.config.loading import load_config
from dmkd_fast.jobs import build as build_module
from dmkd_fast.jobs import evaluate, networks, results
from dmkd_fast.jobs import parts as parts_module
from dmkd_fast.jobs import resolve as resolve_module
from dmkd_fast.jobs.build import build
from dmkd_fast.jobs.images import OpenSource
from dmkd_fast.jobs.parts import load_parts, prepare
from dmkd_fast.jobs.pretrain import loop
from dmkd_fast.jobs.resolve import resolve
from dmkd_fast.runtime import device as device_module
from dmkd_fast.runtime import distributed
from dmkd_fast.runtime.device import exact_float32, resolve_device

SECOND = torch.device("cuda", 1)


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second process of two on a machine with two GPUs."""
    current = [0]
    for name, answer in (
        ("is_available", lambda: True),
        ("device_count", lambda: 2),
        ("current_device", lambda: current[0]),
        ("set_device", lambda index: current.__setitem__(0, index)),
    ):
        monkeypatch.setattr(torch.cuda, name, answer)
    monkeypatch.setattr(resolve_module, "can_compile", lambda _: False)
    monkeypatch.setattr(resolve_module, "set_repeatable", lambda _: None)
    for name, value in (
        ("RANK", 1),
        ("LOCAL_RANK", 1),
        ("WORLD_SIZE", 2),
        ("LOCAL_WORLD_SIZE", 2),
        ("TORCHELASTIC_RUN_ID", 1),
    ):
        monkeypatch.setenv(name, str(value))


def recorder(found: list[Any], **facts: Any) -> Any:
    """Takes the place of whatever is given a device; remembers all devices given."""

    def call(*args: Any, **kwargs: Any) -> Any:
        given = [*args, *kwargs.values()]
        found.extend(value for value in given if isinstance(value, torch.device))
        found.extend(torch.device(value) for value in given if value in ("cuda", "cpu"))
        return SimpleNamespace(**facts)

    return call


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize("source", [False, True])
def test_nothing_of_a_second_rank_gets_a_device_without_index(
    source: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = [*SHORT, "device=cuda", f"run_dir={tmp_path}", "ring.capacity_images=256"]
    mine = distributed.read()
    job = resolve(load_config(DistillConfig, CONFIG, changes), mine)
    assert mine.local_rank == 1 and torch.cuda.current_device() == 1
    # On another day it may be another device, so the saved settings do not say which.
    assert job.config.device == "cuda"
    found: dict[str, list[torch.device]] = {}

    def watch(owner: Any, name: str, **facts: Any) -> None:
        found[name] = []
        monkeypatch.setattr(owner, name, recorder(found[name], **facts))

    spec = SimpleNamespace(in_chans=1, mean=(0.5,), std=(0.5,), input=None)
    teachers = SimpleNamespace(
        specs={"teacher": spec},
        num_classes={"teacher": 10},
        class_names={"teacher": ()},
        together=None,
    )
    images = SimpleNamespace(
        num_classes=10,
        image_shape=(1, 28, 28),
        module=None,
        scheduler={},
        latent_shape=(),
        decoder=None,
        null_class=10,
        takes_guidance=False,
        class_map=None,
    )
    watch(networks, "load_teachers", **vars(teachers))
    watch(parts_module, "open_denoiser", **vars(images))
    watch(parts_module, "open_test_set", class_names=("a",) * 10)
    monkeypatch.setattr(parts_module, "check_fit", lambda *_: None)
    students: list[torch.device] = []
    found["load_student"] = students

    def load_student(*_: Any, device: torch.device, **__: Any) -> Any:
        students.append(device)
        return None, spec

    monkeypatch.setattr(networks, "load_student", load_student)
    parts = load_parts(job)
    for owner, name in (
        (build_module, "ViewSpec"),
        (build_module, "DiffusionSampler"),
        (build_module, "LabelStream"),
        (build_module, "ImageDecoder"),
    ):
        watch(owner, name)
    watch(build_module, "RingBuffer", capacity=256)
    for name in ("Distiller", "StudentTrainer", "Targets", "Views"):
        monkeypatch.setattr(build_module, name, lambda *_, **__: None)
    for name in ("GeneratedImages", "StoredImages"):
        monkeypatch.setattr(build_module, name, lambda *_, **__: None)
    if source:
        opened = OpenSource(
            source=None,
            kind="shards",
            image_shape=(1, 28, 28),
            num_classes=10,
            license="",  # type: ignore[arg-type]
        )
        object.__setattr__(parts, "origin", opened)
        section = SourceConfig(path=str(tmp_path), block_images=64)
        job = replace(job, config=job.config.model_copy(update={"source": section}))
    build(job, parts, show=False)
    asked = {name for name, devices in found.items() if devices}
    skipped = {"DiffusionSampler", "LabelStream"} if source else {"ImageDecoder"}
    assert asked == set(found) - skipped
    for name, devices in found.items():
        assert set(devices) <= {SECOND}, name


@pytest.mark.usefixtures("two_gpus")
def test_every_verb_resolves_a_device_with_its_index() -> None:
    distributed.use_device(distributed.read(), "cuda")
    assert resolve_device("auto") == resolve_device("cuda") == SECOND
    assert resolve_device("cpu") == torch.device("cpu")
    for module in (evaluate, loop):
        assert module.resolve_device is resolve_device


@pytest.mark.usefixtures("two_gpus")
def test_more_ranks_than_gpus_are_refused_unless_they_use_the_cpu() -> None:
    many = distributed.Ranks(rank=2, world_size=3, local_rank=2, local_world_size=3)
    with pytest.raises(ValueError, match="at most the 2 CUDA devices"):
        distributed.use_device(many, "auto")
    distributed.use_device(many, "cpu")
    assert torch.cuda.current_device() == 0


@pytest.fixture
def switches() -> Iterator[Any]:
    """The switches that decide how CUDA libraries choose kernels, restored afterwards."""
    import torch._inductor.config as inductor

    cudnn = torch.backends.cudnn
    names = ((cudnn, "deterministic"), (cudnn, "benchmark"))
    names += ((inductor, "deterministic"), (inductor, "max_autotune_pointwise"))
    before = [getattr(owner, name) for owner, name in names]
    yield lambda: [getattr(owner, name) for owner, name in names]
    for (owner, name), value in zip(names, before, strict=True):
        setattr(owner, name, value)


def test_kernels_are_chosen_by_timing_where_the_config_says_so(
    switches: Any, tmp_path: Path
) -> None:
    before = switches()
    config = load_config(DistillConfig, CONFIG, [*SHORT, f"run_dir={tmp_path / 'run'}"])
    for device, repeatable in (("cpu", False), ("cuda", False), ("cuda", True), ("cuda", False)):
        changed = load_config(DistillConfig, config, {"device": device, "repeatable": repeatable})
        with pretended():
            job = resolve(changed)
        assert job.config.repeatable is repeatable
        is_lost = "repeatable" in results.what_is_lost(job.config)
        assert is_lost == (device == "cuda" and not repeatable)
        fixed = [repeatable, not repeatable] * 2
        assert switches() == (fixed if device == "cuda" else before)
    weak = load_config(
        TeacherConfig, ROOT / "configs" / "pretrain" / "weak.yaml", {"device": "cuda"}
    )
    with pretended():
        loop.prepare(weak, resume=False, show=False)
    assert switches() == [True, False, True, False]


@pytest.mark.usefixtures("switches")
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_views_and_students_have_the_form_that_the_device_computes_in(
    device: Literal["cpu", "cuda"], tmp_path: Path
) -> None:
    changes = [*SHORT, f"device={device}", "dtype=auto", f"run_dir={tmp_path / 'run'}"]
    changes.append("student={path: embedded:fashion_mnist/weak}")
    with pretended() if device == "cuda" else nullcontext():
        job, parts = prepare(load_config(DistillConfig, CONFIG, changes))
        run = build(job, parts, show=False)
        views = run.targets.views
        seen = views.whole(run.ring.images, torch.arange(2))
        convs = [w for w in run.student.model.parameters() if w.ndim == 4 and w.shape[1] > 1]
    dtype = torch.float16 if device == "cuda" else torch.float32
    assert seen.dtype == dtype and seen.is_contiguous(memory_format=torch.channels_last)
    is_last = [w.is_contiguous(memory_format=torch.channels_last) for w in convs]
    assert is_last == [device == "cuda"] * len(convs) and convs


def test_torch_compile_needs_a_c_compiler_on_cuda_and_a_cpp_compiler_on_a_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton builds a C module before it launches its first kernel."""
    from torch.utils import _triton

    can_compile = device_module.can_compile.__wrapped__
    monkeypatch.setattr(_triton, "has_triton", lambda: True)
    monkeypatch.setattr(device_module.sysconfig, "get_path", lambda _: str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "Python.h").touch()
    able = [(can_compile("cuda"), can_compile("cpu"))]
    for name in ("clang", "g++"):
        (tmp_path / name).touch(mode=0o755)
        able.append((can_compile("cuda"), can_compile("cpu")))
    assert able == [(False, False), (True, False), (True, True)]
    for name in ("CC", "CXX"):
        monkeypatch.setenv(name, "no-such-compiler")
    assert not can_compile("cuda") and not can_compile("cpu")
    for name in ("CC", "CXX"):
        monkeypatch.setenv(name, str(tmp_path / "clang"))
    assert can_compile("cuda") and can_compile("cpu")
    (tmp_path / "Python.h").unlink()
    assert not can_compile("cuda") and not can_compile("cpu")


@pytest.fixture
def products() -> Iterator[Any]:
    """The settings of float32 products on CUDA, restored afterwards with those of the CPU."""
    backends: Any = torch.backends
    parts = backends.cuda.matmul, backends.mkldnn.matmul
    before = [part.fp32_precision for part in parts]
    yield parts[0]
    torch.set_float32_matmul_precision("highest")
    for part, precision in zip(parts, before, strict=True):
        part.fp32_precision = precision


@pytest.mark.parametrize("setting", ["allow_tf32", "high", "medium", "fp32_precision"])
def test_float32_is_exact_by_whichever_setting_a_program_has_allowed_tf32(
    setting: str, products: Any
) -> None:
    """torch refuses to read settings of two kinds that contradict each other."""
    if setting == "allow_tf32":
        products.allow_tf32 = True
    elif setting == "fp32_precision":
        products.fp32_precision = "tf32"
    else:
        torch.set_float32_matmul_precision(setting)
    of_the_cpu: Any = torch.backends.mkldnn.matmul
    before = products.fp32_precision, of_the_cpu.fp32_precision
    with exact_float32():
        assert products.allow_tf32 is False and products.fp32_precision == "ieee"
        assert torch.get_float32_matmul_precision() == "highest"
    assert (products.fp32_precision, of_the_cpu.fp32_precision) == before
    assert before[0] == "tf32"
    if setting != "fp32_precision":
        expected = "medium" if setting == "medium" else "high"
        assert products.allow_tf32 and torch.get_float32_matmul_precision() == expected
