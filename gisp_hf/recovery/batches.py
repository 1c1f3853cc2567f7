"""Batches of calibration tokens."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from gisp_hf.losses.objectives import IGNORE_INDEX

Batch = Mapping[str, torch.Tensor]  # input_ids and perhaps attention_mask and counted, all (B, T)
COUNTED = "counted"  # tokens that count in a fit, where these are not all that the attention mask has


def model_inputs(batch: Batch) -> dict[str, torch.Tensor]:
    """What a model is given of a batch."""
    return {key: value for key, value in batch.items() if key != COUNTED}


def mask_of(batch: Batch) -> torch.Tensor | None:
    """(B, T), which tokens count in a fit; None: all."""
    return batch.get(COUNTED, batch.get("attention_mask"))


def batches_of(
    examples: Any,
    *,
    batch_size: int,
    tokens: int | None,
    collate: Callable[[list[Any]], Any] | None = None,
    answers: bool = False,
) -> list[Batch]:
    """Batches of token ids, up to a number of tokens.

    Args:
        examples: batches (``input_ids`` of two dimensions) or examples (of one), in any iterable.
        collate: makes a batch of examples; by default they are stacked, or padded at the end and masked.
        tokens: most of them, those outside answers too; None for all.
        answers: count only tokens whose label is not -100, and the one before each, which predicts it.

    Raises:
        ValueError: if there is no token, or ``answers`` finds none.
    """
    found: list[Batch] = []
    room = math.inf if tokens is None else tokens
    for batch in _batched(examples, batch_size, collate or _pad):
        ids, mask = batch["input_ids"], batch.get("attention_mask")
        mask = torch.ones_like(ids) if mask is None else mask
        fits = mask.sum(dim=1).cumsum(0) <= room
        ids, mask = ids[fits], mask[fits]
        if len(ids):
            kept = {"input_ids": ids} if mask.all() else {"input_ids": ids, "attention_mask": mask}
            found.append({**kept, COUNTED: _in_answers(batch)[fits]} if answers else kept)
            room -= int(mask.sum())
        if not fits.all() or room <= 0:
            break
    if not found:
        raise ValueError(f"the calibration data hold no sequence of at most {tokens} tokens; give more text or tokens")
    if answers and not any(batch[COUNTED].any() for batch in found):
        raise ValueError("positions='answers' needs labels of answers, and all labels are -100; use positions='all'")
    return found


def _in_answers(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """(B, T), true for tokens with a loss and for those that predict them."""
    if "labels" not in batch:
        raise ValueError(
            "positions='answers' needs calibration data with labels, as objective='completion', 'margin' or 'self' of "
            "load_calibration gives them; use positions='all'"
        )
    answer = batch["labels"] != IGNORE_INDEX
    predicts = torch.zeros_like(answer)
    predicts[:, :-1] = answer[:, 1:]
    return answer | predicts


def _batched(examples: Any, batch_size: int, collate: Callable[[list[Any]], Any]) -> Iterator[Batch]:
    waiting: list[Any] = []
    for example in examples:
        ids = example["input_ids"]
        if isinstance(ids, torch.Tensor) and ids.ndim == 2:
            yield example
            continue
        waiting.append(example)
        if len(waiting) == batch_size:
            yield collate(waiting)
            waiting = []
    if waiting:
        yield collate(waiting)


def _pad(examples: Sequence[Mapping[str, Any]]) -> Batch:
    rows = [torch.as_tensor(example["input_ids"], dtype=torch.long) for example in examples]
    masks = [
        torch.as_tensor(example.get("attention_mask", torch.ones_like(row))) for example, row in zip(examples, rows)
    ]
    pad = nn.utils.rnn.pad_sequence
    found = {"input_ids": pad(rows, batch_first=True), "attention_mask": pad(masks, batch_first=True)}
    if all("labels" in example for example in examples):
        labels = [torch.as_tensor(example["labels"]) for example in examples]
        found["labels"] = pad(labels, batch_first=True, padding_value=IGNORE_INDEX)
    return found
