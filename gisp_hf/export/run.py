"""GGUF files of all levels of a run, each in its level's folder, from where a push takes them."""

from collections.abc import Callable, Iterable
from pathlib import Path

from gisp_hf.export.gguf import FileType, export_gguf


def gguf_name(repo_id: str, level: str, file_type: FileType = "f16") -> str:
    """The name of a level's GGUF file: ``SmolLM2-135M-gisp-sparsity-0.20-F16.gguf`` of ``me/SmolLM2-135M-gisp``.

    It comes from the repository: the name of a local base model must not be published.
    """
    return f"{repo_id.rpartition('/')[2]}-{level}-{file_type.upper()}.gguf"


def export_levels(
    folder: str | Path, levels: Iterable[str], *, repo_id: str, file_type: FileType, tell: Callable[[str], None]
) -> list[Path]:
    """Writes the GGUF files that are missing. Safe to run again.

    Args:
        folder: the output folder of a run.
        levels: names of its levels, such as ``sparsity-0.20``.
        repo_id: of the repository that the levels go to, for the names of the files.
        tell: is given the notes, once each.

    Returns:
        The files, in the order of ``levels``.

    Raises:
        ImportError, ValueError, OSError: as ``export_gguf``; files that are finished stay.
    """
    paths, told = [], set()
    for level in levels:
        path = Path(folder) / level / gguf_name(repo_id, level, file_type)
        if not path.exists():
            for text in export_gguf(path.parent, path, file_type=file_type).notes:
                if text not in told:
                    tell(f"{level}: {text}")
                told.add(text)
        paths.append(path)
    return paths
