"""Makes class-conditional images with a diffusion model, straight into the slots it is given.

The noise of an image is keyed by (seed, image id, step), so an image does not
depend on the others made with it; its bits are fixed for a fixed micro-batch, device and build.
Shapes never change and nothing inside waits for the device, so the loop compiles to one graph per
kind of step and, on CUDA, is captured whole.
B micro-batch, c channels, h w latent cells (pixels, for a pixel model), H W pixels, K steps.

Sources: Ho & Salimans, classifier-free guidance (arXiv 2207.12598), eq. 6; Kynkaanniemi et al.,
guidance in an interval (arXiv 2404.07724); solvers: see solvers.py.
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dmkd_fast.rng import philox
from dmkd_fast.runtime import checks
from dmkd_fast.runtime.errors import NotFiniteError
from dmkd_fast.sampling.arguments import check_guidance, check_settings
from dmkd_fast.sampling.noise_levels import Solver
from dmkd_fast.sampling.solvers import SolverTable, solver_table

# Images that pass the decoder at a time: its activations are hundreds of times the latents. On a
# CPU four at once take 1.6 times as long per image as two (SD-VAE, 256 pixels: 0.58 and 0.36 s).
MOST_DECODED = {"cuda": 8, "cpu": 2}
# A CPU library splits the products of very small batches otherwise and rounds otherwise in
# bfloat16: fewer images at a time would be other bits (embedded denoiser: up to 12 levels).
FEWEST_IMAGES = 4
# Of all images. Rare ones do not hurt a student; a decoder that overflows breaks most.
MOST_BROKEN = 0.01


class DiffusionSampler:
    """Fixed-shape sampling loop over a coefficient table.

    Args:
        module: `module(latents (B, c, h, w), timesteps (B,), labels (B,))` -> (B, c, h, w), or
            (B, 2c, h, w) if it also predicts variances. Moved and cast in place.
        scheduler: Content of the model's scheduler_config.json; fixes objective and solver.
        latent_shape: (c, h, w).
        decoder: Latents -> images in [-1, 1]; None for a pixel model.
        null_class: Label that stands for "no class"; None if the model has none.
        takes_guidance: The module has a fourth input, the guidance scales (B,).
        num_classes: Labels are checked against it, on a CPU; None skips that.
        class_map: The module's own index of each label; None: labels are its own.
        num_steps: K.
        solver: See `sampling/solvers.py`; "auto" is the scheduler's own.
        guidance_scale: 1 means no guidance.
        class_guidance: Guidance scale of some labels in place of that; needs num_classes. All
            images then take the steps of guided ones, those with scale 1 too.
        guidance_interval: Steps int(start * K) to int(stop * K) - 1 are guided; the others run
            without their unconditional half.
        guidance_channels: Guide only the first so many channels (the original DiT code: 3);
            None: all.
        micro_batch_images: B, at least 4; smaller requests are filled up, so shapes never change.
        dtype: Compute dtype of the module; latents stay float32 between steps.
        device: Where everything lives.
        seed: Of the noise.
        compile: torch.compile each kind of step, and on CUDA the decoder.

    Raises:
        ValueError: Guidance without a null class or of a label that there is not, or an
            unsupported scheduler or setting.

    Attributes:
        num_made: Images made so far, those that fill up micro-batches included.
        num_broken: How many of them had a value that is not finite, () int64 on the device.
    """

    def __init__(
        self, module: nn.Module, *, scheduler: dict[str, Any], latent_shape: tuple[int, int, int],
        decoder: nn.Module | None = None, null_class: int | None = None,
        takes_guidance: bool = False, num_classes: int | None = None,
        class_map: tuple[int, ...] | None = None, num_steps: int = 8,
        solver: Solver = "auto", guidance_scale: float = 1.0,
        class_guidance: Mapping[int, float] | None = None,
        guidance_interval: tuple[float, float] = (0.0, 1.0), guidance_channels: int | None = None,
        micro_batch_images: int = 64, dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu", seed: int = 0, compile: bool = False,
    ) -> None:  # fmt: skip
        self.device, self.dtype, self.seed = torch.device(device), dtype, seed
        self.class_guidance = dict(class_guidance or {})
        check_settings(
            latent_shape=latent_shape, null_class=null_class, num_classes=num_classes,
            class_map=class_map, guidance_interval=guidance_interval, dtype=dtype, seed=seed,
            guidance_channels=guidance_channels, micro_batch_images=micro_batch_images,
            scales=[guidance_scale, *self.class_guidance.values()], guided=[*self.class_guidance],
        )  # fmt: skip
        scales = {guidance_scale, *self.class_guidance.values()}
        for scale in sorted(scales):
            check_guidance(scheduler, scale, null_class, takes_guidance)
        self.latent_shape, self.null_class, self.num_classes = latent_shape, null_class, num_classes
        self.guidance_scale, self.takes_guidance = guidance_scale, takes_guidance
        self.guidance_channels = guidance_channels
        self._class_map = None
        if class_map is not None:
            self._class_map = torch.tensor(class_map, device=self.device)
        self._scales = self._scale_table()
        self.micro_batch_images = max(micro_batch_images, FEWEST_IMAGES)
        self.table = solver_table(scheduler, num_steps, self.device, solver=solver)
        self._is_noisy = any(self.table.stochastic)
        first, last = (int(share * num_steps) for share in guidance_interval)
        batched = scales != {1.0} and not takes_guidance
        self._guided = [batched and first <= k < last for k in range(num_steps)]
        self._module = module.to(device=self.device, dtype=dtype)
        self._decoder = None if decoder is None else decoder.to(device=self.device, dtype=dtype)
        self._advance, self._finish = _advance, _decode
        if compile:
            self._advance = torch.compile(_copy(_advance), fullgraph=True, dynamic=False)
            # Convolutions on a CPU are oneDNN's either way; compiled group norms are slower there.
            if self.device.type == "cuda":
                self._finish = torch.compile(_copy(_decode), fullgraph=True, dynamic=False)
        self._graph: _Graph | None = None
        self.num_made = 0
        self.num_broken = torch.zeros((), dtype=torch.int64, device=self.device)

    @property
    def forwards_per_image(self) -> int:
        """Evaluations of the module that one image takes, unconditional ones included."""
        return len(self._guided) + sum(self._guided)

    @torch.inference_mode()
    def sample(self, ids: Tensor, labels: Tensor, *, out: Tensor) -> Tensor:
        """Make one image per id.

        Args:
            ids: (n,) int64 image ids; each fixes its image's noise.
            labels: (n,) int64 classes.
            out: (n, 1 or 3, H, W) uint8, written in place.

        Returns:
            `out`.

        Raises:
            TypeError, ValueError: A tensor is of another shape, dtype or device, or, on a CPU, an
                id or label is out of range.
        """
        self._check_rows(ids, labels)
        if out.ndim != 4 or len(out) != len(ids) or out.dtype != torch.uint8:
            raise ValueError(f"out: got {tuple(out.shape)} {out.dtype}, expected ({len(ids)}, c, "
                             "H, W) torch.uint8")  # fmt: skip
        size = self.micro_batch_images
        for start in range(0, len(ids), size):
            batch = slice(start, start + size)
            images = self._images(_fill(ids[batch], size), _fill(labels[batch], size))
            if images.shape[1:] != out.shape[1:]:  # `copy_` would repeat a single channel or row
                raise ValueError(
                    f"out: got images of {tuple(out.shape[1:])}, expected {tuple(images.shape[1:])}"
                )
            out[batch].copy_(images[: len(ids[batch])])
        return out

    @torch.inference_mode()
    def trajectory(self, ids: Tensor, labels: Tensor) -> Tensor:
        """All states of one micro-batch, noise first: (B,), (B,) -> (K + 1, B, c, h, w) float32."""
        self._check_rows(ids, labels)
        return torch.stack(list(self._states(ids, labels)))

    def _images(self, ids: Tensor, labels: Tensor) -> Tensor:
        """One micro-batch, (B,) and (B,) -> (B, 1 or 3, H, W) uint8; replayed on CUDA."""
        self.num_made += len(ids)
        if self.device.type != "cuda":
            return self._make(ids, labels)
        if self._graph is None:
            self._graph = _Graph(self._make, ids, labels)
            self.num_broken.zero_()  # Of its trial runs.
        return self._graph(ids, labels)

    def _make(self, ids: Tensor, labels: Tensor) -> Tensor:
        *_, latents = self._states(ids, labels)
        size = len(latents)
        if self._decoder is not None:
            size = min(MOST_DECODED[self.device.type], size)
        parts = []
        for part in latents.split(size):
            images, is_broken = self._finish(self._decoder, _fill(part, size), self.dtype)
            self.num_broken += is_broken[: len(part)].sum()
            parts.append(images[: len(part)])
        return torch.cat(parts)

    def _states(self, ids: Tensor, labels: Tensor) -> Iterator[Tensor]:
        """The K + 1 states of one micro-batch, each (B, c, h, w) float32."""
        table = self.table
        x = table.initial_scale * self._noise(ids, step=0)
        yield x
        scale: float | Tensor = self.guidance_scale
        if self._scales is not None:
            scale = self._scales[labels][:, None, None, None]  # (B, 1, 1, 1)
        if self._class_map is not None:
            labels = self._class_map[labels]
        both = labels
        if any(self._guided):
            assert self.null_class is not None
            both = torch.cat((labels, torch.full_like(labels, self.null_class)))  # (2B,)
        before = torch.zeros_like(x)
        for k, guided in enumerate(self._guided):
            # Where its coefficient is 0 as well: without it a step would be another graph.
            fresh = self._noise(ids, step=k + 1) if self._is_noisy else None
            x, before = self._advance(
                self._module, x, before, table.rows[k], both if guided else labels, fresh,
                guided=guided, scale=scale, channels=self.guidance_channels,
                takes_guidance=self.takes_guidance, clip=table.clip,
                learned_variance=table.learned_variance, dtype=self.dtype,
            )  # fmt: skip
            yield x

    def _noise(self, ids: Tensor, step: int) -> Tensor:
        """(B,) ids -> (B, c, h, w) float32."""
        c, h, w = self.latent_shape
        return philox.normal(self.seed, ids, step=step, count=c * h * w).view(-1, c, h, w)

    def _scale_table(self) -> Tensor | None:
        """Guidance scale of each label, (num_classes,) float32; None if it is one for all."""
        if not self.class_guidance:
            return None
        if self.num_classes is None:
            raise ValueError("num_classes: got None with class_guidance, expected their number; "
                             "set it")  # fmt: skip
        count = self.num_classes
        low, high = min(self.class_guidance), max(self.class_guidance)
        if low < 0 or high >= count:
            raise ValueError(
                f"class_guidance: got class {low if low < 0 else high}, expected 0 to {count - 1}, "
                "the classes of the job; correct it"
            )
        scales = torch.full((count,), self.guidance_scale, device=self.device)
        for label, scale in self.class_guidance.items():
            scales[label] = scale
        return scales

    def _check_rows(self, ids: Tensor, labels: Tensor) -> None:
        checks.rows("ids", ids)
        if ids.device.type != self.device.type:
            raise ValueError(f"ids: got {ids.device}, expected {self.device}, as the sampler")
        checks.rows("labels", labels, count=len(ids), device=ids.device)
        checks.within("ids", ids, low=0, high=checks.MAX_SEED)
        # Elsewhere the embedding asserts: reading would wait for the device.
        most = checks.MAX_SEED if self.num_classes is None else self.num_classes - 1
        checks.within("labels", labels, low=0, high=most)


def check_broken(broken: int, made: int) -> None:
    """Refuse images too many of which have values that are not finite.

    Args:
        broken: Of them.
        made: All.

    Raises:
        NotFiniteError: More than 1 % of them do.
    """
    if broken > MOST_BROKEN * made:
        raise NotFiniteError(
            f"{broken:,} of {made:,} images have values that are not finite, expected at most "
            f"{MOST_BROKEN:.0%}; float16 overflows in some denoisers and decoders: set "
            "dtype=bfloat16 or dtype=float32"
        )


def _advance(
    module: nn.Module, x: Tensor, before: Tensor, row: Tensor, labels: Tensor,
    fresh: Tensor | None, *, guided: bool, scale: float | Tensor, channels: int | None,
    takes_guidance: bool, clip: float | None, learned_variance: bool, dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One step of any solver: x, before (B, c, h, w) float32 -> the next two.

    Args:
        module: The denoiser.
        x: State.
        before: Clipped image estimate of the step before.
        row: (len(SolverTable.COLUMNS),) float32.
        labels: (B,), or (2B,) with the null class in the second half if guided.
        fresh: New noise (B, c, h, w), or None.
        guided: Whether to combine conditional and unconditional prediction.
        scale: Guidance scale: a number, or (B, 1, 1, 1).
        channels: How many channels it applies to; None: all.
        takes_guidance: Whether the scale is an input of the module.
        clip: Bound of the image estimate, or None.
        learned_variance: Whether the module's second half interpolates the noise's variance.
        dtype: Of the module.
    """
    values = dict(zip(SolverTable.COLUMNS, row.unbind(), strict=True))
    inputs = (values["input_scale"] * x).to(dtype)
    if guided:
        inputs = torch.cat((inputs, inputs))
    timesteps = values["timestep"].expand(len(inputs))
    if takes_guidance:
        scales = scale.flatten() if isinstance(scale, Tensor) else torch.full_like(timesteps, scale)
        output = module(inputs, timesteps, labels, scales)
    else:
        output = module(inputs, timesteps, labels)
    width = x.shape[1]
    prediction, variance = output[:, :width].float(), output[: len(x), width:].float()
    if guided:
        conditional, unconditional = prediction.chunk(2)
        prediction = unconditional + scale * (conditional - unconditional)
        if isinstance(scale, Tensor):  # scale 1 is no guidance, not only up to rounding
            prediction = torch.where(scale == 1, conditional, prediction)
        if channels is not None:
            prediction = torch.cat((prediction[:, :channels], conditional[:, channels:]), dim=1)
    estimate = values["skip"] * x + values["out"] * prediction
    newest = estimate if clip is None else estimate.clamp(-clip, clip)
    x = values["a"] * x + values["b0"] * newest + values["b1"] * before + values["u"] * estimate
    if fresh is not None:
        deviation = values["n"]
        if learned_variance:
            share = (variance + 1) / 2
            low, high = values["log_variance_low"], values["log_variance_high"]
            deviation = deviation * torch.exp((share * high + (1 - share) * low) / 2)
        x = x + deviation * fresh
    return x, newest


