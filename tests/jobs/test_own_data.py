"""`dmkd init own-data`: four configs that fit a folder of images, and the commands in order."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from command_line import one_line
from PIL import Image
from small_jobs import few_test_images

from dmkd_fast import cli
from dmkd_fast.config.data import RealImagesConfig
from dmkd_fast.config.loading import load_config
from dmkd_fast.config.reference import JOBS
from dmkd_fast.jobs.pretrain import own_data, own_time
from dmkd_fast.jobs.pretrain.real_data import load_real
from dmkd_fast.runtime.errors import UserError

KINDS = ("teacher", "denoiser", "fewstep", "distill")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, a cache of its own, and no measurement."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(own_time, "_seconds", lambda call, device: 0.1)
    return tmp_path


def image_set(root: Path, *, sides: tuple[int, int], gray: bool = False) -> Path:
    """Ten noise images of each of three classes to train on, and two to test."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 10), ("test", 2)):
        for name in ("b", "a", "c d"):
            (root / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 256, (*sides, 1 if gray else 3), dtype=np.uint8)
                image = Image.fromarray(np.repeat(pixels, 3 // pixels.shape[2], axis=2))
                image.save(root / part / name / f"{number}.png")
    return root


def test_configs_and_commands_fit_the_folder(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = image_set(here / "my data", sides=(40, 70))
    assert cli.main(["init", "own-data", "--data", str(data)]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert "3 classes (a, b, c d); 27 images to train on (9 a class), 3 held out, 6 to" in lines[0]
    assert "70 x 40 pixels, color" in lines[0]
    commands = [line.strip() for line in lines if line.startswith("  dmkd")]
    assert [line.split()[1] for line in commands] == [*["pretrain"] * 3, "distill", "report"]
    assert f"--data '{data}'  # " in commands[0] and commands[0].endswith(" min")
    assert list(json.loads(last)["minutes"]) == list(KINDS)
    teacher, denoiser, fewstep, distill = (load_config(JOBS[k], f"{k}.yaml") for k in KINDS)
    assert teacher.data == denoiser.data and denoiser.data.image_size == 32
    assert teacher.views == distill.views and teacher.views.size == 32
    assert 0.4 < teacher.mean < 0.6 and 0.1 < teacher.std < 0.4
    assert fewstep.denoiser.path == "runs/denoiser/model"
    assert distill.denoiser.path == "runs/fewstep/model"
    assert distill.teacher.path == "runs/teacher/model"
    assert distill.eval.path == str(data / "test")
    text = Path("denoiser.yaml").read_text()
    assert "# Number of transformer blocks." in text and text.startswith("# dmkd pretrain denoiser")
    assert max(map(len, text.splitlines()[1:])) <= 120  # the first one holds the path
    before = text
    (data / "test").rename(data / "valid")
    found = load_real(data, torch.device("cpu"), teacher.data)
    assert found.test is not None and len(found.test.labels) == 6
    Path("teacher.yaml").unlink()
    assert cli.main(["init", "own-data", "--data", str(data)]) == 2
    assert "denoiser.yaml: exists already" in capsys.readouterr().err
    assert Path("denoiser.yaml").read_text() == before and not Path("teacher.yaml").exists()


def test_gray_small_images_and_idx_files(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = own_data.look(image_set(here / "gray", sides=(21, 20), gray=True), torch.device("cpu"))
    assert found.data.channels == 1 and found.shape == (1, 16, 16)
    assert "20 x 21 pixels, gray" in found.describe()
    idx = shutil.copytree(few_test_images(5200), here / "idx")
    for name in ("images-idx3", "labels-idx1"):
        shutil.copy(idx / f"t10k-{name}-ubyte.gz", idx / f"train-{name}-ubyte.gz")
    assert cli.main(["init", "own-data", "--data", str(idx)]) == 0
    assert "10 classes" in capsys.readouterr().out
    denoiser, distill = (load_config(JOBS[k], f"{k}.yaml") for k in ("denoiser", "distill"))
    assert denoiser.data.image_size is None and denoiser.patch_size == 4
    assert distill.views.size == 28 and distill.eval.path == str(idx)


def test_all_images_that_cannot_be_used_are_named_at_once(
    here: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = image_set(here / "data", sides=(16, 16))
    (data / "train" / "a" / "0.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"^\S+0\.png: not an image that can be read"):
        own_data.look(data, torch.device("cpu"))
    cut = data / "test" / "b" / "1.png"
    cut.write_bytes(cut.read_bytes()[:-40])
    with pytest.raises(UserError, match=r"got 2 of 36 images .* listed above, in \S+data, "):
        own_data.look(data, torch.device("cpu"))
    assert "a/0.png: not an image" in caplog.text and "b/1.png: damaged" in caplog.text


def test_transparent_images_are_announced(here: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = image_set(here / "data", sides=(16, 16))
    opaque = Image.new("RGBA", (16, 16), (9, 9, 9, 255))
    opaque.save(data / "train" / "a" / "0.png")
    own_data.look(data, torch.device("cpu"))
    assert not caplog.text
    Image.new("RGBA", (16, 16), (9, 9, 9, 0)).save(data / "train" / "a" / "1.png")
    own_data.look(data, torch.device("cpu"))
    assert "1 of 30 images looked at are partly transparent" in caplog.text


def test_mistakes_are_refused_in_one_line(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = image_set(here / "data", sides=(16, 16))
    for arguments, words in (
        (["own-data"], "--data: got None, expected a folder with own-data"),
        (["demo", "--data", str(data)], "and none with others"),
        (["own-data", "--data", "nowhere"], "nowhere: no such folder"),
        (["own-data", "--data", str(data / "train")], "expected both, as a student is tested on"),
    ):
        assert cli.main(["init", *arguments]) == 2
        assert words in capsys.readouterr().err
    assert not list(Path().iterdir())


@pytest.mark.parametrize(
    ("name", "shown"), [(os.fsdecode(b"caf\xe9"), "caf\\udce9"), ("two\nlines", "two\\nlines")]
)
def test_a_path_that_is_no_text_is_refused_in_one_line(
    name: str, shown: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Such a path cannot stand in the first line of a config, as its command."""
    data = image_set(here / name, sides=(16, 16))
    assert cli.main(["init", "own-data", "--data", str(data)]) == 2
    one_line(capsys, ["--data: got", shown, "expected a path of one line in UTF-8", "rename"])
    assert not list(Path().iterdir())


def test_idx_files_inside_train_are_refused_in_one_line(here: Path) -> None:
    shutil.copytree(few_test_images(20), here / "data" / "train")
    (here / "data" / "test").mkdir()
    with pytest.raises(UserError, match=r"got idx files in \S+/train, expected class folders"):
        own_data.look(here / "data", torch.device("cpu"))


@pytest.mark.parametrize(("side", "patch"), [(9, 1), (15, 1), (16, 2), (21, 3), (28, 4)])
def test_patches_divide_the_side_of_the_images(side: int, patch: int) -> None:
    images = torch.zeros(2, 1, side, side, dtype=torch.uint8)
    real: Any = SimpleNamespace(train=SimpleNamespace(images=images, class_names=("a", "b")))
    data = RealImagesConfig(channels=1)
    found = own_data.OwnData(folder=Path("x"), test=Path("x"), real=real, data=data, stored="")
    texts = own_data._texts(found, own_data.SIZES["cpu"])
    # Chosen on held-out drawings: docs/notebook.md.
    names = [yaml.safe_load(text)["optim"]["name"] for text in texts]
    assert names == ["adamw", "adamw", "adamw", "muon"]
    _, denoiser, _, _ = texts
    assert yaml.safe_load(denoiser)["patch_size"] == patch
