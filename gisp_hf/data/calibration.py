"""Calibration data for a `Trainer`: packed blocks of text, or questions with their answers.

::

    calibration = load_calibration("cmqa", tokenizer, tokens=512_000, seed=0)
    Trainer(
        model, args, train_dataset=calibration.dataset, data_collator=calibration.collator,
        compute_loss_func=calibration.loss, callbacks=[...],
    )

What is drawn depends on the name, the seed, the budget and the tokenizer alone; ``calibration.provenance`` says what it
was. Only training splits are read, and no data set's own code is ever run.
"""

import hashlib
import struct
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gisp_hf.data.encoding import (
    CandidateCollator,
    EmptyCompletionError,
    Encoded,
    LongCompletionError,
    encode_question,
    encode_record,
    pack_blocks,
    pad_token_id,
    tokenize,
)
from gisp_hf.data.files import FILE_LOADERS, load_file
from gisp_hf.data.records import Messages, Objective, Source
from gisp_hf.data.self_answers import AnsweredPrompts, AnswerSettings, answered_prompts
from gisp_hf.data.shares import share_tokens, split_mixture
from gisp_hf.data.sources import choose_objective, find_sources, open_source
from gisp_hf.losses.objectives import language_modeling_loss, margin_loss

# arXiv 2510.18030: 2,000 sequences of 256 tokens; and the same number of tokens for the answer sets.
DEFAULT_TOKENS = 512_000
# Answers get longer sequences than text: a question that is cut loses more than a document that is.
DEFAULT_BLOCK_SIZES: dict[Objective, int] = {"language_modeling": 256, "completion": 512, "margin": 512, "self": 512}


@dataclass(frozen=True)
class Calibration:
    """Everything a Trainer needs, and where it came from.

    Attributes:
        dataset: ``input_ids`` and ``labels``. Language modelling: blocks of exactly ``block_size`` tokens. Completion:
            one sequence an item, at most ``block_size`` long. Self: the same, in an `AnsweredPrompts`. Margin: one
            question an item, a list of sequences each (layout: `gisp_hf.losses.objectives.margin_loss`), so that a step
            never sees half a question.
        collator: ``data_collator`` for the dataset.
        loss: ``compute_loss_func`` for the dataset.
        provenance: JSON-ready record: ``name``, ``objective``, ``seed``, ``block_size``, ``tokens`` (padding not
            counted), ``sequences``, ``items`` (of ``dataset``), ``correct`` and ``incorrect`` (candidates; margin
            only), ``sha256`` (all input ids, sequence after sequence, as little-endian int64) and ``sources``: for each
            data set ``name``, ``hub_id``, ``config``, ``split``, ``revision`` (the commit; None for a local file),
            ``records`` (for a running text: blocks) and ``tokens`` drawn, and ``skipped`` (reason -> records). A
            mixture also has ``parts``: for each ``name``, ``share``, ``tokens``, ``sequences``, ``items`` and the
            ``sha256`` of what this part gave, in the order in which it gives it alone.
    """

    dataset: datasets.Dataset | AnsweredPrompts
    collator: CandidateCollator
    loss: Callable[..., torch.Tensor]
    provenance: dict[str, Any]


@dataclass
class _Reading:
    """A data set being read, and what it has given so far."""

    name: str
    source: Source
    dataset: datasets.Dataset | datasets.IterableDataset
    commit: str | None
    records: int = 0
    tokens: int = 0
    skipped: Counter[str] = field(default_factory=Counter)


