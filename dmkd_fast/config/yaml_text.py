"""Read and write YAML as plain values, within fixed limits and with one kind of error.

PyYAML keeps the last of two equal keys, shares aliased values, expands aliases without limit, and
raises errors of many kinds. `parse` does none of this.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

MAX_BYTES, MAX_VALUES, MAX_DEPTH = 2**20, 10_000, 32
# PyYAML raises all of these for text that it cannot read, such as odd numbers, tags and keys.
_PARSER_ERRORS = (
    yaml.YAMLError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)
_TAG = "tag:yaml.org,2002:"
_PLAIN = tuple(_TAG + kind for kind in ("null", "bool", "int", "float", "str", "seq", "map"))


class YamlError(ValueError):
    """Text that is not YAML, or exceeds the limits of a settings file; a one-line message."""


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """A loader of plain values: a date stays a string, `!!binary` and other tags are errors."""


class _Dumper(yaml.SafeDumper):
    """A dumper that quotes the strings that `_Loader` would read as numbers."""


_Loader.yaml_constructors = {
    tag: make for tag, make in _Loader.yaml_constructors.items() if tag is None or tag in _PLAIN
}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in rules if tag != _TAG + "timestamp"]
    for first, rules in _Loader.yaml_implicit_resolvers.items()
}
for _kind in (_Loader, _Dumper):  # YAML 1.2: 1e-3 is a number; PyYAML wants 1.0e-3.
    _kind.add_implicit_resolver(
        _TAG + "float",
        re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$"),
        list("-+.0123456789"),
    )


def parse(text: str) -> Any:
    """Read one document: None, bool, int, float, str, and lists and dictionaries of these.

    Raises:
        YamlError: The text is not YAML, repeats a key, or exceeds a limit.
    """
    if len(text) > MAX_BYTES:
        raise YamlError(f"got {len(text):,} characters, expected at most {MAX_BYTES:,}; shorten it")
    try:
        _check_limits(text)
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _check_keys(node)
            return _unshared(loader.construct_document(node))
        finally:
            loader.dispose()
    except YamlError:
        raise
    except _PARSER_ERRORS as error:
        lines = [line.strip() for line in str(error).splitlines()] or [type(error).__name__]
        reason = lines[0] if len(lines) == 1 else f"{lines[0]} ... {lines[-1]}"
        raise YamlError(f"not valid YAML ({reason})") from None


def dump(values: Any) -> str:
    """Write values as text that `parse` reads back unchanged."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False)


def dump_flow(value: Any) -> str:
    """Write a value in one line, as `{key: [1, 2]}`."""
    text: str = yaml.dump([value], Dumper=_Dumper, default_flow_style=True, width=10**6)
    return text.strip()[1:-1]


def _check_limits(text: str) -> None:
    """Refuse too many values or levels, aliases expanded, before anything is built."""
    total = 0
    known: dict[str, tuple[int, int]] = {}  # anchor -> its values, its levels
    opened: list[list[Any]] = []  # anchor, total before it, levels below it
    for event in yaml.parse(text, Loader=_Loader):
        levels = 0
        if isinstance(event, yaml.CollectionStartEvent):
            opened.append([event.anchor, total, 0])
            total += 1
        elif isinstance(event, yaml.ScalarEvent):
            total, levels = total + 1, 1
            if event.anchor:
                known[event.anchor] = (1, 1)
        elif isinstance(event, yaml.AliasEvent):
            if any(anchor == event.anchor for anchor, *_ in opened):
                raise YamlError(f"alias *{event.anchor} is inside its own value; remove it")
            count, levels = known.get(str(event.anchor), (1, 1))
            total += count
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before, below = opened.pop()
            levels = below + 1
            if anchor:
                known[anchor] = (total - before, levels)
        if opened:
            opened[-1][2] = max(opened[-1][2], levels)
        if total > MAX_VALUES:
            raise YamlError(f"got more than {MAX_VALUES:,} values, aliases expanded; shorten it")
        if len(opened) + levels > MAX_DEPTH:
            raise YamlError(f"got more than {MAX_DEPTH} levels, one inside the other; flatten it")


def _check_keys(root: yaml.Node) -> None:
    """Refuse a mapping that names a key twice; a key merged by `<<` may be overridden."""
    waiting, seen = [root], set()
    while waiting:
        node = waiting.pop()
        if id(node) in seen or isinstance(node, yaml.ScalarNode):
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            waiting += node.value
            continue
        keys = set()
        for key, value in node.value:
            waiting += [key, value]
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in keys:
                    line = key.start_mark.line + 1
                    raise YamlError(f"line {line}: got key {key.value!r} twice; remove one")
                keys.add((key.tag, key.value))


def _unshared(value: Any) -> Any:
    """Copy a value so that aliased lists and dictionaries become separate."""
    if isinstance(value, dict):
        return {key: _unshared(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_unshared(item) for item in value]
    return value
