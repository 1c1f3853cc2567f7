"""Classes of models whose layers differ in size. Pruned checkpoints load with them.

This file travels with every checkpoint, so that ``from_pretrained(..., trust_remote_code=True)`` works where gisp_hf is
not installed. It therefore imports nothing beyond transformers and what that itself stands on, and does nothing but
build layers of the right size.

Each class is the family's own model, with or without a head; only the sizes come from ``config.per_layer_config``,
Transformers' own field for layers that differ: ``num_attention_heads``, ``num_key_value_heads`` and
``intermediate_size`` per layer. With ``compensation_bias: true`` in the config, every ``o_proj`` and ``down_proj`` has
a bias.
"""

from typing import Any, ClassVar

import transformers as hf
from huggingface_hub.dataclasses import strict
from torch import nn

# Ending of a class's name -> the Auto class that builds it.
AUTO_CLASSES = {
    "Model": hf.AutoModel,
    "ForCausalLM": hf.AutoModelForCausalLM,
    "ForSequenceClassification": hf.AutoModelForSequenceClassification,
    "ForTokenClassification": hf.AutoModelForTokenClassification,
}


class PrunedConfigMixin:
    """The checks of a pruned config, in place of the family's own, and the names of its model classes."""

    auto_classes: ClassVar[dict[str, str]] = {}  # Auto class -> the class in this file; becomes ``auto_map``

    def validate_architecture(self) -> None:
        # The families ask that the hidden size be a multiple of the number of heads, which only matters where the head
        # dimension is derived from the two. A pruned config always names its head dimension.
        config: Any = self
        if getattr(config, "head_dim", None) is None:
            raise ValueError("head_dim must be set in a pruned config: it cannot be derived once heads are removed")
        for number, layer in enumerate(config.per_layer_config):
            if layer.num_attention_heads % layer.num_key_value_heads:
                raise ValueError(
                    f"layer {number}: num_attention_heads ({layer.num_attention_heads}) must be divisible by "
                    f"num_key_value_heads ({layer.num_key_value_heads})"
                )

    def __eq__(self, other: object) -> bool:
        # The one that dataclass makes reads every field, and a config with per-layer sizes refuses to give some.
        return type(other) is type(self) and other.to_dict() == self.to_dict()  # type: ignore[attr-defined]

    def save_pretrained(self, save_directory, push_to_hub=False, **kwargs):
        if self.auto_classes:  # every one of them, whichever model is saved: a head can be put on any level
            self.auto_map = dict(self.auto_classes)
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)  # type: ignore[misc]


def add_compensation_biases(layer: Any) -> None:
    """Gives a decoder layer the biases that stand for the mean output of removed structures."""
    for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
        if projection.bias is None:
            projection.bias = nn.Parameter(projection.weight.new_zeros(projection.out_features))


class PrunedModelMixin:
    """Rebuilds each decoder layer in the size that ``config.per_layer_config`` gives it."""

    def __init__(self, config, *args, **kwargs):
        overrides = config.to_dict().get("per_layer_config")
        # The family's constructor knows one size for all layers and reads it from the config itself, which a config
        # with per-layer sizes refuses to give. It builds the unpruned layers (on the meta device in from_pretrained).
        config.per_layer_config = None
        try:
            super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        finally:
            config.per_layer_config = overrides
        if overrides is None:
            return
        model: Any = self
        layers: nn.ModuleList = model.base_model.layers
        for number, layer_config in enumerate(config.per_layer_config):
            layers[number] = type(layers[number])(layer_config, number)
            if getattr(config, "compensation_bias", False):
                add_compensation_biases(layers[number])
            # Layers read the attention implementation from their config at every call: give them the one that
            # set_attn_implementation changes, not the copy that knew their size.
            for module in layers[number].modules():
                if getattr(module, "config", None) is layer_config:
                    module.config = config
        model.post_init()


