"""The calibration data sets as a table: place on the Hub, columns, and the converter of a row to a record.

Prompts follow the usual zero-shot evaluation formats, so that
calibration and evaluation ask the same way. Converters raise ``ValueError`` with the reason; the reader adds the row.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets

from gisp_hf.data.files import FILE_LOADERS, file_source, load_file, text_record
from gisp_hf.data.records import Candidate, Objective, Record, Source


def _choose(prompt: str, texts: Sequence[str], gold: int) -> tuple[Candidate, ...]:
    """Candidates with one prompt and different completions, ``gold`` being the index of the right one."""
    if not 0 <= gold < len(texts):
        raise ValueError(f"label {gold} is outside its {len(texts)} choices")
    return tuple(Candidate(prompt, _after_space(text), index == gold) for index, text in enumerate(texts))


def _after_space(text: str) -> str:
    return f" {text.strip()}" if text.strip() else ""


def _number(label: Any) -> int:
    """A label that the Hub stores as text; unlabelled splits hold an empty string."""
    try:
        return int(label)
    except ValueError:
        raise ValueError(f"label {label!r} is not a number: is this an unlabelled split?") from None


def _labelled_index(labels: Sequence[str], key: str) -> int:
    """Position of an answer key such as "B" or "2" among the choices' own labels."""
    key = key.strip()
    if key not in labels:
        raise ValueError(f"label {key!r} is outside its choices {list(labels)}")
    return list(labels).index(key)


def _boolq(row: Mapping[str, Any]) -> Record:
    question = row["question"].strip().rstrip("?")
    prompt = f"{row['passage'].strip()}\nQuestion: {question}?\nAnswer:"
    return _choose(prompt, ("no", "yes"), int(row["answer"]))


def _piqa(row: Mapping[str, Any]) -> Record:
    return _choose(f"Question: {row['goal'].strip()}\nAnswer:", (row["sol1"], row["sol2"]), _number(row["label"]))


def _hellaswag(row: Mapping[str, Any]) -> Record:
    scene = " ".join(part for part in (row["ctx_a"].strip(), row["ctx_b"].strip().capitalize()) if part)
    prompt = _without_wiki_marks(f"{row['activity_label']}: {scene}")
    return _choose(prompt, [_without_wiki_marks(ending) for ending in row["endings"]], _number(row["label"]))


def _without_wiki_marks(text: str) -> str:
    """WikiHow rows hold markup: ``[title]`` opens a new sentence, other brackets carry nothing."""
    text = re.sub(r"\[.*?\]", "", text.replace(" [title]", ". "))
    return re.sub(r" {2,}", " ", text).strip()


def _winogrande(row: Mapping[str, Any]) -> Record:
    """The options differ in the prompt; the completion is the rest of the sentence, the same for both."""
    before, blank, after = row["sentence"].partition("_")
    if not blank:
        raise ValueError(f"sentence {row['sentence']!r} has no blank '_' to fill")
    gold = _number(row["answer"]) - 1
    if gold not in (0, 1):
        raise ValueError(f"label {row['answer']!r} is outside its choices '1' and '2'")
    options = (row["option1"], row["option2"])
    return tuple(
        Candidate(before + option.strip(), _after_space(after), index == gold) for index, option in enumerate(options)
    )


def _arc(row: Mapping[str, Any]) -> Record:
    choices = row["choices"]
    gold = _labelled_index(choices["label"], row["answerKey"])
    return _choose(f"Question: {row['question'].strip()}\nAnswer:", choices["text"], gold)


def _openbookqa(row: Mapping[str, Any]) -> Record:
    choices = row["choices"]
    gold = _labelled_index(choices["label"], row["answerKey"])
    return _choose(row["question_stem"].strip(), choices["text"], gold)


def _medqa(row: Mapping[str, Any]) -> Record:
    """The options are part of the prompt, and the candidates are their letters."""
    options = {letter: text for letter, text in sorted(row["options"].items()) if text is not None}
    gold = _labelled_index(list(options), row["answer_idx"])
    listed = "".join(f"{letter}. {text.strip()}\n" for letter, text in options.items())
    return _choose(f"Question: {row['question'].strip()}\n{listed}Answer:", list(options), gold)


def _gsm8k(row: Mapping[str, Any]) -> Record:
    """The whole worked answer, up to and including its ``#### number``."""
    prompt = f"Question: {row['question'].strip()}\nAnswer:"
    return (Candidate(prompt, _after_space(row["answer"]), True),)


_ARC_COLUMNS = ("question", "choices", "answerKey")

