"""What reaches DALI: the device with its index, and a decoder that agrees with published ones."""

from __future__ import annotations

import io
import struct
import sys
import zlib
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from PIL import Image
from real_sets import COLOUR, picture
from shard_files import encode, random_images, write_shards

from dmkd_fast import InputSpec
from dmkd_fast.data import decode, test_sets
from dmkd_fast.data.listing import MOST_BYTES, MOST_PIXELS, Item, SourceError
from dmkd_fast.data.sources import FileSource, ShardSource
from dmkd_fast.data.stored import ImageDecoder, StoredImages
from dmkd_fast.runtime.distributed import ALONE, Ranks


@pytest.fixture
def dali(monkeypatch: pytest.MonkeyPatch) -> MagicMock:
    """A stand-in that records what it is called with."""
    pytest.importorskip("nvidia.dali")
    recorder = MagicMock()
    monkeypatch.setattr(sys.modules["nvidia"], "dali", recorder)
    return recorder


def build(device: str) -> None:
    """Both pipelines: that of test sets and that of images for the ring."""
    for inputs in ([COLOUR], []):
        decode.Decoder(3, inputs, device=torch.device(device), num_threads=1)._build(4)


@pytest.mark.parametrize(
    ("device", "index", "kind"),
    [("cuda:0", 0, "mixed"), ("cuda:1", 1, "mixed"), ("cpu", None, "cpu")],
)
def test_dali_gets_the_index_of_the_device_and_interpolates_chroma(
    dali: MagicMock, device: str, index: int | None, kind: str
) -> None:
    build(device)
    made = [call.kwargs for call in dali.Pipeline.call_args_list]
    assert [options["device_id"] for options in made] == [index, index]
    decoders = [call.kwargs for call in dali.fn.decoders.image.call_args_list]
    assert len(decoders) == 2
    for options in decoders:
        assert options["device"] == kind and options["jpeg_fancy_upsampling"] is True
        assert options["adjust_orientation"] is False


def test_no_device_without_an_index_reaches_dali(dali: MagicMock) -> None:
    for use in (lambda: build("cuda"), lambda: ImageDecoder((3, 8, 8), device="cuda")):
        with pytest.raises(ValueError, match=r"got cuda without an index, expected .* cuda:0"):
            use()
    dali.Pipeline.assert_not_called()


@pytest.mark.parametrize("channels", [1, 3])
def test_jpegs_with_halved_chroma_are_decoded_as_pillow_decodes_them(
    tmp_path: Path, channels: int
) -> None:
    """At most 2 of 255 levels apart; repeated chroma would differ by 52 here."""
    image = picture(3, 48, 48)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95, subsampling="4:2:0")
    path = tmp_path / "a.jpg"
    path.write_bytes(buffer.getvalue())
    mode = "L" if channels == 1 else "RGB"
    expected = np.asarray(Image.open(path).convert(mode)).reshape(48, 48, channels).astype(int)
    decoded = ImageDecoder((channels, 48, 48)).decode(["a.jpg"], [buffer.getvalue()])
    read = decoded[0].permute(1, 2, 0).numpy()
    spec = InputSpec(size=48, mean=(0.0,) * channels, std=(1.0,) * channels)
    images = test_sets.EncodedSet(
        items=(Item(str(path), 0),), class_names=("a",), device=torch.device("cpu")
    )
    ((views, _),) = images.batches([spec])
    tested = (views[spec][0] * 255).round().permute(1, 2, 0).numpy()
    # Pillow makes grey from rounded RGB, DALI takes the stored luma.
    tolerance = 2 if channels == 3 else 4
    assert abs(read - expected).max() <= tolerance and abs(tested - expected).max() <= tolerance


def png_header(width: int, height: int) -> bytes:
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n\0\0\0\r" + body + struct.pack(">I", zlib.crc32(body))


