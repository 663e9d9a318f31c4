"""Check the types of what the files of a run hold before a page is made of it.

A disk or a person may have changed the files. Keys that no page uses may hold anything.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dmkd_fast.config import yaml_text
from dmkd_fast.config.loading import Fraction
from dmkd_fast.runtime.errors import UserError, invalid, shown

Count = Annotated[int, Field(ge=0, lt=2**63)]
Amount = Annotated[float, Field(ge=0, le=1e15)]
Picture = Annotated[str, Field(pattern="^data:image/")]
Mean = Annotated[float, Field(ge=0, le=1.001)]
"""Mean of fractions, which rounding may raise above 1."""


class Content(BaseModel):
    """Base class of all objects: values are not converted, and unknown keys are kept."""

    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=())


class Row(Content):
    """A row of stats.jsonl."""

    views: Count
    wall_s: Amount
    images: Amount = 0
    top1: Fraction = 0
    loss: float = 0
    ring_fill: float = 0
    ring_uses: float = 0
    ring_age_blocks: float = 0


class Summary(Content):
    """Content of summary.json."""

    top1: Fraction = 0
    top5: Fraction | None = None
    teacher_top1: Fraction | None = None
    agreement: Fraction | None = None
    generated_images: Amount = 0
    wall_s: Amount = 0
    cpu_s: Amount = 0


class Training(Content):
    """Section `train` of a config."""

    num_views: Count = 0


class Config(Content):
    """Content of config.yaml."""

    train: Training | None = None


class Sheet(Content):
    """One picture."""

    src: Picture
    width: Annotated[int, Field(ge=1, le=100_000)]
    height: Annotated[int, Field(ge=1, le=100_000)]


class Sample(Sheet):
    """Training images of one class."""

    name: Any = Field(alias="class")


class Guess(Sheet):
    """A real test image with the guesses of student and teacher."""

    label: str
    guess: str
    probability: Mean
    teacher_guess: str
    teacher_probability: Mean


class Ring(Content):
    """The ring of images at the last look."""

    slots: Count = 0
    uses: list[Count] = []
    ages: list[Count] = []


class ClassRow(Content):
    """Scores of one class."""

    name: str
    images: Count
    top1: Fraction | None
    teacher_top1: Fraction | None
    mistaken_for: str
    mistakes: Count

    @model_validator(mode="after")
    def _has_scores(self) -> Self:
        if self.images and self.top1 is None:
            raise ValueError("got no top1, expected one for a class with images")
        return self


class Confusion(Content):
    """Confusion matrix: its counts, or a picture of many classes and their worst pairs."""

    counts: list[list[Count]] = []
    picture: Picture = ""
    per_pixel: Count = 1
    pairs: list[tuple[str, str, Count]] = []


class Evaluation(Content):
    """A student on its test set."""

    scores: dict[str, float] = {}
    num_images: Count = 0
    classes: list[ClassRow] = []
    confusion: Confusion = Confusion()
    calibration: dict[str, list[tuple[Count, Mean, Mean]]] = {}
    right: list[Guess] = []
    mistakes: list[Guess] = []

    @model_validator(mode="after")
    def _has_square_counts(self) -> Self:
        counts, size = self.confusion.counts, len(self.classes)
        if counts and not len(counts) == size == min(map(len, counts)) == max(map(len, counts)):
            raise ValueError(f"got confusion.counts of another size, expected {size} x {size}")
        return self


class Facts(Content):
    """Content of report.json."""

    state: str = ""
    message: str = ""
    written: str = ""
    command: str = ""
    arguments: list[str] = []
    title: str = ""
    num_classes: Count = 0
    num_teachers: Count = 0
    world_size: Count = 0
    student_parameters: Count = 0
    teacher_parameters: Count = 0
    cpu_s: Amount = 0
    licenses: dict[str, Any] = {}
    versions: dict[str, Any] = {}
    forwards_per_image: list[tuple[Amount, Count]] = []
    seconds: dict[str, Amount] = {}
    samples: list[Sample] = []
    ring: Ring = Ring()
    evaluation: Evaluation = Evaluation()


def read_json(path: Path, kind: type[Content]) -> dict[str, Any]:
    """Return the object in a JSON file; empty if there is no such file.

    Raises:
        UserError: The file cannot be read, or does not hold what it should.
    """
    if not path.is_file():
        return {}
    try:
        data = path.read_bytes()
        kind.model_validate_json(data)
        found: dict[str, Any] = json.loads(data)
    except ValidationError as error:
        raise UserError(f"{path}: {described(error)}; delete it") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({error}); delete it") from None
    return found


def check_row(row: Any) -> dict[str, Any]:
    """Return a row of statistics unchanged.

    Raises:
        ValueError: It is no object, or its values have other types; a message of one line.
    """
    try:
        Row.model_validate(row)
    except ValidationError as error:
        raise ValueError(described(error)) from None
    found: dict[str, Any] = row
    return found


def read_config(path: Path) -> tuple[str, dict[str, Any]]:
    """Return the text of config.yaml and its values.

    Raises:
        UserError: The file cannot be read, or does not hold settings.
    """
    try:
        text = path.read_text(encoding="utf-8")
        values = yaml_text.parse(text)
        Config.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{path}: {described(error)}; restore it") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); restore it") from None
    return text, values


def described(error: ValidationError) -> str:
    """Describe the first problem in one line."""
    problem = error.errors(include_url=False)[0]
    name = ".".join(map(str, problem["loc"])) or "content"
    if problem["type"] == "json_invalid":
        return f"not valid JSON ({problem['ctx']['error']})"
    if problem["type"] == "missing":
        return f"{name}: missing"
    if problem["type"] == "value_error":
        return f"{name}: {problem['ctx']['error']}"
    expected = re.sub(r"^\w+ (should|must) (be|have) ", "", problem["msg"])
    return str(invalid(name, shown(problem["input"]), expected))
