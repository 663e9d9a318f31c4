"""The documentation: generated pages are current, links resolve, examples and notebooks run."""

from __future__ import annotations

import dataclasses
import json
import pkgutil
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import dmkd_fast
from dmkd_fast import RingBuffer, RingPlan, cli
from dmkd_fast.config import data, generator, jobs, networks, training
from dmkd_fast.config import reference as reference_module
from scripts import reference

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
FOLDER = DOCS / "reference" / "schema"
PAGES = sorted(DOCS.rglob("*.md"))
SECTIONS = {
    name: value
    for module in (data, generator, jobs, networks, training)
    for name, value in vars(module).items()
}


def test_generated_pages_are_current() -> None:
    for path, text in reference.pages().items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name}: run scripts/reference.py"


@pytest.mark.parametrize("job", reference_module.JOBS)
def test_every_setting_of_the_models_is_in_the_reference(job: str) -> None:
    page = reference.settings()
    for name in names_of(reference_module.JOBS[job]):
        assert f"`{name}`" in page, f"{name} of {job} is missing"


def names_of(kind: Any, prefix: str = "") -> list[str]:
    """Dotted names of all settings, straight from the models and without the JSON schema."""
    found = []
    for name, field in kind.model_fields.items():
        found.append(prefix + name)
        for inner in re.findall(r"\b(\w+Config)\b", str(field.annotation)):
            section = SECTIONS[inner]
            many = "[]" if "tuple" in str(field.annotation) else ""
            # The entries of `more_teachers` are described once, as `teacher`.
            if name != "more_teachers":
                found += names_of(section, f"{prefix}{name}{many}.")
    return found


def test_a_description_has_type_default_range_and_text() -> None:
    (setting,) = reference_module.describe("distill", "eval.num_points")
    assert str(setting).splitlines() == [
        "eval.num_points: integer, default 8, 1 to 10,000",
        "    Number of evaluations during a run, the last one included.",
    ]
    (setting,) = reference_module.describe("distill", "sampler.num_steps")
    assert setting.facts == "integer or `auto`, default `auto`, 1 to 1,000"


def test_config_verb_prints_a_section_and_names_the_nearest_setting(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["config", "ring"]) == 0
    assert "ring.error_buffer: number or null" in capsys.readouterr().out
    assert cli.main(["config", "ring.eror_buffer"]) == 2
    assert capsys.readouterr().err == (
        "dmkd: ring.eror_buffer: unknown setting; did you mean 'ring.error_buffer'?\n"
    )


@pytest.mark.parametrize("job", reference_module.JOBS)
def test_schemas_accept_shipped_configs(job: str) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    folder, names = ROOT / "configs", {"teacher": "weak"}
    paths = [folder / "pretrain" / f"{names.get(job, job)}.yaml"]
    if job == "distill":
        paths = [*folder.glob("*.yaml"), *folder.glob("paper/*.yaml")]
    for path in paths:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        jsonschema.validate(values, reference_module.schema(job))
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(values | {"sedd": 1}, reference_module.schema(job))


def test_every_public_name_has_its_place_in_the_api_pages() -> None:
    text = "".join(p.read_text(encoding="utf-8") for p in (DOCS / "reference" / "api").glob("*.md"))
    assert sorted(re.findall(r"^::: dmkd_fast\.(\w+)$", text, re.M)) == sorted(dmkd_fast.__all__)
    index = (DOCS / "reference" / "index.md").read_text(encoding="utf-8")
    assert set(dmkd_fast.__all__) <= set(re.findall(r"`(\w+)`", index))


def test_embedded_names_are_listed() -> None:
    page = (DOCS / "guides" / "teacher.md").read_text(encoding="utf-8")
    manifest = json.loads((ROOT / "dmkd_fast" / "assets" / "manifest.json").read_text("utf-8"))
    assert sorted(re.findall(r"^\| `embedded:([\w/]+)` \|", page, re.M)) == sorted(manifest)


def test_settings_named_on_pages_exist() -> None:
    known = {s.name for job in reference_module.JOBS for s in reference_module.describe(job)}
    sections = {name for name in known if any(n.startswith(f"{name}.") for n in known)}
    for path in PAGES:
        for name in re.findall(r"`(\w+\.\w+)(?:[:=][^`]*)?`", path.read_text(encoding="utf-8")):
            is_file = name.endswith((".yaml", ".json"))
            if name.split(".")[0] in sections - {"student", "model"} and not is_file:
                assert name in known, f"{path.name}: {name}"


def test_every_setting_has_an_example_in_a_config_or_on_a_page() -> None:
    written = [path for path in PAGES if path != reference.FOLDER / "settings.md"]
    text = "".join(p.read_text("utf-8") for p in [*ROOT.glob("configs/**/*.yaml"), *written])
    for job in reference_module.JOBS:
        for setting in reference_module.describe(job):
            field = setting.name.split(".")[-1]
            found = re.search(rf"\b{field}:|\b{re.escape(setting.name)}\b", text)
            assert setting.is_section or found, f"{setting.name} has no example"


def test_shipped_configs_name_their_schema() -> None:
    for path in ROOT.glob("configs/**/*.yaml"):
        text = path.read_text(encoding="utf-8")
        (schema,) = re.findall(r"^# yaml-language-server: \$schema=(\S+)$", text, re.M)
        kind = re.match(r"# dmkd (?:pretrain )?(\w+)", text)
        assert kind and (path.parent / schema).resolve() == FOLDER / f"{kind[1]}.json", path


