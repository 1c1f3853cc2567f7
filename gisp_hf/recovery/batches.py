"""Batches of calibration tokens."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

Batch = Mapping[str, torch.Tensor]  # input_ids and perhaps attention_mask, both (B, T)


def batches_of(
    examples: Any, *, batch_size: int, tokens: int | None, collate: Callable[[list[Any]], Any] | None = None
) -> list[Batch]:
    """Batches of token ids, without the labels, up to a number of tokens that count.

    Args:
        examples: batches (``input_ids`` of two dimensions) or examples (of one), in any iterable.
        collate: makes a batch of examples; by default they are stacked, or padded at the end and masked.
        tokens: most of them; None for all.

    Raises:
        ValueError: if there is no token.
    """
    found: list[Batch] = []
    room = math.inf if tokens is None else tokens
    for batch in _batched(examples, batch_size, collate or _pad):
        ids, mask = batch["input_ids"], batch.get("attention_mask")
        mask = torch.ones_like(ids) if mask is None else mask
        fits = mask.sum(dim=1).cumsum(0) <= room
        ids, mask = ids[fits], mask[fits]
        if len(ids):
            found.append({"input_ids": ids} if mask.all() else {"input_ids": ids, "attention_mask": mask})
            room -= int(mask.sum())
        if not fits.all() or room <= 0:
            break
    if not found:
        raise ValueError(f"the calibration data hold no sequence of at most {tokens} tokens; give more text or tokens")
    return found


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
    return {"input_ids": pad(rows, batch_first=True), "attention_mask": pad(masks, batch_first=True)}
