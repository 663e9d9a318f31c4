"""Describe every setting of a job: name, type, default, range and text.

`dmkd config` prints these descriptions, and `scripts/reference.py` writes them to the reference
page. Types, defaults and ranges come from the JSON schema of the pydantic models; texts are the
docstrings below the fields.
"""

from __future__ import annotations

import difflib
import math
import textwrap
from collections.abc import Iterator
from typing import Any, NamedTuple

from dmkd_fast.config.jobs import (
    DistillConfig,
    PretrainDenoiserConfig,
    PretrainFewstepConfig,
    TeacherConfig,
)
from dmkd_fast.config.loading import Section
from dmkd_fast.runtime.errors import UserError

JOBS: dict[str, type[Section]] = {
    "distill": DistillConfig,
    "teacher": TeacherConfig,
    "denoiser": PretrainDenoiserConfig,
    "fewstep": PretrainFewstepConfig,
}
"""The settings class of each job: `dmkd distill` and the three kinds of `dmkd pretrain`."""


class Setting(NamedTuple):
    """One setting, or a section of settings."""

    name: str
    """Dotted name, as in an override; `[]` stands for any entry of a list of sections."""
    type: str
    default: str
    """Default as in YAML; "required" if there is none; empty for a section."""
    range: str
    """Allowed range; empty if the type is the only limit."""
    text: str

    @property
    def is_section(self) -> bool:
        """Whether this is a section; its settings follow it in the list."""
        return self.type.startswith(("section", "list of sections"))

    def __str__(self) -> str:
        body = textwrap.indent(textwrap.fill(self.text, 84, break_on_hyphens=False), "    ")
        return f"{self.name}: {self.facts}\n{body}".replace("`", "").rstrip()

    @property
    def facts(self) -> str:
        """Type, default and range in one line."""
        default = self.default
        if default not in ("", "required"):
            default = f"default {default}"
        return ", ".join(filter(None, (self.type, default, self.range)))


def describe(job: str = "distill", prefix: str = "") -> list[Setting]:
    """Describe the settings of a job.

    Args:
        job: A key of `JOBS`.
        prefix: A section or a setting to describe; empty: all settings.

    Raises:
        UserError: No setting has this name.
    """
    found = list(_walk(schema(job)))
    if not prefix:
        return found
    names = {setting.name: setting for setting in found}
    inside = (f"{prefix}.", f"{prefix}[")
    chosen = [s for s in found if s.name == prefix or s.name.startswith(inside)]
    if not chosen:
        close = difflib.get_close_matches(prefix, names, n=1)
        hint = f"did you mean {close[0]!r}?" if close else "run `dmkd config` for all names"
        raise UserError(f"{prefix}: unknown setting; {hint}")
    return chosen


def schema(job: str) -> dict[str, Any]:
    """Build the JSON schema of a job's YAML file, with a description of every setting."""
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    return head | JOBS[job].model_json_schema()


def _walk(root: dict[str, Any]) -> Iterator[Setting]:
    described: dict[str, str] = {}  # where a section's settings are listed

    def fields(part: dict[str, Any], prefix: str) -> Iterator[Setting]:
        for field, value in part["properties"].items():
            name = prefix + field
            is_required = field in part.get("required", ())
            default = "required" if is_required else _yaml(value.get("default", {}))
            reference = _reference(value)
            if reference is None:
                text = " ".join(value.get("description", "").split())
                yield Setting(name, _type(value), default, _range(value), text)
                continue
            is_list = value.get("type") == "array"
            kind = "list of sections" if is_list else "section"
            state = "required" if is_required else "optional"
            section = root["$defs"][reference]
            text = " ".join((value.get("description") or section["description"]).split())
            if reference in described:
                kind += f" like `{described[reference]}`"
            yield Setting(name, f"{kind}, {state}", "", _range(value), text)
            if reference not in described:
                described[reference] = name
                yield from fields(section, name + ("[]." if is_list else "."))

    return fields(root, "")


def _reference(value: dict[str, Any]) -> str | None:
    """Return the name of the section that a field holds, if any."""
    for part in (value, value.get("items", {}), *value.get("anyOf", ()), *value.get("allOf", ())):
        if "$ref" in part:
            return str(part["$ref"]).rpartition("/")[2]
    return None


def _type(value: dict[str, Any]) -> str:
    if "enum" in value or "const" in value:
        return " or ".join(f"`{v}`" for v in value.get("enum", [value.get("const")]))
    if "anyOf" in value:
        return " or ".join(_type(part) for part in value["anyOf"])
    if "prefixItems" in value:
        return f"list [{', '.join(_type(part) for part in value['prefixItems'])}]"
    if value.get("type") == "array":
        return f"list of {_type(value['items'])}s"
    if value.get("type") == "object":
        values = value.get("additionalProperties")
        parts = values.get("anyOf", [values]) if isinstance(values, dict) else []
        kinds = " or ".join(f"{_type(part).removesuffix('s')}s" for part in parts)
        return f"mapping to {kinds}" if kinds else "mapping"
    names = {"boolean": "`true` or `false`", "null": "`null`"}
    kind = str(value.get("type", "any value"))
    return names.get(kind, kind)


def _range(value: dict[str, Any]) -> str:
    parts = []
    for part in value.get("anyOf", [value]):
        each = part.get("items") or part.get("additionalProperties")
        each = (part.get("prefixItems") or [each])[0]
        if isinstance(each, dict) and "$ref" not in each and (inner := _range(each)):
            parts.append(f"each {inner}")
        most = part.get("maxItems", part.get("maxProperties"))
        lengths = _interval(part.get("minItems"), most)
        if lengths and "prefixItems" not in part:
            parts.append(f"{lengths} entries")
        if lengths := _interval(part.get("minLength"), part.get("maxLength")):
            parts.append(f"{lengths} characters")
        low, high = part.get("minimum"), part.get("maximum")
        above, below = part.get("exclusiveMinimum"), part.get("exclusiveMaximum")
        words = [
            "" if above is None else f"above {_number(above)}",
            _interval(low, high),
            "" if below is None else f"below {_number(below)}",
        ]
        parts.append(" and ".join(filter(None, words)))
        if "pattern" in part:
            parts.append(f"matching `{part['pattern']}`")
    return ", ".join(filter(None, parts))


def _interval(low: float | None, high: float | None) -> str:
    if low is not None and high is not None:
        return f"{_number(low)} to {_number(high)}"
    if low is not None:
        return f"at least {_number(low)}"
    return "" if high is None else f"at most {_number(high)}"


def _number(value: float) -> str:
    exponent = math.log2(value) if value > 0 else 0.0
    if exponent.is_integer() and abs(exponent) > 13:
        return f"2^{exponent:.0f}"
    is_whole = float(value).is_integer() and abs(value) < 1e15
    return f"{int(value):,}" if is_whole else f"{value:g}".replace("e+", "e").replace("e-0", "e-")


def _yaml(value: Any) -> str:
    words = {None: "null", True: "true", False: "false"}
    is_word = value is None or isinstance(value, bool)
    return f"`{words[value] if is_word else value}`"
