"""Settings: frozen, round-trip, and what "auto" becomes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import CONFIG
from pydantic import ValidationError

from dmkd_fast import config as cfg
from dmkd_fast import job, run_dir, runtime
from dmkd_fast.ops import transformer


def test_saved_settings_load_unchanged(tmp_path: Path) -> None:
    config, _ = job.prepare(cfg.load(cfg.DistillConfig, CONFIG, ["optim.lr=1e-3", "seed=7"]))
    path = tmp_path / "config.yaml"
    path.write_text(cfg.dump(config))
    assert cfg.load(cfg.DistillConfig, path) == config
    assert config.optim.lr == 1e-3 and config.seed == 7
    assert "auto" not in cfg.dump(config)
    able = transformer.has_short_attention(getattr(torch, config.dtype), head_dim=32)
    assert config.sampler.attention == ("short" if able else "sdpa")


@pytest.mark.parametrize("path", sorted((Path(CONFIG).parent / "pretrain").glob("*.yaml")))
def test_pretraining_configs_are_valid(path: Path) -> None:
    kinds = {"denoiser": cfg.PretrainDenoiserConfig, "fewstep": cfg.PretrainFewstepConfig}
    kind = kinds.get(path.stem, cfg.TeacherConfig)
    assert cfg.load(kind, path).name == path.stem


def test_settings_cannot_be_changed_afterwards() -> None:
    config = cfg.load(cfg.DistillConfig, CONFIG)
    with pytest.raises(ValidationError, match="frozen"):
        config.sampler.num_steps = 3  # type: ignore[misc]


def test_auto_is_resolved_by_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    for has_bf16, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(runtime, "cpu_has_bf16", lambda has=has_bf16: has)
        assert runtime.resolve_dtype("auto", cpu) == dtype
    for able in (True, False):
        monkeypatch.setattr(runtime, "can_compile", lambda _, able=able: able)
        config = job.resolve(cfg.load(cfg.DistillConfig, CONFIG))
        assert config.sampler.compile is False and config.train.compile is False
    # A CPU gains little from it; a GPU much, where it can.
    monkeypatch.setattr(runtime, "resolve_device", lambda _: torch.device("cuda"))
    for able in (True, False):
        monkeypatch.setattr(runtime, "can_compile", lambda _, able=able: able)
        config = job.resolve(cfg.load(cfg.DistillConfig, CONFIG))
        assert config.sampler.compile is able and config.train.compile is able


def test_newest_run_of_a_name_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = cfg.load(cfg.DistillConfig, CONFIG)
    for name in ("many_steps-20200101-000000", "many_steps-20210101-000000"):
        claimed = run_dir.claim(config.model_copy(update={"run_dir": f"runs/{name}"}))
        (claimed / "checkpoints" / "step-000000001").mkdir(parents=True)
    assert run_dir.find(config).run_dir == "runs/many_steps-20210101-000000"