@pytest.mark.parametrize(
    ("width", "height", "short_side", "fits"),
    [
        (8192, 8192, 1, True),
        (8193, 8192, 1, False),
        (8192, 8193, 1, False),
        (0, 5, 1, False),
        (5, 0, 1, False),
        (MOST_PIXELS, 1, 1, True),
        (4000, 3, 128, True),
        (4000, 3, 500, False),
        (3, 4000, 500, False),
    ],
)
def test_sizes_are_checked_before_anything_is_decoded(
    width: int, height: int, short_side: int, fits: bool
) -> None:
    data = png_header(width, height)
    if fits:
        assert decode.image_size("x", data, short_side=short_side) == (height, width)
    else:
        with pytest.raises(
            SourceError, match=f"got {width} x {height} pixels, expected (1|at most)"
        ):
            decode.image_size("x", data, short_side=short_side)


def test_test_sets_refuse_an_image_that_would_fill_the_memory(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for data in (png_header(65536, 65536), encode(np.zeros((2, 60_000), dtype=np.uint8))):
        (tmp_path / "a" / "0.png").write_bytes(data)
        with pytest.raises(SourceError, match=r"a/0\.png: got 6[05]\d+ x \d+ pixels"):
            list(
                test_sets.open_set(tmp_path, torch.device("cpu")).batches(
                    [InputSpec(size=224, mean=(0.5,), std=(0.5,))]
                )
            )


def test_files_larger_than_any_image_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "a" / "0.png"
    path.parent.mkdir()
    with path.open("wb") as file:
        file.truncate(MOST_BYTES + 1)  # sparse
    items = test_sets.open_set(tmp_path, torch.device("cpu"))
    assert isinstance(items, test_sets.EncodedSet)
    with pytest.raises(SourceError, match=f"got {MOST_BYTES + 1} bytes"):
        items.items[0].read()
    with pytest.raises(SourceError, match=f"got {MOST_BYTES + 1} bytes"):
        FileSource(tmp_path, ["a/0.png"], [0]).read(0)


def test_a_range_beyond_its_file_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "0.tar"
    path.write_bytes(b"0123456789")
    assert Item(str(path), 0, "0.png", 2, 5).read() == b"23456"
    with pytest.raises(SourceError, match=r"0\.tar: 0\.png: got 8 bytes, expected 9, as when"):
        Item(str(path), 0, "0.png", 2, 9).read()
    path.unlink()
    with pytest.raises(
        SourceError, match=r"0\.tar: 0\.png: No such file or directory; put it back"
    ):
        Item(str(path), 0, "0.png", 2, 5).read()


def test_memory_that_is_used_up_is_not_blamed_on_an_image(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise RuntimeError("x: std::bad_alloc\ny")

    pytest.importorskip("nvidia.dali")
    monkeypatch.setattr(decode.Decoder, "_decode_by_dali", fail)
    with pytest.raises(SourceError, match="memory is used up"):
        ImageDecoder((1, 8, 8)).decode(["a"], [encode(np.zeros((8, 8), dtype=np.uint8))])


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_read_disjoint_blocks_that_together_are_one_reader_s(
    tmp_path: Path, world_size: int
) -> None:
    images, labels = random_images(25)
    write_shards(tmp_path, images, labels, 4)
    ranks = [Ranks(rank=rank, world_size=world_size) for rank in range(world_size)]
    alone, *parts = (
        StoredImages(
            ShardSource(tmp_path), ImageDecoder((1, 8, 8)), ring_images=8, show=False, ranks=each
        )
        for each in (ALONE, *ranks)
    )
    for _ in range(5):  # over the end of the first pass
        expected, classes = alone.next_block(4 * world_size)
        alone.advance(4 * world_size)
        found = [part.next_block(4) for part in parts]
        for part in parts:
            part.advance(4)
        assert torch.equal(torch.cat([ids for ids, _ in found]), expected)
        assert torch.equal(torch.cat([labels for _, labels in found]), classes)


@pytest.mark.parametrize(
    ("ring_images", "position", "expected"),
    [(25, 25, True), (24, 25, False), (25, 24, False), (26, 50, True)],
)
def test_a_set_is_used_up_when_all_of_it_is_in_the_ring(
    tmp_path: Path, ring_images: int, position: int, expected: bool
) -> None:
    images, labels = random_images(25)
    write_shards(tmp_path, images, labels, 8)
    reader = StoredImages(
        ShardSource(tmp_path), ImageDecoder((1, 8, 8)), ring_images=ring_images, show=False
    )
    reader.advance(position)
    assert reader.is_exhausted is expected
