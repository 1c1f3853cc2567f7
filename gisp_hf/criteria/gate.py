"""Activation Taylor: ``sum over tokens of |activation x its gradient|``, without the gradient of any weight."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from gisp_hf.criteria.activations import ActivationCriterion, readers
from gisp_hf.models.layout import Layout


class Gate(ActivationCriterion):
    """``sum over tokens t of |dL/dz_t|``, ``z_t`` being a gate of value 1 on what a structure puts out for token ``t``.

    The gate multiplies all columns of ``o_proj`` (or the one of ``down_proj``) that read the structure, so its
    derivative is the sum of input times gradient over them. The query heads of a key/value group share one gate. As in
    the Taylor score of gates and feature maps (Molchanov et al., arXiv 1611.06440; Michel et al., arXiv 1905.10650),
    the absolute value is taken before the sum over examples; here an example is a token.

    Weights need no gradient: the graph starts at the first projection that is watched. The inputs of the projections
    stay in memory until the backward pass, which the weight gradients would need too.
    """

    needs = "activation_gradients"

    @contextmanager
    def watch(self, model: nn.Module, layout: Layout, *, micro_batches: int = 0) -> Iterator[None]:
        self._widths: dict[str, int] = {}  # parameter -> columns of one structure
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

    def see(self, parameter: str, inputs: torch.Tensor) -> None:
        if not inputs.requires_grad:
            inputs.requires_grad_()
        kept = inputs.detach()

        def score(gradient: torch.Tensor) -> None:
            products = kept.float() * gradient.float()  # (B, T, length)
            gates = products.unflatten(-1, (-1, self._widths[parameter])).sum(dim=-1)  # (B, T, size)
            self.add(parameter, gates.abs().flatten(0, -2).sum(dim=0))

        inputs.register_hook(score)
