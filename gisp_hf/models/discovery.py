"""From a model to the list of its blocks, read off the shapes of its weights."""

from collections.abc import Collection
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from gisp_hf.models.families import FAMILIES, BlockRow, Family, Projection
from gisp_hf.models.layout import KINDS, Block, Layout, Member
from gisp_hf.models.shards import plain_parameters
from gisp_hf.models.wrapped import bare_model, is_plain, plain_shell


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
        f"{type(model).__name__} (model type {model_type!r}) cannot be pruned; supported are {supported}. A new family "
        "is one more row in gisp_hf/models/families.py and its classes in gisp_hf/models/modeling_gisp.py"
    )


def discover(model: PreTrainedModel, kinds: Collection[str] | None = None, *, attention_unit: str = "group") -> Layout:
    """All blocks of a model, with exact parameter counts; on the meta device too, since only shapes are read.

    Of a quantized model, or one with PEFT adapters: the blocks of the same model without them.

    Args:
        kinds: names of the kinds of structure to look for: some of the family's, or one whose structures are whole
            layers. None: all of the family's, which divide its layers further.
        attention_unit: where ``kinds`` is None, what they have of attention: ``group`` or ``query``
            (`GISPConfig.attention_unit`).

    Raises:
        ValueError: if no family fits, the family has no such kind, or the sizes of a layer contradict each other.
    """
    model = bare_model(model)
    family = family_of(model)
    if not is_plain(model):
        model = plain_shell(model)
    layers = model.get_submodule(family.layers)
    numbered = list(enumerate(layers.children()))
    if len(numbered) != model.config.num_hidden_layers:
        raise ValueError(
            f"the model has {len(numbered)} decoder layers, and its config says {model.config.num_hidden_layers}; load "
            "it anew"
        )
    usual = family.rows("query" if kinds is not None and "query" in kinds else attention_unit)
    kinds = [row.kind for row in usual] if kinds is None else kinds
    rows = [row for row in usual if row.kind in kinds]
    whole = [kind for kind in kinds if kind in KINDS and KINDS[kind].whole]
    if not kinds or (len(kinds) > 1 if whole else len(rows) < len(kinds)):
        raise ValueError(
            f"{family.model_class} has no structures of the kinds {', '.join(list(kinds)[:5]) or '(none)'}; use some "
            f"of {', '.join(row.kind for row in family.blocks)}, or one of these alone: "
            f"{', '.join(kind.name for kind in KINDS.values() if kind.whole)}"
        )
    blocks: list[Block] = []
    for number, layer in numbered:
        prefix = f"{family.layers}.{number}"
        blocks += [_block(layer, row, model=model, prefix=prefix, number=number) for row in rows]
        blocks += [_whole_layer(layer, kind, prefix=prefix, number=number) for kind in whole]
    layout = Layout(
        architecture=family.model_type,
        blocks=tuple(blocks),
        total=sum(parameter.numel() for parameter in layers.parameters()),
        num_layers=len(numbered),
    )
    for name, dim, length in layout.lengths():
        if length != model.get_parameter(name).shape[dim]:
            raise ValueError(
                f"{name} has {model.get_parameter(name).shape[dim]} entries along dimension {dim}, but its structures "
                f"own {length}: the row of {family.model_class} in the table of families does not fit this model"
            )
    return layout


def _whole_layer(layer: nn.Module, kind: str, *, prefix: str, number: int) -> Block:
    """The block of one structure, which owns every parameter of the layer."""
    parameters = dict(plain_parameters(layer))
    members = tuple(Member(f"{prefix}.{name}", 0, parameter.shape[0]) for name, parameter in parameters.items())
    return Block(layer=number, kind=kind, size=1, cost=sum(p.numel() for p in parameters.values()), members=members)


def _block(layer: nn.Module, row: BlockRow, *, model: PreTrainedModel, prefix: str, number: int) -> Block:
    if row.kind not in KINDS:
        raise ValueError(f"kind {row.kind!r} is unknown; add it by register_kind, or use one of {', '.join(KINDS)}")
    per = 1 if row.per is None else int(getattr(layer.get_submodule(row.per[0]), row.per[1]))
    length = layer.get_parameter(f"{row.counted.module}.weight").shape[row.counted.dim]
    size, rest = divmod(length, per)
    if rest or not size:
        raise ValueError(f"{prefix}.{row.counted.module} has length {length}, no multiple of {per}")
    config = model.config.per_layer_config[number] if any(p.pieces for p in row.projections) else model.config
    members = [member for p in row.projections for member in _members(layer, p, config, prefix=prefix, size=size)]
    # A bias after a structure's columns belongs to no structure.
    cost = sum(_numel(layer, member, prefix=prefix) for member in members)
    return Block(
        layer=number,
        kind=row.kind,
        size=size,
        cost=cost,
        members=tuple(members),
        reference_cost=row.reference(members[0].width, size, model.config.hidden_size) if row.reference else None,
        parts=1 if row.parts is None else layer.get_parameter(f"{row.parts.module}.weight").shape[row.parts.dim] // per,
    )


def _members(layer: nn.Module, projection: Projection, config: Any, *, prefix: str, size: int) -> list[Member]:
    """The members of one projection, those of its bias included."""
    module = layer.get_submodule(projection.module)
    length = layer.get_parameter(f"{projection.module}.weight").shape[projection.dim]
    shares = [int(getattr(config, key)) for key in projection.pieces] or [1]
    members, offset = [], 0
    for share in shares:
        width, rest = divmod(length * share // sum(shares), size)
        if rest or not width:
            raise ValueError(
                f"{prefix}.{projection.module} has {length} entries along dimension {projection.dim}, which {size} "
                "structures cannot share out evenly"
            )
        names = ["weight"] + (["bias"] if projection.dim == 0 and getattr(module, "bias", None) is not None else [])
        members += [Member(f"{prefix}.{projection.module}.{n}", projection.dim, width, offset) for n in names]
        offset += width * size
    return members


def _numel(layer: nn.Module, member: Member, *, prefix: str) -> int:
    """Parameters of one member that belong to one structure."""
    shape = layer.get_parameter(member.parameter.removeprefix(f"{prefix}.")).shape
    return member.width * shape.numel() // shape[member.dim]
