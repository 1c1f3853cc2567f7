"""Atomic and durable writes of files and folders."""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_text_atomic(path: str | Path, text: str) -> None:
    """Replaces a file, in UTF-8. A reader or a crash meets the old contents or the new ones, never a part.

    The text is written to a new file of a unique name in the same folder, which is then renamed.

    Raises:
        OSError: if it cannot be written; the old file is still there, and nothing else.
    """
    with replacement(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def replacement(path: str | Path) -> Iterator[Path]:
    """Gives the path of an empty new file beside ``path``; once the block has written it, it takes that name.

    For files that another library writes (``save_file``). If the block fails, the new file is deleted.
    """
    path = Path(path)
    temporary = unique_beside(path)
    temporary.touch(exist_ok=False)
    try:
        yield temporary
        sync_file(temporary)
        temporary.replace(path)
    except BaseException:  # Ctrl-C too
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def replace_folder(temporary: str | Path, folder: str | Path) -> None:
    """Gives a finished folder its name, once every file in it is on the disk. An older ``folder`` is deleted.

    Args:
        temporary: a folder beside it, such as ``unique_beside(folder)``.
        folder: its new name.

    Raises:
        OSError: if it cannot be renamed; the older folder is then still there.
    """
    temporary, folder = Path(temporary), Path(folder)
    for where, _, names in os.walk(temporary):
        for name in names:
            sync_file(Path(where) / name)
        sync_folder(where)
    old: Path | None = None
    if folder.exists():  # a folder that holds files cannot be renamed over
        old = unique_beside(folder)
        folder.rename(old)
    try:
        temporary.rename(folder)
    except BaseException:
        if old is not None:
            old.rename(folder)
        raise
    sync_folder(folder.parent)
    if old is not None:
        shutil.rmtree(old)


def sync_file(path: str | Path) -> None:
    """Waits until the contents of a file are on the disk."""
    with Path(path).open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: str | Path) -> None:
    """Waits until the names in a folder are on the disk; of no effect where folders cannot be opened (Windows)."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def unique_beside(path: str | Path) -> Path:
    """A name that nobody else has, in the same folder: hidden, so that a push leaves it out, and ending in ``.tmp``.

    Unlike ``tempfile``, a file or folder that is made under it gets the permissions that any other would get.
    """
    path = Path(path)
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
