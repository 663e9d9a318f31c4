"""Generate Inductor's CUDA code for an H100 that is absent, and count what it launches.

Each case runs the package's own compiled functions on fake tensors (`absent_gpu.py`), so that
torch.compile makes the graphs of a GPU. After a deliberate change, write the golden file again with

    python tests/helpers/inductor_cuda.py
"""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from absent_gpu import absent_h100
from aot import TOOLS
from paper_models import DIT, IMAGENET, VAE
from torch import Tensor, nn
from torch._inductor import config, graph, scheduler
from torch._inductor.codecache import PyCodeCache
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch._dynamo.utils import counters

GOLDEN = Path(__file__).parents[1] / "golden" / "inductor_cuda_2.14.json"
FLAGS = {
    "compile_threads": 1,
    "force_disable_caches": True,
    "deterministic": True,  # as `runtime.device.make_repeatable` sets it
}
SOURCE = re.compile(r"async_compile\.triton\('(\w+)', '''(.*?)''', device_str='cuda'\)", re.DOTALL)


class Recorder:
    """What torch.compile made: graphs, and their Triton kernels by source."""

    def __init__(self, mode: FakeTensorMode) -> None:
        self.mode = mode
        self.graphs: list[dict[str, Any]] = []
        self.sources: dict[str, dict[str, int]] = {}

    def compile_to_module(self, lowering: Any) -> Any:
        """Take the place of `GraphLowering.compile_to_module`, which would load the kernels."""
        code, _ = lowering.codegen()
        self.graphs.append(self._facts(lowering, code.value))
        Path(f"/tmp/cg/code{len(self.graphs)}.py").write_text(code.value)
        outputs = [self._output(node) for node in lowering.graph_outputs]

        def call(args: list[Any]) -> list[Any]:
            args.clear()
            with self.mode:
                return [make() for make in outputs]

        return SimpleNamespace(call=call, __file__="")

    def _output(self, node: Any) -> Callable[[], Any]:
        if not node.has_tensor_output():
            return lambda: None
        size, stride = (tuple(map(int, x)) for x in (node.get_size(), node.get_stride()))
        dtype, device = node.get_dtype(), node.get_device()
        return lambda: torch.empty_strided(size, stride, dtype=dtype, device=device)

    def _facts(self, lowering: Any, code: str) -> dict[str, Any]:
        products: Counter[str] = Counter()
        num_bytes = {"products": 0, "between": 0}
        for node in lowering.scheduler.nodes:
            if isinstance(node, scheduler.NopKernelSchedulerNode):
                continue
            moved = int(node.get_read_write_buffers_sizes())
            if isinstance(node, scheduler.ExternKernelSchedulerNode):
                products[_name(node.node)] += 1
                num_bytes["products"] += moved
            else:
                num_bytes["between"] += moved
        names = dict(SOURCE.findall(code))
        launches = {name: len(re.findall(rf"\b{name}\.run\(", code)) for name in names}
        kernels = [self._kernel(name, source) for name, source in names.items()]
        return {
            "products": dict(sorted(products.items())),
            "launches": sum(launches.values()),
            "kernels": len(names),
            "bytes": num_bytes,
            "registers": max((k["registers"] for k in kernels), default=0),
            "spills": sum(k["spills"] for k in kernels),
        }

    def _kernel(self, name: str, source: str) -> dict[str, int]:
        key = source.replace(name, "kernel")
        if key not in self.sources:
            kernel = getattr(PyCodeCache.load(source), name)
            kernel._precompile_worker()
            builds = [usage(result.kernel.asm) for result in kernel.compile_results]
            self.sources[key] = {k: max(b[k] for b in builds) for k in builds[0]}
        return self.sources[key]


def usage(asm: dict[str, Any]) -> dict[str, int]:
    """Return registers and spilled bytes of a kernel, as ptxas reports them."""
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as ptx:
        ptx.write(asm["ptx"])
        ptx.flush()
        command = [str(TOOLS / "ptxas"), "-v", "--gpu-name=sm_90a", ptx.name, "-o", "/dev/null"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers, stores, loads = (
        int(re.search(pattern, said)[1])  # type: ignore[index]
        for pattern in (r"Used (\d+) registers", r"(\d+) bytes spill stores", r"(\d+) bytes spill loads")
    )
    return {"registers": registers, "spills": stores + loads}


def _name(node: Any) -> str:
    name = node.get_kernel_name() if hasattr(node, "get_kernel_name") else type(node).__name__
    return str(name or getattr(node, "op_overload", type(node).__name__))


class _Compiled(nn.Module):
    """A compiled module or function that is called outside of the mode of fake tensors."""

    def __init__(self, compiled: Any) -> None:
        super().__init__()
        self.compiled = compiled

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with unset_fake_temporarily():
            return self.compiled(*args, **kwargs)


@contextlib.contextmanager
def recording() -> Iterator[Recorder]:
    """Record what torch.compile makes inside, for an absent H100."""
    real = torch.compile
    with absent_h100() as mode, config.patch(FLAGS), contextlib.ExitStack() as stack:
        recorder = Recorder(mode)
        stack.enter_context(
            mock.patch.object(torch, "compile", lambda m, **options: _Compiled(real(m, **options)))
        )
        stack.enter_context(
            mock.patch.object(
                graph.GraphLowering,
                "compile_to_module",
                lambda lowering: recorder.compile_to_module(lowering),
            )
        )
        yield recorder



def main() -> None:
    import sys, time
    from inductor_cases import CASES
    results = {}
    for name, case in CASES.items():
        if len(sys.argv) > 1 and not any(a in name for a in sys.argv[1:]):
            continue
        began = time.time()
        with recording() as recorder:
            case(recorder.mode)
        results[name] = recorder.graphs
        print(name, json.dumps(recorder.graphs, indent=1), round(time.time() - began, 1), flush=True)


if __name__ == "__main__":
    main()
