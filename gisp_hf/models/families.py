"""The families that can be pruned, as data. A new family with separate projections is a new row here, and a pair of
classes in ``modeling_gisp.py`` so that its pruned checkpoints load."""

from dataclasses import dataclass

from transformers import PreTrainedConfig, PreTrainedModel

from gisp_hf.models import modeling_gisp as gisp


@dataclass(frozen=True)
class Family:
    """Where a family keeps its projections, relative to a decoder layer, and the classes of its models.

    ``sized_attributes``: (module, attribute) pairs that hold the number of channels and must follow when it changes.
    """

    model_type: str
    model_class: str
    pruned_config: type[PreTrainedConfig]
    pruned_model: type[PreTrainedModel]
    layers: str = "model.layers"
    attention: str = "self_attn"
    query: str = "self_attn.q_proj"
    key: str = "self_attn.k_proj"
    value: str = "self_attn.v_proj"
    output: str = "self_attn.o_proj"
    into_channels: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    out_of_channels: str = "mlp.down_proj"
    sized_attributes: tuple[tuple[str, str], ...] = (("mlp", "intermediate_size"),)


# Llama also covers SmolLM, SmolLM2 and DeepSeek-R1-Distill-Llama.
FAMILIES = (
    Family("llama", "LlamaForCausalLM", gisp.GispLlamaConfig, gisp.GispLlamaForCausalLM),
    Family("mistral", "MistralForCausalLM", gisp.GispMistralConfig, gisp.GispMistralForCausalLM),
    Family("qwen2", "Qwen2ForCausalLM", gisp.GispQwen2Config, gisp.GispQwen2ForCausalLM),
    Family("qwen3", "Qwen3ForCausalLM", gisp.GispQwen3Config, gisp.GispQwen3ForCausalLM),
    Family("gemma2", "Gemma2ForCausalLM", gisp.GispGemma2Config, gisp.GispGemma2ForCausalLM),
    Family("gemma3_text", "Gemma3ForCausalLM", gisp.GispGemma3TextConfig, gisp.GispGemma3ForCausalLM),
)
