"""Rows of calibration data as records: a string is a text, a tuple of `Candidate` the possible answers to one question.

A data set without wrong answers gives one candidate a question.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Objective = Literal["language_modeling", "completion", "margin", "self"]

Messages = Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class Candidate:
    """One possible answer.

    Attributes:
        prompt: text, or chat messages ``[{"role": ..., "content": ...}, ...]``.
        completion: what follows the prompt, as it stands: it begins with the space that separates the two. After chat
            messages it is the assistant's turn. Empty means that the data set has no text here.
        correct: whether it is a right answer.
    """

    prompt: str | Messages
    completion: str
    correct: bool


Record = str | tuple[Candidate, ...]


@dataclass(frozen=True)
class Source:
    """One data set.

    Attributes:
        hub_id: repository on the Hub; ``None`` for a local file.
        config: configuration within the repository.
        columns: columns that ``convert`` reads.
        convert: row -> record.
        objective: what the data set is calibrated with unless the caller says otherwise.
        revision: commit or branch to load; ``None`` is the head of main.
        split: always a training split, so that no evaluation data reach calibration.
        streaming: too large to download.
        running_text: the rows are consecutive pieces of one text, not documents of their own.
        file: path of a local file, in place of ``hub_id``.
    """

    hub_id: str | None
    config: str | None
    columns: tuple[str, ...]
    convert: Callable[[Mapping[str, Any]], Record]
    objective: Objective
    revision: str | None = None
    split: str = "train"
    streaming: bool = False
    running_text: bool = False
    file: str | None = None

    def read(self, row: Mapping[str, Any]) -> Record:
        """The record of one row.

        Raises:
            ValueError: a column is missing or null, or the row contradicts itself.
        """
        missing = [column for column in self.columns if row.get(column) is None]
        if missing:
            raise ValueError(f"no value in {', '.join(missing)}: the columns {', '.join(self.columns)} are needed")
        return self.convert(row)