def _decode(
    decoder: nn.Module | None, latents: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Latents (B, c, h, w) float32 -> images (B, 1 or 3, H, W) uint8, which are broken (B,) bool.

    Values are rounded to the nearest level. One that is not finite would look like black or white.
    """
    images = latents
    if decoder is not None:
        latents = latents.to(dtype).contiguous(memory_format=torch.channels_last)
        images = decoder(latents).float()
    is_broken = ~images.flatten(1).sum(1).isfinite()
    return (images * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8), is_broken


class _Graph:
    """All of one micro-batch as one CUDA graph: two small copies in, one launch."""

    def __init__(self, make: Any, ids: Tensor, labels: Tensor) -> None:
        self._ids, self._labels = ids.clone(), labels.clone()
        # Compilation and lazy initialisation must be over before the capture.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                make(self._ids, self._labels)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._images = make(self._ids, self._labels)

    def __call__(self, ids: Tensor, labels: Tensor) -> Tensor:
        self._ids.copy_(ids)
        self._labels.copy_(labels)
        self._graph.replay()
        return self._images


def _copy(function: Any) -> Any:
    """The same function with a code object of its own.

    torch.compile keeps its graphs per code object and gives up after eight, so samplers that
    shared one would run out.
    """
    copy = types.FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _fill(values: Tensor, size: int) -> Tensor:
    """Repeat the last entry until there are `size`."""
    return torch.cat((values, values[-1:].expand(size - len(values), *values.shape[1:])))
