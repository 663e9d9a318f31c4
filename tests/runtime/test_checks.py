"""Checks of numbers and tensors name the argument, in one line, and need no torch for numbers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dmkd_fast.runtime import checks, tensor_checks
from dmkd_fast.runtime.errors import NotFiniteError, UserError, invalid

RUNTIME = Path(checks.__file__).parent


def test_numbers_are_checked_without_torch_and_numpy() -> None:
    code = f"""
import importlib.util, sys, types
for name in ("dmkd_fast", "dmkd_fast.runtime"):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = []
for name in ("errors", "checks"):
    full = "dmkd_fast.runtime." + name
    spec = importlib.util.spec_from_file_location(full, r"{RUNTIME}/" + name + ".py")
    sys.modules[full] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[full])
assert sys.modules[full].whole("count", 3) == 3
assert not {{"torch", "numpy"}} & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("value", [True, 1.0, "1", None, torch.tensor(1)])
def test_only_integers_are_whole(value: Any) -> None:
    with pytest.raises(TypeError, match=r"^count: got .*, expected a whole number$"):
        checks.whole("count", value)


@pytest.mark.parametrize("value", [True, "1", b"1", None, torch.tensor(1.0), [1.0]])
def test_only_numbers_are_numbers(value: Any) -> None:
    with pytest.raises(TypeError, match=r"^rate: got .*, expected a number$"):
        checks.number("rate", value)


@pytest.mark.parametrize(
    ("value", "bounds", "message"),
    [
        (5, {"high": 4}, "rate: got 5, expected a finite number of at most 4"),
        (0, {"low": 0, "above": True}, "rate: got 0, expected a finite number of more than 0"),
        (-1, {"low": 0, "high": 1}, "rate: got -1, expected a finite number of at least 0 and"),
        (float("nan"), {}, "rate: got nan, expected a finite number"),
        (10**400, {}, "rate: got 1000"),
        (10**5000, {}, "rate: got an integer of 16610 bits, expected a finite number"),
    ],
    ids=["above", "zero", "below", "nan", "large", "unprintable"],
)
def test_bounds_are_named(value: float, bounds: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        checks.number("rate", value, **bounds)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("shape", [(1, 2), "abc", (1, 2, 0), None, torch.Size([3, 4])])
def test_image_shapes_are_three_sizes(shape: Any) -> None:
    with pytest.raises(UserError, match=r"^image_shape: got "):
        checks.image_shape(shape)
    assert checks.image_shape(torch.Size([3, 4, 5])) == (3, 4, 5)


def test_rows_are_int64_one_for_each_image() -> None:
    tensor_checks.rows("ids", torch.arange(3), count=3, device=torch.device("cpu"))
    for wrong in (torch.arange(2), torch.arange(3.0), torch.zeros(3, 1, dtype=torch.int64)):
        with pytest.raises(UserError, match=r"^ids: got .*, expected \(3,\) torch\.int64"):
            tensor_checks.rows("ids", wrong, count=3)
    with pytest.raises(TypeError, match=r"^ids: got list, expected a tensor$"):
        tensor_checks.rows("ids", [1, 2])


@pytest.mark.parametrize(("low", "bad"), [(0, -1), (0, 10), (2, 1), (-5, -6)])
def test_the_number_out_of_range_is_named(low: int, bad: int) -> None:
    tensor_checks.within("labels", torch.tensor([low, 9]), low=low, high=9)
    tensor_checks.within("labels", torch.tensor([], dtype=torch.int64), low=low, high=9)
    with pytest.raises(UserError, match=f"^labels: got {bad}, expected {low} to 9$"):
        tensor_checks.within("labels", torch.tensor([low, bad, 9]), low=low, high=9)


def test_a_renamed_error_keeps_its_kind_and_the_rest_of_its_message() -> None:
    error = invalid("steps.count", "9 for steps.count", "at most 4").renamed("sampler.num_steps")
    assert str(error) == "sampler.num_steps: got 9 for steps.count, expected at most 4"
    assert error.name == "sampler.num_steps"
    assert type(NotFiniteError.invalid("loss", 1, "0").renamed("kd")) is NotFiniteError


def test_an_error_within_a_section_keeps_its_kind() -> None:
    error = invalid("capacity_images", 3, "at least 4", "set it to 4").within("ring")
    assert str(error) == "ring.capacity_images: got 3, expected at least 4; set it to 4"
    assert type(NotFiniteError("loss: not finite").within("train")) is NotFiniteError