def load_calibration(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    objective: Objective | None = None,
    tokens: int | None = DEFAULT_TOKENS,
    block_size: int | None = None,
    seed: int = 0,
    revision: str | None = None,
    model: PreTrainedModel | None = None,
    answers: AnswerSettings | None = None,
) -> Calibration:
    """Draw a calibration set.

    Args:
        name: a data set of `gisp_hf.data.sources.SOURCES`; ``"cmqa"``, the seven decision tasks under one budget;
            ``owner/name`` or ``owner/name:config`` on the Hub; the path of a ``.jsonl``, ``.json``, ``.parquet`` or
            ``.txt`` file (columns: `find_sources`); or a mixture of these with their shares of the tokens, which add up
            to 1: ``"wikitext2:0.5,code.jsonl:0.3,owner/name:config:0.2"``, or ``"a.txt:1/3,b.txt:1/3,c.txt:1/3"``. Each
            part of a mixture gives what it gives alone with its share of the tokens; blocks hold one part only.
        tokenizer: needs a pad token; documents are separated by its end-of-text token, if it has one.
        objective: ``"language_modeling"`` (packed blocks), ``"completion"`` (loss on the right answers only),
            ``"margin"``, or ``"self"`` (the prompts of a data set or of a file with a column ``prompt``, answered by
            ``model`` itself; loss on its answers only). ``None`` takes what the data set is for; all parts of a mixture
            must be for the same.
        tokens: budget. Blocks use it to the last token. Questions are never cut: they are drawn until the next one
            would pass it, always from the data set that has given the fewest tokens, so a mixture shares it equally and
            a small set's unused share goes to the others. ``None`` takes all there is. For ``"self"`` it
            allows ``tokens / max_new_tokens`` prompts. The margin needs several times
            what language modelling does (measured: recipes/results/multiple_choice).
        block_size: tokens in a block, or the most in one sequence. A longer question loses the left end of its prompt,
            never a token of the answer. ``None``: 256 for language modelling (paper), 512 for answers.
        seed: fixes the order in which rows are drawn, and in which the items of a mixture stand.
        revision: commit, tag or branch on the Hub, instead of the table's.
        model: answers the prompts of objective ``"self"``; not used otherwise.
        answers: how it answers; the defaults of `AnswerSettings` if None.

    Raises:
        ValueError: the request cannot be met (unknown name, no pad token, budget not a multiple of the block, too
            little data), or a row is not what it should be; the message names the row by its position in the split (in
            the shuffled stream, for a streamed set). Counted in ``provenance`` instead of raised: an answer too long
            for ``block_size``, an empty text, and an empty answer in a data set of the Hub, which the caller cannot
            mend.
    """
    pad_token_id(tokenizer)
    if objective == "self":
        return _answer_prompts(
            name, tokenizer, model, tokens=tokens, block_size=block_size, seed=seed, revision=revision, answers=answers
        )
    shares = split_mixture(name)
    if revision is not None and len(shares) > 1:
        raise ValueError(f"revision {revision!r} is for one data set of the Hub, {name!r} is not: leave it out")
    named = {part: find_sources(part, revision=revision) for part in shares}
    objective = _common_objective(named, objective)
    block_size = DEFAULT_BLOCK_SIZES[objective] if block_size is None else block_size
    for part in shares:
        _check_sizes(part, named[part], objective=objective, tokens=tokens, block_size=block_size)
    budgets: dict[str, int | None] = {name: tokens}
    if len(shares) > 1:
        if tokens is None:
            raise ValueError(f"the shares of {name!r} are shares of tokens: give them, for instance {DEFAULT_TOKENS}")
        budgets = {**share_tokens(shares, tokens=tokens, unit=block_size if objective == "language_modeling" else 1)}

    drawn: list[list[Encoded]] = []
    parts, sources = [], []
    for part, budget in budgets.items():
        readings = [_Reading(label, source, *open_source(source)) for label, source in named[part].items()]
        pieces = _draw_part(
            part, readings, tokenizer, objective=objective, tokens=budget, block_size=block_size, seed=seed
        )
        drawn += pieces
        parts.append({"name": Path(part).name, "share": str(shares[part]), **_count(pieces, objective)})
        sources += [_describe(reading) for reading in readings]
    if len(parts) > 1:
        drawn = [drawn[index] for index in permutation(len(drawn), seed)]

    provenance: dict[str, Any] = {
        "name": ",".join(f"{part['name']}:{part['share']}" for part in parts) if len(parts) > 1 else Path(name).name,
        "objective": objective,
        "seed": seed,
        "block_size": block_size,
        **_count(drawn, objective),
        "sources": sources,
    }
    if len(parts) > 1:
        provenance["parts"] = parts
    sequences = [sequence for piece in drawn for sequence in piece]
    if objective == "margin":
        correct = sum(sequence.correct for sequence in sequences)
        provenance |= {"correct": correct, "incorrect": len(sequences) - correct}
        rows = [encode_question(piece, correct=correct, incorrect=len(sequences) - correct) for piece in drawn]
        dataset = datasets.Dataset.from_list(rows)
    else:
        columns = {"input_ids": [s.input_ids for s in sequences], "labels": [s.labels for s in sequences]}
        dataset = datasets.Dataset.from_dict(columns)
    return Calibration(
        dataset=dataset,
        collator=CandidateCollator(tokenizer),
        loss=margin_loss if objective == "margin" else language_modeling_loss,
        provenance=provenance,
    )


