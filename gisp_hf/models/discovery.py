"""From a model to the list of its blocks, read off the shapes of its weights."""

from torch import nn
from transformers import PreTrainedModel

from gisp_hf.models.families import FAMILIES, Family
from gisp_hf.models.layout import Block, Layout, Member


def family_of(model: PreTrainedModel) -> Family:
    """The table row of a model. A pruned model belongs to the family it was made from.

    Raises:
        ValueError: if no row fits, with the rows there are and how to add one.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    ancestors = {cls.__name__ for cls in type(model).__mro__}
    for family in FAMILIES:
        if family.model_type == model_type.removeprefix("gisp_") and family.model_class in ancestors:
            return family
    supported = ", ".join(f"{family.model_class} ({family.model_type})" for family in FAMILIES)
    raise ValueError(
        f"{type(model).__name__} (model type {model_type!r}) cannot be pruned; supported are {supported}. A decoder "
        "with separate q/k/v/o and gate/up/down projections is one more row in gisp_hf/architectures/table.py and one "
        "more pair of classes in gisp_hf/modeling_gisp.py"
    )


def discover(model: PreTrainedModel) -> Layout:
    """All blocks of a model, with exact parameter counts; on the meta device too, since only shapes are read."""
    family = family_of(model)
    layers = model.get_submodule(family.layers)
    blocks: list[Block] = []
    for number, layer in enumerate(layers.children()):
        blocks += _layer_blocks(layer, family=family, number=number, hidden_size=model.config.hidden_size)
    total = sum(parameter.numel() for parameter in layers.parameters())
    return Layout(architecture=family.model_type, blocks=tuple(blocks), total=total, num_layers=len(blocks) // 2)


def _layer_blocks(layer: nn.Module, *, family: Family, number: int, hidden_size: int) -> list[Block]:
    prefix = f"{family.layers}.{number}"
    head_dim: int = vars(layer.get_submodule(family.attention))["head_dim"]
    num_groups = layer.get_parameter(f"{family.key}.weight").shape[0] // head_dim
    queries = layer.get_parameter(f"{family.query}.weight").shape[0] // head_dim // num_groups  # query heads per group
    num_channels = layer.get_parameter(f"{family.out_of_channels}.weight").shape[1]

    def members(projection: str, dim: int, width: int) -> list[Member]:
        found = [Member(f"{prefix}.{projection}.weight", dim, width)]
        # A bias on the output side of a structure's rows goes with them; one after its columns belongs to nobody.
        if dim == 0 and layer.get_submodule(projection).bias is not None:
            found.append(Member(f"{prefix}.{projection}.bias", 0, width))
        return found

    attention = [
        *members(family.query, 0, queries * head_dim),
        *members(family.key, 0, head_dim),
        *members(family.value, 0, head_dim),
        *members(family.output, 1, queries * head_dim),
    ]
    mlp = [member for name in family.into_channels for member in members(name, 0, 1)]
    mlp += members(family.out_of_channels, 1, 1)

    def cost(found: list[Member], size: int) -> int:
        return sum(layer.get_parameter(m.parameter.removeprefix(f"{prefix}.")).numel() for m in found) // size

    return [
        Block(
            layer=number,
            kind="attention",
            size=num_groups,
            cost=cost(attention, num_groups),
            reference_cost=4 * head_dim * hidden_size * queries,
            members=tuple(attention),
        ),
        Block(
            layer=number,
            kind="mlp",
            size=num_channels,
            cost=cost(mlp, num_channels),
            reference_cost=3 * num_channels,
            members=tuple(mlp),
        ),
    ]
