"""Local files: their columns and the meaning of these, and how a file is read."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import datasets

from gisp_hf.data.records import Candidate, Record, Source


def text_record(row: Mapping[str, Any]) -> Record:
    """The converter of every data set whose rows are texts."""
    return row["text"]


def _completion(row: Mapping[str, Any]) -> Record:
    return (Candidate(row["prompt"], row["completion"], True),)


def _candidates(row: Mapping[str, Any]) -> Record:
    sides = ((row["correct"], True), (row["incorrect"], False))
    return tuple(Candidate(row["prompt"], text, correct) for texts, correct in sides for text in texts)


# Loader of `datasets` for each kind of local file.
FILE_LOADERS: dict[str, str] = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".txt": "text"}


_FILE_SCHEMAS = (
    Source(None, None, ("text",), text_record, "language_modeling"),
    Source(None, None, ("prompt", "completion"), _completion, "completion"),
    Source(None, None, ("prompt", "correct", "incorrect"), _candidates, "margin"),
)


def file_source(path: Path) -> Source:
    """The data set that a local file holds, by its columns (table: `gisp_hf.data.sources.find_sources`).

    Raises:
        ValueError: the columns fit no schema, or more than one.
    """
    columns = set(load_file(path).column_names)
    fitting = [schema for schema in _FILE_SCHEMAS if columns.issuperset(schema.columns)]
    if len(fitting) != 1:
        wanted = "; ".join(", ".join(schema.columns) for schema in _FILE_SCHEMAS)
        found = "more than one schema" if fitting else "no schema"
        raise ValueError(
            f"{path.name}: columns {', '.join(sorted(columns))} fit {found}: rename or drop columns so that they hold "
            f"just one of: {wanted}"
        )
    return replace(fitting[0], file=str(path), running_text=path.suffix == ".txt")


def load_file(path: Path) -> datasets.Dataset:
    """The rows of a .jsonl, .json, .parquet or .txt file."""
    # A text file is one document; by default `datasets` would make every line a row.
    options = {"sample_by": "document"} if path.suffix == ".txt" else {}
    return datasets.load_dataset(FILE_LOADERS[path.suffix], data_files=str(path), split="train", **options)


def read_json_lines(path: str | Path, limit: int | None = None) -> list[dict[str, Any]]:
    """The objects of a JSONL file, the first ``limit`` of them, or all; empty lines do not count.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not UTF-8, a line is no JSON object (the message names the line), or there are none.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}; give a JSONL file, one object a line")
    rows = list(islice(_json_objects(Path(path)), limit))
    if not rows:
        raise ValueError(f"{path} holds no records: give at least one line with a JSON object")
    return rows


def _json_objects(path: Path) -> Iterator[dict[str, Any]]:
    # not str.splitlines: it also splits at U+2028 and its like, which may stand in a JSON string
    with path.open(encoding="utf-8-sig") as lines:
        try:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield _json_object(line, where=f"{path}, line {number}")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text ({error}): convert it") from error


def _json_object(line: str, *, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{where} is no JSON: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"{where} is no object but {type(row).__name__}: write {{...}}")
    return row
