"""Pruned models and a plain restoration by whole matrices, for the tests of restoration."""

import copy
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from gisp_hf.models import discover
from gisp_hf.models.surgery import as_pruned_model, slice_structures
from tests.tiny import tiny_blocks, tiny_model

PROJECTIONS = ("self_attn.o_proj", "mlp.down_proj")


def pruned_copy(base: PreTrainedModel, *, share: float = 0.7, seed: int = 0) -> PreTrainedModel:
    """A level of ``base`` that keeps a random share of every block."""
    level = copy.deepcopy(base)
    layout = discover(level)
    generator = torch.Generator().manual_seed(seed)
    kept = [
        torch.randperm(block.size, generator=generator)[: max(1, int(share * block.size))].sort().values
        for block in layout.blocks
    ]
    slice_structures(level, layout, kept)
    return as_pruned_model(level, layout, [len(keep) for keep in kept])


def pair(family: str = "llama", **options: Any) -> tuple[PreTrainedModel, PreTrainedModel]:
    """An unpruned model and a level of it."""
    base = tiny_model(family, **options)
    return base, pruned_copy(base)


def ids_of(count: int = 64, length: int = 16) -> torch.Tensor:
    return torch.stack([block["input_ids"] for block in tiny_blocks(count, length)])


@torch.no_grad()
def restore_by_whole_matrices(
    level: PreTrainedModel,
    base: PreTrainedModel,
    ids: torch.Tensor,
    *,
    blend: float,
    ridge: float,
    counted: torch.Tensor | None = None,
) -> None:
    """The definition, for families without norms behind the projections: all tokens at once, lstsq, whole models.

    Args:
        counted: (B, T), the tokens that count; None: all.
    """
    counted = torch.ones_like(ids, dtype=torch.bool) if counted is None else counted
    for number in range(len(level.model.layers)):
        for name in PROJECTIONS:
            small, large = level.model.layers[number], base.model.layers[number]
            seen = _look(level, ids, number, name)
            goal = _look(base, ids, number, name)
            args, kwargs = seen["arguments"]
            found = large.get_submodule(name.rpartition(".")[0])(*args, **kwargs)  # ends with the projection
            own = found[0] if isinstance(found, tuple) else found
            residual = goal["before"] + goal["output"] - seen["before"]
            target = (1 - blend) * own + blend * residual
            fitted = small.get_submodule(name)
            x = seen["input"][counted].double()
            rest = (target - seen["output"])[counted].double()
            weight = (ridge * x.square().sum(dim=0).mean()).sqrt()
            rows = torch.cat([x, weight * torch.eye(x.shape[1], dtype=torch.float64)])
            right = torch.cat([rest, torch.zeros(x.shape[1], rest.shape[1], dtype=torch.float64)])
            change = torch.linalg.lstsq(rows, right).solution.T
            fitted.weight.copy_((fitted.weight.double() + change).float())


def _look(model: PreTrainedModel, ids: torch.Tensor, number: int, name: str) -> dict[str, Any]:
    """Input and output of a projection, its sublayer's arguments, and the stream that its output is added to."""
    seen: dict[str, Any] = {}
    layer: nn.Module = model.model.layers[number]
    sublayer, norm = {
        "self_attn.o_proj": ("self_attn", "input_layernorm"),
        "mlp.down_proj": ("mlp", "post_attention_layernorm"),
    }[name]

    def keep(module: nn.Module, args: Any, output: torch.Tensor) -> None:
        seen["input"], seen["output"] = args[0], output

    def keep_arguments(module: nn.Module, args: Any, kwargs: Any) -> None:
        seen["arguments"] = args, kwargs

    def keep_stream(module: nn.Module, args: Any) -> None:
        seen["before"] = args[0]

    handles = [
        layer.get_submodule(name).register_forward_hook(keep),
        layer.get_submodule(sublayer).register_forward_pre_hook(keep_arguments, with_kwargs=True),
        layer.get_submodule(norm).register_forward_pre_hook(keep_stream),
    ]
    model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen
