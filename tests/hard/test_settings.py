"""Random settings files and overrides: each is a valid config or one line, within 0.1 s."""

from __future__ import annotations

import contextlib
import copy
import random
import string
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_jobs import ROOT

from dmkd_fast.config import yaml_text
from dmkd_fast.config.jobs import (
    DistillConfig,
    PretrainDenoiserConfig,
    PretrainFewstepConfig,
    TeacherConfig,
)
from dmkd_fast.config.loading import Section, dump_config, load_config
from dmkd_fast.runtime.errors import UserError

PRETRAIN = {"denoiser": PretrainDenoiserConfig, "fewstep": PretrainFewstepConfig}
FILES = {
    path: PRETRAIN.get(path.stem, TeacherConfig)
    if path.parent.name == "pretrain"
    else DistillConfig
    for path in sorted((ROOT / "configs").rglob("*.yaml"))
}
NUMBERS = [
    0,
    -1,
    1,
    2,
    0.5,
    1e30,
    -1e30,
    float("nan"),
    float("inf"),
    10**400,
    2**63,
    2**53 + 1,
    1e-300,
]
SNIPPETS = [
    "!!binary",
    "!!set {a}",
    "!!timestamp",
    "&a [*a]",
    "*a",
    "<<: *a",
    "<<:",
    "? ",
    "- ",
    "|",
    ">",
    "---",
    "...",
    "%YAML 1.1",
    "\t",
    "\0",
    "\ufeff",
    "\ud800",
    "\x85",
    "\u2028",
    "{",
    "}",
    "[",
    "]",
    ":",
    "#",
    "'",
    '"',
    "2020-13-45",
    "1:99",
    "0b2",
    "0o9",
    "0x",
    "1e999",
    "~",
    "=",
    "!",
    "!!int x",
    "!!float 1e1e",
    "!!bool",
    "!!null x",
    "\x1b[31m",
    "\\x",
    '"\\U00110000"',
]


def odd(pick: random.Random, depth: int = 0) -> Any:
    """A value that no field, or only some field, takes."""
    kind = pick.randrange(9 if depth < 3 else 5)
    if kind == 0:
        return pick.choice(NUMBERS)
    if kind == 1:
        return pick.choice([None, True, False])
    if kind == 2:
        return "".join(pick.choice(string.printable) for _ in range(pick.randrange(20)))
    if kind == 3:
        return pick.choice(["auto", "embedded:x", "1e5", "no", "2020-01-01", "hf-hub:a/b", "a\0b"])
    if kind == 4:
        return pick.uniform(-2, 2)
    if kind == 5:
        return pick.choice(["x", "\ud800", "\u2028"]) * (50_000 if depth == 0 else 5)
    if kind == 6:
        return [odd(pick, depth + 1) for _ in range(pick.randrange(4))]
    if kind == 7 and depth == 0:
        return [odd(pick, 9) for _ in range(2000)]
    keys = [1, None, "a", "path", "name", 2.5, True, "x" * 500]
    return {pick.choice(keys): odd(pick, depth + 1) for _ in range(pick.randrange(3))}


def places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    found = []
    for key, value in items:
        found.append((*path, key))
        if isinstance(value, dict | list):
            found += places(value, (*path, key))
    return found


def changed_tree(pick: random.Random, tree: Any, others: list[Any]) -> Any:
    """Some values replaced, dropped, added, moved, or taken from another file."""
    tree = copy.deepcopy(tree)
    for _ in range(pick.randrange(1, 4)):
        known = places(tree)
        if not known:
            break
        *path, key = pick.choice(known)
        holder = tree
        for part in path:
            holder = holder[part]
        action = pick.randrange(6)
        if action == 0:
            del holder[key]
        elif action == 1 and isinstance(holder, dict):
            holder[str(key) + pick.choice("xs_.")] = holder.pop(key)
        elif action == 2:
            other = pick.choice(others)
            *there, last = pick.choice(places(other))
            for part in there:
                other = other[part]
            holder[key] = copy.deepcopy(other[last])
        elif action == 3 and isinstance(holder[key], int | float):
            holder[key] = holder[key] * pick.choice([-1, 0, 0.5, 2, 10, 1000])
        else:
            holder[key] = odd(pick)
    return tree


