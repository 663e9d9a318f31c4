"""Generate Inductor's CUDA code for an absent H100, and count what it would launch.

`inductor_cases.py` runs the package's own compiled functions on fake tensors, so that torch.compile
makes the graphs of a GPU. Their Triton kernels are compiled, and nothing is launched. After a
deliberate change, write the golden file and the table in docs/guides/gpu.md again with

    python tests/helpers/inductor_cuda.py
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import aot
import torch
from absent_gpu import CPU, DEVICE, absent_h100
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor import compile_fx, config, graph, ir, output_code, scheduler
from torch._inductor.codecache import PyCodeCache
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

ROOT = Path(__file__).parents[2]
VERSION = "2.14"
GOLDEN = ROOT / "tests" / "golden" / f"inductor_cuda_{VERSION}.json"
PAGE, BEGIN, END = ROOT / "docs" / "guides" / "gpu.md", "<!-- inductor -->\n", "<!-- end -->\n"
OPTIONS = {
    "compile_threads": 1,
    "force_disable_caches": True,
    "use_static_cuda_launcher": False,  # it loads kernels on the device
    "deterministic": True,  # as `runtime.device.make_repeatable` sets it
}
KERNEL = re.compile(r"async_compile\.triton\('(\w+)', '''(.*?)''', device_str='cuda'\)", re.DOTALL)
REPORT = r"Used (\d+) registers", r"(\d+) bytes spill stores", r"(\d+) bytes spill loads"
REAL_COMPILE = torch.compile


class Recorder:
    """The graphs that torch.compile makes, each lowered for the absent GPU.

    Args:
        mode: Mode of the fake tensors.

    Attributes:
        graphs: Counts of each graph, in the order of their compilation.
    """

    builds: dict[str, dict[str, int]] = {}  # noqa: RUF012 - by source, shared by all cases

    def __init__(self, mode: FakeTensorMode) -> None:
        self.mode = mode
        self.graphs: list[dict[str, Any]] = []
        self._device: torch.device | None = None  # of results; None: that of the graph

    def compile(self, model: Any, **options: Any) -> Any:
        """Take the place of `torch.compile`."""
        return _Compiled(REAL_COMPILE(model, backend=self._backend, **options))

    def compile_to_module(self, lowering: Any) -> Any:
        """Take the place of `GraphLowering.compile_to_module`, which would load the kernels."""
        code, _ = lowering.codegen()
        facts = self._facts(lowering, code.value)
        self.graphs.append(facts)
        outputs = [self._output(node) for node in lowering.graph_outputs]

        def call(args: list[Any]) -> list[Any]:
            facts["calls"] += 1
            args.clear()
            with self.mode:
                return [make() for make in outputs]

        return SimpleNamespace(call=call, __file__="")

    def _backend(self, module: Any, inputs: list[Tensor]) -> Any:
        return compile_fx.compile_fx(module, inputs, inner_compile=self._inner)

    def _inner(self, module: Any, inputs: Any, **options: Any) -> Any:
        """Lower a graph; one that was traced on the CPU is moved to the GPU before."""
        is_moved = any(isinstance(x, Tensor) and x.device == CPU and x.ndim for x in inputs)
        self._device = CPU if is_moved else None
        if is_moved:
            inputs = [_on_cuda(x) for x in inputs]
            places = [node for node in module.graph.nodes if node.op == "placeholder"]
            for node, value in zip(places, inputs, strict=True):
                node.meta["val"] = value
            for node in module.graph.nodes:
                if node.kwargs.get("device") == CPU:
                    node.kwargs = {**node.kwargs, "device": DEVICE}
        return compile_fx.compile_fx_inner(module, inputs, **options)

    def _output(self, node: Any) -> Callable[[], Any]:
        if not node.has_tensor_output():
            return lambda: None
        size, stride = (tuple(map(int, x)) for x in (node.get_size(), node.get_stride()))
        dtype, device = node.get_dtype(), self._device or node.get_device()
        return lambda: torch.empty_strided(size, stride, dtype=dtype, device=device)

    def _facts(self, lowering: Any, code: str) -> dict[str, Any]:
        products: Counter[str] = Counter()
        launches = in_products = between = 0
        for node, num_bytes in _nodes(lowering, {}):
            if isinstance(node.node, ir.MultiOutput):  # a name for one of a product's results
                continue
            if isinstance(node, scheduler.ExternKernelSchedulerNode):
                products[_name(node.node)] += 1
                in_products += num_bytes
            elif not isinstance(node, scheduler.NopKernelSchedulerNode):
                launches += 1
                between += num_bytes
        sources = dict(KERNEL.findall(code))
        assert len(sources) == code.count("async_compile.triton("), "KERNEL does not find all"
        builds = [self._build(name, source) for name, source in sources.items()]
        return {
            "calls": 0,
            "products": dict(sorted(products.items())),
            "launches": launches,
            "kernels": len(builds),
            "bytes of products": in_products,
            "bytes between": between,
            "most registers": max((build["registers"] for build in builds), default=0),
            "spills": sum(build["spills"] for build in builds),
        }

    def _build(self, name: str, source: str) -> dict[str, int]:
        """Compile a kernel in all configurations that Inductor would choose from."""
        key = source.replace(name, "kernel")
        if key not in self.builds:
            kernel = getattr(PyCodeCache.load(source), name)
            kernel._precompile_worker()
            found = [usage(result.kernel.asm["ptx"]) for result in kernel.compile_results]
            self.builds[key] = {fact: max(build[fact] for build in found) for fact in found[0]}
        return self.builds[key]


class _Compiled(nn.Module):
    """A compiled module or function, called outside of the mode of fake tensors."""

    def __init__(self, compiled: Any) -> None:
        super().__init__()
        self.compiled = compiled

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with unset_fake_temporarily():
            return self.compiled(*args, **kwargs)


@contextlib.contextmanager
def recording() -> Iterator[Recorder]:
    """Record the graphs that torch.compile makes inside."""
    torch._dynamo.reset()
    counters.clear()
    with absent_h100() as mode, config.patch(OPTIONS), contextlib.ExitStack() as stack:
        recorder = Recorder(mode)
        for owner, name, stand_in in (
            (torch, "compile", recorder.compile),
            (graph.GraphLowering, "compile_to_module", _method(recorder.compile_to_module)),
            # Fake tensors have no address whose alignment could be checked.
            (output_code, "align_inputs_from_check_idxs", lambda model, *_, **__: model),
        ):
            stack.enter_context(mock.patch.object(owner, name, stand_in))
        yield recorder


def _method(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return a function that becomes a method where it is an attribute of a class."""
    return lambda self: function(self)  # noqa: PLW0108


