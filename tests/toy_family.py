"""A family that the package does not know: fused gate and up, and a bottleneck in every layer, a kind of its own.

What a user would write to prune a model of their own, without touching the package.
"""

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from gisp_hf.models import BlockRow, Family, Kind, Projection, register_family, register_kind
from gisp_hf.models.families import ATTENTION
from gisp_hf.models.modeling_gisp import PrunedConfigMixin, PrunedModelMixin


@strict
class ToyConfig(LlamaConfig):
    model_type = "toy"
    bottleneck_size: int = 10


class FusedMLP(nn.Module):
    def __init__(self, config) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=True)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(torch.nn.functional.silu(gate) * up)


class ToyLayer(LlamaDecoderLayer):
    def __init__(self, config, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.mlp = FusedMLP(config)
        self.narrow = nn.Linear(config.hidden_size, config.bottleneck_size, bias=False)
        self.widen = nn.Linear(config.bottleneck_size, config.hidden_size, bias=True)

    def forward(self, hidden_states, *args, **kwargs):
        hidden_states = super().forward(hidden_states, *args, **kwargs)
        return hidden_states + self.widen(torch.tanh(self.narrow(hidden_states)))


class ToyForCausalLM(LlamaForCausalLM):
    config_class = ToyConfig

    def __init__(self, config) -> None:
        super().__init__(config)
        for number in range(config.num_hidden_layers):
            self.model.layers[number] = ToyLayer(config, number)
        self.post_init()


@strict
class GispToyConfig(PrunedConfigMixin, ToyConfig):
    model_type = "gisp_toy"


class GispToyForCausalLM(PrunedModelMixin, ToyForCausalLM):
    config_class = GispToyConfig


BOTTLENECK = Kind("bottleneck", "unit", "units", ("bottleneck_size",))


def register() -> None:
    register_kind(BOTTLENECK)
    fused = Projection("mlp.gate_up_proj", 0, pieces=("intermediate_size", "intermediate_size"))
    down = Projection("mlp.down_proj", 1)
    rows = (
        ATTENTION,
        BlockRow("mlp", (fused, down), counted=down),
        BlockRow("bottleneck", (Projection("narrow", 0), Projection("widen", 1)), counted=Projection("widen", 1)),
    )
    register_family(Family("toy", "ToyForCausalLM", GispToyConfig, GispToyForCausalLM, blocks=rows))
    AutoConfig.register("gisp_toy", GispToyConfig)
    AutoModelForCausalLM.register(GispToyConfig, GispToyForCausalLM)


def toy_model(seed: int = 0) -> ToyForCausalLM:
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 6}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 64}
    torch.manual_seed(seed)
    model = ToyForCausalLM(ToyConfig(**sizes, **heads))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embed" not in name:
                parameter.mul_(3.0).add_(0.05 * torch.randn_like(parameter))
    return model.eval()
