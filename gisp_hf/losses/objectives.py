"""Losses for ``Trainer(compute_loss_func=...)``: language modelling, completion only, and the margin of decision tasks.

Each has the Trainer's signature, ``(outputs, labels, num_items_in_batch=None) -> loss``, and is exact over a whole
optimizer step: the gradient does not depend on how the step is cut into micro-batches or spread over processes. A loss
of your own with this signature works as well; `completion_losses` and `decode_weights` are there to build it from.

How the Trainer scales (transformers 5): it adds the micro-batch losses up and never divides a ``compute_loss_func`` by
the number of micro-batches; ``num_items_in_batch`` counts the targets of the whole step, on all processes; and with
``average_tokens_across_devices`` (the default) it multiplies the loss by the number of processes, which undoes the mean
that DDP and FSDP take. So a loss must return *its share of the step's loss*. With that option off, a run on several
processes gets the margin divided by their number (no ranking changes), and a language-modelling mean that is exact only
if every process has equally many targets. Accelerate repeats items where their number is no multiple of processes x
batch size: a pass that must hold each item once needs one that is.

Notation: B rows, T positions, V vocabulary entries. ``labels`` is (B, T), int64; position t predicts
``labels[:, t + 1]``, and -100 marks what is not a target. ``labels[:, 0]`` is never one: nothing stands before it.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

if TYPE_CHECKING:
    from transformers.utils import ModelOutput

IGNORE_INDEX = -100

# Added to the count that `encode_weight` stores in labels[:, 0]. No token id comes near it, so labels that were not
# made for the margin are found out instead of being read as weights.
_WEIGHT_MARK = 1 << 40


def language_modeling_loss(
    outputs: "ModelOutput | Mapping[str, Any] | tuple[Any, ...]",
    labels: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """Mean cross-entropy over the target tokens of the step (arXiv 2510.18030, language modelling).

    Completion-only training is this same loss on labels whose prompt tokens are -100.

    Args:
        outputs: what the model returned; its logits are (B, T, V) in any float type and are cast to float32.
        labels: (B, T).
        num_items_in_batch: targets in the whole step, from the Trainer. ``None`` takes the mean over this batch.

    Returns:
        Scalar float32, in nats per token: this batch's share of the step's mean.

    Raises:
        ValueError: there is no target at all, or logits and labels disagree in shape.
    """
    losses, _ = _target_losses(outputs, labels)
    count = losses.numel() if num_items_in_batch is None else torch.as_tensor(num_items_in_batch, device=losses.device)
    if not bool(torch.as_tensor(count).sum()):
        raise ValueError(
            f"no target among labels of shape {tuple(labels.shape)}: every label after the first position is "
            f"{IGNORE_INDEX}. Check that the answers were not masked or cut away."
        )
    return losses.sum() / count


def completion_losses(
    outputs: "ModelOutput | Mapping[str, Any] | tuple[Any, ...]", labels: torch.Tensor
) -> torch.Tensor:
    """Mean cross-entropy of each row's completion: (B,) float32, in nats per token.

    Raises:
        ValueError: a row has no completion token, or logits and labels disagree in shape.
    """
    losses, lengths = _target_losses(outputs, labels)
    if 0 in lengths:
        raise ValueError(
            f"row {lengths.index(0)} of the batch has no completion token: all its labels are {IGNORE_INDEX}. "
            "Check that the answers were not masked or cut away."
        )
    return torch.stack([part.mean() for part in losses.split(lengths)])


def margin_loss(
    outputs: "ModelOutput | Mapping[str, Any] | tuple[Any, ...]",
    labels: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """``L+ - L-`` of a decision task (arXiv 2510.18030, decision-style tasks).

    ``L+`` is the mean over the correct candidates of the calibration set of each candidate's mean completion
    cross-entropy; ``L-`` is the same over the incorrect ones. Every candidate counts the same within its side, however
    long it is and however many candidates its question has.

    Batch layout: one row a candidate, prompt and completion, padded on the right. ``labels`` is -100 outside the
    completion, but for ``labels[:, 0]``, which is never a target and carries the row's weight (`encode_weight`):
    +1/N+ for a correct and -1/N- for an incorrect candidate, N+ and N- being the candidates *of the whole calibration
    set*. Each row therefore knows its share, and the loss is a plain weighted sum: rows may be reordered, padded,
    accumulated and spread over processes in any way, and a step that is one pass over the set gives exactly
    ``L+ - L-``. A step over a part of the set gives that part's share of it.

    Args:
        outputs: what the model returned; its logits are (B, T, V).
        labels: (B, T), as above.
        num_items_in_batch: ignored; a count of tokens has no part in a mean over candidates.

    Returns:
        Scalar float32, in nats per token; it may be negative.

    Raises:
        ValueError: labels carry no weights, or a row has no completion token.
    """
    weights = decode_weights(labels)
    losses = completion_losses(outputs, labels)
    return (weights.to(losses.device) * losses).sum()


def encode_weight(*, correct: bool, count: int) -> int:
    """The integer for ``labels[row, 0]`` that stands for the weight +1/count (correct) or -1/count (incorrect).

    Args:
        correct: whether the row is a correct candidate.
        count: how many candidates of its kind the calibration set has.

    Raises:
        ValueError: ``count`` is below 1.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}: it includes the candidate itself")
    code = _WEIGHT_MARK + count
    return code if correct else -code


def decode_weights(labels: torch.Tensor) -> torch.Tensor:
    """The rows' weights, read from ``labels[:, 0]``: (B,) float32, positive for correct candidates.

    Raises:
        ValueError: a row carries no weight.
    """
    codes = labels[:, 0]
    counts = codes.abs() - _WEIGHT_MARK
    bare = (counts < 1).nonzero()
    if bare.numel():
        row = int(bare[0])
        raise ValueError(
            f"labels[{row}, 0] is {int(codes[row])}, which is no candidate weight: the margin needs the labels of "
            "load_calibration (objective 'margin') or of encode_weight. For other labels use language_modeling_loss."
        )
    return codes.sign() / counts


def _target_losses(
    outputs: "ModelOutput | Mapping[str, Any] | tuple[Any, ...]", labels: torch.Tensor
) -> tuple[torch.Tensor, list[int]]:
    """Cross-entropy of every target, row after row: (n,) float32, and how many targets each row has (B ints)."""
    logits = outputs["logits"] if isinstance(outputs, Mapping) else outputs[0]
    if logits.ndim != 3 or logits.shape[:2] != labels.shape:
        raise ValueError(
            f"logits {tuple(logits.shape)} must be (batch, length, vocabulary) for labels {tuple(labels.shape)}: "
            "a causal language model without logits_to_keep or virtual tokens is needed"
        )
    targets = labels[:, 1:].to(logits.device)
    is_target = targets != IGNORE_INDEX
    # Only rows of logits that predict a target are cast: a short answer after a long prompt costs almost no memory.
    losses = F.cross_entropy(logits[:, :-1][is_target].float(), targets[is_target], reduction="none")
    return losses, is_target.sum(dim=1).tolist()