def changed_text(pick: random.Random, data: bytes) -> bytes:
    """Bytes flipped, dropped, doubled, cut, or with odd YAML put in."""
    text = bytearray(data)
    for _ in range(pick.randrange(1, 5)):
        at = pick.randrange(len(text) + 1)
        action = pick.randrange(5)
        if action == 0 and at < len(text):
            text[at] = pick.randrange(256)
        elif action == 1:
            del text[at : at + pick.randrange(1, 30)]
        elif action == 2:
            text[at:at] = text[at : at + pick.randrange(1, 200)] * pick.choice([1, 2, 200])
        elif action == 3 and pick.random() < 0.3:
            del text[at:]
        else:
            snippet = pick.choice(SNIPPETS) * pick.choice([1, 1, 1, 40, 5000])
            text[at:at] = snippet.encode("utf-8", "surrogatepass")
    return bytes(text)


def an_override(pick: random.Random, tree: Any) -> str:
    path = ".".join(map(str, pick.choice(places(tree))))
    if pick.random() < 0.2:
        path = changed_text(pick, path.encode()).decode("utf-8", "replace")
    value = odd(pick)
    if pick.random() < 0.5:
        text = str(value)
    else:
        text = (
            yaml_text.yaml.safe_dump(value, default_flow_style=True, allow_unicode=False)
            if not isinstance(value, str)
            else value
        )
    if pick.random() < 0.3:
        text = changed_text(pick, text.encode("utf-8", "surrogatepass")).decode("utf-8", "replace")
    return f"{path}={text}"


@pytest.mark.hard
def test_random_settings_are_a_config_or_one_line(
    num_cases: Callable[[int, int], int], tmp_path: Path, record_property: Callable[..., None]
) -> None:
    cases, failures, valid, slowest = num_cases(5000, 500), [], 0, 0.0
    trees = {path: yaml_text.parse(path.read_text()) for path in FILES}
    file = tmp_path / "case.yaml"
    for number in range(cases):
        pick = random.Random(number)
        path = pick.choice(list(FILES))
        kind: type[Section] = FILES[path]
        overrides: list[str] = []
        data = path.read_bytes()
        way = number % 3
        if way == 0:
            data = changed_text(pick, data)
        elif way == 1:
            tree = changed_tree(pick, trees[path], list(trees.values()))
            dump = yaml_text.yaml.safe_dump(tree, allow_unicode=False)
            data = dump.encode("utf-8", "surrogatepass")
        else:
            overrides = [an_override(pick, trees[path]) for _ in range(pick.randrange(1, 3))]
        file.write_bytes(data)
        started, config, line = time.process_time(), None, ""
        try:
            config = load_config(kind, file, overrides)
            is_good = True
        except UserError as error:
            line = str(error)
            is_good = "\n" not in line and 10 < len(line) <= 1000
        except Exception as error:
            is_good, line = False, repr(error)[:200]
        took = time.process_time() - started
        if took > 0.1:  # once more, as a busy machine is slower
            started = time.process_time()
            with contextlib.suppress(Exception):
                load_config(kind, file, overrides)
            took = min(took, time.process_time() - started)
        if config is not None:
            valid += 1
            copy_file = tmp_path / "copy.yaml"
            copy_file.write_text(dump_config(config), encoding="utf-8", errors="surrogatepass")
            again = load_config(kind, copy_file)
            is_good, line = dump_config(again) == dump_config(config), "not saved as it is"
        slowest = max(slowest, took)
        if not is_good or took > 0.1:
            failures.append(number)
            print(
                f"case {number} of {path.name}, way {way}, {took:.2f} s: {line} {overrides}"[:400]
            )
    print(f"{valid} of {cases} are valid; the slowest took {slowest:.3f} s")
    record_property("claim", "random settings files and overrides: a config or one line, no hang")
    record_property("cases", cases)
    record_property("failures", len(failures))
    assert not failures and cases * 0.02 < valid < cases * 0.9
    assert sorted(p.name for p in tmp_path.iterdir()) == ["case.yaml", "copy.yaml"]
