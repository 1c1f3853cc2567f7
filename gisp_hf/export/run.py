"""GGUF files of all levels of a run, each in its level's folder, from where a push takes them."""

import re
from collections.abc import Callable, Iterable
from pathlib import Path

from gisp_hf.export.gguf import FileType, export_gguf


def gguf_name(base: str, level: str, file_type: FileType = "f16") -> str:
    """The name of a level's GGUF file: ``SmolLM2-135M-Instruct-sparsity-0.20-F16.gguf``.

    Args:
        base: id or folder of the unpruned model; only its last part is used.
    """
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", re.split(r"[/\\]", base.rstrip("/\\"))[-1]).strip("-.")
    return f"{name or 'model'}-{level}-{file_type.upper()}.gguf"


def export_levels(
    folder: str | Path, levels: Iterable[str], *, base: str, file_type: FileType, tell: Callable[[str], None]
) -> list[Path]:
    """Writes the GGUF files that are missing. Safe to run again.

    Args:
        folder: the output folder of a run.
        levels: names of its levels, such as ``sparsity-0.20``.
        base: id of the unpruned model, for the names of the files.
        tell: is given the notes, once each.

    Returns:
        The files, in the order of ``levels``.

    Raises:
        ImportError, ValueError, OSError: as ``export_gguf``; files that are finished stay.
    """
    paths, told = [], set()
    for level in levels:
        path = Path(folder) / level / gguf_name(base, level, file_type)
        if not path.exists():
            for text in export_gguf(path.parent, path, file_type=file_type).notes:
                if text not in told:
                    tell(f"{level}: {text}")
                told.add(text)
        paths.append(path)
    return paths
