"""Execute the PTX of a Triton kernel with NumPy, one array element for each thread of a block.

The threads of a block run in lockstep. What PTX leaves undefined is a `KernelError`: a barrier that
some threads miss, a register that was never written, an access out of bounds or misaligned, a race.
An instruction that is not known here is a `KernelError` as well.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import ptx_numbers as numbers
import torch
from ptx_memory import Bytes, Clock, GlobalMemory, KernelError
from ptx_numbers import TYPES, WIDTHS, registers_of
from ptx_program import Instruction, Program

GARBAGE = 0xA5A5A5A5A5A5A5A5
MOST_STEPS = 200_000  # an endless loop ends here


def run(
    program: Program,
    grid: tuple[int, ...],
    arguments: Iterable[Any],
    shared_bytes: int,
    *,
    backwards: bool = False,
) -> None:
    """Run all blocks of a launch, one after the other; tensors are changed in place.

    Args:
        program: The kernel.
        grid: Blocks in each direction.
        arguments: Tensors and numbers, in the order of the kernel's parameters.
        shared_bytes: Size of the shared memory of a block.
        backwards: Whether the last block runs first.
    """
    given = list(arguments)
    given += [0] * (len(program.parameters) - len(given))  # scratch memory, unused
    tensors = {
        name: value
        for name, value in zip(program.parameters, given, strict=True)
        if isinstance(value, torch.Tensor) and value.numel()
    }
    clock = Clock(program.threads)
    memory = GlobalMemory(tensors, clock)
    grid = (*grid, 1, 1)[:3]
    indices = [tuple(reversed(at)) for at in itertools.product(*map(range, reversed(grid)))]
    order = list(enumerate(indices))
    for number, index in reversed(order) if backwards else order:
        clock.start_block(number)
        shared = Bytes(
            "shared memory",
            np.zeros(shared_bytes, np.uint8),
            np.ones(shared_bytes, np.bool_),
            False,
            clock,
        )
        names = {f"%ctaid.{axis}": at for axis, at in zip("xyz", index, strict=True)}
        names |= {f"%nctaid.{axis}": size for axis, size in zip("xyz", grid, strict=True)}
        values = dict(zip(program.parameters, map(_raw, given), strict=True))
        with np.errstate(all="ignore"):
            Block(program, names | values, memory, shared, clock).execute()


class Block:
    """One block of a launch.

    Args:
        program: The kernel.
        names: Values of parameters and of special registers.
        memory: Global memory.
        shared: Shared memory of this block.
        clock: Clock of the launch.
    """

    def __init__(
        self,
        program: Program,
        names: dict[str, int],
        memory: GlobalMemory,
        shared: Bytes,
        clock: Clock,
    ) -> None:
        self._program, self._memory, self._shared, self._clock = program, memory, shared, clock
        self._count = program.threads
        self._lane = np.arange(self._count, dtype=np.uint32)
        self._thread = self._lane.astype(np.int32) + clock.block * self._count
        self._names: dict[str, Any] = {"global_smem": 0, "%tid.y": 0, "%tid.z": 0, **names}
        self._names |= {"%tid.x": self._lane, "%ntid.x": self._count}
        self._registers: dict[str, np.ndarray] = {}
        self._active, self._is_split = np.ones(self._count, np.bool_), False
        self._constants: dict[tuple[str, str], np.ndarray] = {}

    def execute(self) -> None:
        """Run to the end; where threads part, those that are furthest behind run first."""
        code, end = self._program.code, len(self._program.code)
        at, places = 0, np.zeros(self._count, np.int64)
        for _ in range(MOST_STEPS):
            if at == end:
                return
            instruction = code[at]
            try:
                if instruction.op in ("bra", "ret"):
                    target = end
                    if instruction.op == "bra":
                        target = self._program.labels[instruction.operands[0]]
                    taken = self._mask(instruction)
                    places[self._active] = at + 1
                    places[taken] = target
                else:
                    self._step(instruction)
                    places[self._active] = at + 1
            except KernelError as fault:
                raise KernelError(f"{fault} [{instruction}]") from None
            if self._is_split or instruction.op in ("bra", "ret"):
                at = int(places.min())
                self._active = places == at
                self._is_split = not self._active.all()
            else:
                at += 1
        raise KernelError("the kernel does not end")

    def _step(self, i: Instruction) -> None:
        method = getattr(self, f"_{i.op}", None)
        if method is not None:
            method(i)
        elif i.op in numbers.UNARY and len(i.operands) == 2:
            x = numbers.flushed(self._read(i.operands[1], i.type), i)
            self._write(i, numbers.flushed(numbers.UNARY[i.op](x), i))
        elif i.op in numbers.BINARY and len(i.operands) == 3 and "NaN" not in i.modifiers:
            x, y = (
                numbers.flushed(numbers.lanes(self._read(name, i.type), i.type), i)
                for name in i.operands[1:]
            )
            self._write(i, numbers.flushed(numbers.BINARY[i.op](x, y), i))
        else:
            raise KernelError("not known")

    # Registers

    def _read(self, name: str, kind: str) -> np.ndarray:
        """Return an operand as an array of a type, one element for each thread."""
        dtype = TYPES[kind]
        if name in self._registers:
            value = self._registers[name]
        elif name in self._names:
            value = np.broadcast_to(np.asarray(self._names[name]), (self._count,)).astype(np.uint64)
        elif name.startswith("%"):
            raise KernelError(f"{name} was never written")
        else:
            key = name, kind
            if key not in self._constants:
                self._constants[key] = np.full(self._count, numbers.immediate(name), np.uint64)
            value = self._constants[key]
        if np.dtype("?") in (value.dtype, dtype):
            return value.astype(dtype)
        unsigned = np.dtype(f"u{dtype.itemsize}")
        return value.astype(unsigned, copy=False).view(dtype)

    def _write(self, i: Instruction, value: np.ndarray, name: str | None = None) -> None:
        """Set the first operand, or `name`, where the guard holds."""
        name = name or i.operands[0]
        if name == "_":
            return
        prefix = re.match(r"%[a-z]+", name)
        assert prefix, name
        dtype = WIDTHS[prefix[0]]
        if value.ndim == 2:  # two numbers in one register
            value = np.ascontiguousarray(value).view(np.uint64)[:, 0]
        if value.dtype != np.bool_:
            if value.dtype.kind == "f":
                value = value.view(f"u{value.dtype.itemsize}")
            value = value.astype(dtype)  # signed numbers keep their sign
        if i.guard is not None or self._is_split:
            mask, garbage = self._mask(i), np.uint64(GARBAGE).astype(dtype)
            before = self._registers.get(name, np.full(self._count, garbage))
            value = np.where(mask, value, before)
        self._registers[name] = value

    def _mask(self, i: Instruction) -> np.ndarray:
        if i.guard is None:
            return self._active
        mask = self._read(i.guard.strip("!"), "pred")
        return self._active & (~mask if i.guard.startswith("!") else mask)

    def _check_together(self, i: Instruction) -> None:
        if i.guard or self._is_split:
            raise KernelError("not reached by all threads together")

    # Arithmetic

    def _mul(self, i: Instruction) -> None:
        x, y = (
            numbers.flushed(numbers.lanes(self._read(n, i.type), i.type), i) for n in i.operands[1:]
        )
        self._write(i, numbers.flushed(numbers.product(x, y, i), i))

    def _mad(self, i: Instruction) -> None:
        product = numbers.product(*(self._read(n, i.type) for n in i.operands[1:3]), i)
        wide = f"{i.type[0]}{8 * product.itemsize}"
        self._write(i, product + self._read(i.operands[3], wide))

    def _fma(self, i: Instruction) -> None:
        if i.type not in ("f32", "f32x2"):
            raise KernelError("not known")
        x, y, z = (
            numbers.flushed(numbers.lanes(self._read(n, i.type), i.type), i) for n in i.operands[1:]
        )
        self._write(i, numbers.flushed((x.astype(np.float64) * y + z).astype(np.float32), i))

    def _shl(self, i: Instruction) -> None:
        self._shift(i, np.left_shift)

    def _shr(self, i: Instruction) -> None:
        self._shift(i, np.right_shift)

    def _shift(self, i: Instruction, shift: Callable[[Any, Any], Any]) -> None:
        x, bits = self._read(i.operands[1], i.type), 8 * TYPES[i.type].itemsize
        by = self._read(i.operands[2], "u32")
        most = np.minimum(by, bits - 1).astype(x.dtype)
        is_sign = i.type[0] == "s"  # which fills the places from the left
        self._write(i, np.where((by < bits) | is_sign, shift(x, most), 0).astype(x.dtype))

    def _bfe(self, i: Instruction) -> None:
        x = self._read(i.operands[1], i.type).astype(np.int64)
        start, length = (int(n, 0) for n in i.operands[2:])
        x = (x >> start) & (2**length - 1)
        if i.type[0] == "s":
            x = np.where(x >> (length - 1) & 1, x - 2**length, x)
        self._write(i, x)

    def _prmt(self, i: Instruction) -> None:
        pair = np.stack([self._read(n, "b32") for n in i.operands[1:3]], 1).view(np.uint8)
        chosen = int(i.operands[3].rstrip("U"), 0)
        picks = [(chosen >> (4 * k)) & 15 for k in range(4)]
        if max(picks) > 7:
            raise KernelError("not known")
        self._write(i, np.ascontiguousarray(pair[:, picks]).view(np.uint32)[:, 0])

    def _setp(self, i: Instruction) -> None:
        if len(i.operands) != 3:
            raise KernelError("not known")
        x, y = (self._read(n, i.type) for n in i.operands[1:])
        how, nan = i.modifiers[0], np.isnan(x) | np.isnan(y) if i.type[0] == "f" else False
        if i.type[0] == "f" and how.endswith("u"):
            self._write(i, numbers.COMPARE[how[:-1]](x, y) | nan)
        else:
            self._write(i, numbers.COMPARE[how](x, y) & ~np.broadcast_to(nan, x.shape))

    def _selp(self, i: Instruction) -> None:
        x, y = (self._read(n, i.type) for n in i.operands[1:3])
        self._write(i, np.where(self._read(i.operands[3], "pred"), x, y))

    def _cvt(self, i: Instruction) -> None:
        if len(i.operands) != 2:
            raise KernelError("not known")
        target, source = i.modifiers[-2:]
        x = numbers.flushed(self._read(i.operands[1], source), i)
        if source == "bf16":
            x = (x.astype(np.uint32) << np.uint32(16)).view(np.float32)
        if "rmi" in i.modifiers:
            x = np.floor(x)
        if target == "bf16":
            x = numbers.bfloat16(x)
        elif x.dtype.kind == "f" and target[0] in "su":
            if not {"rzi", "rmi"} & set(i.modifiers):
                raise KernelError("not known")
            x = numbers.whole(x, TYPES[target])
        else:
            x = x.astype(TYPES[target])
        self._write(i, x)

    # Moves and memory

    def _mov(self, i: Instruction) -> None:
        to, source = i.operands
        if to.startswith("{"):
            names = registers_of(to)
            raw = self._read(source, i.type).view(np.uint8).reshape(self._count, len(names), -1)
            for k, name in enumerate(names):
                self._write(i, numbers.joined(raw[:, k]), name)
        elif source.startswith("{"):
            self._write(
                i,
                numbers.joined(
                    self._bytes(registers_of(source), i.type, len(registers_of(source)))
                ),
            )
        else:
            self._write(i, self._read(source, i.type))

    def _bytes(self, names: list[str], kind: str, shared_by: int = 1) -> np.ndarray:
        """Return the bytes of several registers, each a part of `kind`, side by side."""
        size = TYPES[kind].itemsize // shared_by
        parts = [self._read(name, f"u{8 * size}") for name in names]
        return np.stack(parts, 1).view(np.uint8).reshape(self._count, -1)

    def _addresses(self, operand: str) -> np.ndarray:
        name, _, offset = operand.strip("[] ").partition("+")
        return self._read(name.strip(), "u64") + np.uint64(int(offset or "0", 0))

    def _space(self, i: Instruction) -> Bytes | GlobalMemory:
        space = i.modifiers[0].split("::")[0]
        if space not in ("shared", "global"):
            raise KernelError("not known")
        return self._shared if space == "shared" else self._memory

    def _ld(self, i: Instruction) -> None:
        dtype = TYPES[i.type]
        if i.modifiers[0] == "param":
            self._write(i, self._read(i.operands[1].strip("[]"), i.type))
            return
        names, mask = registers_of(i.operands[0]), self._mask(i)
        raw = np.zeros((self._count, dtype.itemsize * len(names)), np.uint8)
        if mask.any():
            at = self._addresses(i.operands[1])[mask]
            raw[mask] = self._space(i).load(at, raw.shape[1], self._thread[mask])
        for k, name in enumerate(names):
            part = np.ascontiguousarray(raw[:, k * dtype.itemsize : (k + 1) * dtype.itemsize])
            self._write(i, part.view(dtype)[:, 0], name)

    def _st(self, i: Instruction) -> None:
        mask = self._mask(i)
        if mask.any():
            raw = self._bytes(registers_of(i.operands[1]), i.type)[mask]
            self._space(i).store(self._addresses(i.operands[0])[mask], raw, self._thread[mask])

    def _stmatrix(self, i: Instruction) -> None:
        """Store 8 x 8 matrices of 16-bit numbers; lane 8 j + k has the address of row k of j."""
        self._check_together(i)
        if "trans" in i.modifiers:
            raise KernelError("not known")
        rows = self._addresses(i.operands[0]).reshape(-1, 32)
        lane = np.arange(32)
        for j, name in enumerate(registers_of(i.operands[1])):
            at = rows[:, 8 * j + lane // 4] + (4 * (lane % 4)).astype(np.uint64)
            self._shared.store(at.reshape(-1), self._bytes([name], "b32"), self._thread)

    def _atom(self, i: Instruction) -> None:
        if i.modifiers != ("global", "gpu", "acq_rel", "add", "u32"):
            raise KernelError("not known")
        at, by = self._addresses(i.operands[1]), self._read(i.operands[2], "u32")
        before = np.zeros(self._count, np.uint32)
        for lane in np.nonzero(self._mask(i))[0]:
            before[lane] = self._memory.add(at[lane], int(by[lane]))
            self._clock.release_and_acquire(int(self._thread[lane]))
        self._write(i, before)

    def _shfl(self, i: Instruction) -> None:
        self._check_together(i)
        if i.modifiers[:2] != ("sync", "bfly") or i.operands[3:] != ("31", "-1"):
            raise KernelError("not known")
        other = self._lane ^ np.uint32(int(i.operands[2], 0))
        self._write(i, self._read(i.operands[1], "b32")[other], i.operands[0].split("|")[0])

    def _bar(self, i: Instruction) -> None:
        self._check_together(i)
        if i.modifiers != ("sync",) or i.operands != ("0",):
            raise KernelError("not known")
        self._clock.barrier()

    def _createpolicy(self, i: Instruction) -> None:
        """Hints for the cache change no value."""

    _nop = _createpolicy


def _raw(value: Any) -> int:
    """Return the bits of an argument: the address of a tensor, the bits of a float32."""
    if isinstance(value, torch.Tensor):
        return value.data_ptr()
    if isinstance(value, float):
        return int(np.float32(value).view(np.uint32))
    return int(value) % 2**64