def _answer_prompts(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel | None,
    *,
    tokens: int | None,
    block_size: int | None,
    seed: int,
    revision: str | None,
    answers: AnswerSettings | None,
) -> Calibration:
    """Prompts in seeded order, with the answers that the model gives. Whole answers count towards the budget."""
    if model is None:
        raise ValueError(f"objective='self' lets the model answer the prompts of {name} itself: give model=")
    settings, block_size = answers or AnswerSettings(), block_size or DEFAULT_BLOCK_SIZES["self"]
    most = None if tokens is None else max(1, tokens // settings.max_new_tokens)
    prompts, sources = read_prompts(name, revision=revision, seed=seed, most=most)
    data = answered_prompts(model, prompts, tokenizer, block_size=block_size, settings=settings, seed=seed)
    provenance: dict[str, Any] = {
        "name": Path(name).name,
        "objective": "self",
        "seed": seed,
        "block_size": block_size,
        **_count([[row] for row in data.rows], "self"),
        "sources": sources,
        "answers": {
            **{key: getattr(settings, key) for key in ("max_new_tokens", "batch_size", "temperature")},
            "rounds": data.rounds,  # grows where a callback has answers given anew
        },
    }
    return Calibration(data, CandidateCollator(tokenizer), language_modeling_loss, provenance)


def read_prompts(
    name: str, *, revision: str | None, seed: int, most: int | None
) -> tuple[list[str | Messages], list[dict[str, Any]]]:
    """Prompts without their answers, in seeded order, at most this many, and a description of their data sets.

    Raises:
        ValueError: there are none: a file has no column ``prompt``, or the data set holds texts.
    """
    if Path(name).suffix in FILE_LOADERS and Path(name).is_file():
        rows = load_file(Path(name))
        if "prompt" not in rows.column_names:
            raise ValueError(f"{name} has columns {', '.join(rows.column_names)}; objective='self' needs prompt")
        order = permutation(len(rows), seed)[:most]
        facts = {"name": Path(name).name, "hub_id": None, "config": None, "split": None, "revision": None}
        return [rows[i]["prompt"] for i in order], [{**facts, "records": len(order), "tokens": 0, "skipped": {}}]
    readings = [
        _Reading(key, source, *open_source(source)) for key, source in find_sources(name, revision=revision).items()
    ]
    streams = [(reading, shuffled_rows(reading.dataset, seed)) for reading in readings]
    prompts: list[str | Messages] = []
    while streams and (most is None or len(prompts) < most):
        reading, stream = entry = min(streams, key=lambda pair: pair[0].records)
        if (found := next(stream, None)) is None:
            streams.remove(entry)
            continue
        record = reading.source.read(found[1])
        if isinstance(record, str):
            raise ValueError(f"{reading.name} holds texts, and objective='self' needs prompts; choose another data set")
        prompts.append(record[0].prompt)
        reading.records += 1
    return prompts, [_describe(reading) for reading in readings]


def _common_objective(named: Mapping[str, Mapping[str, Source]], objective: Objective | None) -> Objective:
    """The one objective that all parts are calibrated with."""
    chosen = {part: choose_objective(part, sources, objective) for part, sources in named.items()}
    if len(set(chosen.values())) > 1:
        listed = ", ".join(f"{part} is for {made_for}" for part, made_for in chosen.items())
        raise ValueError(
            f"the parts of a mixture must have the same objective, and {listed}: give one that all of them can be "
            "calibrated with, such as objective='language_modeling'"
        )
    return next(iter(chosen.values()))


def _draw_part(
    name: str,
    readings: Sequence[_Reading],
    tokenizer: PreTrainedTokenizerBase,
    *,
    objective: Objective,
    tokens: int | None,
    block_size: int,
    seed: int,
) -> list[list[Encoded]]:
    """What one name gives: blocks, answers or questions, each as its sequences."""
    streams = [_encode(r, tokenizer, objective=objective, block_size=block_size, seed=seed) for r in readings]
    drawn = _draw(readings, streams, tokens=tokens, cut=objective == "language_modeling")
    if objective == "language_modeling":
        ids = [token for piece in drawn for sequence in piece for token in sequence.input_ids][:tokens]
        drawn = [[block] for block in pack_blocks(ids, block_size)]
    if not drawn:
        skipped = {reading.name: dict(reading.skipped) for reading in readings}
        raise ValueError(
            f"{name} gave nothing for tokens={tokens}, block_size={block_size} (skipped: {skipped}): raise them"
        )
    return drawn


def _count(drawn: Sequence[list[Encoded]], objective: Objective) -> dict[str, Any]:
    sequences = [sequence for piece in drawn for sequence in piece]
    return {
        "tokens": sum(len(sequence.input_ids) for sequence in sequences),
        "sequences": len(sequences),
        "items": len(drawn) if objective == "margin" else len(sequences),
        "sha256": _sha256(sequences),
    }


def _check_sizes(
    name: str, named: Mapping[str, Source], *, objective: Objective, tokens: int | None, block_size: int
) -> None:
    if block_size < 2:
        raise ValueError(f"block_size must be at least 2, got {block_size}: a token needs another to be predicted from")
    if tokens is None:
        if any(source.streaming for source in named.values()):
            raise ValueError(f"{name} is streamed and practically endless: give tokens, for instance {DEFAULT_TOKENS}")
    elif tokens < 1:
        raise ValueError(f"tokens must be at least 1, got {tokens}: give the budget, or None for all there is")
    elif objective == "language_modeling" and tokens % block_size:
        above = (tokens // block_size + 1) * block_size
        raise ValueError(
            f"tokens ({tokens}) must be a multiple of block_size ({block_size}), as blocks are full: use {above}"
        )


def _encode(
    reading: _Reading, tokenizer: PreTrainedTokenizerBase, *, objective: Objective, block_size: int, seed: int
) -> Iterator[list[Encoded]]:
    """The data set's records in seeded order, each as its sequences: one text, or the candidates of one question."""
    if reading.source.running_text:
        yield from _cut_running_text(reading, tokenizer, block_size=block_size, seed=seed)
        return
    for index, row in shuffled_rows(reading.dataset, seed):
        try:
            record = reading.source.read(row)
            pieces = encode_record(record, tokenizer, objective=objective, block_size=block_size)
        except LongCompletionError:
            reading.skipped["answer longer than block_size"] += 1
            continue
        except EmptyCompletionError as error:
            if reading.source.file is not None:
                raise ValueError(f"{reading.name}, row {index}: {error}") from error
            reading.skipped["empty answer"] += 1
            continue
        except ValueError as error:
            raise ValueError(f"{reading.name}, row {index}: {error}") from error
        if not pieces:
            reading.skipped["empty text"] += 1
            continue
        yield pieces


def _cut_running_text(
    reading: _Reading, tokenizer: PreTrainedTokenizerBase, *, block_size: int, seed: int
) -> Iterator[list[Encoded]]:
    """Blocks of one long text in seeded order; what is left at its end is dropped."""
    ids = tokenize("\n\n".join(row["text"] for row in reading.dataset), tokenizer)
    blocks = pack_blocks(ids, block_size)
    for index in permutation(len(blocks), seed):
        yield [blocks[index]]


def _draw(
    readings: Sequence[_Reading],
    streams: Sequence[Iterator[list[Encoded]]],
    *,
    tokens: int | None,
    cut: bool,
) -> list[list[Encoded]]:
    """Records up to the budget, each from the data set that has given the fewest tokens (the first of equals).

    ``cut`` allows the last record to exceed the budget (the caller cuts it); without it the drawing ends before that.
    """
    drawn: list[list[Encoded]] = []
    total = 0
    still_open = list(zip(readings, streams, strict=True))
    while still_open and total != tokens:
        reading, stream = entry = min(still_open, key=lambda pair: pair[0].tokens)
        piece = next(stream, None)
        if piece is None:
            still_open.remove(entry)
            continue
        cost = sum(len(sequence.input_ids) for sequence in piece)
        if tokens is not None and total + cost > tokens:
            if not cut:
                break
            cost = tokens - total
        drawn.append(piece)
        reading.records += 1
        reading.tokens += cost
        total += cost
    if tokens is not None and total < tokens and not still_open:
        names = ", ".join(reading.name for reading in readings)
        skipped = {reading.name: dict(reading.skipped) for reading in readings if reading.skipped}
        raise ValueError(
            f"{names} held only {total} of tokens={tokens} (skipped: {skipped}): lower tokens, or use tokens=None for "
            "all there is"
        )
    return drawn


def _sha256(sequences: Sequence[Encoded]) -> str:
    digest = hashlib.sha256()
    for sequence in sequences:
        digest.update(struct.pack(f"<{len(sequence.input_ids)}q", *sequence.input_ids))
    return digest.hexdigest()


def _describe(reading: _Reading) -> dict[str, Any]:
    source = reading.source
    return {
        "name": reading.name,
        "hub_id": source.hub_id,
        "config": source.config,
        "split": source.split if source.hub_id else None,
        "revision": reading.commit or source.revision,
        "records": reading.records,
        "tokens": reading.tokens,
        "skipped": dict(reading.skipped),
    }


_SHUFFLE_BUFFER = 10_000  # documents held while a streamed data set is shuffled


def shuffled_rows(
    dataset: datasets.Dataset | datasets.IterableDataset, seed: int
) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Rows in seeded order, with their position in the split (in the shuffled stream, where there is no other)."""
    if isinstance(dataset, datasets.IterableDataset):
        yield from enumerate(dataset.shuffle(seed=seed, buffer_size=_SHUFFLE_BUFFER))
    else:
        for index in permutation(len(dataset), seed):
            yield index, dataset[index]


def permutation(length: int, seed: int) -> list[int]:
    """0 ... length - 1 in an order that the seed fixes."""
    return torch.randperm(length, generator=torch.Generator().manual_seed(seed)).tolist()
