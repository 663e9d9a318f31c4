"""`dmkd init` writes every shipped config with comments, and changes no setting."""

from __future__ import annotations

import errno
import io
import os
from pathlib import Path

import pytest
from small_jobs import ROOT

from dmkd_fast import cli
from dmkd_fast.config import shipped
from dmkd_fast.config.jobs import DistillConfig
from dmkd_fast.config.loading import load_config
from dmkd_fast.config.reference import JOBS
from dmkd_fast.runtime.errors import UserError


@pytest.mark.parametrize("name", shipped.shipped())
def test_a_commented_config_has_the_same_settings(name: str, tmp_path: Path) -> None:
    path = shipped.init(name, tmp_path)
    stem = Path(name).stem
    kind = JOBS.get(stem, JOBS["teacher"]) if name.startswith("pretrain/") else DistillConfig
    assert path == tmp_path / f"{stem}.yaml"
    assert load_config(kind, path) == load_config(kind, ROOT / "configs" / f"{name}.yaml")
    text = path.read_text()
    assert "# Views per optimizer step.\n  batch_size: " in text
    assert max(map(len, text.splitlines())) <= 120 and "yaml-language-server" not in text


def test_init_lists_names_refuses_wrong_ones_and_overwrites_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["init"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["own-data", *shipped.shipped()]
    assert all(len(line.split()) > 2 and len(line) <= 80 for line in lines)
    assert cli.main(["init", "fashon_mnist"]) == 2
    assert "try fashion_mnist" in capsys.readouterr().err
    assert cli.main(["init", "demo"]) == 0
    before = (tmp_path / "demo.yaml").read_text()
    assert cli.main(["init", "demo"]) == 2
    assert "exists already" in capsys.readouterr().err
    assert (tmp_path / "demo.yaml").read_text() == before and os.listdir() == ["demo.yaml"]


def test_a_missing_config_names_a_similar_one() -> None:
    with pytest.raises(UserError, match=r"did you mean configs/fashion_mnist\.yaml\?"):
        load_config(DistillConfig, "configs/fashon_mnist.yaml")
    with pytest.raises(UserError, match="dmkd init"):
        load_config(DistillConfig, "x.yaml")


def test_a_config_that_is_half_written_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class FullDisk(io.TextIOWrapper):
        def write(self, text: str) -> int:
            super().write(text[: len(text) // 2])
            self.flush()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def opened(path: Path, mode: str, *, encoding: str) -> FullDisk:
        return FullDisk(io.BufferedWriter(io.FileIO(path, mode)), encoding=encoding)

    monkeypatch.setattr(Path, "open", opened)
    with pytest.raises(UserError, match=r"cannot write \(No space left on device\)"):
        shipped.write_new(tmp_path / "demo.yaml", "name: demo\n")
    assert os.listdir(tmp_path) == []
