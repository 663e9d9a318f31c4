"""What a DiT block reads and writes between its products on CUDA, counted in its traced graph."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Node
from torch.fx.experimental.proxy_tensor import make_fx

from dmkd_fast.denoisers import attention
from dmkd_fast.denoisers.dit import DiTBlock
from dmkd_fast.denoisers.kernels import gelu_tanh, quantize_rows, residual_norm

IMAGES, TOKENS, WIDTH, HEADS = 2, 16, 64, 4
PRODUCTS = ("mm", "addmm", "linear_gelu", "xformers_attention", "_scaled_mm")
VIEWS = (
    "view",
    "_unsafe_view",
    "permute",
    "unsqueeze",
    "transpose",
    "t",
    "unbind",
    "getitem",
    "clone",
    "select",
    "slice",
)


@contextmanager
def bfloat16() -> Iterator[None]:
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(torch.float32)


class Passes:
    """The passes between products, each with the activations of (B, T, D) that it moves.

    All elementwise work after the same number of products in a row is one pass, as torch.compile
    fuses it.
    """

    def __init__(self, forward: Callable[..., Any], *, fp8: bool = False) -> None:
        with FakeTensorMode(), torch.device("cuda"), bfloat16(), torch.no_grad():
            block: Any = DiTBlock(WIDTH, HEADS, bias=True, eps=1e-5)
            x, normed = torch.empty(2, IMAGES, TOKENS, WIDTH).unbind()
            if fp8:
                for product in block.children():
                    product.fp8_weight = quantize_rows(product.weight)
            traced = make_fx(lambda *args: forward(block, *args, "xformers"))(
                x, normed, torch.empty(IMAGES, 6, WIDTH)
            )
        self.products: list[str] = []
        self.level: dict[Node, int] = {}
        self._moved: dict[int, set[Node]] = defaultdict(set)
        for node in traced.graph.nodes:
            self._add(node)
        self.moved = {
            level: sum(_numel(node) for node in nodes) / (IMAGES * TOKENS * WIDTH)
            for level, nodes in sorted(self._moved.items())
        }

    def _add(self, node: Node) -> None:
        if node.op not in ("call_function", "output") or _name(node) in VIEWS:
            return
        sources = {_source(argument) for argument in node.all_input_nodes}
        level = max((self.level[s] + _is_product(s) for s in sources if s in self.level), default=0)
        self.level[node] = level
        is_pass = node.op != "output" and not _is_product(node)
        if _is_product(node):
            self.products.append(_name(node))
        for source in sources:
            if _numel(source) < IMAGES * TOKENS * WIDTH:
                continue
            made_in = self.level.get(source)
            is_own = is_pass and made_in == level and not _is_product(source)
            if is_pass and not is_own:
                self._moved[level].add(source)  # read
            if not is_own and made_in is not None and not _is_product(source):
                self._moved[made_in].add(source)  # written


def _name(node: Node) -> str:
    """Return `mm` for `aten.mm.default`."""
    return str(getattr(node.target, "_opname", getattr(node.target, "__name__", "")))


def _is_product(node: Node) -> bool:
    return node.op == "call_function" and _name(node) in PRODUCTS


def _source(node: Node) -> Node:
    while node.op == "call_function" and _name(node) in VIEWS:
        node = node.all_input_nodes[0]
    return node


def _numel(node: Node) -> int:
    value = node.meta.get("val")
    value = value[0] if isinstance(value, tuple | list) else value
    return math.prod(value.shape) if isinstance(value, Tensor) else 0


def as_on_a_cpu(
    block: DiTBlock, x: Tensor, normed: Tensor, modulation: Tensor, kind: Any
) -> tuple[Tensor, Tensor]:
    """Add biases and run gelu after the products, as a CPU does, by the definitions."""
    gate, shift, scale, gate_mlp, *end = modulation.unbind(1)
    qkv = F.linear(normed, block.qkv.weight).unflatten(2, (3, HEADS, -1))
    mixed = F.linear(attention.attend(qkv, block.qkv.bias, kind).flatten(2), block.project.weight)
    x, normed = residual_norm(x, mixed, block.project.bias, gate, shift, scale, eps=1e-5)
    hidden = gelu_tanh(F.linear(normed, block.up.weight), block.up.bias)
    hidden = F.linear(hidden, block.down.weight)
    return residual_norm(x, hidden, block.down.bias, gate_mlp, *end, eps=1e-6)


def test_biases_and_gelu_of_a_block_are_no_passes_of_their_own() -> None:
    before, now = Passes(as_on_a_cpu), Passes(DiTBlock.forward)
    # query, key, value: read and write 3; residual and norm: 4; gelu: read and write 4; again 4.
    assert list(before.moved.values()) == [6, 4, 8, 4]
    assert list(now.moved.values()) == [4, 4]
    attention = "xformers_attention"
    assert before.products == ["mm", attention, "mm", "mm", "mm"]
    assert now.products == ["addmm", attention, "mm", "linear_gelu", "mm"]


def test_rounding_to_8_bits_runs_in_the_passes_that_exist() -> None:
    """All four products take 8 bits; the result of attention is the one that needs a pass."""
    passes = Passes(DiTBlock.forward, fp8=True)
    assert passes.products.count("_scaled_mm") == 4 and len(passes.products) == 5
    assert len(passes.moved) == 5  # before each product, and the last residual and norm
