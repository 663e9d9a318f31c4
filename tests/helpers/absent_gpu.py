"""A stand-in for an H100 that answers every question of a compiler and computes nothing.

Tensors are fake: they have a shape, a dtype and the device cuda:0, but no memory. So Dynamo,
AOTAutograd and Inductor take the paths of the GPU as far as the machine code, and nothing can be
launched.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch._dynamo.device_interface  # looks at the real torch.cuda when imported
import torch._subclasses.fake_tensor
from torch import Tensor, nn
from torch._inductor.fx_passes import joint_graph
from torch._inductor.runtime import triton_helpers
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Node
from torch.nn import functional as F
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

CPU, DEVICE = torch.device("cpu"), torch.device("cuda", 0)
CAPABILITY = (9, 0)
PROPERTIES = SimpleNamespace(
    name="no GPU: code generation for an H100",
    major=CAPABILITY[0],
    minor=CAPABILITY[1],
    total_memory=80 << 30,
    multi_processor_count=132,
    warp_size=32,
    max_threads_per_block=1024,
    max_threads_per_multi_processor=2048,
    regs_per_multiprocessor=65536,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
    L2_cache_size=50 << 20,
    clock_rate=1755000,
    memory_clock_rate=2619000,
    memory_bus_width=5120,
    gcnArchName="",
)


class _Driver:
    """Triton's driver, which only knows the target."""

    utils = SimpleNamespace(
        get_device_properties=lambda _: {
            "max_shared_mem": PROPERTIES.shared_memory_per_block_optin,
            "max_num_regs": PROPERTIES.regs_per_multiprocessor,
            "multiprocessor_count": PROPERTIES.multi_processor_count,
            "warpSize": PROPERTIES.warp_size,
        }
    )

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 10 * CAPABILITY[0] + CAPABILITY[1], PROPERTIES.warp_size)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return DEVICE


@contextlib.contextmanager
def absent_h100() -> Iterator[FakeTensorMode]:
    """Answer the questions of compilers as an H100 would; new tensors are fake inside.

    Autograd's engine, which is C++, asks the driver itself: backward passes run on fake tensors of
    the CPU (`inductor_cuda.py` moves their graphs).
    """
    answers: dict[str, Any] = {
        "is_available": True,
        "is_initialized": True,
        "_is_in_bad_fork": False,
        "_lazy_init": None,
        "device_count": 1,
        "current_device": 0,
        "set_device": None,
        "_exchange_device": 0,
        "_maybe_exchange_device": 0,
        "synchronize": None,
        "is_bf16_supported": True,
        "get_device_name": PROPERTIES.name,
        "get_device_capability": CAPABILITY,
        "get_device_properties": PROPERTIES,
        "is_current_stream_capturing": False,
        "get_rng_state": torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": None,
    }
    # Otherwise operators of C++ would set the current device.
    torch._C._ensureCUDADeviceGuardSet()
    with contextlib.ExitStack() as stack:
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        interface = torch._dynamo.device_interface.CudaInterface
        for name, value in answers.items():
            answer = lambda *_, value=value, **__: value  # noqa: E731
            for owner in (torch.cuda, interface):
                if name in vars(owner) and (owner is torch.cuda or name != "is_available"):
                    made = staticmethod(answer) if owner is interface else answer
                    stack.enter_context(mock.patch.object(owner, name, made))
        fake = torch._subclasses.fake_tensor
        stack.enter_context(mock.patch.object(fake, "init_gpu_context"))
        stack.enter_context(mock.patch.object(triton_helpers, "set_driver_to_gpu"))
        stack.enter_context(mock.patch.object(driver, "_active", _Driver()))
        stack.enter_context(mock.patch.object(F, "scaled_dot_product_attention", _attention))
        # Constants would be made on the device.
        stack.enter_context(mock.patch.object(FakeTensorMode, "avoid_device_init", True))
        folder = joint_graph.UniformValueConstantFolder
        deduce = _deduced_on_cpu(folder._deduce_value)
        stack.enter_context(mock.patch.object(folder, "_deduce_value", deduce))
        # Patterns of graphs are traced forward and backward, on the CPU as well as on a GPU.
        patterns = functools.partial(joint_graph.lazy_init, CPU)
        on_cpu = mock.Mock(side_effect=lambda _=None: patterns())
        stack.enter_context(mock.patch.object(joint_graph, "lazy_init", on_cpu))
        stack.enter_context(mock.patch.object(nn.Module, "to", functools.partialmethod(_to, mode)))
        stack.enter_context(mode)
        yield mode


def _to(module: nn.Module, mode: FakeTensorMode, *args: Any, **kwargs: Any) -> nn.Module:
    """Take the place of `nn.Module.to`, which cannot change a fake parameter in place.

    Where the mode is on, real tensors become fake ones.
    """
    device, dtype, _, memory_format = torch._C._nn._parse_to(*args, **kwargs)

    def moved(value: Tensor) -> Tensor:
        value = value.detach()
        if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is mode:
            value = mode.from_tensor(value)
        to = dtype if dtype and value.is_floating_point() else value.dtype
        layout = memory_format if value.ndim == 4 and memory_format else torch.preserve_format
        return value.to(device or value.device, to, memory_format=layout)

    for part in module.modules():
        for name, value in part.named_parameters(recurse=False):
            new = nn.Parameter(moved(value), requires_grad=value.requires_grad)
            part._parameters[name] = new
        for name, value in part.named_buffers(recurse=False):
            part._buffers[name] = moved(value)
    return module


def _deduced_on_cpu(deduce: Callable[[Any, Node], Any]) -> Callable[[Any, Node], Any]:
    """Compute the values that constant folding reads on the CPU."""

    def deduced(folder: Any, node: Node) -> Any:
        kwargs = node.kwargs
        if kwargs.get("device") == DEVICE:
            node.kwargs = {**kwargs, "device": CPU}
        try:
            return deduce(folder, node)
        finally:
            node.kwargs = kwargs

    return deduced


def _attention(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    """Take the place of PyTorch's attention, which asks the real device for its kernel.

    One kernel takes all shapes: heads of more than 256 numbers, as in the decoder, and masks.
    """
    mask = options.pop("attn_mask", None)
    assert not any(options.values())
    if mask is not None:
        mask = mask.expand(*query.shape[:-1], key.shape[-2])
    run = torch.ops.aten._scaled_dot_product_efficient_attention
    attended: Tensor = run(query, key, value, mask, compute_log_sumexp=False)[0]
    return attended
