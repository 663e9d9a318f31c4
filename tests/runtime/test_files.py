"""Files are replaced whole or not at all, and nothing is deleted behind a link."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from dmkd_fast.runtime import files


def test_a_link_to_a_folder_is_deleted_and_its_target_is_not(tmp_path: Path) -> None:
    link, folder, target = (tmp_path / name for name in ("link", "folder", "target"))
    target.mkdir()
    (target / "weights").write_text("kept")
    folder.mkdir()
    for path in (link, folder / "link"):
        path.symlink_to(target)
    files.discard(link)
    files.discard(folder)
    assert list(tmp_path.iterdir()) == [target]
    assert (target / "weights").read_text() == "kept"


def test_parts_that_cannot_be_made_leave_the_old_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_text("old")

    def parts() -> Iterator[bytes]:
        yield b"half"
        raise TypeError("no such dtype")

    with pytest.raises(TypeError, match="no such dtype"):
        files.replace(path, parts())
    assert list(tmp_path.iterdir()) == [path] and path.read_text() == "old"
