"""Activation Taylor: ``sum over tokens of |activation x its gradient|``, without the gradient of any weight."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from gisp_hf.criteria.activations import ActivationCriterion, readers
from gisp_hf.criteria.base import Sums
from gisp_hf.models.layout import Layout


class Gate(ActivationCriterion):
    """``sum over tokens t of |dL/dz_t|``, ``z_t`` being a gate of value 1 on what a structure puts out for token ``t``.

    The gate multiplies all columns of ``o_proj`` (or the one of ``down_proj``) that read the structure, so its
    derivative is the sum of input times gradient over them. The query heads of a key/value group share one gate. As in
    the Taylor score of gates and feature maps (Molchanov et al., arXiv 1611.06440; Michel et al., arXiv 1905.10650),
    the absolute value is taken before the sum over examples; here an example is a token.

    Weights need no gradient: the graph starts at the first projection that is watched. The inputs of the projections
    stay in memory until the backward pass, which the weight gradients would need too. Under activation checkpointing
    they are computed a second time, as everything else in a layer, and each token counts once.
    """

    needs = "activation_gradients"

    @contextmanager
    def watch(self, model: nn.Module, layout: Layout, *, micro_batches: int = 0) -> Iterator[None]:
        self._widths: dict[str, int] = {}  # parameter -> columns of one structure
        self._seen: set[str] = set()  # parameters whose inputs went forward since the last call of `sums`
        for block in layout.blocks:
            for member in readers(block):
                if member.parameter in self._widths or member.offset or member.stride is not None:
                    raise ValueError(
                        f"the structures of {block.name} do not lie side by side in {member.parameter}, which "
                        "gates need; choose another method"
                    )
                self._widths[member.parameter] = member.width
        with super().watch(model, layout, micro_batches=micro_batches):
            yield

    def see(self, parameter: str, inputs: torch.Tensor) -> torch.Tensor:
        self._seen.add(parameter)
        if not inputs.requires_grad:
            inputs = inputs.detach().requires_grad_()

        def score(activation: torch.Tensor, gradient: torch.Tensor) -> None:
            gates = activation * gradient.float()  # (B, T, length), float32
            if self._widths[parameter] > 1:  # a channel is one column, and a sum over it would be a copy
                gates = gates.unflatten(-1, (-1, self._widths[parameter])).sum(dim=-1)  # (B, T, size)
            self.add(parameter, gates.abs_().flatten(0, -2).sum(dim=0))

        return _ScoredIdentity.apply(inputs, score)

    def sums(self, layout: Layout, blocks: Sequence[int]) -> Sums:
        names = [member.parameter for number in blocks for member in readers(layout.blocks[number])]
        for name in names:
            if name in self._seen and name not in self._totals:
                raise ValueError(
                    f"no gradient has reached the input of {name}: the loss does not depend on it. Look for detach(), "
                    "no_grad() or reentrant checkpointing in the model or the loss"
                )
        found = super().sums(layout, blocks)
        self._seen = set()
        return found


class _ScoredIdentity(torch.autograd.Function):
    """Its input; the backward pass hands the input and its gradient to ``score``.

    The input is saved as autograd saves it, not by a reference, so that activation checkpointing can drop it.
    """

    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, score: Callable[[torch.Tensor, torch.Tensor], None]) -> torch.Tensor:
        ctx.save_for_backward(inputs)
        ctx.score = score
        return inputs.view_as(inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        ctx.score(*ctx.saved_tensors, gradients[0])
        return gradients[0], None
