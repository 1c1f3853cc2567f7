"""Tiny models of every supported family, and a tiny tokenizer: offline, seeded, built from a config.

The sizes are chosen so that a mistake shows: a head dimension that is not ``hidden_size / num_attention_heads`` where
the family allows it, more than one query head in a key/value group, biases and norms that are not at their start value.
"""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCAB_SIZE = 64

# family -> (config class, model class, what differs from the common sizes)
FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "llama_mha": (LlamaConfig, LlamaForCausalLM, {"num_key_value_heads": 8}),
    "llama_bias": (LlamaConfig, LlamaForCausalLM, {"attention_bias": True, "mlp_bias": True}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": 16}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 6}),
    "gemma2": (Gemma2Config, Gemma2ForCausalLM, {"head_dim": 6, "query_pre_attn_scalar": 6, "sliding_window": 16}),
    "gemma3_text": (
        Gemma3TextConfig,
        Gemma3ForCausalLM,
        {"head_dim": 6, "query_pre_attn_scalar": 6, "sliding_window": 16},
    ),
}


def tiny_model(
    family: str = "llama", *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes
) -> PreTrainedModel:
    """A model of ``family`` with 6 layers, 8 query heads in 4 groups, 24 channels; about 40,000 parameters."""
    config_class, model_class, differences = FAMILIES[family]
    sizes = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 24,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    torch.manual_seed(seed)
    model = model_class(config_class(**{**sizes, **differences, **changes}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:  # biases start at zero and norms at one: make them count
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif "embed" not in name:
                parameter.mul_(3.0)  # far from linear, so that logits tell models apart
    return model.to(dtype).eval()


def tiny_blocks(count: int = 32, length: int = 16, *, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """``count`` calibration examples of ``length`` random tokens: {"input_ids": (length,), "labels": (length,)}."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, VOCAB_SIZE, (count, length), generator=generator)
    return [{"input_ids": row, "labels": row.clone()} for row in tokens]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer over the words w4 ... w63, with <pad> 0, <bos> 1, <eos> 2, <unk> 3."""
    vocabulary = {"<pad>": 0, "<bos>": 1, "<eos>": 2, "<unk>": 3, **{f"w{i}": i for i in range(4, VOCAB_SIZE)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )
