"""Local files: which columns they may have and what these mean, and how a file is read."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets

from gisp_hf.data.records import Candidate, Record, Source


def text_record(row: Mapping[str, Any]) -> Record:
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
    # A text file is one document; by default `datasets` would make every line a row.
    options = {"sample_by": "document"} if path.suffix == ".txt" else {}
    return datasets.load_dataset(FILE_LOADERS[path.suffix], data_files=str(path), split="train", **options)
