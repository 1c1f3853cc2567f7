"""The language-modelling loss without the logits of a whole batch: a few tokens at a time. Torch alone.

With a vocabulary of 128,000 the logits of 2,000 tokens take 1 GB in float32, and the backward pass two or three times
that. The LM head is not pruned and needs no gradient of its own, so the gradient of the hidden states can be taken as
each chunk's loss is, and no logits need be kept.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

IGNORE_INDEX = -100


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of token cross-entropies of a linear head, in float32; its gradient goes to the hidden states alone."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        size: int,
    ) -> torch.Tensor:
        gradient = torch.empty_like(hidden)  # (n, d)
        total = hidden.new_zeros((), dtype=torch.float32)
        for start in range(0, len(hidden), size):
            part = slice(start, start + size)
            logits = F.linear(hidden[part], weight, bias).float()  # (c, V)
            total += F.cross_entropy(logits, targets[part], ignore_index=IGNORE_INDEX, reduction="sum")
            # d loss / d logits = softmax - one hot
            logits = logits.softmax(dim=-1)
            counted = targets[part] != IGNORE_INDEX
            logits[counted.nonzero().squeeze(1), targets[part][counted]] -= 1
            logits[~counted] = 0
            gradient[part] = logits.to(weight.dtype) @ weight
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0].to(gradient.dtype), None, None, None, None


class ChunkedLoss:
    """Makes a causal LM compute its own loss in chunks, for as long as it is attached.

    The LM head hands the hidden states through, and the model's ``loss_function`` applies it chunk by chunk. What the
    model returns as logits are then hidden states: only the model's own loss can be used (no ``compute_loss_func``, no
    label smoothing), which ``check_used`` makes sure of.

    Args:
        model: with an ``lm_head`` that is a plain ``nn.Linear`` and logits that are not changed after it.
        size: tokens in a chunk.

    Raises:
        ValueError: if the model caps its logits, or its head is something else.
    """

    def __init__(self, model: Any, size: int) -> None:
        if size < 1:
            raise ValueError(f"chunk_tokens must be at least 1, got {size}")
        if getattr(model.config, "final_logit_softcapping", None):
            raise ValueError(
                f"{type(model).__name__} caps its logits after the LM head, which a chunked loss would leave out; use "
                "chunk_tokens=None"
            )
        if not isinstance(model.lm_head, nn.Linear):
            raise ValueError(f"the LM head is {type(model.lm_head).__name__}, not nn.Linear; use chunk_tokens=None")
        self.model = model
        self.size = size
        self.head: nn.Linear = model.lm_head
        self.had_loss_function: Callable[..., torch.Tensor] | None = vars(model).get("_loss_function")
        self.used = False
        self.head.forward = lambda input: input  # type: ignore[method-assign]
        model.loss_function = self._loss

    def _loss(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor,
        vocab_size: int,
        num_items_in_batch: torch.Tensor | int | None = None,
        shift_labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        self.used = True
        if shift_labels is None:
            shift_labels = F.pad(labels, (0, 1), value=IGNORE_INDEX)[..., 1:]
        hidden, targets = logits.flatten(0, -2), shift_labels.flatten().to(logits.device)  # (n, d), (n,)
        total = _ChunkedCrossEntropy.apply(hidden, self.head.weight, self.head.bias, targets, self.size)
        if num_items_in_batch is None:
            num_items_in_batch = (targets != IGNORE_INDEX).sum()
        return total / num_items_in_batch

    def check_used(self) -> None:
        """Raises ValueError if the loss of the step did not come through here."""
        if not self.used:
            raise ValueError(
                "chunk_tokens needs the model's own loss, but another one was used (compute_loss_func or label "
                "smoothing), which saw hidden states in place of logits; use chunk_tokens=None"
            )
        self.used = False

    def detach(self) -> None:
        del self.head.forward
        if self.had_loss_function is None:
            del self.model._loss_function
        else:
            self.model.loss_function = self.had_loss_function
