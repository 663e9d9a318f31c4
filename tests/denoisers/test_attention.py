"""Which attention kernel runs: xFormers' dispatcher decides, and its answer is reported."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from small_models import small_dit
from torch._subclasses.fake_tensor import FakeTensorMode

from dmkd_fast.denoisers import attention
from dmkd_fast.denoisers.denoiser import Denoiser
from dmkd_fast.denoisers.dit import lean_dit
from dmkd_fast.jobs.images import attention_facts
from dmkd_fast.runtime import errors

CUDA = torch.device("cuda", 0)
SHAPE: dict[str, Any] = {"num_tokens": 256, "num_heads": 16, "head_dim": 72}
REFUSAL = """No operator found for `memory_efficient_attention_forward` with inputs:
     query       : shape=(2, 256, 16, 72) (torch.float16)
`fa2F@2.5.7-pt` is not supported because:
    xFormers wasn't build with CUDA support
`cutlassF-pt` is not supported because:
    xFormers wasn't build with CUDA support
    operator wasn't built"""


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], list[Any]]:
    """Install a stand-in for xFormers that answers like its dispatcher; return what it is asked."""

    def install(answer: Any) -> list[Any]:
        given: list[Any] = []

        class Inputs(SimpleNamespace):
            def validate_inputs(self) -> None:
                given.append(self)

        def dispatch(inputs: Any, needs_gradient: bool) -> Any:
            assert inputs is given[-1] and not needs_gradient
            if isinstance(answer, Exception):
                raise answer
            return SimpleNamespace(NAME=answer)

        names = ("xformers", "xformers.ops", "xformers.ops.fmha", "xformers.ops.fmha.dispatch")
        for name in names:
            module: Any = ModuleType(name)
            monkeypatch.setitem(sys.modules, name, module)
            parent, _, leaf = name.rpartition(".")
            if parent:
                setattr(sys.modules[parent], leaf, module)
        fmha: Any = sys.modules["xformers.ops.fmha"]
        fmha.Inputs, fmha.dispatch._dispatch_fw = Inputs, dispatch
        # The dispatcher never tries this one, which takes everything.
        fmha.ALL_FW_OPS = [SimpleNamespace(not_supported_reasons=lambda _: [])]
        monkeypatch.setattr(errors, "_warned", set())
        return given

    return install


def resolve(name: attention.Attention, device: torch.device = CUDA) -> str:
    with FakeTensorMode():
        return attention.resolve(name, device=device, dtype=torch.float16, **SHAPE)


def test_xformers_is_asked_first_on_cuda_with_the_tensors_that_it_will_get(
    asked: Callable[[Any], list[Any]], caplog: pytest.LogCaptureFixture
) -> None:
    given = asked("fa2F@2.5.7-pt")
    assert resolve("auto") == resolve("xformers") == "xformers"
    for inputs in given:
        for part in (inputs.query, inputs.key, inputs.value):
            assert part.device == CUDA and part.dtype == torch.float16
            assert part.shape == (2, 256, 16, 72)
            assert part.stride() == (3 * 256 * 1152, 3 * 1152, 72, 1)  # parts of one product
    assert len(given) == 2 and not caplog.records
    with FakeTensorMode():
        name = attention.describe("xformers", device=CUDA, dtype=torch.float16, **SHAPE)
    assert name == "xformers fa2F@2.5.7-pt"


def test_auto_falls_to_sdpa_where_the_dispatcher_finds_nothing_and_says_so_once(
    asked: Callable[[Any], list[Any]], caplog: pytest.LogCaptureFixture
) -> None:
    given = asked(NotImplementedError(REFUSAL))
    with caplog.at_level(logging.WARNING, logger="dmkd_fast"):
        assert resolve("auto") == resolve("auto") == "sdpa"
    assert len(given) == 2 and len(caplog.messages) == 1
    text = caplog.messages[0]
    assert "scaled_dot_product_attention" in text and text.endswith(
        "xFormers wasn't build with CUDA support; operator wasn't built"
    )


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (NotImplementedError(REFUSAL), "wasn't build with CUDA support; operator wasn't built"),
        (RuntimeError("schema\n of another torch"), "schema of another torch"),
        (AttributeError("no name"), "no name"),
        (TypeError("unexpected argument"), "unexpected argument"),
    ],
)
def test_xformers_that_cannot_dispatch_is_an_error_and_never_a_fallback(
    answer: Exception, reason: str, asked: Callable[[Any], list[Any]]
) -> None:
    asked(answer)
    with pytest.raises(errors.UserError, match="attention: got xformers") as raised:
        resolve("xformers")
    assert reason in str(raised.value) and "set attention=auto" in str(raised.value)


def test_a_missing_xformers_is_a_reason_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xformers", None)
    monkeypatch.setitem(sys.modules, "xformers.ops", None)
    monkeypatch.setattr(errors, "_warned", set())
    assert resolve("auto") == "sdpa"
    with pytest.raises(errors.UserError, match=r"got xformers.*xformers"):
        resolve("xformers")


def test_xformers_is_not_asked_on_a_cpu_nor_for_another_kernel(
    asked: Callable[[Any], list[Any]],
) -> None:
    given = asked("fa2F")
    assert resolve("auto", torch.device("cpu")) in ("short", "sdpa")
    assert resolve("sdpa") == "sdpa"
    with pytest.raises(errors.UserError, match="it runs on CUDA only"):
        resolve("xformers", torch.device("cpu"))
    assert not given


def test_the_summary_names_the_operator_that_runs(
    asked: Callable[[Any], list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    lean = lean_dit(small_dit())
    assert lean is not None
    images = Denoiser(module=lean, scheduler={}, latent_shape=(4, 8, 8))
    lean.attention = "sdpa"
    monkeypatch.setattr(torch, "_fused_sdp_choice", lambda *_: 2)
    facts = attention_facts(images, torch.device("cpu"), "float32")
    assert facts == {"attention": "sdpa efficient_attention"}
    asked("cutlassF-pt")
    lean.attention = "xformers"
    facts = attention_facts(images, torch.device("cpu"), "float32")
    assert facts == {"attention": "xformers cutlassF-pt"}
    lean.attention = "short"
    assert attention_facts(images, torch.device("cpu"), "float32") == {"attention": "short"}


def test_the_dispatcher_of_the_installed_xformers_can_be_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("xformers")
    from xformers._cpp_lib import _built_with_cuda

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    with FakeTensorMode():
        operator, reason = attention.find_xformers(CUDA, torch.float16, *SHAPE.values())
        assert bool(operator) != bool(reason)
        if _built_with_cuda:  # as in the environment of `make test-xformers`
            assert operator
        # Blackwell has no operator for such wide heads, though one that is never tried takes them.
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (10, 0))
        operator, reason = attention.find_xformers(CUDA, torch.float16, 256, 16, 320)
    assert operator == "" and reason
