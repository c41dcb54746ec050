"""Files and folders that appear whole or not at all, when another process comes first."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lit_mult import atomic


def fill_while_another_comes_first(path: Path, keep: Callable[[Path], bool] | None) -> None:
    with atomic.new_folder(path, keep=keep) as scratch:
        (scratch / "text").write_text("ours")
        path.mkdir()
        (path / "text").write_text("theirs")


@pytest.mark.parametrize(("keep", "content"), [(True, "theirs"), (False, "ours")])
def test_a_folder_that_came_first_is_kept_or_replaced(keep: bool, content: str, tmp_path: Path) -> None:
    judged: list[Path] = []
    fill_while_another_comes_first(tmp_path / "a", lambda path: judged.append(path) or keep)  # type: ignore[func-returns-value]
    assert judged == [tmp_path / "a"]
    assert (tmp_path / "a" / "text").read_text() == content
    assert list(tmp_path.iterdir()) == [tmp_path / "a"]  # no scratch folder is left


def test_a_folder_that_came_first_is_an_error_unless_something_judges_it(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="not empty"):
        fill_while_another_comes_first(tmp_path / "a", None)
    assert (tmp_path / "a" / "text").read_text() == "theirs"
    assert list(tmp_path.iterdir()) == [tmp_path / "a"]


def test_a_file_that_is_there_is_named_by_the_error(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("theirs")
    with pytest.raises(FileExistsError) as caught:
        atomic.write_text(tmp_path / "a.txt", "ours", overwrite=False)
    assert caught.value.filename == str(tmp_path / "a.txt")
    assert (tmp_path / "a.txt").read_text() == "theirs"
    assert list(tmp_path.iterdir()) == [tmp_path / "a.txt"]
