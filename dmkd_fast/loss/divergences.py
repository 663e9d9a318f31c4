"""The divergences of teacher and student by name, and their parameters. Plain Python, no torch.

    "reverse_kl"                                        one of NAMES, with its usual parameters
    {"jsd": {"beta": 0.1}}                              with other parameters
    {"forward_kl": 0.5, "reverse_kl": 0.5}              a sum of two with weights
    {"forward_kl": 0.9, "dkd": {"weight": 0.1, "beta": 4}}

The same forms are accepted by `kd_loss`, `DistillKL` and the settings of a job.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real
from typing import NamedTuple

from dmkd_fast.runtime.errors import invalid

Divergence = str | Mapping[str, float | Mapping[str, float]]

MAX_TERMS = 2


class Parameter(NamedTuple):
    """A parameter of a divergence: its name, usual value, and limits."""

    name: str
    usual: float
    low: float
    high: float
    is_open: bool = False  # whether the limits themselves are excluded


# The positions in this table are the numbers of the kinds in csrc/ and in the Triton kernels.
PARAMETERS: dict[str, tuple[Parameter, ...]] = {
    "forward_kl": (),
    "reverse_kl": (),
    "jsd": (Parameter("beta", 0.5, 0, 1, is_open=True),),
    "alpha_beta": (Parameter("alpha", 0.2, 0.01, 10), Parameter("beta", 0.7, 0.01, 10)),
    "total_variation": (),
    "dkd": (Parameter("alpha", 1.0, 0, 1000), Parameter("beta", 8.0, 0, 1000)),
    "dist": (Parameter("beta", 1.0, 0, 1000), Parameter("gamma", 1.0, 0, 1000)),
}
NAMES = tuple(PARAMETERS)
FORWARD_KL, REVERSE_KL, JSD, ALPHA_BETA, TOTAL_VARIATION, DKD, DIST = range(len(NAMES))


def terms_of(divergence: Divergence) -> list[float]:
    """Check a divergence and return four numbers a term: kind, weight, first and second parameter.

    The list is empty for the forward KL alone.

    Raises:
        TypeError: `divergence` is neither a name nor a mapping, or a parameter is not a number.
        ValueError: A name is unknown, or a number is out of range.
    """
    if isinstance(divergence, str):
        if divergence in _USUAL:  # without the checks, which take as long as a small loss
            return [*_USUAL[divergence]]
        divergence = {divergence: 1.0}
    if not isinstance(divergence, Mapping):
        raise TypeError(
            f"divergence: got {type(divergence).__name__}, expected one of {NAMES}, or a mapping "
            'such as {"jsd": {"beta": 0.1}}'
        )
    if not 1 <= len(divergence) <= MAX_TERMS:
        raise invalid("divergence", f"{len(divergence)} terms", f"1 or {MAX_TERMS}")
    numbers = [number for item in divergence.items() for number in _term(*item)]
    return [] if numbers == [FORWARD_KL, 1, 0, 0] else numbers


def _term(name: str, given: float | Mapping[str, float]) -> list[float]:
    if name not in PARAMETERS:
        raise invalid("divergence", repr(name), f"one of {NAMES}")
    values = dict(given) if isinstance(given, Mapping) else {"weight": given}
    parameters = (Parameter("weight", 1.0, 0, math.inf, is_open=True), *PARAMETERS[name])
    names = [p.name for p in parameters]
    if unknown := set(values) - set(names):
        raise invalid(f"divergence: {name}", sorted(map(str, unknown)), f"some of {names}")
    numbers = [float(NAMES.index(name))]
    for parameter, usual, low, high, is_open in parameters:
        label, value = f"divergence: {name}.{parameter}", values.get(parameter, usual)
        if not isinstance(value, Real) or isinstance(value, bool):
            raise TypeError(f"{label}: got {type(value).__name__}, expected a number")
        try:
            numbers.append(float(value))
        except OverflowError:
            numbers.append(math.inf)
        if not (low < numbers[-1] < high if is_open else low <= numbers[-1] <= high):
            kind = " (exclusive)" if is_open else ""
            raise invalid(label, f"{numbers[-1]:g}", f"{low:g} to {high:g}{kind}")
    return [*numbers, *[0.0] * (4 - len(numbers))]


_USUAL = {name: terms_of({name: 1.0}) for name in NAMES}
