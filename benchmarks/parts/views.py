"""Time views of images in memory: ours, DALI's pipeline, torchvision, eager PyTorch.

Timed: from slot numbers and image ids to a batch of normalized views, new crops drawn each time,
bilinear everywhere. "256 -> 224" is a random resized crop (area 0.08 to 1) and flip; no crop there
shrinks by more than 1.15, so nothing needs antialiasing. "32 -> 32" pads by 4, crops and flips. Two
sets of rows: every arm allocates a new result ("fresh"), or writes into memory that is already
there, where it can ("reused"; DALI's pipeline has buffers of its own). The copy is a strided copy
of as many numbers from planar to channels-last.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from benchmarks.harness import Report, arguments, recorded, time_interleaved
from dmkd_fast import Views, ViewSpec
from dmkd_fast.runtime.device import resolve_device, set_num_threads
from dmkd_fast.views.reference import reference_views

BATCH = 128
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RATIO = (3 / 4, 4 / 3)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# name: (side of the images, number of images, side of the views, crops)
CASES: dict[str, tuple[int, int, int, dict[str, Any]]] = {
    "256 -> 224": (256, 1024, 224, {"scale": (0.08, 1.0), "ratio": RATIO}),
    "32 -> 32": (32, 8192, 32, {"pad": 4}),
}
# Times faster than an arm, by dtype; for "256 -> 224", all threads, fresh results.
GOALS = {
    ("DALI", torch.float32): 1.5,
    ("DALI", torch.float16): 1.5,
    ("torchvision", torch.float32): 3.0,
    ("torchvision", torch.bfloat16): 3.0,
}


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse the arguments of the command line."""
    parser = arguments("views", __doc__ or "")
    parser.add_argument("--n", type=int, default=20, help="timings per arm")
    parser.add_argument("--quick", action="store_true", help="small images alone, one dtype")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    options = parse(argv)
    device = resolve_device(options.device)
    report = Report(bench="views", arguments=recorded(options), device=device)
    set_num_threads(0)
    for name in list(CASES)[-1:] if options.quick else CASES:
        for dtype in DTYPES[:1] if options.quick else DTYPES:
            medians = _measure(report, name, dtype, device, options.n)
            for (other, wanted), goal in GOALS.items():
                is_judged = device.type == "cpu" and name == "256 -> 224" and other in medians
                if is_judged and wanted == dtype:
                    gain = medians[other] / medians["ours"]
                    report.at_least(f"{name} {_short(dtype)} vs {other}", gain, goal)
    report.finish(record=options.record)


def _measure(
    report: Report, name: str, dtype: torch.dtype, device: torch.device, n: int
) -> dict[str, float]:
    timings = time_interleaved(arms(name, dtype, device), n=n)
    medians = {arm: timing["median_ms"] for arm, timing in timings.items()}
    for arm, timing in timings.items():
        ours = medians["ours, reused" if arm.endswith(", reused") else "ours"]
        report.rows.append(
            {
                "case": name,
                "dtype": _short(dtype),
                "device": device.type,
                "batch": BATCH,
                "arm": arm.removesuffix(", reused"),
                "set": "reused" if arm.endswith(", reused") else "fresh",
                "images_per_s": round(1e3 * BATCH / timing["median_ms"]),
                **timing,
                "ours_is_times_faster": round(timing["median_ms"] / ours, 2),
            }
        )
    return medians


def arms(name: str, dtype: torch.dtype, device: torch.device) -> dict[str, Callable[[], object]]:
    """Return the calls to compare; each call makes one batch."""
    side, count, size, crops = CASES[name]
    generator = torch.Generator().manual_seed(0)
    slots = torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=generator)
    slots = slots.to(device)
    spec = ViewSpec(size=size, mean=MEAN, std=STD, dtype=dtype, device=device)
    views = Views(spec, **crops)
    batches = _batches(count, device)
    out = torch.empty(
        (BATCH, 3, size, size), dtype=dtype, device=device, memory_format=torch.channels_last
    )
    planar = torch.rand(BATCH, 3, size, size, device=device).to(dtype)

    def ours(out: Tensor | None = None) -> Tensor:
        indices, uses = next(batches)
        return views(slots, indices, indices, uses, out=out)

    def eager() -> Tensor:
        indices, uses = next(batches)
        boxes, flips = views.parameters(indices, uses, side, side)
        return reference_views(
            slots,
            indices,
            boxes,
            flips,
            size=size,
            pad=views.pad,
            mean=views.spec.mean,
            std=views.spec.std,
            dtype=dtype,
        )

    timed: dict[str, Callable[[], object]] = {
        "ours": ours,
        "eager": eager,
        "copy": lambda: planar.contiguous(memory_format=torch.channels_last),
        "ours, reused": lambda: ours(out),
        "copy, reused": lambda: out.copy_(planar),
    }
    has_dali = dtype != torch.bfloat16 and importlib.util.find_spec("nvidia.dali")
    if device.type == "cpu":
        timed["torchvision"] = _torchvision(slots, batches, size, crops, dtype)
        timed["torchvision, reused"] = _torchvision(slots, batches, size, crops, dtype, out)
    # DALI writes no bfloat16, is an extra of the package, and asks for a driver.
    if has_dali and (device.type == "cpu" or torch._C._cuda_getDeviceCount() > 0):
        timed["DALI"] = _dali(slots, size, crops, dtype)
    return timed


