"""Read, order and compare the names of classes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from dmkd_fast.data.listing import CLASS_NAMES, MOST_BYTES, SourceError
from dmkd_fast.runtime.errors import UserError, invalid, warn_once


def read_class_names(path: Path, *, must_exist: bool) -> tuple[str, ...]:
    """Read class names, one per line; return none if the file is optional and missing.

    Raises:
        UserError: The file is missing or is no list of different names.
    """
    if not path.is_file():
        if must_exist or path.exists():
            what = "got a folder" if path.is_dir() else "no such file"
            raise UserError(f"{path}: {what}; give a text file with one class name a line")
        return ()
    try:
        with path.open("rb") as file:
            text = file.read(MOST_BYTES).decode("utf-8-sig")  # Windows editors write a BOM
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise UserError(f"{path}: {reason}; save it with one class name a line") from None
    names = tuple(line.strip() for line in text.splitlines())
    if not names or not all(names) or len(set(names)) != len(names):
        unique, empty = len(set(names)), names.count("")
        what = f"{len(names)} lines, {unique} of them different and {empty} empty"
        raise invalid(path, what, "one class name a line, each once")
    return names


def write_class_names(path: Path, names: Sequence[str]) -> None:
    """Write class names, one per line, for `read_class_names`."""
    path.write_text("".join(f"{name}\n" for name in names), encoding="utf-8")


def all_numbers(names: Sequence[str]) -> bool:
    """Return whether all names are whole numbers, which do not describe the classes."""
    return all(name.isascii() and name.isdigit() for name in names)


def has_standard_order(names: Sequence[str]) -> bool:
    """Return whether the names are numbers or WordNet ids, whose order is the sorted one."""
    return all_numbers(names) or all(re.fullmatch(r"n\d{8}", name) for name in names)


def class_order(names: Iterable[str]) -> tuple[str, ...]:
    """Sort class folders by label: numbers by value, other names alphabetically."""
    order = sorted(names)
    return tuple(sorted(order, key=int) if all_numbers(order) else order)


def _is_plain(name: str) -> bool:
    """Return whether a name can be a line of a text file."""
    is_text = not any("\ud800" <= character <= "\udfff" for character in name)
    return is_text and name == name.strip() and len(name.splitlines()) == 1


def order_folders(
    folder: Path, found: Sequence[str], names: Sequence[str], *, owner: str = "the list of classes"
) -> tuple[str, ...]:
    """Return the class folders in the order of their labels.

    One warning is logged if the labels differ from those of torchvision's ImageFolder.

    Args:
        folder: Folder that holds them, for messages.
        found: Names of the class folders.
        names: The same names in the order of the labels; if empty, `class_order` applies.
        owner: What states `names`, for messages.

    Raises:
        SourceError: `names` and `found` are not the same names, or a name is not a line of text.
    """
    odd = next((name for name in found if not _is_plain(name)), None)
    if odd is not None:
        expected = "a name in UTF-8 of one line without outer blanks"
        raise SourceError.invalid(folder, f"class folder {odd!a:.60}", expected, "rename it")
    missing, extra = sorted(set(names) - set(found)), sorted(set(found) - set(names))
    if names and (missing or extra):
        what = f"no folder for class {missing[0]!r}" if missing else f"folder {extra[0]!r}"
        more = len(missing or extra) - 1
        raise SourceError(
            f"{folder}: got {what}{f' and {more} more' if more else ''}, which {owner} "
            f"{'has' if missing else 'does not have'}; make both agree"
        )
    if names:
        return tuple(names)
    order = class_order(found)
    for label, (mine, other) in enumerate(zip(order, sorted(order), strict=True)):
        if mine != other:
            warn_once(
                f"{folder}: class folders are in numeric order, so class {label} is {mine!r}; in "
                f"alphabetical order, torchvision's ImageFolder has {other!r} there; to choose, "
                f"list the names in {CLASS_NAMES}, eval.classes or --classes"
            )
            break
    return order


def teacher_order(
    folder: Path, found: Sequence[str], num_classes: int, class_names: Sequence[str]
) -> tuple[str, ...]:
    """Return class folders in the order of a teacher's classes.

    Args:
        folder: Folder that holds them, for messages.
        found: Names of the class folders.
        num_classes: Number of the teacher's classes.
        class_names: Names of the classes, in the order of the labels. Folders with these names are
            matched by name, and numbered folders (0, 1, ...) by number. If `class_names` are only
            numbers, the sorted folders are matched in order.

    Raises:
        SourceError: The folders cannot be matched.
    """
    if len(found) != num_classes:
        expected = f"{num_classes}, one for each class of the teacher"
        raise SourceError.invalid(folder, f"{len(found)} class sub-folders", expected)
    if set(found) == set(class_names):
        return tuple(class_names)
    if all_numbers(found) and sorted(map(int, found)) != list(range(num_classes)):
        what = f"class sub-folders {', '.join(class_order(found)[:5])} ..."
        raise SourceError.invalid(folder, what, f"the numbers 0 to {num_classes - 1}")
    if all_numbers(found) or all_numbers(class_names):
        return order_folders(folder, found, ())
    return order_folders(folder, found, class_names, owner="the test set")


def order_by_name(names: Sequence[str], wanted: Sequence[str] | None) -> list[int] | None:
    """Return the place in `wanted` of each of the names; None unless the sets agree.

    If no exact match exists, case and punctuation are ignored, and numbers are not mapped. Wanted
    names that count from 0 on say nothing, as what has no names is saved with those.

    Args:
        names: Class names of a set of images.
        wanted: Class names in another order, or None if they are unknown.
    """
    if wanted is None or _only_count(wanted):
        return None
    if _are_same(names, wanted):
        exact = {name: place for place, name in enumerate(wanted)}
        return [exact[name] for name in names] if len(exact) == len(wanted) else None
    if all_numbers(names) or all_numbers(wanted):
        return None
    places = {_simplified(name): place for place, name in enumerate(wanted)}
    mine = [_simplified(name) for name in names]
    if len(places) != len(wanted) or len(set(mine)) != len(mine) or set(mine) != set(places):
        return None
    return [places[name] for name in mine]


def compare_class_names(
    owner: str, names: Sequence[str] | None, tested: Sequence[str], *, setting: str
) -> None:
    """Refuse classes that have other names in a part of a job than in the test set.

    If both sides hold the same names, their order must be the same. Otherwise case and punctuation
    are ignored, and names that are only numbers are not compared. Names that count from 0 on are
    those of classes without names, and are compared with no numbers.

    Args:
        owner: Name of the part, for the message.
        names: Class names of the part, in the order of the labels; None if it states none.
        tested: Class names of the test set.
        setting: Setting or option for the order of the test set's classes, for the message.

    Raises:
        UserError: A class has different names.
    """
    if names is None:
        return
    are_same = _are_same(names, tested) and not (_only_count(names) or _only_count(tested))
    if not are_same and (all_numbers(names) or all_numbers(tested)):
        return
    form = str if are_same else _simplified
    for label, (mine, other) in enumerate(zip(names, tested, strict=False)):
        if form(mine) != form(other):
            raise UserError(
                f"classes: class {label} is {mine!r} in {owner} and {other!r} in the test set, "
                f"expected the same; set {setting} to a file with the test set's class names, one "
                f"a line, in the order of {owner}"
            )


def _only_count(names: Sequence[str]) -> bool:
    return list(names) == [str(label) for label in range(len(names))]


def _are_same(names: Sequence[str], others: Sequence[str]) -> bool:
    """Return whether two lists hold the same names in any order."""
    return sorted(names) == sorted(others)


def _simplified(name: str) -> str:
    return "".join(c for c in name.casefold() if c.isalnum()) or name
