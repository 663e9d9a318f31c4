"""Class names from files, folders and networks are read, ordered and compared in one way."""

from __future__ import annotations

from pathlib import Path

import pytest

from dmkd_fast.data.class_names import (
    class_order,
    compare_class_names,
    order_by_name,
    order_folders,
    teacher_order,
)
from dmkd_fast.data.listing import SourceError
from dmkd_fast.runtime.errors import UserError

FOLDER = Path("set")


def test_numbers_are_sorted_by_value_and_names_alphabetically() -> None:
    assert class_order(["10", "2", "1"]) == ("1", "2", "10")
    assert class_order(["b", "2", "10"]) == ("10", "2", "b")


def test_class_names_in_another_order_are_refused() -> None:
    def check(names: tuple[str, ...] | None, tested: list[str]) -> None:
        compare_class_names("m", names, tested, setting="--classes")

    check(None, ["a", "b"])
    check(("T-shirt/top", "Ankle boot"), ["t_shirt top", "ankle-boot"])
    check(("cat", "dog"), ["0", "1"])
    check(("0", "1"), ["cat", "dog"])
    check(("cat", "dog"), ["cat"])  # numbers of classes are compared elsewhere
    with pytest.raises(UserError, match=r"class 0 is 'cat' in m and 'dog' in .*set --classes to"):
        check(("cat", "dog"), ["dog", "cat"])
    for names, tested in ((("1", "10", "2"), ["1", "2", "10"]), (("Cat", "cat"), ["cat", "Cat"])):
        check(names, list(names))
        with pytest.raises(UserError, match=r"class \d is '(10|Cat)' in m and '(2|cat)' in the"):
            check(names, tested)
    # What has no names of its own is saved with the numbers from 0 on.
    check(("0", "2", "1"), ["0", "1", "2"])
    check(("0", "1", "2"), ["0", "2", "1"])


def test_equal_names_are_mapped_as_they_are_written() -> None:
    assert order_by_name(["1", "2", "10"], ["1", "10", "2"]) == [0, 2, 1]
    assert order_by_name(["Cat", "cat"], ["cat", "Cat"]) == [1, 0]
    assert order_by_name(["0", "1"], ["1", "2"]) is None
    assert order_by_name(["0", "1", "10"], ["0", "10", "1"]) == [0, 2, 1]
    assert order_by_name(["0", "2", "1"], ["0", "1", "2"]) is None  # these say nothing
    assert order_by_name(["a", "a"], ["a", "a"]) is None


def test_folders_and_the_list_of_classes_must_have_the_same_names() -> None:
    assert order_folders(FOLDER, ["a", "b"], ("b", "a")) == ("b", "a")
    with pytest.raises(SourceError, match="no folder for class 'b' and 1 more, which the list"):
        order_folders(FOLDER, ["a"], ("a", "b", "c"))
    with pytest.raises(SourceError, match="folder 'b', which the list of classes does not have"):
        order_folders(FOLDER, ["a", "b"], ("a",))
    with pytest.raises(SourceError, match="no folder for class '0'"):
        order_folders(FOLDER, ["a", "b"], ("0", "1"))


@pytest.mark.parametrize(
    "name",
    ["caf\udce9", " ant", "ant\t", "a\nb"],
    ids=["not UTF-8", "blank before", "blank after", "line break"],
)
def test_folders_whose_names_are_no_line_of_text_are_refused(name: str) -> None:
    expected = r"^set: got class folder '.*', expected a name in UTF-8 of one line"
    with pytest.raises(SourceError, match=expected) as error:
        order_folders(FOLDER, ["bee", name], ())
    assert "\n" not in str(error.value) and str(error.value).isascii()


def test_a_teachers_classes_are_matched_by_name_or_number() -> None:
    assert teacher_order(FOLDER, ["a", "b"], 2, ("b", "a")) == ("b", "a")
    assert teacher_order(FOLDER, ["10", *map(str, range(10))], 11, ("x",) * 11)[-1] == "10"
    assert teacher_order(FOLDER, ["b", "a"], 2, ("0", "1")) == ("a", "b")
    with pytest.raises(SourceError, match="no folder for class 'c', which the test set has"):
        teacher_order(FOLDER, ["a", "b"], 2, ("a", "c"))