def _batches(count: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Slot numbers in shuffled passes, and how often each was used."""
    generator = torch.Generator().manual_seed(1)
    for use in range(2**24):
        order = torch.randperm(count, generator=generator).to(device)
        uses = torch.full((BATCH,), use, device=device)
        yield from ((indices, uses) for indices in order.split(BATCH))


def _torchvision(
    slots: Tensor,
    batches: Iterator[tuple[Tensor, Tensor]],
    size: int,
    crops: dict[str, Any],
    dtype: torch.dtype,
    out: Tensor | None = None,
) -> Callable[[], object]:
    """v2 transforms on one image at a time: on a batch they would crop all images alike."""
    from torchvision.transforms import v2

    crop = (
        v2.RandomCrop(size, padding=crops["pad"])
        if "pad" in crops
        else v2.RandomResizedCrop(size, crops["scale"], crops["ratio"], antialias=False)
    )
    transform = v2.Compose(
        [
            crop,
            v2.RandomHorizontalFlip(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )

    def call() -> Tensor:
        shape = (BATCH, 3, size, size)
        result = out
        if result is None:
            result = torch.empty(shape, dtype=dtype, memory_format=torch.channels_last)
        for row, index in enumerate(next(batches)[0].tolist()):
            result[row] = transform(slots[index])
        return result

    return call


def _dali(
    slots: Tensor, size: int, crops: dict[str, Any], dtype: torch.dtype
) -> Callable[[], object]:
    """DALI's pipeline on the device of the slots, fed from their memory.

    Not pipelined: batches made ahead would be made while other arms are timed. Small images are
    padded once, beforehand, so that crop, flip and normalization are one operator.
    """
    # Untyped: what its stubs say changes between versions.
    fn, types, dali = (
        cast(Any, importlib.import_module(f"nvidia.dali{part}")) for part in (".fn", ".types", "")
    )
    pad = crops.get("pad", 0)
    padded = torch.nn.functional.pad(slots, (pad, pad, pad, pad))
    images: Any = padded.permute(0, 2, 3, 1).contiguous()  # It crops channels-last images only.
    where = "gpu" if slots.is_cuda else "cpu"
    images = images if slots.is_cuda else images.numpy()
    generator = np.random.default_rng(1)

    def feed() -> list[Any]:
        return [images[i] for i in generator.integers(0, len(images), BATCH)]

    @dali.pipeline_def  # type: ignore[untyped-decorator]
    def pipeline() -> Any:
        views = fn.external_source(source=feed, device=where, no_copy=True, layout="HWC")
        if not pad:
            views = fn.random_resized_crop(
                views,
                size=size,
                random_area=crops["scale"],
                random_aspect_ratio=crops["ratio"],
                interp_type=types.DALIInterpType.INTERP_LINEAR,
                antialias=False,
            )
        places = {f"crop_pos_{axis}": fn.random.uniform(range=[0.0, 1.0]) for axis in "xy"}
        return fn.crop_mirror_normalize(
            views,
            mirror=fn.random.coin_flip(),
            output_layout="HWC",
            dtype=types.FLOAT16 if dtype == torch.float16 else types.FLOAT,
            mean=[255 * m for m in MEAN],
            std=[255 * s for s in STD],
            **({"crop": (size, size)} | places if pad else {}),
        )

    built = pipeline(
        batch_size=BATCH,
        num_threads=torch.get_num_threads(),
        device_id=slots.device.index,
        seed=1,
        prefetch_queue_depth=1,
        exec_async=False,
        exec_pipelined=False,
    )
    built.build()
    run: Callable[[], object] = built.run
    return run


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
