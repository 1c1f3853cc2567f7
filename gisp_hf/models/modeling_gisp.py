"""Classes of models whose layers differ in size. Pruned checkpoints load with them.

This file travels with every checkpoint, so that ``from_pretrained(..., trust_remote_code=True)`` works where gisp_hf is
not installed. It therefore imports nothing beyond transformers and what that itself stands on, and does nothing but
build layers of the right size.

Each class is the family's own model; only the sizes come from ``config.per_layer_config``, Transformers' own field for
layers that differ: ``num_attention_heads``, ``num_key_value_heads`` and ``intermediate_size`` per layer. With
``compensation_bias: true`` in the config, every ``o_proj`` and ``down_proj`` has a bias.
"""

from typing import Any

from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)


class PrunedConfigMixin:
    """The checks of a pruned config, in place of the family's own."""

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
        layers: nn.ModuleList = model.model.layers
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


@strict
class GispLlamaConfig(PrunedConfigMixin, LlamaConfig):
    model_type = "gisp_llama"


class GispLlamaForCausalLM(PrunedModelMixin, LlamaForCausalLM):
    config_class = GispLlamaConfig


@strict
class GispMistralConfig(PrunedConfigMixin, MistralConfig):
    model_type = "gisp_mistral"


class GispMistralForCausalLM(PrunedModelMixin, MistralForCausalLM):
    config_class = GispMistralConfig


@strict
class GispQwen2Config(PrunedConfigMixin, Qwen2Config):
    model_type = "gisp_qwen2"


class GispQwen2ForCausalLM(PrunedModelMixin, Qwen2ForCausalLM):
    config_class = GispQwen2Config


@strict
class GispQwen3Config(PrunedConfigMixin, Qwen3Config):
    model_type = "gisp_qwen3"


class GispQwen3ForCausalLM(PrunedModelMixin, Qwen3ForCausalLM):
    config_class = GispQwen3Config


@strict
class GispGemma2Config(PrunedConfigMixin, Gemma2Config):
    model_type = "gisp_gemma2"


class GispGemma2ForCausalLM(PrunedModelMixin, Gemma2ForCausalLM):
    config_class = GispGemma2Config


@strict
class GispGemma3TextConfig(PrunedConfigMixin, Gemma3TextConfig):
    model_type = "gisp_gemma3_text"


class GispGemma3ForCausalLM(PrunedModelMixin, Gemma3ForCausalLM):
    config_class = GispGemma3TextConfig


# Their checkpoints name these classes in ``auto_map`` and carry this file.
for _model in PrunedModelMixin.__subclasses__():
    _class: Any = _model
    _class.config_class.register_for_auto_class("AutoConfig")
    _class.register_for_auto_class("AutoModelForCausalLM")
