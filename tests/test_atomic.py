"""Files and folders appear whole or not at all, reach the disk before they get their name, and leave nothing beside."""

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from gisp_hf.atomic import replace_folder, replacement, unique_beside, write_text_atomic


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """(what, name) of each fsync and rename, in order."""
    seen: list[tuple[str, str]] = []
    fsync, rename, replace = os.fsync, Path.rename, Path.replace

    def noted(what: str, call: Callable[[Path, Path], Path]) -> Callable[[Path, Path], Path]:
        def method(self: Path, target: Path) -> Path:
            seen.append((what, Path(target).name))
            return call(self, target)

        return method

    def noted_fsync(handle: int) -> None:
        seen.append(("fsync", Path(os.readlink(f"/proc/self/fd/{handle}")).name))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "rename", noted("rename", rename))
    monkeypatch.setattr(Path, "replace", noted("rename", replace))
    return seen


needs_proc = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="reads names of open files from /proc")


def test_a_text_is_written_and_replaced(tmp_path: Path) -> None:
    for text in ("old \u00e4\n", "new"):
        write_text_atomic(tmp_path / "facts.json", text)
        assert (tmp_path / "facts.json").read_text(encoding="utf-8") == text
        assert [path.name for path in tmp_path.iterdir()] == ["facts.json"]


def test_a_file_of_the_users_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "facts.json.tmp").write_text("mine")
    write_text_atomic(tmp_path / "facts.json", "new")
    assert (tmp_path / "facts.json.tmp").read_text() == "mine"


def test_a_file_can_be_read_by_whom_any_other_can(tmp_path: Path) -> None:
    (tmp_path / "other").write_text("x")
    write_text_atomic(tmp_path / "facts.json", "x")
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert len(modes) == 1


@needs_proc
def test_a_file_is_on_the_disk_before_it_gets_its_name(tmp_path: Path, calls: list[tuple[str, str]]) -> None:
    write_text_atomic(tmp_path / "facts.json", "x")
    (first, temporary), *others = calls
    assert first == "fsync" and temporary.startswith(".facts.json.") and temporary.endswith(".tmp")
    assert others == [("rename", "facts.json"), ("fsync", tmp_path.name)]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_old_file(tmp_path: Path, error: BaseException) -> None:
    (tmp_path / "facts.json").write_text("old")
    with pytest.raises(type(error)), replacement(tmp_path / "facts.json") as temporary:
        temporary.write_text("half")
        raise error
    assert (tmp_path / "facts.json").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["facts.json"]


def make_folder(folder: Path, text: str) -> Path:
    (folder / "sub").mkdir(parents=True)
    (folder / "a").write_text(text)
    (folder / "sub" / "b").write_text(text)
    return folder


@pytest.mark.parametrize("exists", [False, True])
def test_a_folder_gets_its_name(tmp_path: Path, exists: bool) -> None:
    if exists:
        make_folder(tmp_path / "level", "old")
        (tmp_path / "level" / "only-old").touch()
    replace_folder(make_folder(unique_beside(tmp_path / "level"), "new"), tmp_path / "level")
    found = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")}
    assert found == {"level", "level/a", "level/sub", "level/sub/b"}
    assert (tmp_path / "level" / "sub" / "b").read_text() == "new"


@needs_proc
def test_every_file_of_a_folder_is_on_the_disk_before(tmp_path: Path, calls: list[tuple[str, str]]) -> None:
    temporary = make_folder(unique_beside(tmp_path / "level"), "new")
    replace_folder(temporary, tmp_path / "level")
    renamed = calls.index(("rename", "level"))
    assert {name for _, name in calls[:renamed]} == {"a", "b", "sub", temporary.name}
    assert calls[renamed + 1 :] == [("fsync", tmp_path.name)]


def test_a_folder_that_cannot_be_renamed_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_folder(tmp_path / "level", "old")
    temporary = make_folder(unique_beside(tmp_path / "level"), "new")
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self == temporary:
            raise OSError("no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="no"):
        replace_folder(temporary, tmp_path / "level")
    assert (tmp_path / "level" / "a").read_text() == "old"
    assert sorted(tmp_path.iterdir()) == sorted([tmp_path / "level", temporary])


def test_names_are_unique_hidden_and_beside(tmp_path: Path) -> None:
    names = {unique_beside(tmp_path / "level") for _ in range(100)}
    assert len(names) == 100
    assert all(path.parent == tmp_path and path.name.startswith(".level.") and path.suffix == ".tmp" for path in names)
