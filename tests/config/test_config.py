"""Settings: frozen, round-trip, and what "auto" becomes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from small_jobs import CONFIG

from dmkd_fast.config.jobs import (
    DistillConfig,
    PretrainDenoiserConfig,
    PretrainFewstepConfig,
    TeacherConfig,
)
from dmkd_fast.config.loading import dump_config, load_config
from dmkd_fast.denoisers import kernels
from dmkd_fast.jobs import resolve as resolve_module
from dmkd_fast.jobs import run_dir
from dmkd_fast.jobs.parts import prepare
from dmkd_fast.jobs.resolve import resolve
from dmkd_fast.runtime import device as device_module
from dmkd_fast.runtime.device import resolve_dtype
from dmkd_fast.runtime.errors import UserError
from dmkd_fast.training.optim import build_optimizer


def test_saved_settings_load_unchanged(tmp_path: Path) -> None:
    job, _ = prepare(load_config(DistillConfig, CONFIG, ["optim.lr=1e-3", "seed=7"]))
    config = job.config
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config))
    assert load_config(DistillConfig, path) == config
    assert config.optim.lr == 1e-3 and config.seed == 7
    assert "auto" not in dump_config(config)
    able = kernels.has_short_attention(getattr(torch, config.dtype), head_dim=32)
    assert config.sampler.attention == ("short" if able else "sdpa")


def test_a_shipped_config_is_found_from_any_folder_unless_there_is_an_own_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name = "configs/many_steps.yaml"
    shipped = load_config(DistillConfig, name)
    assert shipped == load_config(DistillConfig, CONFIG)
    (tmp_path / "configs").mkdir()
    (tmp_path / name).write_text("seed: 5\n")
    with pytest.raises(ValueError, match="missing"):
        load_config(DistillConfig, name)


@pytest.mark.parametrize("path", sorted((Path(CONFIG).parent / "pretrain").glob("*.yaml")))
def test_pretraining_configs_are_valid(path: Path) -> None:
    kinds = {"denoiser": PretrainDenoiserConfig, "fewstep": PretrainFewstepConfig}
    kind = kinds.get(path.stem, TeacherConfig)
    assert load_config(kind, path).name == path.stem


def test_settings_cannot_be_changed_afterwards() -> None:
    config = load_config(DistillConfig, CONFIG)
    with pytest.raises(ValidationError, match="frozen"):
        config.sampler.num_steps = 3  # type: ignore[misc]


def test_auto_is_resolved_by_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    for has_bf16, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(device_module, "cpu_has_bf16", lambda has=has_bf16: has)
        assert resolve_dtype("auto", cpu) == dtype
    for able in (True, False):
        monkeypatch.setattr(resolve_module, "can_compile", lambda _, able=able: able)
        job = resolve(load_config(DistillConfig, CONFIG))
        assert not job.compile_sampler and not job.compile_student
        assert job.config.sampler.compile is False and job.config.train.compile is False
    # A CPU gains little from it; a GPU much, where it can.
    monkeypatch.setattr(resolve_module, "resolve_device", lambda _: torch.device("cuda"))
    for able in (True, False):
        monkeypatch.setattr(resolve_module, "can_compile", lambda _, able=able: able)
        job = resolve(load_config(DistillConfig, CONFIG))
        assert job.compile_sampler is able and job.compile_student is able
        assert job.config.sampler.compile is able and job.config.train.compile is able


def test_compile_auto_means_cuda_with_triton_and_true_is_never_ignored(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    for able in (True, False):
        monkeypatch.setattr(resolve_module, "can_compile", lambda _, able=able: able)
        assert resolve_module.compiles("auto", cuda) is able
        for device in (cpu, cuda):
            assert resolve_module.compiles(False, device) is False
        assert resolve_module.compiles("auto", cpu) is False
    for device, lacks in ((cpu, "a C.. compiler"), (cuda, "Triton")):
        words = f"sampler.compile: got true without {lacks}.*set sampler.compile=auto"
        with pytest.raises(UserError, match=words):
            resolve_module.compiles(True, device, name="sampler.compile")
    monkeypatch.setattr(resolve_module, "can_compile", lambda _: True)
    assert all(resolve_module.compiles(True, device) for device in (cpu, cuda))


def test_nested_changes_keep_what_they_do_not_name() -> None:
    changes = {"train": {"num_views": 64_000}, "views": {"scale": [0.5, 1.0]}, "seed": 7}
    path, teacher = Path("models/it"), {"arch": None, "path": Path("some/where")}
    first = load_config(DistillConfig, CONFIG)
    config = load_config(DistillConfig, CONFIG, {**changes, "teacher": teacher, "run_dir": path})
    assert config.train == first.train.model_copy(update={"num_views": 64_000})
    assert config.views == first.views.model_copy(update={"scale": (0.5, 1.0)})
    assert (config.seed, config.run_dir, config.teacher.path) == (7, "models/it", "some/where")
    assert load_config(DistillConfig, first, changes).train == config.train
    assert first == load_config(DistillConfig, CONFIG) == load_config(DistillConfig, first)
    with pytest.raises(UserError, match=r"^train\.num_views: got 0, expected"):
        load_config(DistillConfig, first, {"train": {"num_views": 0}})


def test_newest_run_of_a_name_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_config(DistillConfig, CONFIG)
    # The later ones are a run of the job many_steps-2, and a directory that a person has named.
    for name in (
        "many_steps-20200101-000000",
        "many_steps-20210101-000000",
        "many_steps-2-20220101-000000",
        "many_steps-2",
    ):
        claimed = run_dir.claim(config.model_copy(update={"run_dir": f"runs/{name}"}))
        (claimed / "checkpoints" / "step-000000001").mkdir(parents=True)
    assert run_dir.find(config).run_dir == "runs/many_steps-20210101-000000"
    other = config.model_copy(update={"name": "many_steps-2"})
    assert run_dir.find(other).run_dir == "runs/many_steps-2-20220101-000000"
    new = run_dir.name_new(config)
    run_dir.claim(new)
    assert run_dir.find(config).run_dir == new.run_dir


def test_a_tilde_is_the_home_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    changes = ["teacher.path=~/teacher", "eval.path='~'", "denoiser.path=~other/x"]
    config = load_config(DistillConfig, CONFIG, changes)
    assert (config.teacher.path, config.eval.path) == ("/home/me/teacher", "/home/me")
    assert config.denoiser is not None and config.denoiser.path == "~other/x"


def test_settings_of_the_optimizer_reach_muon() -> None:
    changes = ["optim={name: muon, lr: 0.01, momentum: 0.7, weight_decay: 0.3}"]
    schedule = resolve(load_config(DistillConfig, CONFIG, changes)).schedule
    groups = build_optimizer(torch.nn.Linear(8, 8), schedule).param_groups
    assert [(g["lr"], g["momentum"]) for g in groups] == [(0.01, 0.7)] * 2
    assert {g["orthogonal"]: g["weight_decay"] for g in groups} == {True: 0.3, False: 0.0}


def test_the_guidance_of_a_phase_may_have_an_interval() -> None:
    changes = ["sampler.guidance_scale=1", "sampler.guidance_interval=[0.2, 0.8]"]
    phase = "sampler.phases=[{start: 0.5, num_steps: 4, guidance_scale: 2}]"
    assert load_config(DistillConfig, CONFIG, [*changes, phase]).sampler.is_guided
    with pytest.raises(UserError, match="guidance_scale=1, which turns guidance off"):
        load_config(DistillConfig, CONFIG, changes)
