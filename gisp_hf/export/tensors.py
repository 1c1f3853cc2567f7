"""The tensors of a GGUF file: names, and what is done to the weights of a checkpoint."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig

from gisp_hf.export.architectures import Architecture, Sizes, dense_sizes, head_dim, layer_sizes, rope_of

Shapes = dict[str, tuple[int, ...]]
BY_COLUMNS = ("self_attn.o_proj", "mlp.down_proj")  # structures are columns of these weights, and rows of the others


@dataclass(frozen=True)
class Entry:
    """A tensor of the file: ``transform`` of the checkpoint's tensors ``sources``; without sources a constant."""

    name: str
    sources: tuple[str, ...]
    transform: Callable[..., torch.Tensor]

    def shape(self, stored: Shapes) -> tuple[int, ...]:
        """Its shape, given those of the checkpoint; nothing is read.

        Raises:
            ValueError: if a stored tensor does not have the size that the config gives.
        """
        empty = [torch.empty(stored[source], device="meta") for source in self.sources]
        try:
            return tuple(self.transform(*empty).shape)
        except ValueError as error:
            raise ValueError(f"{', '.join(self.sources)}: {error}; save the level again") from error


def plan_tensors(config: PreTrainedConfig, architecture: Architecture, stored: Shapes, *, pad: bool) -> list[Entry]:
    """All tensors of the file, in the order in which they are written.

    Args:
        stored: shapes of the tensors in the checkpoint.
        pad: every layer gets the size that it had before pruning, with zeros.

    Raises:
        ValueError: if the checkpoint lacks a tensor, or has one that the architecture has no place for.
    """
    entries = [Entry("token_embd.weight", ("model.embed_tokens.weight",), _same)]
    sizes = layer_sizes(config)
    targets = [dense_sizes(config)] * len(sizes) if pad else sizes
    for number, (have, want) in enumerate(zip(sizes, targets)):
        entries += _layer(number, config, architecture, stored=stored, have=have, want=want)
    shift = _shift(architecture.norm_shift)
    entries.append(Entry("output_norm.weight", ("model.norm.weight",), shift))
    if not config.tie_word_embeddings:
        entries.append(Entry("output.weight", ("lm_head.weight",), _same))
    if rope_of(config, "full_attention").get("rope_type") == "llama3":
        factors = rope_factors(config)
        entries.append(Entry("rope_freqs.weight", (), lambda: factors))

    used = {source for entry in entries for source in entry.sources}
    if missing := sorted(used - stored.keys()):
        raise ValueError(f"the checkpoint lacks {', '.join(missing[:3])}; save the level again")
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    if others := sorted(stored.keys() - used - tied):
        raise ValueError(f"llama.cpp's {architecture.name} has no place for {', '.join(others[:3])}")
    return entries


def _layer(
    number: int, config: PreTrainedConfig, architecture: Architecture, *, stored: Shapes, have: Sizes, want: Sizes
) -> Iterator[Entry]:
    source, target = f"model.layers.{number}.", f"blk.{number}."
    modules = architecture.modules
    made = {module: _transform(module, config, architecture, have=have, want=want) for module in modules}
    weights = {module: f"{source}{module}.weight" for module in modules}
    biases = {module: f"{source}{module}.bias" for module in modules if architecture.biases}
    if architecture.fused:
        parts = [f"self_attn.{letter}_proj" for letter in "qkv"]
        joined = _joined([made[module] for module in parts])
        yield Entry(f"{target}attn_qkv.weight", tuple(weights.pop(module) for module in parts), joined)
    for module, name in weights.items():
        yield Entry(f"{target}{modules[module]}.weight", (name,), made[module])
    for module, name in biases.items():
        if name in stored:
            transform = _same if module in BY_COLUMNS else made[module]  # a bias belongs to rows
            yield Entry(f"{target}{modules[module]}.bias", (name,), transform)


