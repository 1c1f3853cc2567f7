"""Sizes with which a pruned model is a plain one of its family: all layers alike, and accepted by the family's config.

Llama and Gemma refuse a number of heads that does not divide the hidden size, even if the head dimension is given.
"""

import copy
from collections.abc import Mapping

from transformers import PreTrainedConfig, PreTrainedModel

from gisp_hf.models.discovery import family_of
from gisp_hf.models.families import Family
from gisp_hf.models.layout import Layout, kind_of


def layer_sizes(config: PreTrainedConfig, layout: Layout, number: int, count: int) -> dict[str, int]:
    """The keys of a layer's config, once block ``number`` has ``count`` structures.

    Args:
        layout: that of the unpruned model; ``config`` may be pruned already.
    """
    block = layout.blocks[number]
    layer, keys = config.per_layer_config[block.layer], kind_of(block.kind).config_keys
    return {key: getattr(layer, key) // getattr(layer, keys[-1]) * count for key in keys}


def plain_config(config: PreTrainedConfig, family: Family, sizes: Mapping[str, int]) -> PreTrainedConfig | None:
    """A copy of ``config`` as the family's own, with these sizes in every layer; None if the family refuses them."""
    plain = copy.copy(config)
    plain.per_layer_config = None
    plain.__class__ = family.plain_config
    vars(plain).pop("auto_map", None)  # of a pruned base: the code that it names does not travel with a plain model
    for key, size in sizes.items():
        setattr(plain, key, size)
    try:
        plain.validate_architecture()
    except ValueError:
        return None
    return plain


def find_plain_sizes(model: PreTrainedModel, layout: Layout) -> dict[str, tuple[int, ...]]:
    """`Layout.plain_sizes` of a model: for each kind, the numbers of structures that its family's own class takes.

    Raises:
        ValueError: if the layers differ in size, so that no level can have layers of one size.
    """
    family, config = family_of(model), copy.copy(model.config)
    name_head_dim(config)
    found: dict[str, tuple[int, ...]] = {}
    for kind in layout.kinds:
        numbers = layout.of_kind(kind.name)
        sizes = [layout.blocks[number].size for number in numbers]
        if len(set(sizes)) > 1 or len(numbers) < layout.num_layers:
            raise ValueError(
                f"layout='uniform' needs layers of one size; this model has {min(sizes)} to {max(sizes)} {kind.plural} "
                f"in {len(numbers)} of {layout.num_layers} layers. Use layout='free', or prune the dense model"
            )
        fitting = tuple(
            count
            for count in range(1, sizes[0] + 1)
            if count == sizes[0]
            or plain_config(config, family, layer_sizes(config, layout, numbers[0], count)) is not None
        )
        if len(fitting) < sizes[0]:
            found[kind.name] = fitting
    return found


def name_head_dim(config: PreTrainedConfig) -> None:
    """Writes down the head dimension where it is derived from sizes that are about to change."""
    if getattr(config, "head_dim", None) is None:
        config.head_dim = config.hidden_size // config.num_attention_heads
