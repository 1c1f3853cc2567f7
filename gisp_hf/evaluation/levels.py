"""Evaluate every level of a run, and keep the numbers beside each level."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from gisp_hf.data.files import read_json_lines
from gisp_hf.data.sources import SOURCES, open_source
from gisp_hf.evaluation.answers import exact_match
from gisp_hf.evaluation.choices import multiple_choice_accuracy
from gisp_hf.evaluation.perplexity import perplexity
from gisp_hf.evaluation.suites import evaluate_suite
from gisp_hf.levels.info import LevelInfo, read_levels, write_metrics

WIKITEXT2 = "wikitext2"


def evaluate_levels(
    repo_or_folder: str,
    *,
    text: str | None = None,
    windows: Sequence[int] = (128,),
    questions: str | None = None,
    answers: str | None = None,
    tasks: Sequence[str] = (),
    include_path: str | None = None,
    limit: int | None = None,
    max_new_tokens: int = 256,
    dtype: torch.dtype | None = None,
    batch_size: int = 8,
) -> Iterator[tuple[LevelInfo, dict[str, float]]]:
    """Measures one level after the other, and yields each with its numbers as soon as they are there.

    The numbers of a local run are written into the levels' folders (``metrics.json``), where ``levels.json`` and new
    cards take them from.

    Args:
        repo_or_folder: a run's output folder, or a repository with levels.
        text: a text file, or ``wikitext2`` for the test split of WikiText-2 (raw, lines joined by empty ones).
        windows: lengths of the windows for perplexity; the paper's is 128.
        questions: a JSONL file of ``{"prompt", "choices", "label"}`` for multiple-choice accuracy.
        answers: a JSONL file of ``{"prompt", "completion"}`` records for the exact match of final numbers.
        tasks: names of lm-eval tasks, with ``include_path`` for your own.
        limit: only so many examples of each; None for all.
        max_new_tokens: of a generated answer.

    Raises:
        ValueError: if nothing is to be measured, or a file will not do; before any model is loaded.
        FileNotFoundError: if a file, folder or repository is not there.
    """
    if text is None and questions is None and answers is None and not tasks:
        raise ValueError("nothing to measure: give --text, --questions, --answers or --tasks")
    levels = read_levels(repo_or_folder)
    passage = None if text is None else _read_text(text)
    choices = None if questions is None else read_json_lines(questions, limit)
    records = None if answers is None else read_json_lines(answers, limit)
    folder = Path(repo_or_folder)
    return _measure_each(
        levels,
        source=repo_or_folder,
        folder=folder if folder.is_dir() else None,
        measure_one=partial(
            measure,
            passage=passage,
            windows=windows,
            choices=choices,
            records=records,
            tasks=tasks,
            include_path=include_path,
            limit=limit,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
        ),
        dtype=dtype,
    )


def _measure_each(
    levels: Sequence[LevelInfo],
    *,
    source: str,
    folder: Path | None,
    measure_one: Callable[[PreTrainedModel, PreTrainedTokenizerBase], dict[str, float]],
    dtype: torch.dtype | None,
) -> Iterator[tuple[LevelInfo, dict[str, float]]]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for level in levels:
        where: dict[str, Any] = {"revision": level.name} if folder is None else {}
        path = source if folder is None else str(folder / level.name)
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype or "auto", device_map=device, trust_remote_code=False, **where
        )
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False, **where)
        metrics = measure_one(model, tokenizer)
        if folder is not None:
            write_metrics(folder / level.name, metrics)
        yield level, metrics


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    passage: str | None = None,
    windows: Sequence[int] = (128,),
    choices: Sequence[Mapping[str, Any]] | None = None,
    records: Sequence[Mapping[str, str]] | None = None,
    tasks: Sequence[str] = (),
    include_path: str | None = None,
    limit: int | None = None,
    max_new_tokens: int = 256,
    batch_size: int = 8,
) -> dict[str, float]:
    """The requested measurements of one model, under flat names; those without a number are left out."""
    found: dict[str, float | None] = {}
    if passage is not None:
        ids = torch.tensor(tokenizer(passage, add_special_tokens=False, verbose=False)["input_ids"])
        for window in windows:
            found[f"perplexity_{window}"] = perplexity(model, ids, window=window, batch_size=batch_size, progress=True)
    if choices is not None:
        found |= multiple_choice_accuracy(model, tokenizer, choices, batch_size=batch_size)
    if records is not None:
        found |= exact_match(model, tokenizer, records, max_new_tokens=max_new_tokens, batch_size=batch_size)
    if tasks:
        suite = evaluate_suite(model, tokenizer, tasks, include_path=include_path, limit=limit, batch_size=batch_size)
        found |= {f"{task}/{name}": value for task, metrics in suite.items() for name, value in metrics.items()}
    return {name: value for name, value in found.items() if value is not None}


def _read_text(name: str) -> str:
    if name == WIKITEXT2:
        rows, _ = open_source(replace(SOURCES[WIKITEXT2], split="test"))
        return "\n\n".join(row["text"] for row in rows)
    path = Path(name)
    if not path.is_file():
        raise FileNotFoundError(f"there is no text file {name}; give one, or {WIKITEXT2}")
    return path.read_text(encoding="utf-8")
