"""Sheets of images: samples.png, pairs of images, and small sheets inside a page.

Pillow encodes the files and is imported on first use.
Shapes: C classes, n images of each, c channels (1 or 3), H x W pixels.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dmkd_fast.runtime import files

if TYPE_CHECKING:
    from PIL.Image import Image

MOST_ROWS, MOST_SIDE = 100, 64
_LEAST_SIDE, _NAME_PIXELS = 28, 150


def evenly(count: int, most: int) -> list[int]:
    """Return at most `most` of the numbers from 0 to count - 1, evenly spaced."""
    kept = min(count, most)
    return [i * count // kept for i in range(kept)]


def by_class(labels: Tensor, classes: Sequence[int], per_class: int) -> Tensor:
    """Return indices (len(classes), per_class) of images of each class; -1 where one is missing.

    Args:
        labels: Classes (N,) int64 on any device.
        classes: Classes to look for.
        per_class: Number of images of each.
    """
    found = torch.full((len(classes), per_class), -1)
    host = labels.cpu()
    for row, label in enumerate(classes):
        places = (host == label).nonzero()[:per_class, 0]
        found[row, : len(places)] = places
    return found


def cells(images: Tensor, indices: Tensor, *, most_side: int = MOST_SIDE) -> Tensor:
    """Return a copy of the chosen images on the host, white where an index is -1.

    Args:
        images: Images (N, c, H, W) uint8 on any device.
        indices: Indices (C, n), as `by_class` returns them.
        most_side: Larger images are shrunk to this side.

    Returns:
        (C, n, c, H, W) uint8.
    """
    flat = indices.flatten()
    # Two pixels a side for each one that is shown are enough, and the copy is small.
    every = max(1, max(images.shape[-2:]) // (2 * most_side))
    chosen: Tensor = images[:, :, ::every, ::every][flat.clamp(min=0).to(images.device)]
    if (side := max(chosen.shape[-2:])) > most_side:
        size = [max(1, round(s * most_side / side)) for s in chosen.shape[-2:]]
        chosen = F.interpolate(chosen.float(), size, mode="area").round().byte()
    chosen = chosen.cpu()
    chosen[flat < 0] = 255
    return chosen.view(*indices.shape, *chosen.shape[1:])


def grid(rows: Tensor, names: Sequence[str], path: Path) -> None:
    """Write a PNG file with one row of images per class and the name of the class before it.

    Args:
        rows: Images (C, n, c, H, W) uint8 on the host.
        names: Names of the C classes.
        path: PNG file to write.
    """
    from PIL import Image, ImageDraw, ImageFont

    zoom = max(1, -(-_LEAST_SIDE // rows.shape[-2]))
    sheet = _sheet(rows)
    sheet = sheet.resize((sheet.width * zoom, sheet.height * zoom), Image.Resampling.NEAREST)
    whole = Image.new(sheet.mode, (_NAME_PIXELS + sheet.width, sheet.height), "white")
    whole.paste(sheet, (_NAME_PIXELS, 0))
    draw, height = ImageDraw.Draw(whole), sheet.height // len(rows)
    font = ImageFont.load_default(12)
    for row, name in enumerate(names):
        shown = name if len(name) <= 20 else f"{name[:19]}\u2026"
        draw.text((6, (row + 0.5) * height), shown, fill="black", font=font, anchor="lm")
    files.replace(path, [_encoded(whole)])


def pairs(images: Tensor, others: Tensor, names: Sequence[str], path: Path) -> None:
    """Write a PNG file of pairs of images, one row per class, with a thin gap between pairs.

    Args:
        images, others: Left and right images (C * n, c, H, W) uint8, n of each class in class
            order.
        names: Names of the C classes.
        path: PNG file to write.
    """
    gap = images.new_full((*images.shape[:-1], 3), 255)
    wide = torch.cat((images, others, gap), dim=-1)
    grid(wide.cpu().unflatten(0, (len(names), -1)), names, path)


def sheet_uris(rows: Tensor, *, most_bytes: int) -> list[dict[str, Any]]:
    """Encode each row of images as one picture in a `data:` address.

    Args:
        rows: Images (C, n, c, H, W) uint8 on the host.
        most_bytes: Upper bound for all pictures together. PNG if that fits, otherwise JPEG.

    Returns:
        For each row `src`, `width` and `height`.
    """
    sheets = [_sheet(row[None]) for row in rows]
    qualities = [88, 70, 50, 25, 8] if rows.numel() > 3 * most_bytes else [None, 88, 70, 50, 25, 8]
    few = sheets[::5]  # enough to see what fits, since encoding takes most of the time
    for quality in qualities:
        some = sum(len(_encoded(sheet, quality=quality)) for sheet in few)
        if some * len(sheets) > most_bytes * len(few) and quality != qualities[-1]:
            continue
        encoded = [_encoded(sheet, quality=quality) for sheet in sheets]
        if sum(map(len, encoded)) <= most_bytes:
            break
    kind = "png" if quality is None else "jpeg"
    return [
        {
            "src": f"data:image/{kind};base64,{base64.b64encode(data).decode()}",
            "width": sheet.width,
            "height": sheet.height,
        }
        for sheet, data in zip(sheets, encoded, strict=True)
    ]


def shade_uri(values: Tensor) -> str:
    """Encode values (H, W) in [0, 1] as the opacity of one color, as a PNG `data:` address."""
    from PIL import Image

    alpha = (values * 255).round().byte()
    color = torch.tensor([70, 130, 200], dtype=torch.uint8).expand(*alpha.shape, 3)
    image = Image.fromarray(torch.cat((color, alpha[..., None]), dim=-1).numpy(), "RGBA")
    return f"data:image/png;base64,{base64.b64encode(_encoded(image)).decode()}"


def _sheet(rows: Tensor) -> Image:
    """Return the images (C, n, c, H, W) as one picture of C rows."""
    from PIL import Image

    count, per_row, channels, height, width = rows.shape
    tiled = rows.permute(0, 3, 1, 4, 2).reshape(count * height, per_row * width, channels)
    return Image.fromarray((tiled[..., 0] if channels == 1 else tiled).contiguous().numpy())


def _encoded(image: Image, *, quality: int | None = None) -> bytes:
    file = io.BytesIO()
    if quality is None:
        image.save(file, "PNG")
    else:
        image.save(file, "JPEG", quality=quality)
    return file.getvalue()