def _transform(
    module: str, config: PreTrainedConfig, architecture: Architecture, *, have: Sizes, want: Sizes
) -> Callable[[torch.Tensor], torch.Tensor]:
    """The change to a weight, and to a bias that belongs to its rows."""
    rows = head_dim(config)
    if module in ("self_attn.q_proj", "self_attn.o_proj"):
        old, new = ((size.groups, size.heads // size.groups * rows) for size in (have, want))
    elif module in ("self_attn.k_proj", "self_attn.v_proj"):
        old, new = (have.groups, rows), (want.groups, rows)
    elif module.startswith("mlp."):
        old, new = (have.channels, 1), (want.channels, 1)
    else:
        return _shift(architecture.norm_shift)
    dim = 1 if module in BY_COLUMNS else 0
    heads = {"self_attn.q_proj": want.heads, "self_attn.k_proj": want.groups}.get(module, 0)

    def transform(tensor: torch.Tensor) -> torch.Tensor:
        tensor = grow(tensor, dim, old, new)
        return interleave(tensor, heads) if heads and architecture.interleaved else tensor

    return transform


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _shift(by: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda tensor: tensor.float() + by if by else tensor


def _joined(transforms: Sequence[Callable[[torch.Tensor], torch.Tensor]]) -> Callable[..., torch.Tensor]:
    return lambda *tensors: torch.cat([make(tensor) for make, tensor in zip(transforms, tensors)])


def interleave(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of each head in the order of interleaved rotary embeddings.

    Row i and row i + head_dim/2, which Transformers turns together, become rows 2i and 2i + 1.

    Args:
        tensor: q or k: (heads * head_dim, hidden size), or its bias, (heads * head_dim,).
        heads: of that layer, in that tensor.
    """
    halves = tensor.reshape(heads, 2, len(tensor) // heads // 2, *tensor.shape[1:])
    return halves.swapaxes(1, 2).reshape(tensor.shape)


def grow(tensor: torch.Tensor, dim: int, old: tuple[int, int], new: tuple[int, int]) -> torch.Tensor:
    """A tensor with zeros for the structures that were removed.

    Args:
        dim: the dimension that has ``blocks * rows`` entries.
        old, new: (blocks, rows of a block) before and after. Zeros follow the rows of each block and the last block.

    Raises:
        ValueError: if the dimension does not have ``old`` entries.
    """
    if tensor.shape[dim] != old[0] * old[1]:
        raise ValueError(f"{tensor.shape[dim]} entries along dimension {dim}, and its config says {old[0] * old[1]}")
    if old == new:
        return tensor
    moved = tensor.movedim(dim, 0)
    grown = moved.new_zeros((*new, *moved.shape[1:]))
    grown[: old[0], : old[1]] = moved.reshape(*old, *moved.shape[1:])
    return grown.flatten(0, 1).movedim(0, dim)


def rope_factors(config: PreTrainedConfig) -> torch.Tensor:
    """Divisors of the rotary frequencies of ``llama3`` scaling, float32, shape ``(head_dim / 2,)``.

    Transformers scales the frequencies (``_compute_llama3_parameters``), llama.cpp divides them by these factors.
    """
    rope = rope_of(config, "full_attention")
    size, factor, length = head_dim(config), float(rope["factor"]), float(rope["original_max_position_embeddings"])
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    factors = []
    for index in range(0, size, 2):
        wavelength = 2 * math.pi * float(rope["rope_theta"]) ** (index / size)
        if wavelength < length / high:
            factors.append(1.0)
        elif wavelength > length / low:
            factors.append(factor)
        else:
            smooth = (length / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return torch.tensor(factors, dtype=torch.float32)


# ---- quantisation ----------------------------------------------------------------------------------------------------


def quantisation_notes(shapes: Shapes) -> list[str]:
    """Tensors whose width does not suit the blocks of quantised types, and the effect (``src/llama-quant.cpp``).

    Args:
        shapes: tensor of the file -> shape; the width is the last dimension.
    """
    widths = {name: shape[-1] for name, shape in shapes.items() if len(shape) > 1}
    odd = {name: width for name, width in widths.items() if width % 32}
    # with no width of 32, a K type ends in F16 as well
    coarse = {name: width for name, width in widths.items() if width % 256 and not width % 32}
    notes = []
    if odd:
        notes.append(
            f"{len(odd)} of {len(widths)} matrices have a width that is no multiple of 32 ({_listed(odd)}): quantised "
            "types leave them in F16. channel_multiple=32 when pruning, or `gisp-hf materialize --channel-multiple "
            "32`, avoids that for ffn_down"
        )
    if coarse:
        notes.append(
            f"{len(coarse)} of {len(widths)} matrices have a width that is no multiple of 256 ({_listed(coarse)}): K "
            "types fall back for them (Q4_K to Q5_0, Q5_K to Q5_1, Q6_K to Q8_0), which costs a little room. "
            "Q4_0, Q5_0 and Q8_0 are not affected"
        )
    return notes


def _listed(widths: dict[str, int]) -> str:
    first = [f"{name.removesuffix('.weight')} {width:,}" for name, width in list(widths.items())[:3]]
    return ", ".join(first) + (", ..." if len(widths) > 3 else "")
