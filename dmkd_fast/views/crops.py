"""Draw a random crop and flip for each image, and render them with one fused operator.

A view is fixed by (seed, image id, use), so it can be replayed on any device. The crop (boxes and
flips) and the form that a network takes (`ViewSpec`) are separate. So several networks can look at
the same crops, each at its own size and normalization.

Shapes: N slots, B views, c channels, H x W pixels of a slot.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dmkd_fast.rng import philox
from dmkd_fast.runtime import checks, native, tensor_checks
from dmkd_fast.runtime.errors import invalid
from dmkd_fast.views import ops
from dmkd_fast.views.spec import check_normalization

MOST_USES = philox.MOST_STEPS


class ViewSpec:
    """The form of view that one network takes: size, normalization and dtype.

    Args:
        size: Side of a view, in pixels.
        mean: Mean of each channel, of pixel values in [0, 1].
        std: Standard deviation of each channel, of pixel values in [0, 1].
        dtype: Dtype of the views: float32, float16 or bfloat16.
        device: Device of the images.

    Raises:
        TypeError, UserError: The size or dtype is out of range, or `mean` and `std` are out of
            range or differ in length.
    """

    def __init__(
        self,
        *,
        size: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        checks.whole("size", size, low=1, high=ops.MAX_SIDE)
        check_normalization(mean, std)
        if dtype not in ops.DTYPES:
            raise invalid("dtype", dtype, "float32, float16 or bfloat16")
        self.size, self.dtype = size, dtype
        self.mean = torch.tensor(mean, dtype=torch.float32, device=device)
        self.std = torch.tensor(std, dtype=torch.float32, device=device)


class Views:
    """Draw a random crop and flip for each sample, and render it.

    A crop covers a fraction of the image area drawn from `scale`. Its aspect ratio is drawn from
    `ratio`, uniform in the logarithm. Its sides are whole pixels, and it lies anywhere inside the
    image and its black border. As in torchvision's RandomResizedCrop, a crop larger than the image
    is drawn again, up to ten draws in all. After that, the crop is the largest one in the middle of
    the image that `ratio` allows.

    Args:
        spec: Form of the views, and the device of the ring and the networks.
        scale: Range of the crop's fraction of the image area; (1, 1), with ratio (1, 1), keeps the
            size of the image.
        ratio: Range of width / height.
        pad: Width of the black border, in pixels. With scale (1, 1) this is "pad and crop".
        flip: Probability of a horizontal flip.
        seed: Seed of the views; other seeds give other views.

    Raises:
        TypeError, UserError: An argument is out of range.

    Examples:
        >>> import torch
        >>> from dmkd_fast import Views, ViewSpec
        >>> views = Views(ViewSpec(size=16, mean=(0.5,), std=(0.25,)), scale=(0.3, 1.0), pad=2)
        >>> images = torch.zeros(8, 1, 28, 28, dtype=torch.uint8)
        >>> ids = torch.arange(4)
        >>> views(images, indices=ids, ids=ids, uses=torch.zeros_like(ids)).shape
        torch.Size([4, 1, 16, 16])
    """

    def __init__(
        self,
        spec: ViewSpec,
        *,
        scale: tuple[float, float] = (1.0, 1.0),
        ratio: tuple[float, float] = (1.0, 1.0),
        pad: int = 0,
        flip: float = 0.5,
        seed: int = 0,
    ) -> None:
        for name, pair in (("scale", scale), ("ratio", ratio)):
            if len(pair) != 2:
                raise invalid(name, tuple(pair), "two numbers")
            for value in pair:
                checks.number(name, value)
        checks.whole("pad", pad, high=ops.MAX_SIDE)
        checks.number("flip", flip, low=0, high=1)
        checks.whole("seed", seed, high=checks.MAX_SEED)
        if not 0 < scale[0] <= scale[1] <= 1:
            raise invalid("scale", tuple(scale), "0 < low <= high <= 1")
        if not 2.0**-15 <= ratio[0] <= ratio[1] <= 2.0**15:
            raise invalid("ratio", tuple(ratio), "low <= high between 2**-15 and 2**15")
        self.spec = spec
        self.scale, self.ratio, self.pad, self.flip, self.seed = scale, ratio, pad, flip, seed

    def __call__(
        self,
        slots: Tensor,
        indices: Tensor,
        ids: Tensor,
        uses: Tensor,
        *,
        out: Tensor | None = None,
    ) -> Tensor:
        """Render one view per index.

        Args:
            slots: (N, c, H, W) uint8 images.
            indices: (B,) int64, slots to read.
            ids: (B,) int64, image ids in those slots.
            uses: (B,) int64, how often each image was used before.
            out: Tensor to write the result into, instead of fresh memory.

        Returns:
            (B, c, size, size) in `dtype`, normalized, channels_last.

        Raises:
            TypeError, UserError, IndexError: As `dmkd_fast.views.ops.views`.
        """
        height, width = _sides(slots)
        if not torch.compiler.is_compiling():
            tensor_checks.rows("indices", indices, count=len(ids), device=slots.device)
        boxes, flips = self.parameters(ids, uses, height, width)
        return self.render(slots, indices, boxes, flips, out=out)

    def parameters(
        self, ids: Tensor, uses: Tensor, height: int, width: int
    ) -> tuple[Tensor, Tensor]:
        """Draw the crop and flip of each (image id, use), the same on every device.

        Args:
            ids: (B,) int64 image ids, non-negative.
            uses: (B,) int64 use counts, below 2**24.
            height: Height of the images, in pixels.
            width: Width of the images, in pixels.

        Returns:
            Boxes (B, 4) int32 (top, left, height, width), and flips (B,) bool.

        Raises:
            TypeError, UserError: Ids or uses have a wrong shape, dtype or device, or a side is
                out of range. On a CPU, also if ids or uses are out of range; uses of 2**24 and
                more would repeat earlier views.
        """
        if not torch.compiler.is_compiling():
            tensor_checks.rows("ids", ids)
            tensor_checks.rows("uses", uses, count=len(ids), device=ids.device)
            checks.whole("height", height, low=1, high=ops.MAX_SIDE)
            checks.whole("width", width, low=1, high=ops.MAX_SIDE)
        keeps_size = self.scale == (1, 1) and self.ratio == (1, 1)
        spare = (height, width)
        if width < self.ratio[0] * height and not keeps_size:
            spare = (max(1, round(width / self.ratio[0])), width)
        elif width > self.ratio[1] * height and not keeps_size:
            spare = (height, max(1, round(height * self.ratio[1])))
        shapes = (math.log2(ratio) / 2 for ratio in self.ratio)
        recipe = (
            height,
            width,
            self.pad,
            *(round(x * 2**24) for x in (*self.scale, *shapes)),
            *spare,
            0 if keeps_size else 10,
            self.flip,
        )
        if native.INSTRUCTION_SET == "none":
            tensor_checks.within("uses", uses, low=0, high=MOST_USES - 1)
        try:
            boxes, flips = torch.ops.dmkd_fast.view_boxes(self.seed, ids, uses, *recipe)
        except RuntimeError:
            # The C++ kernel checks `uses` as well, but does not say what it got.
            tensor_checks.within("uses", uses, low=0, high=MOST_USES - 1)
            raise
        return boxes, flips

    def whole(self, slots: Tensor, indices: Tensor, spec: ViewSpec | None = None) -> Tensor:
        """Render whole images at view size, normalized, without crop and flip.

        Args:
            slots: Images (N, c, H, W) uint8.
            indices: Slots (B,) int64 to read.
            spec: Form of the views; None: the form given to this object.

        Returns:
            Views (B, c, size, size), in the dtype of the spec, channels_last.
        """
        height, width = _sides(slots)
        tensor_checks.rows("indices", indices)
        count = len(indices)
        boxes = torch.zeros((count, 4), dtype=torch.int32, device=slots.device)
        boxes[:, 2], boxes[:, 3] = height, width
        flips = torch.zeros(count, dtype=torch.bool, device=slots.device)
        return self.render(slots, indices, boxes, flips, spec)

    def render(
        self,
        slots: Tensor,
        indices: Tensor,
        boxes: Tensor,
        flips: Tensor,
        spec: ViewSpec | None = None,
        *,
        out: Tensor | None = None,
    ) -> Tensor:
        """Render the views with the given boxes and flips.

        Args:
            slots: (N, c, H, W) uint8 images.
            indices: (B,) int64, slots to read.
            boxes: (B, 4) int32, from `parameters`.
            flips: (B,) bool, from `parameters`.
            spec: Form of the views; None means the form given to this object.
            out: Tensor to write the result into, instead of fresh memory.

        Returns:
            (B, c, size, size) in the dtype of the spec, normalized, channels_last.

        Raises:
            TypeError, UserError, IndexError: As `dmkd_fast.views.ops.views`.
        """
        spec = spec or self.spec
        return ops.views(
            slots,
            indices,
            boxes,
            flips,
            size=spec.size,
            pad=self.pad,
            mean=spec.mean,
            std=spec.std,
            dtype=spec.dtype,
            out=out,
        )


def _sides(slots: Tensor) -> tuple[int, int]:
    """Return the height and width of slots (N, c, H, W)."""
    if slots.ndim != 4:
        raise invalid("slots", f"shape {tuple(slots.shape)}", "(N, c, H, W)")
    return slots.shape[2], slots.shape[3]
