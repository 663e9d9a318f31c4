"""Generate class-conditional images with a diffusion model and write them into a given tensor.

The noise of an image depends only on (seed, image id, step), so an image does not depend on the
other images of its batch. The bits of an image are fixed for a fixed micro-batch size, device and
build. Shapes never change and nothing inside waits for the device. So torch.compile makes one graph
per kind of step, and on CUDA one graph captures the whole loop.

Shapes: B micro-batch, c channels, h x w latent cells (pixels for a pixel model), H x W pixels,
K steps.

Sources: Ho & Salimans, classifier-free guidance (arXiv 2207.12598), eq. 6; Kynkaanniemi et al.,
guidance in an interval (arXiv 2404.07724); for the solvers, see `sampling/solvers.py`.
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dmkd_fast.rng import philox
from dmkd_fast.runtime import checks, tensor_checks
from dmkd_fast.runtime.errors import NotFiniteError, UserError
from dmkd_fast.sampling.arguments import check_guidance, check_settings
from dmkd_fast.sampling.noise_levels import Solver
from dmkd_fast.sampling.solvers import SolverTable, solver_table

# Images decoded at a time. Activations of a decoder are hundreds of times larger than latents; on a
# CPU, four images at a time are slower per image than two (docs/notebook.md, "Decoder on a CPU").
MOST_DECODED = {"cuda": 8, "cpu": 2}
# CPU libraries split the products of very small batches in another way and round differently in
# bfloat16, so smaller batches would change the bits.
FEWEST_IMAGES = 4
# Largest accepted fraction of images with values that are not finite. A few do not harm a student,
# but a decoder that overflows breaks most images.
MOST_BROKEN = 0.01


class DiffusionSampler:
    """Generate images with a diffusion model, one per image id.

    The sampling loop has fixed shapes and follows the coefficient table of `sampling/solvers.py`.

    Args:
        module: Denoiser: `module(latents (B, c, h, w), timesteps (B,), labels (B,))` returns
            (B, c, h, w), or (B, 2c, h, w) if it also predicts variances. Moved and cast in place.
        scheduler: Content of the model's scheduler_config.json; fixes objective and solver.
        latent_shape: Shape of one image's latents, (c, h, w).
        decoder: Module that turns latents into images in [-1, 1]; None for a pixel model.
        null_class: Label that stands for "no class"; None if the model has none.
        takes_guidance: Whether the module has a fourth input, the guidance scales (B,).
        num_classes: Number of labels. On a CPU, labels are checked against it; None skips the
            check.
        class_map: The module's own index of each label; None if both are the same.
        num_steps: Number of steps, K.
        solver: Solver name, see `solver_table`; "auto" chooses the scheduler's own.
        guidance_scale: Guidance scale; 1 means no guidance.
        class_guidance: Guidance scales of single labels, which replace `guidance_scale`; needs
            `num_classes`. All images then cost as much as guided ones, also those with scale 1.
        guidance_interval: Fractions (start, stop) of the steps: steps int(start * K) to
            int(stop * K) - 1 are guided, and the others run without the unconditional half.
        guidance_channels: Number of leading channels that are guided (the original DiT code: 3);
            None means all.
        micro_batch_images: Micro-batch size B, at least 4. Smaller requests are padded, so shapes
            never change.
        dtype: Compute dtype of the module; latents stay float32 between steps.
        device: Device of all tensors and modules.
        seed: Seed of the noise.
        compile: Whether to torch.compile each kind of step and, on CUDA, the decoder.

    Raises:
        TypeError: An argument is of a wrong type.
        UserError: Guidance is set for a model without a null class or for an unknown label, or the
            scheduler or a setting is not supported.

    Attributes:
        num_made: Number of images made so far, padding of micro-batches included.
        num_broken: Number of these with a value that is not finite, () int64 on the device.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        scheduler: dict[str, Any],
        latent_shape: tuple[int, int, int],
        decoder: nn.Module | None = None,
        null_class: int | None = None,
        takes_guidance: bool = False,
        num_classes: int | None = None,
        class_map: tuple[int, ...] | None = None,
        num_steps: int = 8,
        solver: Solver = "auto",
        guidance_scale: float = 1.0,
        class_guidance: Mapping[int, float] | None = None,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        guidance_channels: int | None = None,
        micro_batch_images: int = 64,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        seed: int = 0,
        compile: bool = False,
    ) -> None:
        self.device, self.dtype, self.seed = torch.device(device), dtype, seed
        self.class_guidance = dict(class_guidance or {})
        check_settings(
            latent_shape=latent_shape,
            null_class=null_class,
            num_classes=num_classes,
            class_map=class_map,
            guidance_interval=guidance_interval,
            dtype=dtype,
            seed=seed,
            guidance_channels=guidance_channels,
            micro_batch_images=micro_batch_images,
            scales=[guidance_scale, *self.class_guidance.values()],
            guided=[*self.class_guidance],
        )
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
            # On a CPU, oneDNN runs the convolutions in any case, and compiling slows group norms.
            if self.device.type == "cuda":
                self._finish = torch.compile(_copy(_decode), fullgraph=True, dynamic=False)
        self._graph: _Graph | None = None
        self.num_made = 0
        self.num_broken = torch.zeros((), dtype=torch.int64, device=self.device)

    @property
    def forwards_per_image(self) -> int:
        """Number of evaluations of the module per image, unconditional ones included."""
        return len(self._guided) + sum(self._guided)

    @torch.inference_mode()
    def sample(self, ids: Tensor, labels: Tensor, *, out: Tensor) -> Tensor:
        """Generate one image per id.

        Args:
            ids: Image ids, (n,) int64; an id fixes the noise of its image.
            labels: Classes, (n,) int64.
            out: Tensor for the images, (n, 1 or 3, H, W) uint8, written in place.

        Returns:
            `out`.

        Raises:
            TypeError, UserError: A tensor has a wrong shape, dtype or device, or, on a CPU, an id
                or label is out of range.
        """
        self._check_rows(ids, labels)
        if out.ndim != 4 or len(out) != len(ids) or out.dtype != torch.uint8:
            raise UserError(
                f"out: got {tuple(out.shape)} {out.dtype}, expected ({len(ids)}, c, "
                "H, W) torch.uint8"
            )
        size = self.micro_batch_images
        for start in range(0, len(ids), size):
            batch = slice(start, start + size)
            images = self._images(_fill(ids[batch], size), _fill(labels[batch], size))
            if images.shape[1:] != out.shape[1:]:  # `copy_` would broadcast a single channel or row
                raise UserError(
                    f"out: got images of {tuple(out.shape[1:])}, expected {tuple(images.shape[1:])}"
                )
            out[batch].copy_(images[: len(ids[batch])])
        return out

    @torch.inference_mode()
    def trajectory(self, ids: Tensor, labels: Tensor) -> Tensor:
        """Return all states of one micro-batch, noise first.

        Args:
            ids: Image ids, (B,) int64.
            labels: Classes, (B,) int64.

        Returns:
            (K + 1, B, c, h, w) float32.
        """
        self._check_rows(ids, labels)
        return torch.stack(list(self._states(ids, labels)))

    def _images(self, ids: Tensor, labels: Tensor) -> Tensor:
        """Generate one micro-batch, (B, 1 or 3, H, W) uint8; on CUDA by replaying a graph."""
        self.num_made += len(ids)
        if self.device.type != "cuda":
            return self._make(ids, labels)
        if self._graph is None:
            self._graph = _Graph(self._make, ids, labels)
            self.num_broken.zero_()  # the warm-up runs of the graph counted too
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
        """Yield the K + 1 states of one micro-batch, each (B, c, h, w) float32."""
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
            # Noise is passed also where its coefficient is 0; otherwise torch.compile would need
            # another graph for such a step.
            fresh = self._noise(ids, step=k + 1) if self._is_noisy else None
            x, before = self._advance(
                self._module,
                x,
                before,
                table.rows[k],
                both if guided else labels,
                fresh,
                guided=guided,
                scale=scale,
                channels=self.guidance_channels,
                takes_guidance=self.takes_guidance,
                clip=table.clip,
                learned_variance=table.learned_variance,
                dtype=self.dtype,
            )
            yield x

    def _noise(self, ids: Tensor, step: int) -> Tensor:
        """Return the noise of one step for ids (B,), as (B, c, h, w) float32."""
        c, h, w = self.latent_shape
        return philox.normal(self.seed, ids, step=step, count=c * h * w).view(-1, c, h, w)

    def _scale_table(self) -> Tensor | None:
        """Return the guidance scales, (num_classes,) float32; None if all agree."""
        if not self.class_guidance:
            return None
        if self.num_classes is None:
            raise UserError(
                "num_classes: got None with class_guidance, expected their number; set it"
            )
        count = self.num_classes
        low, high = min(self.class_guidance), max(self.class_guidance)
        if low < 0 or high >= count:
            raise UserError(
                f"class_guidance: got class {low if low < 0 else high}, expected 0 to {count - 1}, "
                "the classes of the job; correct it"
            )
        scales = torch.full((count,), self.guidance_scale, device=self.device)
        for label, scale in self.class_guidance.items():
            scales[label] = scale
        return scales

    def _check_rows(self, ids: Tensor, labels: Tensor) -> None:
        tensor_checks.rows("ids", ids)
        if ids.device.type != self.device.type:
            raise UserError(f"ids: got {ids.device}, expected {self.device}, as the sampler")
        tensor_checks.rows("labels", labels, count=len(ids), device=ids.device)
        tensor_checks.within("ids", ids, low=0, high=checks.MAX_SEED)
        # Labels on CUDA are not read, which would wait; the embedding asserts their range there.
        most = checks.MAX_SEED if self.num_classes is None else self.num_classes - 1
        tensor_checks.within("labels", labels, low=0, high=most)


