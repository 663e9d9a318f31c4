"""Typed, frozen, strict settings from YAML files and overrides.

Stands on floor 0. `load` reads a file and applies `section.field=value` overrides; every mistake
becomes one `ConfigError` line that says where, what was got, what was expected and what to change.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError


class ConfigError(ValueError):
    """A setting that cannot be used; the message is one line for the user."""


class Section(BaseModel):
    """Base of all settings: frozen, unknown keys refused, defaults checked."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False
    )


C = TypeVar("C", bound=Section)


def load(kind: type[C], path: str | Path, overrides: list[str] | None = None) -> C:
    """Read a YAML file as `kind` and apply overrides.

    Args:
        kind: The settings class the file mirrors.
        path: YAML file.
        overrides: `section.field=value` strings; values are parsed as YAML.

    Raises:
        ConfigError: The file is missing or not YAML, a key is unknown, a value has the wrong type
            or range, or settings contradict each other.
    """
    return _validate(kind, apply_overrides(_read_yaml(Path(path)), overrides or []), str(path))


@contextmanager
def user_errors() -> Iterator[None]:
    """Errors of loading what the settings name become ConfigError: one line, no traceback."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise ConfigError(" ".join(str(error).split())) from None


def dump(config: Section) -> str:
    """All settings as YAML that `load` reads back unchanged."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def apply_overrides(values: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """Set `section.field=value` entries in nested dictionaries."""
    for text in overrides:
        key, equals, raw = text.partition("=")
        if not equals or not key:
            raise ConfigError(
                f"override {text!r}: expected section.field=value, for example sampler.num_steps=4"
            )
        *sections, field = key.split(".")
        target = values
        for name in sections:
            target = target.setdefault(name, {})
            if not isinstance(target, dict):
                raise ConfigError(f"override {text!r}: {name} is a value, not a section")
        try:
            target[field] = yaml.safe_load(raw)
        except yaml.YAMLError:
            raise ConfigError(f"override {text!r}: the value is not valid YAML; quote it") from None
    return values


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"config {path}: {error.strerror or error}; give the path of a YAML file (see configs/)"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()
        raise ConfigError(
            f"config {path}: not valid YAML ({reason[0]} ... {reason[-1].strip()})"
        ) from None
    if not isinstance(values, dict):
        raise ConfigError(f"config {path}: got {type(values).__name__}, expected key: value lines")
    return values


def _validate(kind: type[C], values: dict[str, Any], where: str) -> C:
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{where}: {_explain(kind, error.errors()[0])}") from None


def _explain(kind: type[Section], problem: Any) -> str:
    """One line for one pydantic error."""
    location = [str(part) for part in problem["loc"]]
    name = ".".join(location)
    if problem["type"] == "extra_forbidden":
        known = _fields_at(kind, location[:-1])
        close = difflib.get_close_matches(location[-1], known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(known)}"
        return f"unknown key {name!r}; {hint}"
    if problem["type"] == "missing":
        return f"{name}: missing; add it or pass {name}=VALUE"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return f"{name}: {message}" if name else message
    expected = message.removeprefix("Input should be ")
    return f"{name}: got {problem['input']!r}, expected {expected}; change it or pass {name}=VALUE"


def _fields_at(kind: type[Section], location: list[str]) -> list[str]:
    """Field names of the section at `location`."""
    section: Any = kind
    for name in location:
        if name.isdigit():  # a place in a list of sections
            section = next(iter(get_args(section)), None)
            continue
        field = getattr(section, "model_fields", {}).get(name)
        section = field.annotation if field is not None else None
        if get_origin(section) in (Union, UnionType):  # a section that may be missing
            section = get_args(section)[0]
    return list(getattr(section, "model_fields", {}))
