"""Training of vectors alone: the weights of norms, or one factor for each input of the output projections.

A vector is a parametrization (`torch.nn.utils.parametrize`) of the weight that it changes. Every forward pass takes the
changed weight in its own dtype, so the trained model is bit for bit the one with the vector folded in.
"""

from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.utils import parametrize

from gisp_hf.models.discovery import family_of


class Shift(nn.Module):
    """``weight + change`` for a weight of shape ``(n,)``."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.change = nn.Parameter(torch.zeros_like(weight, dtype=torch.float32))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return (weight.float() + self.change).to(weight.dtype)


class Scale(nn.Module):
    """``weight * (1 + change)`` for a weight of shape ``(m, n)``: a factor for each of the ``n`` inputs."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.change = nn.Parameter(torch.zeros_like(weight[0], dtype=torch.float32))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return (weight.float() * (1 + self.change)).to(weight.dtype)


def attach_vectors(model: nn.Module, train: str) -> None:
    """Freezes the model and puts vectors, which change nothing yet, on its weights.

    Args:
        train: "norms": every weight of one dimension; "scales": the columns of ``o_proj`` and ``down_proj``, so that
            each channel and each dimension of a head has a factor.

    Raises:
        ValueError: if there is no such weight.
    """
    model.requires_grad_(False)
    owners = list(_norms(model) if train == "norms" else _output_projections(model))
    if not owners:
        raise ValueError(f"{type(model).__name__} has no weights for train={train!r}; use train='lora'")
    for owner in owners:
        change = Shift(owner.weight) if train == "norms" else Scale(owner.weight)  # type: ignore[arg-type]
        parametrize.register_parametrization(owner, "weight", change)


@torch.no_grad()
def fold_vectors(model: nn.Module) -> None:
    """The changed weights take the place of weights and vectors, in the dtype of the weights."""
    for module in list(model.modules()):
        if parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight")


def _norms(model: nn.Module) -> Iterator[nn.Module]:
    for module in model.modules():
        weight = module._parameters.get("weight")
        if weight is not None and weight.ndim == 1:
            yield module


def _output_projections(model: nn.Module) -> Iterator[nn.Module]:
    family = family_of(model)  # type: ignore[arg-type]
    names = {p.module for row in family.blocks for p in row.projections if p.dim == 1}
    for layer in model.get_submodule(family.layers).children():
        modules = dict(layer.named_modules())
        yield from (modules[name] for name in sorted(names) if isinstance(modules.get(name), nn.Linear))
