"""Removal of structures: set them to zero, slice them out, or take whole layers out."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from weakref import WeakSet

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from gisp_hf.models.discovery import family_of
from gisp_hf.models.families import Family
from gisp_hf.models.layout import Block, Layout
from gisp_hf.models.plain import layer_sizes, name_head_dim, plain_config
from gisp_hf.models.shards import local_rows

COMPENSATION_KEY = "compensation_bias"  # of a pruned config: see `add_compensation_biases` in modeling_gisp.py
# Keys of configs that hold one entry for each layer.
LAYER_LISTS = ("layer_types",)
CUT_IN_MEMORY: WeakSet[nn.Module] = WeakSet()  # pruned models that are not what their ``name_or_path`` names any more


@torch.no_grad()
def zero_structures(model: nn.Module, block: Block, structures: torch.Tensor) -> None:
    """Sets every weight of the given structures (indices, shape ``(n,)``) to zero; shapes stay.

    A layer of zeros adds nothing to the residual stream, so it is the same as no layer.
    """
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
    gradients are dropped, since they no longer fit. ``out_features`` and the like are set right. Layers that go leave
    the model: the others are numbered anew, the config follows, and the memory of the weights is freed.

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
        for path, attribute in rows[block.kind].attributes if 0 < len(keep) < block.size else ():
            setattr(model.get_submodule(f"{family.layers}.{block.layer}.{path}"), attribute, len(keep) // block.parts)
    if layout.whole:
        there = [keep for block, keep in zip(layout.blocks, kept) if block.size]
        stay = [number for number, keep in enumerate(there) if len(keep)]
        _keep_layers(model, model.get_submodule(family.layers), stay)  # type: ignore[arg-type]


def _keep_layers(model: PreTrainedModel, layers: nn.ModuleList, stay: Sequence[int]) -> None:
    gone = [layer for number, layer in enumerate(layers) if number not in stay]
    for number in reversed(range(len(layers))):
        if number not in stay:
            del layers[number]
    for number, layer in enumerate(layers):
        for module in layer.modules():
            if "layer_idx" in vars(module):  # the place in the cache
                module.layer_idx = number  # type: ignore[assignment]
    _keep_layers_in_config(model.config, stay)
    for layer in gone:
        for parameter in layer.parameters():  # which an optimizer may hold on to
            parameter.grad = None
            parameter.data = parameter.data.new_empty(0)


def _keep_layers_in_config(config: PreTrainedConfig, stay: Sequence[int]) -> None:
    """Turns a config, in place, into that of a model with only these layers."""
    overrides = config.to_dict().get("per_layer_config")  # of a base that is pruned already
    if overrides is not None:
        config.per_layer_config = None
    config.num_hidden_layers = len(stay)
    for key in LAYER_LISTS:
        if (entries := getattr(config, key, None)) is not None:
            setattr(config, key, [entries[layer] for layer in stay])
    if overrides is not None:
        config.per_layer_config = {n: overrides[str(layer)] for n, layer in enumerate(stay) if str(layer) in overrides}


def slice_tensor(tensor: torch.Tensor, cuts: Sequence[tuple[int, torch.Tensor]]) -> torch.Tensor:
    """The part of one parameter that stays (`Layout.rows_kept`), as a contiguous tensor of its own."""
    for dim, rows in cuts:
        tensor = tensor.index_select(dim, rows.to(tensor.device))
    return tensor.contiguous()


def set_pruned_config(
    config: PreTrainedConfig, family: Family, *, layout: Layout, counts: Sequence[int]
) -> PreTrainedConfig:
    """Turns a config, in place, into that of the pruned model.

    Where all layers have one size that the family's own class takes, it becomes a plain config of the family; otherwise
    the sizes stand in ``per_layer_config``.

    Args:
        layout: that of the unpruned model; ``config`` may be pruned already.
        counts: structures that are left in each block.
    """
    name_head_dim(config)
    overrides: dict[int | str, dict[str, int]] = {layer: {} for layer in range(layout.num_layers)}
    for number, (block, count) in enumerate(zip(layout.blocks, counts)):
        overrides[block.layer] |= layer_sizes(config, layout, number, count)
    first = overrides[0]
    # A plain class has no place for compensation biases.
    if all(sizes == first for sizes in overrides.values()) and not getattr(config, COMPENSATION_KEY, False):
        plain = plain_config(config, family, first)
        if plain is not None:
            vars(config).clear()
            vars(config).update(vars(plain))
            config.__class__ = family.plain_config
            return config
    config.__class__ = family.pruned_config
    config.per_layer_config = overrides
    return config


def as_pruned_model(model: PreTrainedModel, layout: Layout, counts: Sequence[int]) -> PreTrainedModel:
    """Gives a sliced model, in place, the class and config that describe it, so that it saves and loads like any other.

    The pruned classes add nothing but a constructor to the family's, so the model object itself can change class. A
    model that has lost whole layers keeps its own class, and has the right config already.
    """
    if layout.whole:
        CUT_IN_MEMORY.add(model)
        return model
    family = family_of(model)
    set_pruned_config(model.config, family, layout=layout, counts=counts)
    model.__class__ = _model_class(model.config, family)
    CUT_IN_MEMORY.add(model)
    return model


def pruned_shell(model: PreTrainedModel, layout: Layout, counts: Sequence[int]) -> PreTrainedModel:
    """A model without weights (on the meta device) of the size that ``counts`` gives, with the config of ``model``."""
    family, config = family_of(model), copy.deepcopy(model.config)
    if layout.whole:
        names = (family.pruned_model.__name__, family.model_class)  # FSDP2 puts a class of its own before it
        model_class = next(cls for cls in type(model).__mro__ if cls.__name__ in names)
        if config.num_hidden_layers == layout.num_layers:  # not sliced yet
            _keep_layers_in_config(config, [block.layer for block, count in zip(layout.blocks, counts) if count])
    else:
        set_pruned_config(config, family, layout=layout, counts=counts)
        model_class = _model_class(config, family)
    with torch.device("meta"):
        shell = model_class(config)
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


def _model_class(config: PreTrainedConfig, family: Family) -> type[PreTrainedModel]:
    return family.pruned_model if isinstance(config, family.pruned_config) else family.plain_model


@contextmanager
def compensated(model: PreTrainedModel, layout: Layout, biases: Mapping[str, torch.Tensor]) -> Iterator[frozenset[str]]:
    """The model with more biases beside the projections that read structures; without them again on exit.

    Every such projection has a bias inside, and the config says so (``compensation_bias``), so that a level that is
    saved inside has them too. Weights are not touched.

    Args:
        biases: weight -> what is added to the bias beside it, of shape ``(d,)``.

    Yields:
        the names of the biases.
    """
    weights = dict.fromkeys(member.parameter for block in layout.blocks for member in block.members if member.dim == 1)
    modules = {name: model.get_submodule(name.rpartition(".")[0]) for name in weights}
    before = {name: getattr(module, "bias", None) for name, module in modules.items()}
    flag = getattr(model.config, COMPENSATION_KEY, None)
    try:
        for name, module in modules.items():
            weight, bias = model.get_parameter(name), before[name]
            total = weight.new_zeros(weight.shape[0]).float() if bias is None else bias.detach().float()
            if name in biases:
                total = total + biases[name].to(total.device)
            module.register_parameter("bias", nn.Parameter(total.to(weight.dtype), requires_grad=False))
        setattr(model.config, COMPENSATION_KEY, True)
        yield frozenset(f"{name.rpartition('.')[0]}.bias" for name in weights)
    finally:
        for name, module in modules.items():
            module.register_parameter("bias", before[name])
        if flag is None:
            delattr(model.config, COMPENSATION_KEY)


def check_compensable(model: PreTrainedModel, layout: Layout) -> None:
    """Refuses a model whose pruned class has no place for the biases of `compensated`.

    Raises:
        ValueError: naming the biases that are missing.
    """
    with compensated(model, layout, {}) as names:
        shell = pruned_shell(model, layout, [block.size for block in layout.blocks])
        missing = sorted(names - set(shell.state_dict()))
    if missing:
        raise ValueError(
            f"{type(shell).__name__} has no {missing[0]} (nor {len(missing) - 1} other biases), which compensation "
            "needs; use a method without compensation, such as flap"
        )
