"""`dmkd export --push`: the Hub gets the compared folder, with a card that it can read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import yaml
from command_line import one_line
from hub_stub import hub
from small_jobs import few_test_images

from dmkd_fast import cli
from dmkd_fast.jobs.exchange import card

STUDENT = "embedded:fashion_mnist/weak"
NAME = "someone/student"


def header(text: str) -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load(text.split("---\n")[1])
    return values


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let the client in this process call another server; HF_ENDPOINT is read on import only."""

    def change(url: str) -> None:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", url)
        monkeypatch.setenv("HF_TOKEN", "hf_test")

    return change


def command(out: Path, *options: str, to: str = "timm") -> list[str]:
    words = ["export", STUDENT, "--to", to, "--out", str(out), "--data", str(few_test_images(20))]
    return [*words, "--push", NAME, *options]


@pytest.mark.parametrize("to", ["timm", "pt2"])
def test_the_hub_gets_the_folder_and_no_local_path(
    to: str, endpoint: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    with hub() as server:
        endpoint(server.url)
        assert cli.main(command(out, to=to)) == 0
    facts = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert facts["url"].startswith(server.url) and server.repositories == [NAME]
    assert server.token == "Bearer hf_test"
    assert server.files == {path.name: path.read_bytes() for path in out.iterdir()}
    places = [str(tmp_path), str(Path(card.__file__).parents[2]), str(Path.home())]
    for name, content in server.files.items():
        assert not any(place.encode() in content for place in places), name
    values = header(server.files["README.md"].decode())
    assert values["license"] == "apache-2.0" and values["metrics"] == ["accuracy"]
    assert values["datasets"] == ["zalando-datasets/fashion_mnist"]
    assert values["pipeline_tag"] == "image-classification"
    read = huggingface_hub.ModelCard.load(out / "README.md").data  # as the Hub reads it
    (result,) = read.eval_results
    assert result.metric_type == "accuracy" and result.metric_value == facts["top1"]


@pytest.mark.slow
def test_hf_endpoint_names_the_server(tmp_path: Path) -> None:
    with hub() as server:
        words = [sys.executable, "-m", "dmkd_fast", *command(tmp_path / "out")]
        environment = {**os.environ, "HF_ENDPOINT": server.url, "HF_TOKEN": "hf_test"}
        subprocess.run(words, check=True, env=environment, capture_output=True)
    assert server.repositories == [NAME] and "model.safetensors" in server.files


def test_a_refusal_is_one_line_and_keeps_the_folder(
    endpoint: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with hub(refuse=True) as server:
        endpoint(server.url)
        assert cli.main(command(tmp_path / "a")) == 2
        one_line(capsys, ["--push", "403", "is complete", f"hf upload {NAME}"])
    assert (tmp_path / "a" / "model.safetensors").is_file()
    endpoint("http://127.0.0.1:9")  # nothing listens there
    assert cli.main(command(tmp_path / "b")) == 2
    one_line(capsys, ["--push", "is complete"])


@pytest.mark.parametrize("name", ["student", "a/b/c", "a b/c", "/c", "../x", "http://x/y"])
def test_names_of_repositories_are_checked_first(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(command(tmp_path / "out", "--push", name)) == 2
    one_line(capsys, ["--push", "OWNER/NAME"])
    assert not list(tmp_path.iterdir())


def test_licenses_of_both_inputs_are_stated() -> None:
    for licenses, expected in (
        ({"denoiser": "MIT", "teacher": "mit"}, {"license": "mit"}),
        ({"weights": "Apache-2.0 (hf-hub:a/b at 1)"}, {"license": "apache-2.0"}),
        ({"denoiser": "unknown", "teacher": "unknown"}, {"license": "unknown"}),
        (
            {"denoiser": "cc-by-nc-4.0", "teacher": "ResNet18_Weights.IMAGENET1K_V1"},
            {
                "license": "other",
                "license_name": "denoiser-cc-by-nc-4.0-teacher-resnet18-weights.imagenet1k-v1",
            },
        ),
    ):
        assert card.license_fields(licenses) == expected


def test_a_run_states_its_base_models_and_their_data_sets(tmp_path: Path) -> None:
    from dmkd_fast.config.shipped import CONFIGS

    run, teacher = tmp_path / "run", tmp_path / "teacher"
    (run / "student").mkdir(parents=True)
    teacher.mkdir()
    (teacher / "README.md").write_text("---\ndatasets:\n- owner/photos\n- ../bad name\n---\n")
    config = yaml.safe_load((CONFIGS / "fashion_mnist.yaml").read_text())
    commit = "0" * 40
    config["denoiser"] = {"path": "hf-hub:owner/denoiser", "revision": commit}
    config["teacher"], config["more_teachers"] = {"path": str(teacher)}, []
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    licenses = {"denoiser_license": "mit", "teacher_license": "apache-2.0"}
    (run / "summary.json").write_text(json.dumps(licenses))
    found = card.read_inputs(str(run), "unused")
    assert found.base_models == ("owner/denoiser",) and found.datasets == ("owner/photos",)
    assert found.licenses == {"denoiser": "mit", "teacher": "apache-2.0"}
