"""`dmkd predict` and `dmkd export`: the same network, read by other people's loaders."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import one_line
from real_sets import COLOUR, NAMES
from small_jobs import few_test_images

from dmkd_fast import cli, open_set, predict
from dmkd_fast.classifiers.loading import build_classifier, load_classifier, save_classifier
from dmkd_fast.classifiers.spec import ClassifierSpec
from dmkd_fast.jobs.exchange import export as exporting
from dmkd_fast.jobs.exchange import predict as predicting
from dmkd_fast.runtime.errors import UserError

CPU = torch.device("cpu")


def saved(folder: Path, **changes: Any) -> Path:
    """Save a small classifier of three classes with random weights and statistics."""
    base: dict[str, Any] = {
        "architecture": "cifar_resnet8",
        "num_classes": 3,
        "in_chans": 3,
        "input_size": 24,
        "mean": COLOUR.mean,
        "std": COLOUR.std,
        "crop_pct": 0.75,
        "label_names": NAMES,
    }
    spec = ClassifierSpec(**(base | changes))
    torch.manual_seed(0)
    model = build_classifier(spec).train()
    for _ in range(5):  # gives the batch norms statistics of their own
        model(torch.randn(16, spec.in_chans, spec.input_size, spec.input_size))
    folder.mkdir(parents=True)
    save_classifier(model, spec, folder)
    return folder


def printed(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return found


def test_predictions_are_those_of_the_evaluation(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = saved(tmp_path / "run" / "student")  # a run directory means its student
    images = open_set(folder, CPU)
    files = [item.path for item in images.items]
    assert cli.main(["predict", str(tmp_path / "run"), *files, "--json", "--top", "2"]) == 0
    found = printed(capsys)["predictions"]
    model, spec = load_classifier(path, CPU)
    with torch.inference_mode():
        logits = torch.cat([model(v[spec.input]) for v, _ in images.batches([spec.input])])
    assert [row["image"] for row in found] == files
    for row, probabilities in zip(found, logits.softmax(1), strict=True):
        top = probabilities.topk(2)
        assert list(row["classes"]) == [NAMES[k] for k in top.indices]
        torch.testing.assert_close(
            torch.tensor(list(row["classes"].values())), top.values, rtol=1e-5, atol=1e-6
        )
    assert cli.main(["predict", str(path), files[0]]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == files[0] and len(lines) == 4
    assert predict(path, files[:1])[0].image == files[0]


def test_predict_refuses_what_is_no_image(tmp_path: Path, capsys: Any) -> None:
    path = saved(tmp_path / "model")
    assert cli.main(["predict", str(path), str(tmp_path / "none.png")]) == 2
    assert "no such file; give image files" in capsys.readouterr().err
    (tmp_path / "bad.png").write_bytes(b"text")
    assert cli.main(["predict", str(path), str(tmp_path / "bad.png")]) == 2
    assert "not an image that can be read" in capsys.readouterr().err


@pytest.mark.parametrize("architecture", ["cifar_resnet8", "resnetv2_50"])
def test_an_export_to_timm_is_loaded_by_timm(
    architecture: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import timm

    changes = {} if architecture.startswith("cifar") else {"model_args": {"layers": [1, 1, 1, 1]}}
    path = saved(tmp_path / "model", architecture=architecture, **changes)
    out = tmp_path / "out"
    command = ["export", str(path), "--to", "timm", "--out", str(out), "--data", str(folder)]
    assert cli.main(command) == 0
    facts = printed(capsys)
    assert facts["num_images"] == 23 and facts["largest_difference"] <= 1e-4
    importlib.import_module("dmkd_fast.integrations.timm")
    again = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    model, _ = load_classifier(path, CPU)
    images = torch.randn(5, 3, 24, 24)
    with torch.inference_mode():
        torch.testing.assert_close(again(images), model(images))
    card = (out / "README.md").read_text()
    assert "library_name: timm" in card and str(tmp_path) not in card
    assert (out / "classes.txt").read_text().split("\n")[:3] == list(NAMES)


@pytest.mark.slow
@pytest.mark.parametrize("normalize", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("to", ["pt2", "onnx"])
def test_a_program_takes_any_batch_and_normalizes_on_request(
    to: str, normalize: bool, folder: Path, tmp_path: Path
) -> None:
    if to == "onnx":
        for package in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(package)
    path, out = saved(tmp_path / "model"), tmp_path / "out"
    facts = exporting.export(path, to, out=out, data=folder, normalize=normalize)  # type: ignore[arg-type]
    assert facts["num_images"] == 23 and facts["largest_difference"] <= 1e-4
    pixels = torch.rand(7, 3, 24, 24)
    mean, std = (torch.tensor(v)[:, None, None] for v in (COLOUR.mean, COLOUR.std))
    given = pixels if normalize else (pixels - mean) / std
    if to == "pt2":
        again = torch.export.load(out / "model.pt2").module()(given)
    else:
        import onnxruntime

        session = onnxruntime.InferenceSession(str(out / "model.onnx"))
        again = torch.from_numpy(session.run(None, {"images": given.numpy()})[0])
    model, _ = load_classifier(path, CPU)
    with torch.inference_mode():
        torch.testing.assert_close(
            again.detach(), model((pixels - mean) / std), rtol=1e-5, atol=1e-4
        )
    said = "normalizes itself" if normalize else "normalized with mean"
    assert said in (out / "README.md").read_text()


def test_an_export_that_differs_is_not_kept(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, out = saved(tmp_path / "model"), tmp_path / "out"
    write = exporting._write_pt2

    def changed(*arguments: Any) -> Any:
        network = write(*arguments)
        return lambda images: network(images) + torch.tensor([0.0, 0.0, 1e-2])

    monkeypatch.setattr(exporting, "_write_pt2", changed)
    with pytest.raises(UserError, match=r"logits that differ by up to 1\.0e-02"):
        exporting.export(path, "pt2", out=out, data=folder)
    assert not out.exists()


def test_an_export_whose_classes_have_other_names_is_refused(tmp_path: Path, folder: Path) -> None:
    """Like an evaluation: the top-1 of its card would be that of other classes."""
    wrong, out = saved(tmp_path / "wrong", label_names=("bee", "ant", "dog")), tmp_path / "out"
    with pytest.raises(UserError, match=r"class 0 is 'bee' in .*wrong.*set --classes"):
        exporting.export(wrong, "timm", out=out, data=folder)
    assert not out.exists()
    order = tmp_path / "order.txt"
    order.write_text("bee\nant\ncat\n")
    assert exporting.export(wrong, "timm", out=out, data=folder, classes=order)["num_images"] == 23


def test_a_classifier_of_nans_is_one_line(
    tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = saved(tmp_path / "model"), tmp_path / "out"
    model, spec = load_classifier(path, CPU)
    for weight in model.parameters():
        weight.data.fill_(float("nan"))
    save_classifier(model, spec, path)
    photo = str(next((folder / "bee").glob("*.png")))
    export = ["export", str(path), "--to", "timm", "--out", str(out), "--data", str(folder)]
    for command, name in (
        (["predict", str(path), photo, "--json"], photo),
        (export, f"{path}: got NaN or infinite logits for 23 of 23 images"),
    ):
        assert cli.main(command) == 2
        one_line(capsys, [name, "got NaN or infinite logits", "expected finite ones", "damaged"])
    assert not out.exists()


def test_mistakes_are_refused_in_one_line(tmp_path: Path, folder: Path) -> None:
    path = saved(tmp_path / "model")
    small = few_test_images(5)
    for options, message in (
        ({"to": "timm"}, "--out: got none"),
        ({"to": "pt2", "out": path}, "exists already"),
        ({"to": "timm", "out": tmp_path / "a", "normalize": True}, "--normalize: got it with"),
        ({"to": "pt2", "out": tmp_path / "b"}, "--data: got none"),
        ({"to": "pt2", "out": tmp_path / "c", "data": small}, "classes: .* expected the same"),
    ):
        with pytest.raises(UserError, match=message):
            exporting.export(path, **options)  # type: ignore[arg-type]
    other = saved(tmp_path / "other", architecture="torchvision:squeezenet1_1", input_size=64)
    with pytest.raises(UserError, match="--to: got timm for torchvision:"):
        exporting.export(other, "timm", out=tmp_path / "d", data=folder)


@pytest.mark.parametrize("package", ["onnx", "onnxruntime", "onnxscript"])
def test_onnx_without_its_packages_is_one_line_that_names_the_extra(
    tmp_path: Path,
    package: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    out = tmp_path / "out"
    command = ["export", "embedded:fashion_mnist/weak", "--to", "onnx", "--out", str(out)]
    assert cli.main(command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "pip install 'dmkd_fast[onnx]'" in line and not out.exists()


def test_the_name_of_an_image_that_is_no_unicode_is_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = predicting.Prediction(image="caf\udce9.png", classes={"ant": 1.0})
    monkeypatch.setattr(predicting, "predict", lambda *_, **__: [found])
    assert cli.main(["predict", "model", found.image]) == 0
    assert capsys.readouterr().out == "caf\ufffd.png\n  1.0000  ant\n"