def record(run: Callable[[FakeTensorMode], None]) -> dict[str, Any]:
    """Return graph breaks and the counts of all graphs of a case."""
    with recording() as recorder:
        run(recorder.mode)
    return {"breaks": sum(counters["graph_break"].values()), "graphs": recorder.graphs}


def record_all() -> dict[str, Any]:
    """Return the counts of all cases, made by two processes."""
    from inductor_cases import CASES

    names = list(CASES)[::-1]  # the longest ones first
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        made = dict(zip(names, pool.map(_record_one, names), strict=True))
    return {name: made[name] for name in CASES}


def _record_one(name: str) -> dict[str, Any]:
    from inductor_cases import CASES

    return record(CASES[name].run)


def usage(ptx: str) -> dict[str, int]:
    """Return registers and spilled bytes of a kernel, as ptxas reports them."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        command = [aot.TOOLS / "ptxas", "-v", "--gpu-name=sm_90a", source, "-o", f"{source}.cubin"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    found = [re.search(pattern, said) for pattern in REPORT]
    registers, *spills = (int(match[1]) if match else 0 for match in found)
    assert registers, said
    return {"registers": registers, "spills": sum(spills)}


def difference(fewer: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """Return what the only graph of `more` has beside that of `fewer`."""
    (first,), (second,) = fewer["graphs"], more["graphs"]
    numbers = {name: second[name] - first[name] for name in ("launches", "bytes between")}
    products = Counter(second["products"])
    products.subtract(first["products"])
    return numbers | {"products": {name: count for name, count in products.items() if count}}


def table(results: dict[str, Any]) -> str:
    """Return the table of docs/guides/gpu.md."""
    from inductor_cases import CASES, PAPER

    rows = [(name, case.rows, case.unit, results[name]["graphs"]) for name, case in CASES.items()]
    block = difference(*(results[PAPER.format(layers)] for layers in (2, 3)))
    first = CASES[PAPER.format(2)]
    rows.insert(0, ("one block of DiT-XL/2, guided", first.rows, first.unit, [block]))
    lines = [
        "| part | products | Triton launches | MB between products |",
        "| --- | --- | --- | --- |",
    ]
    for name, count, unit, graphs in rows:
        cells = [
            ", ".join(str(sum(graph["products"].values())) for graph in graphs),
            ", ".join(str(graph["launches"]) for graph in graphs),
            ", ".join(f"{graph['bytes between'] / count / 1e6:.1f}" for graph in graphs),
        ]
        lines.append(f"| {name} | {' | '.join(cells)} {unit} |")
    return "\n".join(lines) + "\n"


def _nodes(lowering: Any, subgraphs: dict[str, Any]) -> Iterator[tuple[Any, int]]:
    """Yield what a graph runs, and its bytes; a subgraph, as a block, as often as it is called."""
    for node in lowering.scheduler.nodes:
        if isinstance(getattr(node, "node", None), ir.InvokeSubgraph):
            subgraph = node.node.subgraph  # its code is generated once
            yield from _nodes(subgraphs.setdefault(subgraph.name, subgraph.graph), subgraphs)
        else:
            with V.set_graph_handler(lowering):  # names of buffers are those of the graph
                num_bytes = node.get_read_write_buffers_sizes_impl(
                    include_reads=True, include_writes=True
                )
            yield node, int(num_bytes)


def _name(node: Any) -> str:
    names = (getattr(node, name, None) for name in ("python_kernel_name", "op_overload"))
    return str(next(filter(None, names), type(node).__name__))


def _on_cuda(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    with value.fake_mode:  # type: ignore[attr-defined]
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=DEVICE)


def main(arguments: list[str]) -> None:
    """Write the golden file and the table; with `--print`, print the results instead."""
    results = record_all()
    if arguments == ["--print"]:
        print(json.dumps(results))
        return
    aot.write(GOLDEN, {"torch": VERSION, **results})
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    page = f"{before}{BEGIN}{table(results)}{END}{rest.partition(END)[2]}"
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
