"""Activation Taylor: a norm over tokens of ``activation x its gradient``, without the gradient of any weight."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from gisp_hf.criteria.activations import ActivationCriterion, readers
from gisp_hf.criteria.base import Sums
from gisp_hf.models.layout import Layout


class Gate(ActivationCriterion):
    """``(sum over tokens t of |dL/dz_t|^1.25)^(1/1.25)``, ``z_t`` a gate of 1 on what a structure puts out for ``t``.

    The gate multiplies all columns of ``o_proj`` (or the one of ``down_proj``) that read the structure, so its
    derivative is the sum of input times gradient over them. The query heads of a key/value group share one gate. As in
    the Taylor score of gates and feature maps (Molchanov et al., arXiv 1611.06440; Michel et al., arXiv 1905.10650),
    the absolute value is taken before the sum over examples; here an example is a token. The power is measured
    (docs/ablations.md): that of those papers is 1, and 2 would give the empirical Fisher information of the gates.

    Weights need no gradient: the graph starts at the first projection that is watched. The inputs of the projections
    stay in memory until the backward pass, which the weight gradients would need too; of a gated MLP the two factors
    of that input alone (`_ScoredProduct`). Under activation checkpointing everything in a layer is computed a second
    time, and each token counts once.

    Attributes:
        power: of the derivatives before they are added up. Its root is taken of the sums, so that scores are
            proportional to the loss.
    """

    needs = "activation_gradients"
    power: float = 1.25

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
        self._mlps = {name: mlp for name in self._widths if (mlp := _gated_mlp(model, name)) is not None}
        self._factors: dict[str, dict[str, torch.Tensor]] = {}  # parameter -> the factors of its input, in this pass
        self._is_product: dict[str, bool] = {}  # parameter -> whether its input is their product, tried once
        with super().watch(model, layout, micro_batches=micro_batches), ExitStack() as stack:
            for name, mlp in self._mlps.items():
                for factor in _FACTORS:
                    handle = mlp.get_submodule(factor).register_forward_hook(self._keep_factor(name, factor))
                    stack.callback(handle.remove)
            stack.callback(self._factors.clear)
            yield

    def _keep_factor(self, parameter: str, factor: str) -> Callable[[nn.Module, Any, torch.Tensor], None]:
        def keep(module: nn.Module, args: Any, output: torch.Tensor) -> None:
            if module.training and output.requires_grad:
                self._factors.setdefault(parameter, {})[factor] = output

        return keep

    def _factors_of(self, parameter: str, inputs: torch.Tensor) -> list[torch.Tensor] | None:
        """The factors whose product, the first one through the activation, is this input; None if it is not."""
        found = self._factors.pop(parameter, {})
        node = inputs.grad_fn
        # Its last factor is the output of up_proj itself: nothing, such as a gate, has changed the product since.
        if len(found) < 2 or node is None or node.next_functions[-1][0] is not found["up_proj"].grad_fn:
            return None
        gate, up = (found[factor] for factor in _FACTORS)
        if parameter not in self._is_product:
            with torch.no_grad():
                self._is_product[parameter] = torch.equal(self._mlps[parameter].act_fn(gate) * up, inputs)
        return [gate, up] if self._is_product[parameter] else None

    def see(self, parameter: str, inputs: torch.Tensor) -> torch.Tensor:
        self._seen.add(parameter)
        factors = self._factors_of(parameter, inputs)
        if not inputs.requires_grad:
            inputs = inputs.detach().requires_grad_()

        def score(activation: torch.Tensor, gradient: torch.Tensor) -> None:
            gates = activation * gradient.float()  # (B, T, length), float32
            if self._widths[parameter] > 1:  # a channel is one column, and a sum over it would be a copy
                gates = gates.unflatten(-1, (-1, self._widths[parameter])).sum(dim=-1)  # (B, T, size)
            self.add(parameter, self.reduce(gates))

        if factors is not None:
            return _ScoredProduct.apply(*factors, inputs.detach(), self._mlps[parameter].act_fn, score)
        return _ScoredIdentity.apply(inputs, score)

    def reduce(self, gates: torch.Tensor) -> torch.Tensor:
        """What adds up over batches, (size,), from the derivatives of a batch's gates, (B, T, size), which may change.

        Replaced, with `power`, by criteria that differ in nothing else (`recipes.activation_variants`).
        """
        tokens = gates.flatten(0, -2)
        total = tokens.new_zeros(tokens.shape[1])
        for part in tokens.split(max(1, _PART // tokens.shape[1])):
            part.abs_()
            # x^1.25 by square roots takes a third of the time of a power; parts keep its memory, and the cache, small.
            total += part.mul_(part.sqrt().sqrt_()).sum(dim=0)
        return total

    def scores(self, layout: Layout, blocks: Sequence[int], sums: Sums) -> list[torch.Tensor]:
        return [scores.pow(1 / self.power) for scores in super().scores(layout, blocks, sums)]

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


_FACTORS = ("gate_proj", "up_proj")
_PART = 2**20  # numbers


def _gated_mlp(model: nn.Module, parameter: str) -> Any:
    """The module that holds this projection, if its parts have the names of ``act_fn(gate_proj(x)) * up_proj(x)``."""
    mlp = model.get_submodule(parameter.rpartition(".")[0].rpartition(".")[0])
    return mlp if all(hasattr(mlp, part) for part in (*_FACTORS, "act_fn")) else None


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


class _ScoredProduct(torch.autograd.Function):
    """``act(gate) * up``, given as ``product``; the backward pass hands it and its gradient to ``score``.

    Autograd would keep gate, act(gate), up and the product. Here gate and up stay: half of what a gated MLP keeps. The
    rest is computed again, which takes no matrix product.
    """

    @staticmethod
    def forward(
        ctx: Any,
        gate: torch.Tensor,
        up: torch.Tensor,
        product: torch.Tensor,
        act: Callable[[torch.Tensor], torch.Tensor],
        score: Callable[[torch.Tensor, torch.Tensor], None],
    ) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        ctx.act, ctx.score = act, score
        return product.view_as(product)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        (gradient,) = gradients
        with torch.enable_grad():
            gate = gate.detach().requires_grad_()
            active = ctx.act(gate)
        ctx.score(active.detach() * up, gradient)
        (of_gate,) = torch.autograd.grad(active, gate, gradient * up)
        return of_gate, gradient * active.detach(), None, None, None
