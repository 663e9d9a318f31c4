"""Load configs from YAML files and overrides; configs are typed, frozen and strictly checked.

`load_config` reads a file and applies overrides. Every mistake becomes one `UserError` line that
names the setting, the value found, what was expected, and the fix.
"""

from __future__ import annotations

import difflib
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError

from dmkd_fast import assets
from dmkd_fast.config import overrides as changes
from dmkd_fast.config import yaml_text
from dmkd_fast.runtime.errors import UserError, shortened, shown, warn_once

MAX_CLASSES = 100_000


class Section(BaseModel):
    """Base class of all settings: frozen, without unknown keys, with checked defaults.

    Values are not converted: a string or `true` is not accepted as a number. There are two
    exceptions: a list becomes a tuple, and a float such as 1.0e6 the whole number 1000000.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        validate_default=True,
        allow_inf_nan=False,
        strict=True,
        ser_json_inf_nan="constants",
        use_attribute_docstrings=True,
        protected_namespaces=(),  # pydantic before 2.10 warns about `model_args`
    )

    @model_validator(mode="before")
    @classmethod
    def _as_python_has_it(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {name: _as_python_has_it(value) for name, value in values.items()}


def _as_python_has_it(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(map(_as_python_has_it, value))
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _path(text: str) -> str:
    if "\0" in text:
        raise PydanticCustomError("null_byte", "a path without a null character")
    # A shell does this only where a word begins; a file has no shell.
    return os.path.expanduser(text) if text == "~" or text.startswith("~/") else text


def _switch(value: Any) -> Any:
    if value is True or value is False or value == "auto":
        return value
    raise PydanticCustomError("switch", "true, false or auto")


PathText = Annotated[str, Field(min_length=1, max_length=4096), AfterValidator(_path)]
"""A path, or a name that stands for one; `~` at its start is the home directory."""
Count = Annotated[int, Field(ge=1, le=10**12)]
"""A number of images, views or steps."""
Fraction = Annotated[float, Field(ge=0, le=1)]
ClassMap = Annotated[
    tuple[Annotated[int, Field(ge=0, lt=MAX_CLASSES)], ...],
    Field(min_length=1, max_length=MAX_CLASSES),
]
"""Indices of classes."""
Switch = Annotated[bool | Literal["auto"], BeforeValidator(_switch)]

C = TypeVar("C", bound=Section)


def load_config(kind: type[C], source: str | Path | C, overrides: changes.Overrides = ()) -> C:
    """Return a config from a YAML file, or a changed copy of a config.

    Args:
        kind: Class that the file mirrors.
        source: Path of the YAML file, or a config; `configs/NAME` also names the file that the
            package ships.
        overrides: Changes. A text `section.field=value` sets one value, which is parsed as YAML. A
            dictionary sets the values that it names, such as `{"train": {"batch_size": 64}}`.

    Raises:
        UserError: The file is missing or not YAML, a key is unknown, a value has the wrong type
            or range, or settings contradict each other.
    """
    if isinstance(source, Section):
        values, where = source.model_dump(), ""
    else:
        values, where = _read_yaml(Path(source)), f"{source}: "
    replaced = changes.apply(kind, values, overrides)
    try:
        config = kind.model_validate(values)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        raise UserError(f"{where}{_explain(kind, problem)}") from None
    for line in replaced:
        warn_once(line)
    return config


def dump_config(config: Section) -> str:
    """Return all settings as YAML that `load_config` reads back unchanged."""
    return yaml_text.dump(config.model_dump(mode="json"))


def _read_yaml(path: Path) -> dict[str, Any]:
    shipped = assets.ROOT / path
    if path.parts[:1] == ("configs",) and not path.exists() and shipped.is_file():
        path = shipped
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # Opening a named pipe would block.
            what = "a directory" if path.is_dir() else "no regular file"
            raise UserError(f"config {path}: got {what}, expected a YAML file (see configs/)")
        with path.open("rb") as file:
            data = file.read(yaml_text.MAX_BYTES + 1)
        values = yaml_text.parse(data.decode("utf-8-sig"))
    except UserError:
        raise
    except OSError as error:
        names = [f"configs/{known.relative_to(assets.ROOT / 'configs')}" for known in _shipped()]
        close = difflib.get_close_matches(path.stem, [Path(name).stem for name in names], n=1)
        similar = [name for name in names if close and Path(name).stem == close[0]]
        hint = f"did you mean {similar[0]}?" if similar else "`dmkd init` lists the shipped ones"
        raise UserError(f"config {path}: {error.strerror or error}; {hint}") from None
    except UnicodeDecodeError:
        raise UserError(
            f"config {path}: not valid YAML (not UTF-8 text); save it as UTF-8"
        ) from None
    except yaml_text.YamlError as error:
        raise UserError(f"config {path}: {error}") from None
    except ValueError as error:  # a null character
        raise UserError(f"config {shown(str(path))}: {error}; correct the path") from None
    if values is None:
        raise UserError(f"config {path}: got an empty file, expected key: value lines")
    if not isinstance(values, dict):
        raise UserError(f"config {path}: got {type(values).__name__}, expected key: value lines")
    return values


def _shipped() -> list[Path]:
    return sorted((assets.ROOT / "configs").rglob("*.yaml"))


def _explain(kind: type[Section], problem: Any) -> str:
    """Describe one pydantic error in one line."""
    location = [shortened(str(part), 100) for part in problem["loc"]]
    name = ".".join(location)
    if problem["type"] == "extra_forbidden":
        return f"unknown key {name!r}; {_hint(kind, location)}"
    if problem["type"] == "missing":
        return f"{name}: missing; add it or pass {name}=VALUE"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return f"{name}: {message}" if name else message
    message = message.replace("should match pattern", "should be text that matches")
    expected = _EXPECTED.get(problem["type"]) or re.sub(r"^\w+ should (be|have) ", "", message)
    return (
        f"{name}: got {shown(problem['input'])}, expected {expected}; change it or pass "
        f"{name}=VALUE"
    )


_EXPECTED = {
    "model_type": "a section of key: value lines",
    "tuple_type": "a list",
    "dict_type": "key: value pairs",
    "string_type": "a valid string (in quotes, if it looks like another value)",
    "invalid_key": "keys that are strings",
}


def _hint(kind: type[Section], location: list[str]) -> str:
    """Return advice on an unknown key: the same key in another section, or a similar one."""
    *sections, key = location
    known, everywhere = _fields_at(kind, sections), dict(_names(kind))
    found = [name for name, field in everywhere.items() if field == key]
    found = found or difflib.get_close_matches(key, known, n=1)
    if not found:
        similar = difflib.get_close_matches(key, everywhere.values(), n=1, cutoff=0.8)
        found = [name for name, field in everywhere.items() if field in similar]
    if found:
        return f"did you mean {' or '.join(map(repr, found[:5]))}?"
    return f"known keys: {', '.join(known)}"


def _names(kind: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield the dotted name and the last part of the name of every setting; lists are left out."""
    for field, info in kind.model_fields.items():
        section = changes.section_of(info.annotation)
        if section is not None:
            yield from _names(section, f"{prefix}{field}.")
        yield prefix + field, field


def _fields_at(kind: type[Section], location: list[str]) -> list[str]:
    """Return the field names of the section at `location`."""
    section: Any = kind
    for name in location:
        if name.isdigit():  # An index into a list of sections.
            section = next(iter(get_args(section)), None)
            continue
        field = getattr(section, "model_fields", {}).get(name)
        section = field.annotation if field is not None else None
        section = changes.section_of(section) or section
    return list(getattr(section, "model_fields", {}))
