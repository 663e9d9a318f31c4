"""Image folders: one lister for test sets and for sources, and nothing left out without a word."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from real_sets import encoded, picture
from test_set_cases import CPU, all_of

from dmkd_fast import InputSpec, open_set
from dmkd_fast.data import test_sets
from dmkd_fast.data.listing import EXTENSIONS, SourceError
from dmkd_fast.data.sources import open_files


def images_of(folder: Path, classes: Sequence[str]) -> dict[str, int]:
    """Path and label of each image, the same for a test set and for a source of images."""
    images = open_set(folder, CPU)
    assert isinstance(images, test_sets.EncodedSet)
    tested = {item.path: item.label for item in images.items}
    assert len(tested) == len(images)
    source = open_files(
        folder, "imagefolder", num_classes=len(classes), class_names=images.class_names
    )
    labels = source.labels_of(np.arange(source.num_images)).tolist()
    names = [source.name_of(i) for i in range(source.num_images)]
    assert dict(zip(names, labels, strict=True)) == tested
    assert images.class_names == tuple(classes)
    return {str(Path(path).relative_to(folder)): label for path, label in tested.items()}


def refused_by_both(folder: Path, words: str) -> None:
    for read in (
        lambda: open_set(folder, CPU),
        lambda: open_files(folder, "imagefolder", num_classes=1, class_names=("a",)),
    ):
        with pytest.raises(SourceError, match=words) as error:
            read()
        assert "\n" not in str(error.value)


def place(path: Path, data: bytes | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(0)[0] if data is None else data)


def test_links_are_followed_at_every_depth(tmp_path: Path) -> None:
    place(tmp_path / "all" / "ant" / "0.jpg")
    place(tmp_path / "all" / "more" / "deep" / "1.jpg")
    place(tmp_path / "set" / "bee" / "2.jpg")
    (tmp_path / "set" / "ant").symlink_to(tmp_path / "all" / "ant")
    (tmp_path / "set" / "bee" / "linked").symlink_to(tmp_path / "all" / "more")
    (tmp_path / "set" / "bee" / "3.jpg").symlink_to(tmp_path / "all" / "ant" / "0.jpg")
    assert images_of(tmp_path / "set", ("ant", "bee")) == {
        "ant/0.jpg": 0,
        "bee/2.jpg": 1,
        "bee/3.jpg": 1,
        "bee/linked/deep/1.jpg": 1,
    }


@pytest.mark.parametrize("target", ["set", "set/a", "set/a/inner", "."])
def test_links_that_form_a_cycle_are_one_line(tmp_path: Path, target: str) -> None:
    place(tmp_path / "set" / "a" / "inner" / "0.jpg")
    (tmp_path / "set" / "a" / "inner" / "back").symlink_to(tmp_path / target)
    refused_by_both(tmp_path / "set", "again and again, expected no cycle")


def test_many_links_to_the_same_folders_do_not_take_forever(tmp_path: Path) -> None:
    place(tmp_path / "set" / "a" / "0.jpg")
    for depth in range(25):  # 2^25 ways through them
        (tmp_path / str(depth)).mkdir()
        for name in ("x", "y"):
            (tmp_path / str(depth) / name).symlink_to(tmp_path / str(depth + 1))
    (tmp_path / "25").mkdir()
    (tmp_path / "set" / "a" / "many").symlink_to(tmp_path / "0")
    refused_by_both(tmp_path / "set", "again and again")


def test_broken_links_and_special_files_are_one_line(tmp_path: Path) -> None:
    place(tmp_path / "a" / "0.jpg")
    (tmp_path / "a" / "1.jpg").symlink_to(tmp_path / "nowhere.jpg")
    refused_by_both(tmp_path, r"a/1\.jpg: got a broken link")
    (tmp_path / "a" / "1.jpg").unlink()
    os.mkfifo(tmp_path / "a" / "1.jpg")  # opening it would wait for a writer
    refused_by_both(tmp_path, r"a/1\.jpg: got a broken link or a special file")
    (tmp_path / "a" / "1.jpg").unlink()
    (tmp_path / "a" / "self").symlink_to("self")
    refused_by_both(tmp_path, "a/self: Too many levels")


def test_hidden_files_are_skipped_and_what_is_left_out_is_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("0.jpg", ".1.jpg", "._0.jpg", ".git/2.jpg", "b.GIF", "c.gif", "notes.txt", "RAW"):
        place(tmp_path / "a" / name)
    place(tmp_path / ".ipynb_checkpoints" / "3.jpg")
    place(tmp_path / "classes.txt", b"a\n")
    assert images_of(tmp_path, ("a",)) == {"a/0.jpg": 0}
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path}: not all files are images in a known format (8 files left out: 4 hidden, "
        "2 .gif, 1 .txt, 1 without an ending)"
    ]


FORMATS = {
    "jpg": "JPEG",
    "jpeg": "JPEG",
    "jpe": "JPEG",
    "jfif": "JPEG",
    "png": "PNG",
    "ppm": "PPM",
    "pgm": "PPM",
    "pbm": "PPM",
    "pnm": "PPM",
    "bmp": "BMP",
    "tif": "TIFF",
    "tiff": "TIFF",
    "webp": "WEBP",
    "jp2": "JPEG2000",
}


def test_every_format_in_the_list_is_decoded_to_what_pillow_reads(tmp_path: Path) -> None:
    from torchvision.datasets.folder import IMG_EXTENSIONS

    assert {f".{ending}" for ending in FORMATS} == set(EXTENSIONS) >= set(IMG_EXTENSIONS)
    modes = {"pgm": "L", "pbm": "1"}
    for number, (ending, kind) in enumerate(FORMATS.items()):
        buffer = io.BytesIO()
        picture(number, 24, 24).convert(modes.get(ending, "RGB")).save(
            buffer, kind, **({"lossless": True} if kind == "WEBP" else {})
        )
        place(tmp_path / "a" / f"{number:02d}.{ending.upper()}", buffer.getvalue())
    same = InputSpec(size=24, mean=(0.0,) * 3, std=(1.0,) * 3)
    views, _ = all_of(open_set(tmp_path, CPU), same)
    expected = torch.stack(
        [
            torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)
            for path in sorted((tmp_path / "a").iterdir())
        ]
    )
    assert torch.equal((views * 255).round(), expected.float())


def test_numbered_folders_log_where_torchvision_has_another_order(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("1", "2", "10"):
        place(tmp_path / name / "0.jpg")
    assert images_of(tmp_path, ("1", "2", "10")) == {"1/0.jpg": 0, "2/0.jpg": 1, "10/0.jpg": 2}
    open_set(tmp_path, CPU)
    (message,) = (record.getMessage() for record in caplog.records)
    assert "class 1 is '2'" in message and "'10' there" in message and "classes.txt" in message
    caplog.clear()
    place(tmp_path / "classes.txt", b"1\n10\n2\n")  # the order is chosen, for both readers
    assert images_of(tmp_path, ("1", "10", "2"))["10/0.jpg"] == 1
    assert not caplog.records


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("\ufeffant\nbee\n".encode(), ""),
        (b"ant\r\nbee\r\n", ""),
        ("ant\nbee".encode("utf-16"), "not UTF-8"),
        (b"ant\nb\xe9e\n", "not UTF-8"),
        (None, "got a folder"),
    ],
)
def test_class_lists_of_other_editors_are_read_or_named(
    tmp_path: Path, text: bytes | None, words: str
) -> None:
    for name in ("ant", "bee"):
        place(tmp_path / name / "0.jpg")
    if text is None:
        (tmp_path / "classes.txt").mkdir()
    else:
        place(tmp_path / "classes.txt", text)
    if words:
        with pytest.raises(ValueError, match=rf"classes\.txt: {words}"):
            open_set(tmp_path, CPU)
    else:
        assert open_set(tmp_path, CPU).class_names == ("ant", "bee")