def check_broken(broken: int, made: int) -> None:
    """Raise an error if too many images have values that are not finite.

    Args:
        broken: Number of images with such values.
        made: Number of all images.

    Raises:
        NotFiniteError: More than 1 % of the images have such values.
    """
    if broken > MOST_BROKEN * made:
        raise NotFiniteError(
            f"{broken:,} of {made:,} images have values that are not finite, expected at most "
            f"{MOST_BROKEN:.0%}; float16 overflows in some denoisers and decoders: set "
            "dtype=bfloat16 or dtype=float32"
        )


def _advance(
    module: nn.Module,
    x: Tensor,
    before: Tensor,
    row: Tensor,
    labels: Tensor,
    fresh: Tensor | None,
    *,
    guided: bool,
    scale: float | Tensor,
    channels: int | None,
    takes_guidance: bool,
    clip: float | None,
    learned_variance: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Take one step of any solver.

    Args:
        module: Denoiser.
        x: State, (B, c, h, w) float32.
        before: Clipped image estimate of the previous step, (B, c, h, w) float32.
        row: Coefficients of this step, (len(SolverTable.COLUMNS),) float32.
        labels: Labels (B,), or (2B,) with the null class in the second half if guided.
        fresh: Fresh noise, (B, c, h, w), or None.
        guided: Whether to combine the conditional and the unconditional prediction.
        scale: Guidance scale: a number, or (B, 1, 1, 1).
        channels: Number of leading channels that are guided; None means all.
        takes_guidance: Whether the scale is an input of the module.
        clip: Bound of the image estimate, or None.
        learned_variance: Whether the second half of the module's output sets the noise variance.
        dtype: Compute dtype of the module.

    Returns:
        The next x and `before`.
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
        if isinstance(scale, Tensor):  # scale 1 must give exactly the conditional prediction
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
    """Decode latents (B, c, h, w) float32 and find broken images.

    Values are rounded to the nearest level. One that is not finite would look black or white.

    Returns:
        Images (B, 1 or 3, H, W) uint8, and whether each has a value that is not finite, (B,) bool.
    """
    images = latents
    if decoder is not None:
        latents = latents.to(dtype).contiguous(memory_format=torch.channels_last)
        images = decoder(latents).float()
    is_broken = ~images.flatten(1).sum(1).isfinite()
    return (images * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8), is_broken


class _Graph:
    """One micro-batch as a CUDA graph: two small copies, then one launch."""

    def __init__(self, make: Any, ids: Tensor, labels: Tensor) -> None:
        self._ids, self._labels = ids.clone(), labels.clone()
        # Compilation and lazy initialization must be done before the capture.
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
    """Return the same function with its own code object.

    torch.compile stores its graphs by code object and stops compiling after eight of them, so
    several samplers that share a code object would exceed this limit.
    """
    copy = types.FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _fill(values: Tensor, size: int) -> Tensor:
    """Pad `values` to `size` entries by repeating the last one."""
    return torch.cat((values, values[-1:].expand(size - len(values), *values.shape[1:])))
