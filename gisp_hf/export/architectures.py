"""Architectures of llama.cpp that hold our families, as data.

Most architectures of llama.cpp read one size for all layers. ``deci`` (made for Nemotron) and ``openelm`` read the
numbers of heads, key/value heads and channels of each layer, so they hold pruned models. Source: ``src/models/*.cpp``
and ``src/llama-model.cpp`` of ggml-org/llama.cpp.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from transformers import PreTrainedConfig

_NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
_MLP = {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
_ATTENTION = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
}
_QK_NORMS = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
_GEMMA_NORMS = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


@dataclass(frozen=True)
class Architecture:
    """How an architecture of llama.cpp stores a decoder.

    Attributes:
        name: value of ``general.architecture``, and the prefix of its keys.
        modules: module of a decoder layer -> tensor ``blk.N.<value>``; a weight, and a bias where there is one.
        per_layer: whether it reads the sizes of each layer.
        interleaved: whether rotary embeddings turn neighbouring rows of q and k; Transformers turns row i with row
            i + head_dim/2, so the rows are permuted.
        fused: whether q, k and v are one tensor, ``attn_qkv``.
        own_output: whether the output matrix may differ from the embeddings.
        biases: whether it has biases at all.
        rope_freqs: whether it reads factors of the rotary frequencies, which ``llama3`` scaling needs.
        norm_shift: is added to norm weights: 1 for Gemma, which stores them as a difference from 1.
        activation: of the MLP.
        window_every: layers from one full-attention layer to the next, where it has sliding windows; 0: it has none.
        wide: number of layers of the model whose attention scale is that of ``hidden_size / heads``.
    """

    name: str
    modules: Mapping[str, str]
    per_layer: bool = False
    interleaved: bool = False
    fused: bool = False
    own_output: bool = True
    biases: bool = True
    rope_freqs: bool = False
    norm_shift: float = 0.0
    activation: str = "silu"
    window_every: int = 0
    wide: int = 0


def _modules(*parts: Mapping[str, str]) -> Mapping[str, str]:
    return MappingProxyType({module: name for part in parts for module, name in part.items()})


_PLAIN = _modules(_NORMS, _ATTENTION, _MLP)
_WITH_QK_NORMS = _modules(_NORMS, _ATTENTION, _QK_NORMS, _MLP)

DECI = Architecture("deci", _PLAIN, per_layer=True, interleaved=True, rope_freqs=True)
OPENELM = Architecture("openelm", _WITH_QK_NORMS, per_layer=True, fused=True, own_output=False, biases=False)
LLAMA = Architecture("llama", _PLAIN, interleaved=True, rope_freqs=True)
QWEN2 = Architecture("qwen2", _PLAIN)
QWEN3 = Architecture("qwen3", _WITH_QK_NORMS, biases=False)
GEMMA2 = Architecture(
    "gemma2",
    _modules(_GEMMA_NORMS, _ATTENTION, _MLP),
    own_output=False,
    biases=False,
    norm_shift=1.0,
    activation="gelu_pytorch_tanh",
    window_every=2,
    wide=46,
)
GEMMA3 = Architecture(
    "gemma3",
    _modules(_GEMMA_NORMS, _ATTENTION, _QK_NORMS, _MLP),
    own_output=False,
    biases=False,
    norm_shift=1.0,
    activation="gelu_pytorch_tanh",
    window_every=6,
    wide=62,
)


@dataclass(frozen=True)
class Home:
    """Where a family goes: ``pruned`` with the sizes of each layer (None: nowhere), ``padded`` at full size."""

    pruned: Architecture | None
    padded: Architecture


_GEMMA_LACK = (
    "its {name} reads one size for all layers; of the architectures that read the sizes of each layer, deci and "
    "openelm lack Gemma's norms after attention and MLP, and gemma4 normalises v"
)
HOMES: dict[str, Home] = {
    "llama": Home(DECI, LLAMA),
    "mistral": Home(DECI, LLAMA),
    "qwen2": Home(DECI, QWEN2),
    "qwen3": Home(OPENELM, QWEN3),
    "gemma2": Home(None, GEMMA2),
    "gemma3_text": Home(None, GEMMA3),
}


def family_type(config: PreTrainedConfig) -> str:
    """The model type of the unpruned family: ``llama`` of ``gisp_llama``."""
    return config.model_type.removeprefix("gisp_")


def choose_architecture(config: PreTrainedConfig, *, pad: bool) -> Architecture:
    """The architecture of llama.cpp that holds a model.

    Raises:
        ValueError: if none does; the message says what llama.cpp lacks, and whether ``pad`` helps.
    """
    family = family_type(config)
    home = HOMES.get(family)
    if home is None:
        raise ValueError(f"models of type {family} cannot be exported; known: {', '.join(HOMES)}")
    found = home.padded if pad else home.pruned
    lack = None
    if found is None:
        lack = _GEMMA_LACK.format(name=home.padded.name)
    elif not found.own_output and not config.tie_word_embeddings:
        lack = (
            f"its {found.name}, which reads the sizes of each layer and has norms of q and k, always uses the "
            "embeddings as the output matrix, and this model has an output matrix of its own"
        )
    if found is None or lack:
        refusal = f"llama.cpp cannot hold this {family} model: {lack}"
        raise ValueError(refusal if pad else f"{refusal}. --pad writes it at full size, with zeros: it saves nothing")
    _check_config(config, found)
    return found


def _check_config(config: PreTrainedConfig, architecture: Architecture) -> None:
    """Refuses settings that the architecture would silently ignore."""
    name = f"llama.cpp's {architecture.name}"
    activation = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    if activation != architecture.activation:
        raise ValueError(f"the activation is {activation}, and {name} has {architecture.activation} only")
    scaling = rope_of(config, "full_attention").get("rope_type", "default")
    known = ["default", "linear", *(["llama3"] if architecture.rope_freqs else [])]
    if scaling not in known:
        raise ValueError(f"rotary scaling {scaling!r} cannot be exported to {name}; known: {', '.join(known)}")
    if architecture.window_every:
        _check_gemma(config, architecture, name)


def _check_gemma(config: PreTrainedConfig, architecture: Architecture, name: str) -> None:
    every, layers = architecture.window_every, config.num_hidden_layers
    pattern = ["full_attention" if (number + 1) % every == 0 else "sliding_attention" for number in range(layers)]
    if list(config.layer_types) != pattern:
        raise ValueError(f"{name} has full attention in every {every}th layer, and layer_types says otherwise")
    wide = layers == architecture.wide
    scalar = config.hidden_size // dense_sizes(config).heads if wide else config.head_dim
    if config.query_pre_attn_scalar != scalar:
        raise ValueError(f"query_pre_attn_scalar is {config.query_pre_attn_scalar}, and {name} uses {scalar}")


# ---- sizes -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sizes:
    """Query heads, key/value heads and MLP channels of a layer."""

    heads: int
    groups: int
    channels: int


def layer_sizes(config: PreTrainedConfig) -> list[Sizes]:
    """The sizes of each layer, pruned or not.

    Raises:
        ValueError: if a layer has none left of a kind, which llama.cpp would read as another model.
    """
    found = [
        Sizes(layer.num_attention_heads, layer.num_key_value_heads, layer.intermediate_size)
        for layer in config.per_layer_config
    ]
    for number, sizes in enumerate(found):
        if not (sizes.heads and sizes.groups and sizes.channels):
            raise ValueError(
                f"layer {number} has {sizes.heads} heads and {sizes.channels} channels: llama.cpp needs some"
            )
    return found


def dense_sizes(config: PreTrainedConfig) -> Sizes:
    """The sizes of a layer before pruning, which a pruned config keeps beside those of its layers."""
    facts = config.to_dict()
    return Sizes(facts["num_attention_heads"], facts["num_key_value_heads"], facts["intermediate_size"])


def head_dim(config: PreTrainedConfig) -> int:
    """Rows of a head in q, k and v."""
    return getattr(config, "head_dim", None) or config.hidden_size // dense_sizes(config).heads


def rope_of(config: PreTrainedConfig, layer_type: str) -> dict[str, Any]:
    """The rotary parameters; those of ``layer_type`` where they differ between types of layers."""
    parameters: dict[str, Any] = config.rope_parameters
    return parameters.get(layer_type, parameters)


def window_of(config: PreTrainedConfig) -> int | None:
    """Positions of the sliding window; None without one."""
    window, types = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    return window if window and (types is None or "sliding_attention" in types) else None
