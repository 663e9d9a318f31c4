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

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dmkd_fast.denoisers.denoiser import Denoiser
from dmkd_fast.denoisers.dit import LeanDiT
from dmkd_fast.rng import philox
from dmkd_fast.runtime import checks, tensor_checks
from dmkd_fast.runtime.errors import NotFiniteError, invalid, warn_once
from dmkd_fast.sampling.arguments import Guidance, Steps, check_guidance
from dmkd_fast.sampling.block_cache import modules_by_step
from dmkd_fast.sampling.graph import CudaGraph, compiled, compiled_for
from dmkd_fast.sampling.solvers import solver_table
from dmkd_fast.sampling.step import StepConfig, advance, coefficients, decode, estimate, update

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
        denoiser: Model; its modules are moved and cast in place.
        steps: Number of steps and solver.
        guidance: Guidance scales and where they apply.
        micro_batch_images: Micro-batch size B, at least 4. Smaller requests are padded, so shapes
            never change.
        dtype: Compute dtype of the modules; latents stay float32 between steps.
        device: Device of all tensors and modules.
        seed: Seed of the noise.
        compile: Whether to torch.compile each kind of step and, on CUDA, the decoder.

    Raises:
        TypeError: An argument is of a wrong type.
        UserError: The denoiser does not support the guidance, the steps or its own scheduler.

    Attributes:
        denoiser, steps, guidance: Arguments of the sampler.
        num_made: Number of images made so far, padding of micro-batches included.
        num_broken: Number of these with a value that is not finite, () int64 on the device.
        graph_memory: Memory of the CUDA graph, to be set before the first image: a pool and a
            stream that samplers share which never run at the same time; None: memory of its own.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        steps: Steps = Steps(),  # noqa: B008
        guidance: Guidance = Guidance(),  # noqa: B008
        *,
        micro_batch_images: int = 64,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        seed: int = 0,
        compile: bool = False,
    ) -> None:
        self.seed = checks.whole("seed", seed, high=checks.MAX_SEED)
        size = checks.whole("micro_batch_images", micro_batch_images, low=1, high=2**20)
        if dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
            raise invalid("dtype", dtype, "float32, float16, bfloat16 or float64")
        check_guidance(guidance, denoiser)
        self.denoiser, self.steps, self.guidance = denoiser, steps, guidance
        self.device, self.dtype = torch.device(device), dtype
        self.micro_batch_images = max(size, FEWEST_IMAGES)
        self.table = solver_table(denoiser.scheduler, steps, self.device)
        self._config = StepConfig(
            takes_guidance=denoiser.takes_guidance,
            channels=guidance.channels,
            clip=self.table.clip,
            learned_variance=self.table.learned_variance,
            dtype=dtype,
        )
        self._class_map = None
        if denoiser.class_map is not None:
            self._class_map = torch.tensor(denoiser.class_map, device=self.device)
        # A number would be a constant of the compiled step, which other scales could not use.
        self._scale = torch.tensor(guidance.scale, dtype=torch.float32, device=self.device)
        self._num_prompts = None
        if denoiser.num_prompts is not None:
            self._num_prompts = torch.tensor(denoiser.num_prompts, device=self.device)
        self._scales = None
        if guidance.by_class:
            scales = [float(guidance.scale_of(label)) for label in range(denoiser.num_classes)]
            self._scales = torch.tensor(scales, dtype=torch.float32, device=self.device)
        self._numbers = torch.arange(steps.count, device=self.device)
        self._is_noisy = any(self.table.stochastic)
        first, last = (int(end * steps.count) for end in guidance.interval)
        batched = guidance.is_used and not denoiser.takes_guidance
        self._guided = [batched and first <= k < last for k in range(steps.count)]
        self._module, self._null_class = denoiser.module, denoiser.null_class
        if denoiser.bank is not None:
            denoiser.bank.resize(self.micro_batch_images)
            self._null_class = self.micro_batch_images
        for module in denoiser.modules:
            module.to(device=self.device, dtype=dtype)
        self._modules = modules_by_step(denoiser, steps.block_cache, self._guided)
        self._decoder, self._decoder_dtype = denoiser.decoder, dtype
        # In float16 a decoder may overflow, which the first images show.
        self._is_settled = denoiser.decoder is None or dtype != torch.float16
        self._advance, self._finish = advance, decode
        self._estimate, self._update = estimate, update
        self._guide: Callable[[Tensor, Tensor, Tensor], Tensor] | None = guidance.guide
        if compile:
            key = (self._config, self.micro_batch_images, self.device)
            self._advance = compiled_for(self._module, advance, key)
            if isinstance(self._module, LeanDiT):
                # Compiling every block takes minutes on CUDA. On a CPU the step is faster whole.
                self._module.shares_block_graph = self.device.type == "cuda"
            self._estimate, self._update = compiled(estimate), compiled(update)
            if guidance.guide is not None:  # without fullgraph: gradients break the graph
                self._guide = torch.compile(guidance.guide, dynamic=False)
            # On a CPU, oneDNN runs the convolutions in any case, and compiling slows group norms.
            if self.device.type == "cuda":
                self._finish = compiled(decode)
        self._graph: CudaGraph | None = None
        self.graph_memory: Any = None
        self.num_made, self.num_broken = 0, torch.zeros((), dtype=torch.int64, device=self.device)

    @property
    def forwards_per_image(self) -> int:
        """Number of evaluations of the module per image, unconditional ones included."""
        return len(self._guided) + sum(self._guided)

    @property
    def calls(self) -> list[tuple[nn.Module, int]]:
        """The module that each step calls, and its rows per image: 2 for a guided step."""
        return [(m, 1 + g) for m, g in zip(self._modules, self._guided, strict=True)]

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
        shape = (len(ids), *self.denoiser.image_shape)
        if out.shape != shape or out.dtype != torch.uint8:
            raise invalid("out", f"{tuple(out.shape)} {out.dtype}", f"{shape} torch.uint8")
        size = self.micro_batch_images
        with self._without_gradients():
            for start in range(0, len(ids), size):
                batch = slice(start, start + size)
                images = self._images(_fill(ids[batch], size), _fill(labels[batch], size))
                if images.shape[1:] != shape[1:]:  # `copy_` would broadcast a channel or row
                    expected = f"{tuple(images.shape[1:])}, the shape of the decoded images"
                    raise invalid("denoiser.image_shape", shape[1:], expected)
                out[batch].copy_(images[: len(ids[batch])])
        return out

    def trajectory(self, ids: Tensor, labels: Tensor) -> Tensor:
        """Return all states of one micro-batch, noise first.

        Args:
            ids: Image ids, (B,) int64.
            labels: Classes, (B,) int64.

        Returns:
            (K + 1, B, c, h, w) float32.
        """
        self._check_rows(ids, labels)
        with self._without_gradients():
            self._fill_bank(ids, labels)
            return torch.stack(list(self._states(ids, labels)))

    def own_indices(self, ids: Tensor, labels: Tensor) -> Tensor:
        """Return the module's own index for each image, (B,) int64.

        With several prompts a class, the index is drawn by (seed, id).
        """
        if self._class_map is None:
            return labels
        own: Tensor = self._class_map[labels]
        if self._num_prompts is not None:
            bits = philox.random_bits(self.seed, ids, step=0, stream=philox.STREAM_PROMPTS, count=1)
            own = own + bits[:, 0] % self._num_prompts[labels]
        return own

    def _indices(self, ids: Tensor, labels: Tensor) -> Tensor:
        """Return the rows of the module's tables for one micro-batch, (B,) int64."""
        if self.denoiser.bank is None:
            return self.own_indices(ids, labels)
        return torch.arange(len(ids), device=ids.device)

    def _fill_bank(self, ids: Tensor, labels: Tensor) -> None:
        """Copy the prompts of one micro-batch to the device, which waits for their indices."""
        if self.denoiser.bank is not None:
            self.denoiser.bank.fill(self.own_indices(ids, labels).cpu())

    @contextmanager
    def _without_gradients(self) -> Iterator[None]:
        """Compute without gradients, which a guide may turn on inside."""
        with torch.inference_mode(self._guide is None), torch.no_grad():
            yield

    def _images(self, ids: Tensor, labels: Tensor) -> Tensor:
        """Generate one micro-batch, (B, 1 or 3, H, W) uint8; on CUDA by replaying a graph."""
        if not self._is_settled:
            self._settle_decoder(len(ids))
        self._fill_bank(ids, labels)
        self.num_made += len(ids)
        if self.device.type != "cuda":
            return self._make(ids, labels)
        if self._graph is None:
            self._graph = CudaGraph(self._make, ids, labels, memory=self.graph_memory)
            self.num_broken.zero_()  # the warm-up runs of the graph counted too
        return self._graph(ids, labels)

    def _make(self, ids: Tensor, labels: Tensor) -> Tensor:
        *_, latents = self._states(ids, labels)
        return self._decoded(latents)

    def _settle_decoder(self, count: int) -> None:
        """Decode in a dtype of larger range if over 1 % of some test images overflow.

        The images have the ids 0 to count - 1, so that every process of a run decides alike.
        """
        self._is_settled = True
        ids = torch.arange(count, device=self.device)
        labels = ids % self.denoiser.num_classes
        self._fill_bank(ids, labels)
        *_, latents = self._states(ids, labels)
        before = self.num_broken.clone()
        self._decoded(latents)
        broken = int(self.num_broken - before)
        self.num_broken.copy_(before)
        if broken <= MOST_BROKEN * count or not latents.isfinite().all():
            return
        self._decoder_dtype = wide_dtype(self.device)
        # A copy, because graphs of other samplers may use the decoder unchanged.
        assert self._decoder is not None
        with torch.inference_mode(False):
            self._decoder = copy.deepcopy(self._decoder).to(dtype=self._decoder_dtype)
        warn_once(
            f"decoder: {broken} of {count} images overflow in float16; they are decoded in "
            f"{str(self._decoder_dtype).removeprefix('torch.')}"
        )

    def _decoded(self, latents: Tensor) -> Tensor:
        """Decode one micro-batch (B, c, h, w), and count the images that are not finite."""
        size = len(latents)
        if self._decoder is not None:
            size = min(MOST_DECODED[self.device.type], size)
        segments = []
        for segment in latents.split(size):
            images, is_broken = self._finish(
                self._decoder, _fill(segment, size), self._decoder_dtype
            )
            self.num_broken += is_broken[: len(segment)].sum()
            segments.append(images[: len(segment)])
        return torch.cat(segments)

    def _states(self, ids: Tensor, labels: Tensor) -> Iterator[Tensor]:
        """Yield the K + 1 states of one micro-batch, each (B, c, h, w) float32."""
        table = self.table
        x = table.initial_scale * self._noise(ids, step=0)
        yield x
        given, scale = labels, self._scale
        if self._scales is not None:
            scale = self._scales[labels][:, None, None, None]  # (B, 1, 1, 1)
        both = labels = self._indices(ids, labels)
        if any(self._guided):
            others = labels
            if self.denoiser.weak is None:
                assert self._null_class is not None
                others = torch.full_like(labels, self._null_class)
            both = torch.cat((labels, others))  # (2B,)
        before = torch.zeros_like(x)
        for k, (module, guided) in enumerate(zip(self._modules, self._guided, strict=True)):
            # Noise is passed also where its coefficient is 0; otherwise torch.compile would need
            # another graph for such a step.
            fresh = self._noise(ids, step=k + 1) if self._is_noisy else None
            rows, row = both if guided else labels, table.rows[k]
            if self._guide is None:
                x, before = self._advance(module, x, before, row, rows, fresh, scale, self._config)
            else:
                values = coefficients(row)
                image, variance = self._estimate(module, x, values, rows, scale, self._config)
                image = image + self._correction(image, given, k)
                x, before = self._update(x, before, values, image, variance, fresh, self._config)
            yield x

    def _correction(self, image: Tensor, labels: Tensor, step: int) -> Tensor:
        """Return what the guide adds to the image estimate, (B, c, h, w)."""
        assert self._guide is not None
        version = image._version
        correction = self._guide(image, labels, self._numbers[step])
        if image._version != version:
            got, fix = "an image estimate changed in place", "clone it, or return what to add"
            raise invalid("guide", got, "one left as it is", fix)
        is_tensor = isinstance(correction, Tensor) and correction.is_floating_point()
        if not is_tensor or correction.shape != image.shape:
            got = type(correction).__name__
            if isinstance(correction, Tensor):
                got = f"{tuple(correction.shape)} {correction.dtype}"
            raise invalid("guide", got, f"a correction {tuple(image.shape)} {image.dtype}")
        return correction.detach().to(image.dtype)

    def _noise(self, ids: Tensor, step: int) -> Tensor:
        """Return the noise of one step for ids (B,), as (B, c, h, w) float32."""
        c, h, w = self.denoiser.latent_shape
        return philox.normal(self.seed, ids, step=step, count=c * h * w).view(-1, c, h, w)

    def _check_rows(self, ids: Tensor, labels: Tensor) -> None:
        tensor_checks.rows("ids", ids)
        if ids.device.type != self.device.type:
            raise invalid("ids", ids.device, f"{self.device}, the device of the sampler")
        tensor_checks.rows("labels", labels, count=len(ids), device=ids.device)
        tensor_checks.within("ids", ids, low=0, high=checks.MAX_SEED)
        # Labels on CUDA are not read, which would wait; the embedding asserts their range there.
        tensor_checks.within("labels", labels, low=0, high=self.denoiser.num_classes - 1)


def check_broken(broken: int, made: int, *, is_guided: bool = False) -> None:
    """Raise an error if too many images have values that are not finite.

    Args:
        broken: Number of images with such values.
        made: Number of all images.
        is_guided: Whether a guide has corrected the images.

    Raises:
        NotFiniteError: More than 1 % of the images have such values.
    """
    if broken > MOST_BROKEN * made:
        fix = (
            "float16 overflows in some denoisers and decoders: set dtype=bfloat16 or dtype=float32"
        )
        if is_guided:
            fix = f"check that the guide's corrections are finite; {fix}"
        raise NotFiniteError(
            f"{broken:,} of {made:,} images have values that are not finite, expected at most "
            f"{MOST_BROKEN:.0%}; {fix}"
        )


def wide_dtype(device: torch.device) -> torch.dtype:
    """Return the fastest dtype of a device that has the range of float32."""
    has_bfloat16 = device.type == "cpu" or torch.cuda.is_bf16_supported()
    return torch.bfloat16 if has_bfloat16 else torch.float32


def _fill(values: Tensor, size: int) -> Tensor:
    """Pad `values` to `size` entries by repeating the last one."""
    return torch.cat((values, values[-1:].expand(size - len(values), *values.shape[1:])))
