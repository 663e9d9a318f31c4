"""Every field of every settings class: in its documented range, or one line and nothing written."""

from __future__ import annotations

import copy
import functools
import gc
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import annotated_types
import pytest
import torch
from small_jobs import CONFIG

from dmkd_fast import cli
from dmkd_fast.config import loading, yaml_text
from dmkd_fast.config.jobs import (
    DistillConfig,
    PretrainDenoiserConfig,
    PretrainFewstepConfig,
    TeacherConfig,
)
from dmkd_fast.config.loading import Section, _read_yaml, dump_config, load_config
from dmkd_fast.jobs.resolve import resolve
from dmkd_fast.runtime.errors import UserError

CONFIGS = Path(CONFIG).parent
EVERY_SECTION = [
    "sampler.class_guidance={3: 2}",
    "sampler.block_cache={every: 2}",
    "mix={mixup_alpha: 0.5}",
    "denoiser.class_map=[1, 2]",
    "sampler.phases=[{start: 0.5, num_steps: 2, guidance_scale: 2}]",
    "optim.milestones=[0.5]",
    "more_teachers=[{path: x, class_map: [1, 2]}]",
    "denoiser.prompts=[a, b]",
    "denoiser.prompt_attributes={style: [a, b]}",
]
BASES: dict[str, tuple[type[Section], str, list[str]]] = {
    "distill": (DistillConfig, CONFIG, EVERY_SECTION),
    "disk": (DistillConfig, str(CONFIGS / "from_disk.yaml"), []),
    "teacher": (TeacherConfig, str(CONFIGS / "pretrain" / "weak.yaml"), []),
    "denoiser": (PretrainDenoiserConfig, str(CONFIGS / "pretrain" / "denoiser.yaml"), []),
    "fewstep": (PretrainFewstepConfig, str(CONFIGS / "pretrain" / "fewstep.yaml"), []),
}
VALUES = [
    "0",
    "-1",
    "1",
    "2.5",
    "1e30",
    "-1e30",
    ".nan",
    ".inf",
    "-.inf",
    "1" + "0" * 400,
    "x",
    "'5'",
    "null",
    "true",
    "[[1], [2]]",
    "{a: {b: [1]}}",
    "[]",
    "'" + "x" * 5000 + "'",
    '"a\\0b"',
]


