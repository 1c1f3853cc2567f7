"""The manifest of a level: size and SHA-256 of every file that defines it."""

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Mapping
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

MANIFEST_FILE = "manifest.json"
FORMAT = 1
# Written again after the level was saved: its card, and what was measured of it.
CHANGING_FILES = ("README.md", "metrics.json")
# What from_pretrained might load instead of, or on top of, the weights that were saved.
WEIGHT_FILES = ("*.safetensors", "*.bin", "*.h5", "*.msgpack", "*.index.json")

_LARGEST = 2**24  # bytes of a manifest
_SHA256 = re.compile(r"[0-9a-f]{64}")
_WAY_OUT = "save the level again; if you changed it on purpose, gisp_hf.levels.manifest.write_manifest accepts it"


def write_manifest(folder: str | Path) -> Path:
    """Writes ``manifest.json`` into a level's folder: file -> size in bytes, SHA-256. The same files, the same bytes.

    It covers every regular file except the card, the metrics, itself, and names that begin with a dot.

    Raises:
        ValueError: if the folder holds a symbolic link.
    """
    folder = Path(folder)
    files = {
        name: {"sha256": file_sha256(path), "size": path.stat().st_size}
        for name, path in level_files(folder).items()
        if name not in (*CHANGING_FILES, MANIFEST_FILE)
    }
    text = json.dumps({"files": files, "format": FORMAT}, indent=1, sort_keys=True) + "\n"
    handle, temporary = tempfile.mkstemp(dir=folder, prefix=f".{MANIFEST_FILE}-")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes files that only their owner may read; the other files of the level have what the umask allows.
        Path(temporary).chmod((folder / "config.json").stat().st_mode if (folder / "config.json").exists() else 0o644)
        Path(temporary).replace(folder / MANIFEST_FILE)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return folder / MANIFEST_FILE


def check_manifest(folder: str | Path) -> frozenset[str] | None:
    """Makes sure that a level's folder still holds the files that were saved, byte for byte.

    Returns:
        The names of these files, or None if the folder has no manifest: levels of version 0.1 have none.

    Raises:
        ValueError: with the file, the difference and the way out, if a file is missing or differs, if there are weights
            that the manifest does not name, or if the manifest itself cannot be used.
    """
    folder = Path(folder)
    if not (folder / MANIFEST_FILE).exists():
        return None
    wanted, found = _read(folder / MANIFEST_FILE), level_files(folder)
    if missing := sorted(wanted.keys() - found.keys()):
        raise ValueError(f"{folder} is not as it was saved: it lacks {', '.join(missing[:3])}; {_WAY_OUT}")
    for name in sorted(found.keys() - wanted.keys()):
        if any(fnmatchcase(name, pattern) for pattern in WEIGHT_FILES):
            raise ValueError(f"{found[name]} was not there when the level was saved; remove it, or {_WAY_OUT}")
    for name, (size, _) in wanted.items():  # all sizes first: they cost nothing
        if (there := found[name].stat().st_size) != size:
            raise ValueError(f"{found[name]} has {there:,} bytes, and had {size:,} when it was saved; {_WAY_OUT}")
    for name, (_, sha256) in wanted.items():
        if (computed := file_sha256(found[name])) != sha256:
            raise ValueError(
                f"{found[name]} has other contents than when it was saved (SHA-256 {computed[:12]}..., expected "
                f"{sha256[:12]}...); {_WAY_OUT}"
            )
    return frozenset(wanted)


def level_files(folder: str | Path) -> dict[str, Path]:
    """Name (with ``/``) -> path of the regular files below ``folder``, but for names that begin with a dot.

    Raises:
        ValueError: if there is a symbolic link, whose target could be any file of this machine.
    """
    folder = Path(folder)
    files: dict[str, Path] = {}
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in (*folders, *sorted(names)):
            path = Path(parent, name)
            if name.startswith("."):
                continue
            refuse_link(path, folder)
            if path.is_file():
                files[path.relative_to(folder).as_posix()] = path
    return dict(sorted(files.items()))


def refuse_link(path: Path, folder: Path) -> None:
    """Refuses a symbolic link in ``folder``.

    Raises:
        ValueError: with the link and the way out.
    """
    if path.is_symlink():
        raise ValueError(
            f"{path} is a symbolic link, and its target could be any file. A snapshot in the Hub cache consists of "
            f"links: copy the files with `cp -rL {folder} COPY`, and use the copy"
        )


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file, 64 hex digits. A file with the same size and time of change is read once a process."""
    status = path.stat()
    return _sha256(path, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=4096)
def _sha256(path: Path, size: int, modified: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read(path: Path) -> dict[str, tuple[int, str]]:
    """Name -> size, SHA-256. Validates all of it, since the names become paths."""
    try:
        refuse_link(path, path.parent)
        if path.stat().st_size > _LARGEST:
            raise ValueError(f"it is larger than {_LARGEST:,} bytes")
        facts = json.loads(path.read_text(encoding="utf-8"))
        if facts["format"] != FORMAT:
            raise ValueError(f"it has format {facts['format']!r}, this version of gisp_hf reads format {FORMAT}")
        return {_checked_name(name): _checked_entry(entry) for name, entry in facts["files"].items()}
    except (AttributeError, KeyError, OverflowError, RecursionError, TypeError, ValueError) as error:
        reason = "".join(letter if letter.isprintable() else "?" for letter in str(error))[:300]
        raise ValueError(f"{path} cannot be used: {reason}; {_WAY_OUT}") from error


def _checked_name(name: str) -> str:
    path = PurePosixPath(name)
    if not name.isprintable() or path.is_absolute() or ".." in path.parts or path.as_posix() != name or name == ".":
        raise ValueError(f"{name!r} is not the name of a file of a level")
    return name


def _checked_entry(entry: Mapping[str, Any]) -> tuple[int, str]:
    size, sha256 = entry["size"], entry["sha256"]
    if type(size) is not int or not 0 <= size < 2**63 or not isinstance(sha256, str) or not _SHA256.fullmatch(sha256):
        raise ValueError(f"{dict(entry)!r} is not a size and a SHA-256")
    return size, sha256