def _pruned(config_class: Any, *family_classes: type[hf.PreTrainedModel]) -> list[Any]:
    """The pruned classes of a family, known to the Auto classes and to ``auto_map``."""
    made = []
    config_class.register_for_auto_class("AutoConfig")
    config_class.__eq__ = PrunedConfigMixin.__eq__
    config_class.auto_classes = {"AutoConfig": f"modeling_gisp.{config_class.__name__}"}
    for family_class in family_classes:
        name = f"Gisp{family_class.__name__}"
        facts = {"__module__": __name__, "config_class": config_class}
        model_class: Any = type(name, (PrunedModelMixin, family_class), facts)
        auto_class: Any = next(auto for ending, auto in AUTO_CLASSES.items() if name.endswith(ending))
        model_class.register_for_auto_class(auto_class.__name__)
        auto_class.register(config_class, model_class, exist_ok=True)  # classifiers build their base by AutoModel
        config_class.auto_classes[auto_class.__name__] = f"modeling_gisp.{name}"
        made.append(model_class)
    return made


@strict
class GispLlamaConfig(PrunedConfigMixin, hf.LlamaConfig):
    model_type = "gisp_llama"


GispLlamaModel, GispLlamaForCausalLM, GispLlamaForSequenceClassification, GispLlamaForTokenClassification = _pruned(
    GispLlamaConfig,
    hf.LlamaModel,
    hf.LlamaForCausalLM,
    hf.LlamaForSequenceClassification,
    hf.LlamaForTokenClassification,
)


@strict
class GispMistralConfig(PrunedConfigMixin, hf.MistralConfig):
    model_type = "gisp_mistral"


GispMistralModel, GispMistralForCausalLM, GispMistralForSequenceClassification, GispMistralForTokenClassification = (
    _pruned(
        GispMistralConfig,
        hf.MistralModel,
        hf.MistralForCausalLM,
        hf.MistralForSequenceClassification,
        hf.MistralForTokenClassification,
    )
)


@strict
class GispQwen2Config(PrunedConfigMixin, hf.Qwen2Config):
    model_type = "gisp_qwen2"


GispQwen2Model, GispQwen2ForCausalLM, GispQwen2ForSequenceClassification, GispQwen2ForTokenClassification = _pruned(
    GispQwen2Config,
    hf.Qwen2Model,
    hf.Qwen2ForCausalLM,
    hf.Qwen2ForSequenceClassification,
    hf.Qwen2ForTokenClassification,
)


@strict
class GispQwen3Config(PrunedConfigMixin, hf.Qwen3Config):
    model_type = "gisp_qwen3"


GispQwen3Model, GispQwen3ForCausalLM, GispQwen3ForSequenceClassification, GispQwen3ForTokenClassification = _pruned(
    GispQwen3Config,
    hf.Qwen3Model,
    hf.Qwen3ForCausalLM,
    hf.Qwen3ForSequenceClassification,
    hf.Qwen3ForTokenClassification,
)


@strict
class GispGemma2Config(PrunedConfigMixin, hf.Gemma2Config):
    model_type = "gisp_gemma2"


GispGemma2Model, GispGemma2ForCausalLM, GispGemma2ForSequenceClassification, GispGemma2ForTokenClassification = _pruned(
    GispGemma2Config,
    hf.Gemma2Model,
    hf.Gemma2ForCausalLM,
    hf.Gemma2ForSequenceClassification,
    hf.Gemma2ForTokenClassification,
)


@strict
class GispGemma3TextConfig(PrunedConfigMixin, hf.Gemma3TextConfig):
    model_type = "gisp_gemma3_text"


GispGemma3TextModel, GispGemma3ForCausalLM, GispGemma3TextForSequenceClassification = _pruned(
    GispGemma3TextConfig, hf.Gemma3TextModel, hf.Gemma3ForCausalLM, hf.Gemma3TextForSequenceClassification
)
