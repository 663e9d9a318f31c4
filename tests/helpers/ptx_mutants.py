"""Plant faults in the PTX of a kernel, to see that a test notices them."""

from __future__ import annotations

from collections.abc import Callable

from ptx_program import Instruction, Program

Change = Callable[[Program], Program]


def without_barrier(number: int) -> Change:
    """Leave out one barrier."""
    return lambda program: program.without(program.positions("bar")[number])


def replaced(old: str, new: str, number: int | None = None) -> Change:
    """Replace text of instructions as `str(instruction)` prints them, everywhere or once."""

    def change(program: Program) -> Program:
        code, found = list(program.code), 0
        for at, instruction in enumerate(code):
            if old in str(instruction):
                if number in (None, found):
                    code[at] = _again(instruction, old, new)
                found += 1
        assert found > (number or 0), f"no such instruction: {old}"
        return program._replace(code=code)

    return change


def _again(instruction: Instruction, old: str, new: str) -> Instruction:
    modifiers = ".".join(instruction.modifiers).replace(old, new)
    operands = "; ".join(instruction.operands).replace(old, new)
    changed = instruction._replace(
        modifiers=tuple(modifiers.split(".")), operands=tuple(operands.split("; "))
    )
    assert changed != instruction, f"not inside of modifiers or operands: {old}"
    return changed