def test_example_of_the_limiter_is_what_the_ring_does() -> None:
    plan = RingPlan(
        capacity_images=2048,
        image_shape=(1, 1, 1),
        block_images=256,
        min_fill_images=512,
        samples_per_insert=2,
        error_buffer=384,
    )
    ring = RingBuffer(plan)
    rows, ids = [], ring.ids.new_zeros(256)
    for _ in range(2):
        while ring.must_insert(64):
            ring.commit(ring.reserve(), ids=ids, labels=ids)
        rows.append((ring.num_inserted, ring.num_sampled, round(ring.statistics().error)))
        while not ring.must_insert(64):
            ring.sample(64)
        rows.append((ring.num_inserted, ring.num_sampled, round(ring.statistics().error)))
    page = (DOCS / "concepts" / "ring.md").read_text(encoding="utf-8")
    table = re.findall(r"^\| [^|]+ \| ([\d,]+) \| ([\d,]+) \| (-?[\d,]+) \|", page, re.M)
    shown = [tuple(int(cell.replace(",", "")) for cell in row) for row in table]
    assert shown[:4] == rows
    plan.check_batch(64)
    with pytest.raises(ValueError, match="deadlock"):
        dataclasses.replace(plan, error_buffer=192).check_batch(64)


def test_example_of_the_number_of_images_is_what_the_plan_says() -> None:
    ring = yaml.safe_load((ROOT / "configs" / "fashion_mnist.yaml").read_text("utf-8"))["ring"]
    plan = RingPlan(image_shape=(1, 28, 28), block_images=512, **ring)
    page = (DOCS / "concepts" / "ring.md").read_text(encoding="utf-8")
    (text,) = re.findall(r"^### How many images a run makes\n(.*?)^## ", page, re.M | re.S)
    assert f"the {plan.images_for(120_064):,} images" in text
    assert f"first fill of {plan.images_for(48_128):,} images" in " ".join(text.split())


def test_python_blocks_of_pages_are_valid_python() -> None:
    for path in PAGES:
        for block in re.findall(r"^( *)```python\n(.*?)^ *```", path.read_text(), re.M | re.S):
            text = re.sub(rf"^{block[0]}", "", block[1], flags=re.M)
            compile(text, path.name, "exec")


@pytest.mark.slow
def test_site_builds_and_every_link_resolves(tmp_path: Path, capfd: Any) -> None:
    pytest.importorskip("mkdocs")
    from mkdocs.__main__ import cli as mkdocs

    arguments = ["build", "--strict", "-f", str(ROOT / "mkdocs.yml"), "-d", str(tmp_path)]
    with pytest.raises(SystemExit) as end:
        mkdocs(arguments)
    assert end.value.code in (0, None), capfd.readouterr().err
    for path in tmp_path.rglob("*.html"):
        outside = re.findall(
            r'<(?:script|link|img)[^>]+(?:src|href)="(https?:[^"]+)"', path.read_text()
        )
        assert not outside, f"{path.name} loads {outside}"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["loss_in_a_loop", "parts"])
def test_notebook_runs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("MPLBACKEND", "agg")
    book = nbformat.read(DOCS / "notebooks" / f"{name}.ipynb", as_version=4)
    assert all(not cell.get("outputs") for cell in book.cells), "clear the outputs"
    nbclient.NotebookClient(book, timeout=300, kernel_name="python3").execute()


NAMING = [
    *PAGES,
    *(
        ROOT / name
        for name in (
            "CHANGELOG.md",
            "CONTRIBUTING.md",
            "SECURITY.md",
            "Makefile",
            "mkdocs.yml",
            "pyproject.toml",
            "benchmarks/gpu.sh",
            ".ci/run",
        )
    ),
]
FOLDERS = "benchmarks|configs|csrc|dmkd_fast|docs|scripts|tests"


@pytest.mark.parametrize("path", NAMING, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_modules_that_a_page_names_exist(path: Path) -> None:
    """Paths from the root of the repository, names of Python files, dotted names of the package."""
    text = path.read_text(encoding="utf-8")
    files = re.findall(rf"(?<![\w./-])((?:{FOLDERS})(?:/[\w.-]*\w)+/?)", text)
    missing = [name for name in files if not (ROOT / name).exists()]
    known = {path.name for folder in FOLDERS.split("|") for path in (ROOT / folder).rglob("*.py")}
    # timm's script, and the reader's own in a guide.
    known |= {"setup.py", "train.py", "shapes.py", "split.py"}
    missing += [name for name in re.findall(r"(?<![\w./-])(\w+\.py)\b", text) if name not in known]
    for name in re.findall(r"(?<![\w./-])dmkd_fast(?:\.\w+)+", text):
        try:
            pkgutil.resolve_name(name)
        except (AttributeError, ImportError):
            # The framework of an integration may not be installed; then its file counts.
            module = "/".join(name.split(".")[:3]) + ".py"
            if ".integrations." not in name or not (ROOT / module).exists():
                missing.append(name)
    assert not missing, f"{path.name}: {sorted(set(missing))}"


def test_pages_do_not_name_a_machine() -> None:
    for path in [*PAGES, ROOT / "CHANGELOG.md", ROOT / "SECURITY.md"]:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"/root/|/home/", text) and sys.prefix not in text, path.name
