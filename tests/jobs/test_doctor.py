"""The doctor: silent on a healthy job, and finds each planted fault."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_jobs import ROOT, few_test_images, small_classifier
from torch import Tensor, nn

from dmkd_fast import InputSpec, Teacher, cli
from dmkd_fast.assets import resolve
from dmkd_fast.config.jobs import DistillConfig
from dmkd_fast.config.loading import load_config
from dmkd_fast.denoisers import kernels
from dmkd_fast.denoisers.denoiser import Denoiser
from dmkd_fast.jobs import memory
from dmkd_fast.jobs.build import build
from dmkd_fast.jobs.inspect import doctor, machine, networks
from dmkd_fast.jobs.inspect.findings import Finding
from dmkd_fast.jobs.parts import Parts, prepare
from dmkd_fast.runtime import distributed, native
from dmkd_fast.training.distiller import Distiller

EMBEDDED = str(ROOT / "configs" / "fashion_mnist.yaml")
# The embedded job at reduced size; its images are as good as those of the whole job.
SMALL = [
    "num_threads=1",
    "sampler.micro_batch_images=80",
    "ring.capacity_images=320",
    "ring.min_fill_images=160",
    "train.batch_size=32",
    "train.num_views=640",
    f"eval.path={few_test_images()}",
]
Plant = Callable[[Distiller, Parts], None]


def faults(*overrides: str, plant: Plant | None = None) -> dict[str, Finding]:
    """Return what is wrong with the small job, by name."""
    job, parts = prepare(load_config(DistillConfig, EMBEDDED, [*SMALL, *overrides]))
    distiller = build(job, parts, show=False)
    if plant is not None:
        plant(distiller, parts)
    found = doctor.examine_job(job, parts, distiller)
    return {finding.name: finding for finding in found if not finding.is_ok}


def teacher_folder(
    folder: Path,
    *,
    config: dict[str, Any] | None = None,
    weights: Callable[[dict[str, Tensor]], None] | None = None,
) -> str:
    """Copy the strong teacher, with another config or other weights, and return the override."""
    shutil.copytree(resolve("embedded:fashion_mnist/strong"), folder)
    path = folder / "config.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    values["pretrained_cfg"] |= config or {}
    path.write_text(json.dumps(values), encoding="utf-8")
    if weights is not None:
        state = load_file(folder / "model.safetensors")
        weights(state)
        save_file(state, folder / "model.safetensors")
    return f"teacher.path={folder}"


def test_healthy_embedded_job_has_no_fault(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    code = cli.main(["doctor", EMBEDDED, *SMALL, "--json"])
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert [f for f in found["findings"] if not f["ok"]] == []
    [attention] = [f["what"] for f in found["findings"] if f["name"] == "attention"]
    assert attention.endswith("(short)") or "(sdpa " in attention  # what ran, by name
    assert found["ok"] and code == 0 and "WARNING" not in err
    assert not list(tmp_path.iterdir())
    names = [f["name"] for f in found["findings"]]
    assert len(set(names)) >= 18 and {"extension", "teachers", "teacher: classes"} <= set(names)


def test_without_a_config_the_machine_alone_is_checked(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 9 and all(line.startswith("ok ") for line in lines)


def test_a_fault_is_one_line_and_exit_code_1(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "INSTRUCTION_SET", "none")
    monkeypatch.setattr(native, "WHY_MISSING", "no such file")
    assert cli.main(["doctor"]) == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("WRONG")]
    assert len(lines) == 1
    assert "extension: not loaded (no such file); operators run" in lines[0]
    assert lines[0].endswith("install dmkd_fast again where there is a C++20 compiler")


def test_permuted_classes(tmp_path: Path) -> None:
    def swap(state: dict[str, Tensor]) -> None:
        for name in ("fc.weight", "fc.bias"):
            state[name] = state[name][[0, 5, 2, 3, 4, 1, 6, 7, 8, 9]].clone()

    # A second teacher that is right would decide most classes of the real images.
    found = faults(teacher_folder(tmp_path / "teacher", weights=swap), "more_teachers=[]")
    assert set(found) == {"teacher: classes", "test set: classes"}
    assert "takes 1 for 5, 5 for 1" in found["teacher: classes"].what


@pytest.mark.parametrize(
    ("mean", "std"),
    [
        (0.286, 0.5),
        (0.5, 0.353),
        pytest.param(0.0, 1.0, marks=pytest.mark.slow),
        pytest.param(0.5, 0.5, marks=pytest.mark.slow),
        pytest.param(0.13, 0.308, marks=pytest.mark.slow),
    ],
)
def test_wrong_mean_or_std(mean: float, std: float, tmp_path: Path) -> None:
    inputs = {"mean": [mean], "std": [std]}
    second = "more_teachers=[{path: 'embedded:fashion_mnist/lenet5'}]"
    found = faults(teacher_folder(tmp_path / "teacher", config=inputs), second)
    assert "teacher: normalization" in found and "teacher: classes" not in found
    assert f"mean ({mean:.3g}), std ({std:.3g})" in found["teacher: normalization"].what


def test_trainable_teacher() -> None:
    found = faults(plant=lambda distiller, _: distiller.targets.networks.requires_grad_(True))
    assert set(found) == {"teachers"} and "require gradients" in found["teachers"].what


def test_teacher_in_training_mode() -> None:
    found = faults(plant=lambda distiller, _: distiller.targets.networks.networks.train())
    assert "training mode" in found["teachers"].what


def test_nan_weights(tmp_path: Path) -> None:
    def in_one_class(distiller: Distiller, parts: Parts) -> None:
        assert isinstance(parts.origin, Denoiser)
        parts.origin.module.get_parameter("labels.weight").data[3] = float("nan")

    found = faults(plant=in_one_class)
    assert set(found) == {"weights"} and "denoiser: labels.weight" in found["weights"].what

    def everywhere(state: dict[str, Tensor]) -> None:
        state["fc.bias"][0] = float("nan")

    bad = teacher_folder(tmp_path / "teacher", weights=everywhere)
    wrong = [f for f in doctor.examine(EMBEDDED, [*SMALL, bad]) if not f.is_ok]
    assert [f.name for f in wrong] == ["job"] and "NaN" in wrong[0].what


def test_wrong_label_map() -> None:
    found = faults("teacher.class_map=[1, 2, 3, 4, 5, 6, 7, 8, 9, 0]", "more_teachers=[]")
    assert set(found) == {"teacher: classes", "test set: classes"}
    assert "class_map" in found["teacher: classes"].do


@pytest.mark.slow
@pytest.mark.skipif(native.INSTRUCTION_SET != "avx512", reason="no attention of this package")
def test_attention_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(faults("sampler.attention=sdpa")) == {"attention"}
    monkeypatch.setattr(kernels, "has_short_attention", lambda *_: False)
    assert set(faults()) == {"attention"}


def test_missing_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "INSTRUCTION_SET", "none")
    assert not machine.extension().is_ok


def test_host_reads_in_the_step() -> None:
    class Reading(nn.Module):
        def __init__(self, network: nn.Module) -> None:
            super().__init__()
            self.network = network

        def forward(self, views: Tensor) -> Tensor:
            logits: Tensor = self.network(views)
            return logits * (2.0 if logits.sum() > 1e9 else 1.0)

    def plant(distiller: Distiller, _: Parts) -> None:
        distiller.student.network = Reading(distiller.student.network)

    found = faults(plant=plant)
    assert set(found) == {"step"} and "test_doctor.py:" in found["step"].what


def test_memory_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = tmp_path / "sys/fs/cgroup"
    limits.mkdir(parents=True)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/\n")
    (tmp_path / "proc/meminfo").write_text(f"MemAvailable: {2**25} kB\n")
    assert machine.memory(tmp_path).is_ok
    (limits / "memory.max").write_text(f"{2**29}\n")
    (limits / "memory.current").write_text(f"{2**28}\n")
    assert "0.2 GiB available" in machine.memory(tmp_path).what
    monkeypatch.setattr(memory, "available_bytes", lambda device: 2**20)
    wrong = [f for f in doctor.examine(EMBEDDED, SMALL) if not f.is_ok]
    assert [f.name for f in wrong] == ["job"] and "memory: got 0.00 GiB" in wrong[0].what


def test_too_small_a_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage(NamedTuple):
        free: int = 2**20

    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage())
    assert set(faults(f"run_dir={tmp_path}/run")) == {"run_dir"}
    assert not machine.disk(tmp_path / "none", 2**30).is_ok


@pytest.fixture
def open_socket() -> Iterator[socket.socket]:
    with socket.socket() as server:
        server.bind(("0.0.0.0", 0))
        server.listen(1)
        yield server


def test_bind_beyond_loopback(open_socket: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    found = machine.loopback()
    assert f"0.0.0.0:{open_socket.getsockname()[1]}" in found.what and not found.is_ok
    open_socket.close()
    assert machine.loopback().is_ok
    monkeypatch.setattr(distributed, "LOOPBACK", "0.0.0.0")
    assert "listens on 0.0.0.0:" in machine.loopback().what


def test_a_job_that_compiles_without_graphs_is_found() -> None:
    from dataclasses import replace

    from torch._dynamo import utils

    job, _ = prepare(load_config(DistillConfig, EMBEDDED, SMALL))
    assert doctor.compiled(job).is_ok
    utils.counters.clear()
    assert not doctor.compiled(replace(job, compile_student=True)).is_ok
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize(
    ("capability", "is_ok"), [((7, 5), False), ((8, 0), True), ((10, 0), True), ((12, 0), True)]
)
def test_a_gpu_is_wrong_below_compute_capability_8(
    capability: tuple[int, int], is_ok: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    major, minor = capability
    properties = SimpleNamespace(name="a GPU", total_memory=2**34, major=major, minor=minor)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    found = machine.gpu()
    assert found.is_ok == is_ok and f"compute capability {major}.{minor}" in found.what


def test_a_teacher_is_not_judged_by_images_of_classes_that_it_does_not_teach() -> None:
    teacher = Teacher(
        module=small_classifier().eval(),
        input=InputSpec(size=8, mean=(0.5,), std=(0.5,)),
        teaches=(2, 3),
    )
    parts: Any = SimpleNamespace(
        test_set=SimpleNamespace(class_names=("a", "b", "c", "d")),
        teachers=SimpleNamespace(
            specs={"teacher": None}, together=SimpleNamespace(members=(teacher,))
        ),
    )
    images, labels = torch.zeros(2, 1, 8, 8, dtype=torch.uint8), torch.tensor([0, 1])
    (found,) = networks.understanding(parts, images, labels)
    assert found.is_ok and found.name == "teacher: classes" and "no generated image" in found.what
