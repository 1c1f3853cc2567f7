"""Block influence: ``1 - cosine`` of the hidden states before and after a layer (ShortGPT, arXiv 2403.03853)."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.hooks import RemovableHandle

from gisp_hf.criteria.activations import ActivationCriterion
from gisp_hf.criteria.base import Sums
from gisp_hf.models.layout import Block, Layout, kind_of


class BlockInfluence(ActivationCriterion):
    """The mean over tokens of ``1 - cos(x, y)``, ``x`` being what enters a decoder layer and ``y`` what leaves it.

    A layer that hardly turns the hidden state goes first (Eq. 1 of the paper). ``1 - cos(x, y)`` is computed as half
    the squared distance of ``x`` and ``y`` at length 1: exact for a layer that changes nothing, and 0.5 for a state of
    zeros, as in the authors' code (icip-cas/ShortGPT, ``shortgpt/metrics.py``). That code takes the last hidden state
    of the model as the output of the last layer, which is the state after the final norm; here it is the one before.
    """

    def watched(self, block: Block) -> list[str]:
        if not kind_of(block.kind).whole:
            raise ValueError(
                f"block influence scores whole layers, and {block.name} holds parts of one; give its method "
                "kinds=('layer',)"
            )
        return [block.module] if block.size else []

    def hook(self, name: str) -> RemovableHandle:
        def see(module: nn.Module, args: tuple[torch.Tensor, ...], output: Any) -> None:
            if module.training and torch.is_grad_enabled():
                after = output if isinstance(output, torch.Tensor) else output[0]
                self.see(name, torch.cat([args[0], after.to(args[0].device)], dim=-1))  # (B, T, 2 d)

        return self.model.get_submodule(name).register_forward_hook(see)

    def statistics(self, inputs: torch.Tensor) -> torch.Tensor:
        before, after = (F.normalize(states, dim=-1) for states in inputs.chunk(2, dim=-1))  # (n, d)
        influence = (before - after).square().sum(dim=-1) / 2  # (n,)
        return torch.stack([influence.sum(), influence.new_tensor(len(influence))])

    def scores(self, layout: Layout, blocks: Sequence[int], sums: Sums) -> list[torch.Tensor]:
        found = [sums[number, layout.blocks[number].module] for number in blocks]
        return [(total / count).reshape(1) for total, count in found]
