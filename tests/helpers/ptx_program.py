"""Parse the PTX of one Triton kernel into instructions (`ptx_emulator.py` executes them)."""

from __future__ import annotations

import re
from typing import NamedTuple

_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
_PARAMETER = re.compile(r"\.param\s+\.(\w+)[^,)]*?(\w+)\s*(?=[,)])")
_INSTRUCTION = re.compile(r"(?:@(!?%p\d+)\s+)?([a-z]\w*)([\w.:]*)\s*(.*)", re.DOTALL)


class Instruction(NamedTuple):
    """One instruction: `@guard op.modifiers operands`; the last modifier is the type."""

    guard: str | None
    op: str
    modifiers: tuple[str, ...]
    operands: tuple[str, ...]

    @property
    def type(self) -> str:
        """Type of the operands, or of the source of a conversion."""
        return self.modifiers[-1]

    def __str__(self) -> str:
        guard = f"@{self.guard} " if self.guard else ""
        return f"{guard}{'.'.join((self.op, *self.modifiers))} {', '.join(self.operands)}"


class Program(NamedTuple):
    """A parsed kernel: parameters with their types, threads of a block, code, and jump targets."""

    parameters: dict[str, str]
    threads: int
    code: list[Instruction]
    labels: dict[str, int]

    def without(self, position: int) -> Program:
        """Return the program with one instruction left out; labels keep their positions."""
        skip = Instruction(None, "nop", ("",), ())
        code = [skip if at == position else each for at, each in enumerate(self.code)]
        return self._replace(code=code)

    def positions(self, op: str) -> list[int]:
        """Return where instructions with this name stand."""
        return [at for at, each in enumerate(self.code) if each.op == op]


def parse(ptx: str) -> Program:
    """Parse the only kernel of a PTX file."""
    text = _COMMENT.sub("", ptx)
    head, rest = text[text.index(".entry") :].split("{", 1)
    threads = re.search(r"\.reqntid\s+(\d+)", head)
    assert threads, "the kernel does not fix the number of threads"
    parameters = {name: kind for kind, name in _PARAMETER.findall(head)}
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    for statement in _statements(_body(rest)):
        label = re.match(r"(\$\w+):\s*", statement)
        if label:
            labels[label[1]] = len(code)
            continue
        found = _INSTRUCTION.fullmatch(statement)
        assert found, f"not understood: {statement!r}"
        guard, op, modifiers, operands = found.groups()
        names = tuple(modifiers.strip(".").split("."))
        code.append(Instruction(guard, op, names, tuple(split_operands(operands))))
    return Program(parameters, int(threads[1]), code, labels)


def split_operands(text: str) -> list[str]:
    """Split at the commas outside of braces and brackets."""
    parts = re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,{\[])+", text)
    return [part.strip() for part in parts if part.strip()]


def _body(rest: str) -> str:
    """Return the text up to the brace that closes the kernel."""
    depth = 1
    for place, character in enumerate(rest):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return rest[:place]
    raise AssertionError("the kernel has no end")


def _statements(body: str) -> list[str]:
    """Return labels (with their colon) and instructions, without directives."""
    found = []
    for line in body.splitlines():
        if line.strip().startswith((".loc", ".file")):  # directives without a semicolon
            continue
        found.append(line)
    text = re.sub(r"(\$\w+):", r"\1:;", "\n".join(found))
    statements = (" ".join(part.split()) for part in text.split(";"))
    return [s for s in statements if s and not s.startswith(".")]
