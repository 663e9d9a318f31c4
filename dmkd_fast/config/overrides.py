"""Change the values of a config before they are checked: texts, or nested dictionaries.

An override may replace a choice. Fields that belonged to the choice of the file then mean nothing
or something else: they are reset, and one line names them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel

from dmkd_fast.config import yaml_text
from dmkd_fast.runtime.errors import UserError, shown

Overrides = Sequence[str] | Mapping[str, Any]
"""Changes of a config: `section.field=value` texts, or nested dictionaries."""

# Fields that mean nothing after the value of a field has been replaced.
_NETWORK = ("path", "arch", "revision", "pretrained", "model_args", "stem")
_BELONGING = {
    "sampler.fidelity": ("num_steps", "solver", "guidance_scale"),
    "denoiser.path": ("revision",),
    "optim.name": ("nesterov",),
    **{f"{part}.{field}": _NETWORK for part in ("teacher", "student") for field in _NETWORK[:2]},
}


def apply(kind: type[BaseModel], values: dict[str, Any], overrides: Overrides) -> list[str]:
    """Change values in place, and drop the fields that belong to a choice that is replaced.

    Args:
        kind: Class that the values are for.
        values: Values of a config file, by section.
        overrides: Changes.

    Returns:
        A line for each replaced choice, which names the fields, and one for a kept learning rate.

    Raises:
        UserError: See `apply_overrides`.
    """
    before = {name: dict(part) for name, part in values.items() if isinstance(part, dict)}
    if isinstance(overrides, Mapping):
        _merge(values, overrides)
    else:
        apply_overrides(values, overrides)
    return _reset_replaced(kind, values, before, _given(overrides, values))


def apply_overrides(values: dict[str, Any], overrides: Sequence[str]) -> None:
    """Apply `section.field=value` overrides to nested dictionaries in place.

    Raises:
        UserError: An override has another form, its section is a value, or its value is not YAML.
    """
    for text in overrides:
        key, equals, raw = text.partition("=")
        *sections, field = key.split(".")
        if not equals or not key or len(sections) >= yaml_text.MAX_DEPTH:
            raise UserError(
                f"override {shown(text)}: expected section.field=value, for example "
                "sampler.num_steps=4"
            )
        target = values
        for name in sections:
            target = target.setdefault(name, {})
            if not isinstance(target, dict):
                raise UserError(f"override {shown(text)}: {shown(name)} is a value, not a section")
        try:
            target[field] = yaml_text.parse(raw)
        except yaml_text.YamlError as error:
            raise UserError(
                f"override {shown(text)}: {error}; put the value in quotes if it is text"
            ) from None


def section_of(annotation: Any) -> type[BaseModel] | None:
    """Return the class of a section, which may be optional; None for other types."""
    if get_origin(annotation) in (Union, UnionType):
        annotation = get_args(annotation)[0]
    is_section = isinstance(annotation, type) and issubclass(annotation, BaseModel)
    return annotation if is_section else None


def _merge(values: dict[str, Any], changes: Mapping[str, Any]) -> None:
    """Overwrite nested values in place; a dictionary changes only the keys that it has."""
    for name, value in changes.items():
        if isinstance(value, Mapping):
            section = values.get(name)
            values[name] = dict(section) if isinstance(section, dict) else {}
            _merge(values[name], value)
        else:
            values[name] = str(value) if isinstance(value, Path) else value


def _given(overrides: Overrides, values: Mapping[str, Any]) -> set[str]:
    """Return the names of what overrides set: settings of one part, and `section.field`.

    Args:
        overrides: Changes.
        values: All values after the changes.
    """
    if isinstance(overrides, Mapping):
        parts = {name: part for name, part in overrides.items() if isinstance(part, Mapping)}
        names = set(overrides)
    else:
        names = {text.partition("=")[0] for text in overrides}
        # A text such as `teacher={path: DIR}` replaces the whole section.
        parts = {name: values[name] for name in names if isinstance(values.get(name), dict)}
    return names | {f"{name}.{field}" for name, part in parts.items() for field in part}


def _reset_replaced(
    kind: type[BaseModel], values: dict[str, Any], before: dict[str, Any], given: set[str]
) -> list[str]:
    """Drop the fields that belong to a choice that overrides have replaced.

    Args:
        kind: Class that the file mirrors.
        values: All values, changed in place.
        before: Sections before the overrides.
        given: Names of what the overrides set, see `_given`.

    Returns:
        The lines of `apply`.
    """
    lines = []
    for name in sorted(given & _BELONGING.keys()):
        part, _, choice = name.partition(".")
        info, section = kind.model_fields.get(part), values.get(part)
        known = None if info is None else section_of(info.annotation)
        if known is None or not isinstance(section, dict):
            continue
        usual = {
            field: info.get_default(call_default_factory=True)
            for field, info in known.model_fields.items()
        }
        chosen = section.get(choice)
        if chosen is None or before.get(part, {}).get(choice, usual[choice]) == chosen:
            continue
        dropped = []
        for field in _BELONGING[name]:
            if field == choice or f"{part}.{field}" in given or field not in usual:
                continue
            if section.pop(field, usual[field]) != usual[field]:
                dropped.append(f"{part}.{field}")
        # Further teachers were chosen for the first one, and would be averaged with another.
        if part == "teacher" and "more_teachers" not in given and values.pop("more_teachers", ()):
            dropped.append("more_teachers")
        if dropped:
            lines.append(f"{name}={shown(chosen)} replaces the config's {', '.join(dropped)}")
        if name == "optim.name" and "lr" in section and "optim.lr" not in given:
            lines.append(
                f"{name}={shown(chosen)} keeps the config's optim.lr={shown(section['lr'])}; set "
                "optim.lr too, since a rate belongs to its optimizer"
            )
    return lines