# Revisions are pinned where the data set is streamed or read as one text; the commit is recorded for all of them.
# PIQA's main branch is a loading script, which is never run: the Hub's own Parquet conversion is read instead.
SOURCES: dict[str, Source] = {
    "c4": Source(
        "allenai/c4",
        "en",
        ("text",),
        text_record,
        "language_modeling",
        revision="1588ec454efa1a09f29cd18ddd04fe05fc8653a2",
        streaming=True,
    ),
    "wikitext2": Source(
        "Salesforce/wikitext",
        "wikitext-2-raw-v1",
        ("text",),
        text_record,
        "language_modeling",
        revision="b08601e04326c79dfdd32d625aee71d232d685c3",
        running_text=True,
    ),
    "boolq": Source("google/boolq", None, ("question", "answer", "passage"), _boolq, "margin"),
    "piqa": Source(
        "ybisk/piqa", None, ("goal", "sol1", "sol2", "label"), _piqa, "margin", revision="refs/convert/parquet"
    ),
    "hellaswag": Source(
        "Rowan/hellaswag", None, ("activity_label", "ctx_a", "ctx_b", "endings", "label"), _hellaswag, "margin"
    ),
    "winogrande": Source(
        "allenai/winogrande", "winogrande_xl", ("sentence", "option1", "option2", "answer"), _winogrande, "margin"
    ),
    "arc_easy": Source("allenai/ai2_arc", "ARC-Easy", _ARC_COLUMNS, _arc, "margin"),
    "arc_challenge": Source("allenai/ai2_arc", "ARC-Challenge", _ARC_COLUMNS, _arc, "margin"),
    "openbookqa": Source(
        "allenai/openbookqa", "main", ("question_stem", "choices", "answerKey"), _openbookqa, "margin"
    ),
    "gsm8k": Source("openai/gsm8k", "main", ("question", "answer"), _gsm8k, "completion"),
    "medqa": Source("GBaker/MedQA-USMLE-4-options", None, ("question", "options", "answer_idx"), _medqa, "margin"),
}

# One name for several data sets that share one token budget (paper: "CMQA").
MIXTURES: dict[str, tuple[str, ...]] = {
    "cmqa": ("boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa"),
}

# What a data set can be calibrated with, given what it was made for: candidates hold answers, and answers hold text.
_OBJECTIVES: dict[Objective, tuple[Objective, ...]] = {
    "language_modeling": ("language_modeling",),
    "completion": ("completion", "language_modeling"),
    "margin": ("margin", "completion", "language_modeling"),
}


def find_sources(name: str, *, revision: str | None = None) -> dict[str, Source]:
    """The data sets behind a name of `SOURCES`, a name of `MIXTURES`, or the path of a local file, by their own names.

    Any other data set of the Hub with a column ``text`` is named ``owner/name``, or ``owner/name:config``; its split
    ``train`` is streamed. A local file's meaning is found by its columns; columns that are not listed here are left
    alone.

    ========================================  ================================================================
    columns                                   meaning
    ========================================  ================================================================
    ``text``                                  one document a row; a ``.txt`` file is one running text
    ``prompt``, ``completion``                a question and the answer that the loss is taken on
    ``prompt``, ``correct``, ``incorrect``    a question and two lists of answers
    ========================================  ================================================================

    ``prompt`` is a string, or a list of chat messages. Answers are strings that follow the prompt as they stand: begin
    them with a space where the language wants one.

    Raises:
        ValueError: nothing has that name; the file is empty, or fits no schema or more than one; or a ``revision`` (to
            replace the table's) is given for what is not one data set of the Hub.
    """
    if revision is not None and name not in SOURCES:
        raise ValueError(f"revision {revision!r} is for one data set of the Hub, {name!r} is not: leave it out")
    if name in SOURCES:
        source = SOURCES[name]
        return {name: source if revision is None else replace(source, revision=revision)}
    if name in MIXTURES:
        return {member: SOURCES[member] for member in MIXTURES[name]}
    path = Path(name)
    if re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", name) and path.suffix not in FILE_LOADERS:
        hub_id, _, config = name.partition(":")
        return {name: Source(hub_id, config or None, ("text",), text_record, "language_modeling", streaming=True)}
    if path.suffix not in FILE_LOADERS or not path.is_file():
        known = ", ".join(sorted([*SOURCES, *MIXTURES]))
        raise ValueError(
            f"unknown calibration data {name!r}: choose one of {known}, give owner/name[:config] of a data set on "
            f"the Hub with a column 'text', or the path of an existing {', '.join(FILE_LOADERS)} file; several of them "
            "with their shares are written a:0.5,b:0.5"
        )
    if not path.stat().st_size:
        raise ValueError(f"{path.name} is empty: give a file with at least one row")
    return {path.name: file_source(path)}


def open_source(source: Source) -> tuple[datasets.Dataset | datasets.IterableDataset, str | None]:
    """Load the data set, or begin to stream it. No code from the Hub is run.

    Returns:
        Its rows, and the commit on the Hub that they come from: that of the cache when the Hub cannot be reached. None
        for a local file.

    Raises:
        ValueError: it has no rows.
    """
    commit = None
    dataset: datasets.Dataset | datasets.IterableDataset
    if source.file is not None:
        dataset = load_file(Path(source.file))
    else:
        # the two halves of load_dataset, because the builder between them knows the commit
        builder = datasets.load_dataset_builder(source.hub_id, source.config, revision=source.revision)
        commit = builder.hash if re.fullmatch("[0-9a-f]{40}", builder.hash or "") else None
        if source.streaming:
            dataset = builder.as_streaming_dataset(split=source.split)
        else:
            builder.download_and_prepare()
            dataset = builder.as_dataset(split=source.split)
    if isinstance(dataset, datasets.Dataset) and len(dataset) == 0:
        raise ValueError(f"{source.file or source.hub_id} has no rows in {source.split!r}: give data with at least one")
    return dataset, commit


def choose_objective(name: str, named: Mapping[str, Source], objective: Objective | None) -> Objective:
    """The objective asked for, or what the data sets were made for.

    Raises:
        ValueError: the data sets do not hold what the objective needs.
    """
    made_for = next(iter(named.values())).objective
    if objective is None:
        return made_for
    if objective not in _OBJECTIVES[made_for]:
        possible = ", ".join(_OBJECTIVES[made_for])
        raise ValueError(f"{name} cannot be calibrated with objective {objective!r}: choose one of {possible}")
    return objective
