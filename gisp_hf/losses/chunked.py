"""The language-modelling loss without the logits of a whole batch: a few tokens at a time. Torch alone.

With a vocabulary of 128,000 the logits of 2,000 tokens take 1 GB in float32, and the backward pass two or three times
that. The LM head is not pruned and needs no gradient of its own, so the gradient of the hidden states can be taken as
each chunk's loss is, and no logits need be kept.

``torch.nn.functional.linear_cross_entropy`` (PyTorch 2.13) is not used, because it returns the loss in the dtype of the
inputs: in bfloat16 the loss is off by 5e-3 (here 2e-6) and the peak is 195 MB (here 116), while in float32 time (0.45
and 0.38 of whole logits) and peak (78 and 77 MB) are about the same: ``python -m recipes.benchmark_loss --repeats 2``.
"""

from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from gisp_hf import upstream
from gisp_hf.losses.objectives import IGNORE_INDEX


class _ChunkedCrossEntropy(torch.autograd.Function):
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
            counted = (targets[part] != IGNORE_INDEX).nonzero().squeeze(1)  # (k,)
            chosen = targets[part][counted]
            logits = F.linear(hidden[part], weight, bias).float()  # (c, V), the only buffer of this size
            logits -= logits.amax(dim=-1, keepdim=True)
            likely = logits[counted, chosen]
            sums = logits.exp_().sum(dim=-1, keepdim=True)  # (c, 1)
            total += (sums[counted, 0].log() - likely).sum()
            # d loss / d logits = softmax - one hot
            logits /= sums
            logits[counted, chosen] -= 1
            logits[targets[part] == IGNORE_INDEX] = 0
            gradient[part] = logits.to(weight.dtype) @ weight
            del logits  # before the next chunk's are made
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0].to(gradient.dtype), None, None, None, None


def chunked_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor, *, size: int
) -> torch.Tensor:
    """Sum of the token cross-entropies of a linear head; its gradient goes to the hidden states alone.

    Args:
        hidden: (n, d), any float dtype.
        weight: (V, d), the head, in the dtype of ``hidden``.
        bias: (V,) or None.
        targets: (n,), int64; -100 is ignored.
        size: tokens in a chunk. At most ``size * V`` logits exist at once, in float32.

    Returns:
        Scalar float32, in nats.
    """
    return _ChunkedCrossEntropy.apply(hidden, weight, bias, targets, size)


class ChunkedLoss(AbstractContextManager["ChunkedLoss"]):
    """Makes a causal LM compute its own training loss in chunks, until ``detach`` or the end of a ``with`` block.

    ::

        with ChunkedLoss(model, 256):
            trainer.train()

    While the model is in training mode, its LM head hands the hidden states through, and its ``loss_function`` applies
    the head chunk by chunk. The "logits" that it returns then are hidden states: only the model's own loss can be used
    (no ``compute_loss_func``, no label smoothing), which ``check_used`` makes sure of. In evaluation mode logits and
    loss are the model's own.

    Args:
        model: with an ``lm_head`` that is a plain ``nn.Linear`` and logits that are not changed after it.
        size: tokens in a chunk, at least 1.

    Raises:
        ValueError: if ``size`` is below 1, the model caps its logits, or its head is something else.
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
        self.head: nn.Linear = model.lm_head
        self.size = size
        self.used = False
        self._plain_loss = model.loss_function
        self._plain_forward = self.head.forward
        self._changes = ExitStack()
        self._changes.enter_context(upstream.replaced_loss_function(model, self._loss))
        self._changes.callback(_set_back, self.head, "forward", vars(self.head).get("forward"))
        self.head.forward = self._forward  # type: ignore[method-assign]

    def __exit__(self, *error: object) -> None:
        self.detach()

    def detach(self) -> None:
        """Gives the model its head and its loss back, exactly as they were. A second call does nothing."""
        self._changes.close()

    def check_used(self) -> None:
        """Raises ValueError if the loss of the step did not come through here."""
        if not self.used:
            raise ValueError(
                "chunk_tokens needs the model's own loss, but another one was used: compute_loss_func or label "
                "smoothing, which saw hidden states in place of logits, or a trainer of TRL (SFTTrainer, DPOTrainer), "
                "which computes its loss in chunks by itself; use chunk_tokens=None"
            )
        self.used = False

    def _forward(self, input: torch.Tensor) -> torch.Tensor:
        return input if self.model.training else self._plain_forward(input)

    def _loss(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor,
        vocab_size: int,
        num_items_in_batch: torch.Tensor | int | None = None,
        shift_labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        if not self.model.training:
            return self._plain_loss(
                logits=logits,
                labels=labels,
                vocab_size=vocab_size,
                num_items_in_batch=num_items_in_batch,
                shift_labels=shift_labels,
                **kwargs,
            )
        self.used = True
        if shift_labels is None:
            shift_labels = F.pad(labels, (0, 1), value=IGNORE_INDEX)[..., 1:]
        hidden, targets = logits.flatten(0, -2), shift_labels.flatten().to(logits.device)  # (n, d), (n,)
        total = chunked_cross_entropy(hidden, self.head.weight, self.head.bias, targets, size=self.size)
        if num_items_in_batch is None:
            num_items_in_batch = (targets != IGNORE_INDEX).sum()
        return total / num_items_in_batch


def _set_back(owner: nn.Module, name: str, own: Any) -> None:
    """Gives an object its own attribute back; with None, that of its class."""
    if own is None:
        delattr(owner, name)
    else:
        setattr(owner, name, own)
