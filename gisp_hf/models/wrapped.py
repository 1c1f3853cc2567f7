"""Models whose weights are not their own: quantized ones, and those with PEFT adapters.

Their structures are those of the same model without quantization and adapters, and so are the names of parameters in
their layout.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import PeftModel
from peft.utils.integrations import dequantize_module_weight
from torch import nn
from transformers import PreTrainedModel


def bare_model(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The model that PEFT has wrapped; adapters stay inside its layers. Any other model is returned as it is."""
    return model.get_base_model() if isinstance(model, PeftModel) else model  # type: ignore[return-value]


def has_adapters(model: PreTrainedModel | PeftModel) -> bool:
    return isinstance(model, PeftModel) or bool(getattr(model, "peft_config", None))


def quantization_of(model: PreTrainedModel | PeftModel) -> str | None:
    """The name of the quantization (``bitsandbytes``, ``torchao``, ...), or None."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is None:
        return "an unknown method" if getattr(model, "is_quantized", False) else None
    method = getattr(getattr(quantizer, "quantization_config", None), "quant_method", "an unknown method")
    return str(getattr(method, "value", method))


def is_plain(model: PreTrainedModel | PeftModel) -> bool:
    """Whether the parameters of the model are its weights."""
    return not has_adapters(model) and quantization_of(model) is None


def plain_shell(model: PreTrainedModel) -> PreTrainedModel:
    """The same model without quantization and adapters, and without weights: on the meta device."""
    config = copy.deepcopy(model.config)
    vars(config).pop("quantization_config", None)
    with torch.device("meta"):
        return type(model)(config)


def dense_weight(model: nn.Module, parameter: str) -> torch.Tensor:
    """A weight of the layout, in floating point: dequantized, without adapters. A sharded one stays so."""
    owner = model.get_submodule(parameter.rpartition(".")[0])
    owner = getattr(owner, "base_layer", owner)  # PEFT's name for the layer that it has wrapped
    name = parameter.rpartition(".")[2]
    weight = dequantize_module_weight(owner) if name == "weight" else owner.get_parameter(name)
    return weight.detach()


@contextmanager
def scoring_only(model: PreTrainedModel) -> Iterator[None]:
    """Lets a Trainer be built around a quantized model without adapters.

    ::

        with scoring_only(model):
            trainer = Trainer(model=model, ...)
        gisp_hf.prune(trainer, GISPConfig(method="gisp-activation"))

    The Trainer refuses such a model, since it cannot train its weights. A pruning run trains nothing. The model says
    again that it is quantized as soon as the Trainer is built.
    """
    quantized = getattr(model, "is_quantized", False)
    if not quantized:
        yield
        return
    model.is_quantized = False  # type: ignore[assignment]
    try:
        yield
    finally:
        model.is_quantized = quantized  # type: ignore[assignment]
