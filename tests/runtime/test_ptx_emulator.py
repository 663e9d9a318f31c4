"""The emulator of PTX notices what a GPU leaves undefined."""

from __future__ import annotations

import numpy as np
import ptx_emulator
import pytest
import torch
from ptx_memory import KernelError
from ptx_program import parse

HEAD = """
.visible .entry kernel(
	.param .u64 .ptr .global .align 1 kernel_param_0,
	.param .u64 .ptr .global .align 1 kernel_param_1
)
.reqntid 64
{
	ld.param.b64 %rd1, [kernel_param_0];
	ld.param.b64 %rd2, [kernel_param_1];
	mov.u32 %r1, %tid.x;
	mov.u32 %r2, %ctaid.x;
	shl.b32 %r3, %r1, 2;
	setp.eq.s32 %p1, %r1, 0;
	setp.eq.s32 %p2, %r1, 63;
	setp.eq.s32 %p3, %r2, 0;
	mad.wide.u32 %rd3, %r1, 4, %rd1;
"""


def run(code: str, *, blocks: int = 1, count: int = 64) -> list[int]:
    """Run a kernel on `count` numbers, 0 to begin with, and a counter; return the numbers."""
    numbers, counter = torch.zeros(count, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    program = parse(HEAD + code + "\n\tret;\n}\n")
    ptx_emulator.run(program, (blocks,), (numbers, counter), 256)
    return numbers.tolist()


WRITE, BARRIER, READ = "st.shared.b32 [%r3], %r1;", "bar.sync 0;", "ld.shared.b32 %r4, [%r5];"
MIRROR = "sub.s32 %r5, 252, %r3;"
STORE = "st.global.b32 [%rd3], %r4;"
PUBLISH = "@%p1 atom.global.gpu.acq_rel.add.u32 %r6, [%rd2], 1;"
FIRST_WRITES = "and.pred %p4, %p2, %p3; @%p4 st.global.b32 [%rd3], 7;"
SECOND_READS = "not.pred %p5, %p3; @%p5 ld.global.b32 %r4, [%rd1 + 252];"


def test_ordered_threads_see_what_others_wrote() -> None:
    assert run(WRITE + MIRROR + BARRIER + READ + STORE) == list(range(63, -1, -1))
    run(FIRST_WRITES + BARRIER + PUBLISH + BARRIER + SECOND_READS, blocks=2)


def test_threads_that_part_meet_again() -> None:
    loop = "$L__1: add.s32 %r4, %r4, 1; setp.lt.s32 %p4, %r4, %r1; @%p4 bra $L__1;"
    assert run("mov.b32 %r4, 0;" + loop + BARRIER + STORE) == [1, *range(1, 64)]


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (WRITE + MIRROR + READ, "read without a barrier"),
        (WRITE + MIRROR + BARRIER + READ + WRITE.replace("r1", "r4"), "after another thread's"),
        ("mov.b32 %r5, 0; st.shared.b32 [%r5], %r1;", "different values at once"),
        ("@%p1 st.shared.b32 [0], 1; @%p2 st.shared.b32 [0], 2;", "write different values"),
        ("st.shared.b32 [%r3 + 4], %r1;", "shared memory: access out of bounds"),
        ("mov.b32 %r5, 8; " + READ, "before it was written"),
        ("ld.global.b32 %r4, [%rd3 + 4];", "out of bounds"),
        ("ld.global.b32 %r4, [%rd3 + 2];", "misaligned"),
        ("add.s32 %r4, %r9, 1;", "never written"),
        ("@%p1 bra $L__1; " + BARRIER + " $L__1: mov.b32 %r4, 0;", "by all threads"),
        ("$L__1: bra $L__1;", "does not end"),
        ("lop3.b32 %r4, %r1, %r1, %r1, 0;", "not known"),
    ],
)
def test_a_fault_is_noticed(code: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ptx_emulator, "MOST_STEPS", 100)
    with pytest.raises(KernelError, match=message):
        run(code)


@pytest.mark.parametrize(
    "code",
    [
        FIRST_WRITES + PUBLISH + BARRIER + SECOND_READS,  # the writer is another thread
        FIRST_WRITES + BARRIER + PUBLISH + SECOND_READS,  # so is the reader
        FIRST_WRITES + BARRIER + SECOND_READS,
    ],
)
def test_blocks_see_only_what_others_published(code: str) -> None:
    with pytest.raises(KernelError, match="race"):
        run(code, blocks=2)


def test_rounding_and_special_values_are_those_of_ptx() -> None:
    values = np.array([1.00390625, 1.01171875, 3.4e38, -0.0, 1e-40], np.float32)  # two ties
    bits = values.view(np.uint32)
    code = "".join(
        f"mov.b32 %r4, {value}; cvt.rn.bf16.f32 %rs1, %r4; cvt.u32.u16 %r5, %rs1;"
        f"@%p1 st.global.b32 [%rd1 + {4 * place}], %r5;"
        for place, value in enumerate(bits)
    )
    expected = torch.from_numpy(values).bfloat16().view(torch.int16).tolist()
    assert run(code)[: len(values)] == [value % 2**16 for value in expected]
    flushed = "mul.rn.ftz.f32 %r4, 0f00800000, 0f3F000000; " + STORE
    assert run(flushed) == [0] * 64
    compared = "setp.ne.f32 %p4, 0f7FC00000, 0f00000000; setp.neu.f32 %p5, 0f7FC00000, 0f00000000;"
    chosen = "selp.b32 %r4, 2, 0, %p4; selp.b32 %r5, 1, 0, %p5; add.s32 %r4, %r4, %r5; "
    assert run(compared + chosen + STORE) == [1] * 64