def fields(kind: Any, values: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """(path, field) of every field, those of sections inside included."""
    for name, field in kind.model_fields.items():
        if name in values:
            yield (*path, name), field
            inner = section_in(field.annotation)
            if inner is not None and values[name]:
                is_list = isinstance(values[name], list)
                below = values[name][0] if is_list else values[name]
                yield from fields(inner, below, (*path, name, *([0] * is_list)))


def own_fields(base: str) -> Iterator[tuple[Any, ...]]:
    """Those of a base that no base before it has."""
    names = list(BASES)
    before = [f for b in names[: names.index(base)] for _, f in fields(BASES[b][0], tree_of(b))]
    for path, field in fields(BASES[base][0], tree_of(base)):
        if not any(field is other for other in before):
            yield path, field.annotation, field.metadata


def section_in(annotation: Any) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next(filter(None, map(section_in, get_args(annotation))), None)


def numbers(annotation: Any, metadata: Any) -> list[tuple[type, list[Any]]]:
    """The kinds of numbers a field holds, each with its bounds."""
    if get_origin(annotation) is Annotated:
        inner, *more = get_args(annotation)
        unpacked = [m for each in more for m in getattr(each, "metadata", [each])]
        return numbers(inner, [*metadata, *unpacked])
    if annotation in (int, float):
        return [(annotation, metadata)]
    inner_metadata = metadata if get_origin(annotation) in (Union, UnionType) else []
    return [n for part in get_args(annotation) for n in numbers(part, inner_metadata)]


def is_in(value: float, bounds: list[Any]) -> bool:
    checks = {"ge": float.__ge__, "gt": float.__gt__, "le": float.__le__, "lt": float.__lt__}
    return all(
        check(float(value), float(getattr(bound, name)))
        for bound in bounds
        for name, check in checks.items()
        if hasattr(bound, name)
    )


def leaves(value: Any) -> list[Any]:
    parts = value.values() if isinstance(value, dict) else value
    if isinstance(value, dict | list | tuple):
        return [leaf for part in parts for leaf in leaves(part)]
    return [value]


@functools.cache
def tree_of(base: str) -> Any:
    kind, path, overrides = BASES[base]
    return load_config(kind, path, overrides).model_dump(mode="json")


def at(tree: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


@pytest.mark.parametrize("base", BASES)
def test_every_number_has_two_bounds_and_every_list_a_length(base: str) -> None:
    for path, annotation, metadata in own_fields(base):
        for _, bounds in numbers(annotation, metadata):
            kinds = {type(bound) for bound in bounds}
            assert kinds & {annotated_types.Ge, annotated_types.Gt}, (path, bounds)
            assert kinds & {annotated_types.Le, annotated_types.Lt}, (path, bounds)


@pytest.fixture
def no_collection() -> Iterator[None]:
    """Garbage is not collected: with all libraries loaded that takes longer than a config."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collection")
@pytest.mark.parametrize("base", BASES)
def test_every_field_takes_its_documented_range_and_refuses_the_rest_in_one_line(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    kind, tree = BASES[base][0], copy.deepcopy(tree_of(base))
    read = _read_yaml
    monkeypatch.setattr(  # overrides of a file that was read before
        loading, "_read_yaml", lambda p: copy.deepcopy(tree) if p == file else read(p)
    )
    file, changed = tmp_path / "base.yaml", tmp_path / "changed.yaml"
    file.write_text(yaml_text.dump(tree))
    accepted = 0
    for place, (path, annotation, metadata) in enumerate(own_fields(base)):
        given = at(tree, path[:-1])
        before = given[path[-1]]
        given[path[-1]] = "@@"
        text = json.dumps(tree)
        top = json.dumps(tree[path[0]])
        given[path[-1]] = before
        for number, value in enumerate(VALUES):
            changed.write_text(text.replace('"@@"', value))
            name = ".".join(map(str, path))
            override = f"{path[0]}={top}".replace('"@@"', value) if 0 in path else f"{name}={value}"
            by_file = [(changed, [])] * ((place + number) % 4 == 0)
            for source, overrides in [(file, [override]), *by_file]:
                started = time.process_time()
                try:
                    config = load_config(kind, source, overrides)
                    if isinstance(config, DistillConfig) and config.device != "cuda":
                        resolve(config)
                except UserError as error:
                    printed = str(error)
                    assert len(printed) <= 1000 and "\n" not in printed, printed
                    expects(value, annotation, metadata, printed)
                else:
                    accepted += 1
                    within_bounds(at(config.model_dump(), path), annotation, metadata, name)
                assert time.process_time() - started < 0.1, (override[:100], source)
    assert accepted > 5
    assert sorted(tmp_path.iterdir()) == [file, changed]


def within_bounds(value: Any, annotation: Any, metadata: Any, name: str) -> None:
    allowed = numbers(annotation, metadata)
    if not allowed or section_in(annotation):
        return
    for leaf in leaves(value):
        if leaf is not None:
            assert type(leaf) in (int, float) and math.isfinite(leaf), (name, leaf)
            assert any(is_in(leaf, bounds) for _, bounds in allowed), (name, leaf)


def expects(value: str, annotation: Any, metadata: Any, printed: str) -> None:
    """A plain number in range may only be refused because of another setting."""
    if annotation in (int, float) and value in ("0", "1", "-1"):
        is_valid = is_in(float(value), metadata)
        assert is_valid != ("change it or pass" in printed), printed


@pytest.mark.parametrize(
    "arguments",
    [
        ["sampler.class_guidance={0-99999999: 2}"],
        ["eval.num_points=1e9"],
        ["num_threads=100000"],
        ["views.pad=100000"],
        ["seed=1" + "0" * 400],
        ["loss.temperature=1e300"],
        ["loss.temperature=1e-30"],
        ["mix.mixup_alpha=1e300"],
        ["mix.cutmix_alpha=1e300"],
        ["optim.lr=1e30"],
        ["train.batch_size=1e30"],
        ["ring.samples_per_insert=1e-300"],
        ["ring.error_buffer=1e300"],
        ["train.num_views=1e18"],
        ["views.scale=[1e-30, 1]"],
        ["train.num_views=true"],
        ["train.batch_size='64'"],
        ["sampler.fidelity=[low]"],
        ["train.compile=1"],
        ["train=[1, 2]"],
        ["seed=2020-13-45"],
        ["seed=!!binary x"],
        ["seed=" + "[" * 5000],
        ["name=" + "x" * 10**6],
        ["x" * 10**6],
        ['teacher.path="a\\0b"'],
        ["eval.path=''"],
        ["more_teachers=[{path: x, strat: 0.5}]"],
    ],
)
def test_the_command_refuses_in_one_line_and_writes_nothing(
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["distill", CONFIG, *arguments]) == 2
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert captured.out == "" and len(lines) == 1 and lines[0].startswith("dmkd: "), captured.err
    assert len(lines[0]) < 1100 and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", CONFIG, "--out", "x", "--num-images", "9" * 5000],
        ["generate", CONFIG, "--out", "x", "--num-images", "1", "--shard", "1" * 5000],
        ["distill", CONFIG, "--" + "x" * 10**6],
        ["x" * 10**6],
    ],
)
def test_wrong_arguments_are_one_line(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    printed = capsys.readouterr().err
    assert stop.value.code == 2 and printed.startswith("dmkd: ") and printed.count("\n") == 1
    assert len(printed) < 1200


def test_did_you_mean_reaches_into_lists() -> None:
    with pytest.raises(UserError, match=r"'more_teachers.0.strat'; did you mean 'start'"):
        load_config(DistillConfig, CONFIG, ["more_teachers=[{path: x, strat: 0.5}]"])


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.compile=maybe", "train.compile: got 'maybe', expected true, false or auto;"),
        ("train=[1, 2]", r"train: got \[1, 2\], expected a section of key: value lines;"),
        ("views.scale=0.5", "views.scale: got 0.5, expected a list;"),
        ("more_teachers={a: 1}", r"more_teachers: got \{'a': 1\}, expected a list;"),
        ("name=1", r"name: got 1, expected a valid string \(in quotes"),
        ("mix={1: 2}", "mix.1: got .*, expected keys that are strings"),
        ("sampler.class_guidance={3: 2, '3': 4}", "got a class twice, as 3 and '3'"),
        ("sampler.class_guidance={3-5: 2, 5: 4}", "got class 5 twice"),
        ("sampler.block_cache.steps=[0.5, 0.2]", "block_cache: steps: got .* start < stop"),
    ],
)
def test_wrong_kinds_say_what_is_expected(override: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        load_config(DistillConfig, CONFIG, [override])


def test_whole_numbers_may_be_written_as_decimals() -> None:
    config = load_config(DistillConfig, CONFIG, ["train.num_views=1e6", "optim.lr=1e-3"])
    assert config.train.num_views == 1_000_000 and type(config.train.num_views) is int
    assert config.optim.lr == 0.001 and config.loss.temperature == 4.0


def test_infinite_and_undefined_model_arguments_are_saved_as_they_are(tmp_path: Path) -> None:
    model = "student={arch: resnet18, model_args: {a: .inf, b: [.nan], c: 1.0}}"
    text = dump_config(load_config(DistillConfig, CONFIG, [model]))
    assert "a: .inf" in text and "- .nan" in text and "c: 1.0" in text
