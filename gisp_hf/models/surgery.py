"""Taking structures out of a model: set them to zero, or slice them out for real."""

import copy
from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from gisp_hf.models.discovery import family_of
from gisp_hf.models.families import Family
from gisp_hf.models.layout import Block, Layout
from gisp_hf.models.shards import local_rows


def rows_of(structures: torch.Tensor, width: int) -> torch.Tensor:
    """The rows that structures own: (n,) indices -> (n * width,) indices."""
    return (structures[:, None] * width + torch.arange(width, device=structures.device)).flatten()


@torch.no_grad()
def zero_structures(model: nn.Module, block: Block, structures: torch.Tensor) -> None:
    """Sets every weight of the given structures (indices, shape ``(n,)``) to zero; shapes stay."""
    for member in block.members:
        part = local_rows(model.get_parameter(member.parameter))  # of a sharded parameter, what this rank holds
        rows = rows_of(structures, member.width).to(part.tensor.device)
        if member.dim == 0:
            rows = rows[(rows >= part.first) & (rows < part.first + len(part.tensor))] - part.first
        part.tensor.index_fill_(member.dim, rows, 0)


@torch.no_grad()
def slice_structures(model: PreTrainedModel, block: Block, keep: torch.Tensor) -> None:
    """Keeps only the given structures (indices into what the model has *now*, shape ``(n,)``, increasing).

    The ``Parameter`` objects stay the same, so that an optimizer or a hook that holds one goes on to work; their
    gradients are dropped, since they no longer fit. ``out_features`` and the like are set right.
    """
    for member in block.members:
        parameter = model.get_parameter(member.parameter)
        parameter.grad = None
        parameter.data = slice_tensor(parameter.data, member.dim, keep, member.width)
        owner = model.get_submodule(member.parameter.rpartition(".")[0])
        if isinstance(owner, nn.Linear) and parameter.ndim == 2:
            owner.out_features, owner.in_features = parameter.shape
    if block.kind == "mlp":
        family = family_of(model)
        for path, attribute in family.sized_attributes:
            setattr(model.get_submodule(f"{family.layers}.{block.layer}.{path}"), attribute, len(keep))


def slice_tensor(tensor: torch.Tensor, dim: int, keep: torch.Tensor, width: int) -> torch.Tensor:
    """The kept structures' part of one parameter, as a contiguous tensor of its own."""
    return tensor.index_select(dim, rows_of(keep, width).to(tensor.device)).contiguous()


def set_pruned_config(
    config: PreTrainedConfig, family: Family, *, layout: Layout, counts: Sequence[int]
) -> PreTrainedConfig:
    """Turns a config, in place, into that of the pruned model: ``counts`` structures are left in each block."""
    if getattr(config, "head_dim", None) is None:  # derived from sizes that are about to differ between layers
        config.head_dim = config.hidden_size // config.num_attention_heads
    overrides: dict[int | str, dict[str, int]] = {}
    for block, count in zip(layout.blocks, counts):
        layer = config.per_layer_config[block.layer]
        sizes = overrides.setdefault(block.layer, {})
        if block.kind == "attention":
            sizes["num_attention_heads"] = count * (layer.num_attention_heads // layer.num_key_value_heads)
            sizes["num_key_value_heads"] = count
        else:
            sizes["intermediate_size"] = count
    config.__class__ = family.pruned_config
    config.per_layer_config = overrides
    return config


def as_pruned_model(model: PreTrainedModel, layout: Layout, counts: Sequence[int]) -> PreTrainedModel:
    """Gives a sliced model, in place, the class and config that describe it, so that it saves and loads like any other.

    The pruned classes add nothing but a constructor to the family's, so the model object itself can change class.
    """
    family = family_of(model)
    model.__class__ = family.pruned_model
    set_pruned_config(model.config, family, layout=layout, counts=counts)
    return model


def pruned_shell(model: PreTrainedModel, layout: Layout, counts: Sequence[int]) -> PreTrainedModel:
    """A model without weights (on the meta device) of the size that ``counts`` gives, with the config of ``model``."""
    family = family_of(model)
    config = set_pruned_config(copy.deepcopy(model.config), family, layout=layout, counts=counts)
    with torch.device("meta"):
        shell = family.pruned_model(config)
    shell.generation_config = copy.deepcopy(model.generation_config)
    return shell
