"""YAML as settings need it: plain values, one kind of error, fixed limits."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from small_jobs import CONFIG

from dmkd_fast.config import yaml_text
from dmkd_fast.config.jobs import DistillConfig
from dmkd_fast.config.loading import load_config
from dmkd_fast.config.yaml_text import MAX_DEPTH, MAX_VALUES, YamlError, parse
from dmkd_fast.runtime.errors import UserError

BOMB = "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]\n"
    for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
BROKEN = {
    "odd date tag": ("!!timestamp 2020-99-99", "could not determine a constructor"),
    "binary": ("!!binary x", "could not determine a constructor"),
    "set": ("!!set {a, b}", "could not determine a constructor"),
    "object": ("!!python/object:os.system x", "could not determine a constructor"),
    "bool": ("!!bool x", "not valid YAML"),
    "int": ("!!int x", "invalid literal"),
    "float": ("!!float x", "could not convert"),
    "digits": ("9" * 5000, "Exceeds the limit"),
    "merge of a number": ("{<<: 1}", "not valid YAML"),
    "merge of numbers": ("{<<: [1]}", "not valid YAML"),
    "list as key": ("{[1]: 2}", "not valid YAML"),
    "undefined alias": ("*a", "undefined alias"),
    "recursive alias": ("&a [*a]", r"alias \*a is inside its own value"),
    "two documents": ("1\n---\n2", "not valid YAML"),
    "tab": ("a:\n\t- 1", "not valid YAML"),
    "null character": ("a\0b", "not valid YAML"),
    "surrogate": ("\ud800", "not valid YAML"),
    "unclosed": ("[1", "not valid YAML"),
    "repeated key": ("a: 1\nb: 2\na: 3", "line 3: got key 'a' twice; remove one"),
    "repeated key inside": ("- {a: {b: 1, b: 1}}", "got key 'b' twice"),
    "nested lists": ("[" * 10**5, "level"),
    "nested blocks": ("- " * 10**5, "got more than 32 levels"),
    "nested mappings": ("{a: " * 10**5, "got more than 32 levels"),
    "alias bomb": (BOMB, "got more than 10,000 values, aliases expanded"),
    "million entries": ("[" + "1," * 10**6 + "]", "characters, expected at most 1,048,576"),
    "many entries": ("[" + "1," * 10**5 + "]", "got more than 10,000 values"),
}


@pytest.mark.parametrize(("text", "words"), BROKEN.values(), ids=BROKEN)
def test_whatever_is_not_plain_yaml_is_one_kind_of_error(text: str, words: str) -> None:
    started = time.process_time()
    with pytest.raises(YamlError, match=words):
        parse(text)
    assert time.process_time() - started < 0.1
    with pytest.raises(UserError, match=r"^override .*") as error:
        load_config(DistillConfig, CONFIG, [f"seed={text}"])
    assert len(str(error.value)) <= 1000 and "\n" not in str(error.value)


@pytest.mark.parametrize(("text", "words"), BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_one_line(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(UserError, match=r"^config .*x\.yaml: ") as error:
        load_config(DistillConfig, path)
    assert len(str(error.value)) <= 1000 and "\n" not in str(error.value)


def test_limits_are_exact() -> None:
    assert parse("[" + "1," * (MAX_VALUES - 1) + "]") == [1] * (MAX_VALUES - 1)
    with pytest.raises(YamlError, match="values"):
        parse("[" + "1," * MAX_VALUES + "]")
    deepest = "[" * (MAX_DEPTH - 1) + "1" + "]" * (MAX_DEPTH - 1)
    assert str(parse(deepest)) == deepest
    with pytest.raises(YamlError, match="levels"):
        parse(f"[{deepest}]")
    half = "[" * (MAX_DEPTH // 2 - 1) + "1" + "]" * (MAX_DEPTH // 2 - 1)  # half the levels
    whole = "[" * (MAX_DEPTH // 2 - 1) + "*a" + "]" * (MAX_DEPTH // 2 - 1)
    assert parse(f"[&a {half}, {whole}]")[0] == parse(half)
    with pytest.raises(YamlError, match="levels"):
        parse(f"[&a {half}, [{whole}]]")
    hundred = "&a [" + "1," * 99 + "]"
    room = MAX_VALUES // 100
    assert len(parse(f"[{hundred}" + ", *a" * (room - 2) + "]")) == room - 1
    with pytest.raises(YamlError, match="values"):
        parse(f"[{hundred}" + ", *a" * (room - 1) + "]")
    assert parse("x" * yaml_text.MAX_BYTES) == "x" * yaml_text.MAX_BYTES
    with pytest.raises(YamlError, match="characters"):
        parse("x" * (yaml_text.MAX_BYTES + 1))


def test_values_are_plain() -> None:
    found = parse("[1e-3, 1.5e3, .5, 1_000, 2020-01-01, 1e5x, ~, yes, '1e-3', 010, .inf]")
    assert found == [
        0.001,
        1500.0,
        0.5,
        1000,
        "2020-01-01",
        "1e5x",
        None,
        True,
        "1e-3",
        8,
        float("inf"),
    ]
    assert parse("") is None and parse("# only a comment") is None


def test_merge_keys_may_be_overridden() -> None:
    assert parse("a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}") == {
        "a": {"x": 1, "y": 2},
        "b": {"x": 1, "y": 3},
    }


@pytest.mark.parametrize(
    "text", ["1e5", "1e-3", "2020-01-01", "no", "1:30", "0x1f", "null", "=", "a: b", "\ufeffa", ""]
)
def test_text_that_looks_like_another_value_is_saved_in_quotes(text: str) -> None:
    assert parse(yaml_text.dump({"a": [text]})) == {"a": [text]}


def test_an_override_does_not_change_the_other_section_of_an_alias(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    text = Path(CONFIG).read_text().replace("teacher: {path:", "teacher: &t {path:")
    path.write_text(text + "more_teachers: [*t]\n")
    config = load_config(DistillConfig, path, ["teacher.stop=0.5"])
    assert config.teacher.stop == 0.5
    assert config.more_teachers[0].stop == 1.0


def test_files_that_are_none_are_one_line(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "empty").write_text("")
    (tmp_path / "latin").write_bytes("name: Å".encode("latin-1"))
    (tmp_path / "utf16").write_text("name: x", encoding="utf-16")
    for name, words in (
        ("", "got a directory, expected a YAML file"),
        ("pipe", "got no regular file"),
        ("empty", "got an empty file"),
        ("latin", "not UTF-8"),
        ("utf16", "not UTF-8"),
        ("a\0b", "embedded null byte"),
        ("x" * 5000, "File name too long"),
        ("none", "No such file"),
        ("empty/x", "Not a directory"),
    ):
        with pytest.raises(UserError, match=words) as error:
            load_config(DistillConfig, tmp_path / name)
        assert "\0" not in str(error.value) and len(str(error.value)) <= 1000


def test_a_byte_order_mark_is_skipped(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + Path(CONFIG).read_bytes())
    assert load_config(DistillConfig, path) == load_config(DistillConfig, CONFIG)
