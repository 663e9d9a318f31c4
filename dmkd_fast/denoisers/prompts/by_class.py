"""The prompts of each class: a list, templates with attributes, or a file of captions."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from dmkd_fast.runtime.errors import UserError, invalid, one_line

MOST_PROMPTS = 1_000_000
MOST_BYTES = 2**30
_PLACE = re.compile(r"\{(\w+)\}")
ByClass = tuple[tuple[str, ...], ...]


def prompts_by_class(
    prompts: Sequence[str], names: Sequence[str], attributes: Mapping[str, Sequence[str]]
) -> ByClass:
    """Return the prompts of each class.

    Args:
        prompts: Prompts with `{name}`, each for every class, or one prompt per class.
        names: Class names, in the order of the labels; for prompts with `{name}` only.
            Underscores become spaces.
        attributes: Values by the name of their place in the prompts. A prompt stands for all
            combinations of the values that it has places for.

    Raises:
        UserError: Only some prompts have a place for the name, the names are not known, or places
            and attributes do not agree.
    """
    places = {place for prompt in prompts for place in _PLACE.findall(prompt)}
    if unused := sorted(attributes.keys() - places):
        got = f"{unused[0]!r}, for which no prompt has a place"
        raise invalid("denoiser.prompt_attributes", got, f"{{{unused[0]}}} in denoiser.prompts")
    if unknown := sorted(places - attributes.keys() - {"name"}):
        got, fix = f"{{{unknown[0]}}}", f"add it to denoiser.prompt_attributes as {unknown[0]}"
        raise invalid("denoiser.prompts", got, "{name} or an attribute", fix)
    with_name = [prompt for prompt in prompts if "{name}" in prompt]
    total = sum(_num_filled(prompt, attributes) for prompt in prompts)
    total *= len(names) if with_name else 1
    if total > MOST_PROMPTS:
        raise invalid("denoiser.prompts", f"{total:,}", f"at most {MOST_PROMPTS:,}")
    if not with_name:
        return tuple(_filled(prompt, attributes) for prompt in prompts)
    if len(with_name) < len(prompts):
        got = f"{len(with_name)} of {len(prompts)} prompts with {{name}}"
        raise invalid("denoiser.prompts", got, "all or none of them", "change the others")
    if not names or all(name.isdecimal() for name in names):
        fix = "list the names in eval.classes, or write one prompt per class"
        raise invalid("denoiser.prompts", "{name} without class names", "names", fix)
    return tuple(
        tuple(
            text
            for prompt in prompts
            for text in _filled(prompt, {**attributes, "name": [name.replace("_", " ")]})
        )
        for name in names
    )


def read_captions(path: Path, names: Sequence[str]) -> ByClass:
    """Read the captions of each class.

    Args:
        path: JSON file: a list with the captions of each class, or an object of them by class name.
        names: Class names, in the order of the labels; for an object only.

    Raises:
        UserError: The file is missing or damaged, or its classes are not these.
    """
    try:
        if path.stat().st_size > MOST_BYTES:
            raise UserError(f"{path}: larger than {MOST_BYTES:,} bytes; use fewer captions")
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # UserError is a ValueError, too
        if isinstance(error, UserError):
            raise
        reason = error.strerror if isinstance(error, OSError) else one_line(error)
        raise UserError(f"{path}: {reason}; give a JSON file of captions per class") from None
    if isinstance(found, dict):
        missing, more = sorted(set(names) - found.keys()), sorted(found.keys() - set(names))
        if missing or more:
            got = f"no captions for {missing[0]!r}" if missing else f"captions for {more[0]!r}"
            raise invalid(f"{path}", got, "those of the classes of the job", "correct the names")
        found = [found[name] for name in names]
    if not isinstance(found, list) or not found:
        raise invalid(f"{path}", type(found).__name__, "captions by class, a list or an object")
    for label, captions in enumerate(found):
        if not isinstance(captions, list) or not captions:
            got = f"no list of captions for class {label}"
            raise invalid(f"{path}", got, "one caption or more", "add them")
        if not all(isinstance(caption, str) for caption in captions):
            raise invalid(f"{path}", f"a caption of class {label} that is no text", "text")
    if sum(map(len, found)) > MOST_PROMPTS:
        raise invalid(f"{path}", f"{sum(map(len, found)):,} captions", f"at most {MOST_PROMPTS:,}")
    return tuple(map(tuple, found))


def _places_of(prompt: str, values: Mapping[str, Sequence[str]]) -> dict[str, None]:
    """Return the places of a prompt that have values, each once."""
    return dict.fromkeys(place for place in _PLACE.findall(prompt) if place in values)


def _num_filled(prompt: str, values: Mapping[str, Sequence[str]]) -> int:
    """Return the number of combinations of the values that a prompt has places for."""
    return math.prod(len(values[place]) for place in _places_of(prompt, values))


def _filled(prompt: str, values: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """Return a prompt with every combination of the values that it has places for."""
    places = _places_of(prompt, values)
    return tuple(
        _with_values(prompt, dict(zip(places, chosen, strict=True)))
        for chosen in itertools.product(*(values[place] for place in places))
    )


def _with_values(prompt: str, values: Mapping[str, str]) -> str:
    """Fill the places of a prompt that have a value; leave the others unchanged."""
    return _PLACE.sub(lambda found: values.get(found[1], found[0]), prompt)
