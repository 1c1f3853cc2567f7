"""Removal of structures: set them to zero, or slice them out."""

import copy
from collections.abc import Sequence
from weakref import WeakSet

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from gisp_hf.models.discovery import family_of
from gisp_hf.models.families import Family
from gisp_hf.models.layout import Block, Layout, kind_of
from gisp_hf.models.shards import local_rows

CUT_IN_MEMORY: WeakSet[nn.Module] = WeakSet()  # pruned models that are not what their ``name_or_path`` names any more


@torch.no_grad()
def zero_structures(model: nn.Module, block: Block, structures: torch.Tensor) -> None:
    """Sets every weight of the given structures (indices, shape ``(n,)``) to zero; shapes stay."""
    for member in block.members:
        part = local_rows(model.get_parameter(member.parameter))  # of a sharded parameter, what this rank holds
        rows = member.rows(structures).flatten().to(part.tensor.device)
        if member.dim == 0:
            rows = rows[(rows >= part.first) & (rows < part.first + len(part.tensor))] - part.first
        part.tensor.index_fill_(member.dim, rows, 0)


@torch.no_grad()
def slice_structures(model: PreTrainedModel, layout: Layout, kept: Sequence[torch.Tensor]) -> None:
    """Keeps only the given structures.

    The ``Parameter`` objects stay the same, so that an optimizer or a hook that holds one goes on to work; their
    gradients are dropped, since they no longer fit. ``out_features`` and the like are set right.

    Args:
        layout: that of the model as it is *now*.
        kept: per block of it, the increasing indices that stay.
    """
    for name, cuts in layout.rows_kept(kept).items():
        parameter = model.get_parameter(name)
        parameter.grad = None
        parameter.data = slice_tensor(parameter.data, cuts)
        owner = model.get_submodule(name.rpartition(".")[0])
        if isinstance(owner, nn.Linear) and parameter.ndim == 2:
            owner.out_features, owner.in_features = parameter.shape
    family = family_of(model)
    rows = {row.kind: row for row in family.rows(layout.attention_unit)}
    for block, keep in zip(layout.blocks, kept):
        for path, attribute in rows[block.kind].attributes if len(keep) < block.size else ():
            setattr(model.get_submodule(f"{family.layers}.{block.layer}.{path}"), attribute, len(keep) // block.parts)


def slice_tensor(tensor: torch.Tensor, cuts: Sequence[tuple[int, torch.Tensor]]) -> torch.Tensor:
    """The part of one parameter that stays (`Layout.rows_kept`), as a contiguous tensor of its own."""
    for dim, rows in cuts:
        tensor = tensor.index_select(dim, rows.to(tensor.device))
    return tensor.contiguous()


def set_pruned_config(
    config: PreTrainedConfig, family: Family, *, layout: Layout, counts: Sequence[int]
) -> PreTrainedConfig:
    """Turns a config, in place, into that of the pruned model.

    Args:
        layout: that of the unpruned model; ``config`` may be pruned already.
        counts: structures that are left in each block.
    """
    if getattr(config, "head_dim", None) is None:  # derived from sizes that are about to differ between layers
        config.head_dim = config.hidden_size // config.num_attention_heads
    overrides: dict[int | str, dict[str, int]] = {}
    for block, count in zip(layout.blocks, counts):
        layer = config.per_layer_config[block.layer]
        sizes = overrides.setdefault(block.layer, {})
        keys = kind_of(block.kind).config_keys
        for key in keys:
            sizes[key] = getattr(layer, key) // getattr(layer, keys[-1]) * count
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
    CUT_IN_MEMORY.add(model)
    return model


def pruned_shell(model: PreTrainedModel, layout: Layout, counts: Sequence[int]) -> PreTrainedModel:
    """A model without weights (on the meta device) of the size that ``counts`` gives, with the config of ``model``."""
    family = family_of(model)
    config = set_pruned_config(copy.deepcopy(model.config), family, layout=layout, counts=counts)
    with torch.device("meta"):
        shell = family.pruned_model(config)
    shell.generation_config = copy.deepcopy(model.generation_config)
    return shell


def empty_copy(model: PreTrainedModel, *, unpruned: bool = False) -> PreTrainedModel:
    """A model without weights (on the meta device) of the size that the config of ``model`` describes.

    Args:
        unpruned: the size that it described before anything was removed.
    """
    config = copy.deepcopy(model.config)
    if unpruned:
        config.per_layer_config = None
    with torch.device("meta"):
        return family_of(model).pruned_model(config)
