"""Parameters that are cut into rows over the processes (FSDP2), and names that wrappers have changed.

A *rank* is a process. Three ways of running are told apart here and nowhere else: one process; copies of the model on
every rank, whose gradients DDP has averaged; and parameters cut into rows over the ranks
(``torch.distributed.fsdp.fully_shard``), where each rank holds some rows of every weight and of its gradient.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Shard

from gisp_hf.models.fingerprint import combine_checksums, tensor_checksum


@dataclass(frozen=True)
class Rows:
    """The part of a parameter that this rank holds: ``tensor`` are its rows from ``first`` on, of ``total``."""

    tensor: torch.Tensor
    first: int
    total: int


def local_rows(tensor: torch.Tensor) -> Rows:
    """What this rank has of a parameter or gradient; all of it, if it is not sharded.

    Raises:
        ValueError: if it is cut along another dimension than its rows.
    """
    if not isinstance(tensor, DTensor):
        return Rows(tensor, 0, tensor.shape[0])
    cuts = [placement.dim for placement in tensor.placements if isinstance(placement, Shard)]
    if any(dim != 0 for dim in cuts) or any(placement.is_partial() for placement in tensor.placements):
        raise ValueError(
            f"parameters must be sharded by rows, as fully_shard does by default, got placements {tensor.placements}; "
            "tensor parallelism and shard_placement_fn are not supported"
        )
    first, length = 0, tensor.shape[0]  # of the part so far: one mesh dimension after the other cuts it further
    for dimension, placement in enumerate(tensor.placements):
        if isinstance(placement, Shard):
            rank = tensor.device_mesh.get_local_rank(dimension)
            length, offset = Shard.local_shard_size_and_offset(length, tensor.device_mesh.size(dimension), rank)
            first += int(offset)
    return Rows(tensor.to_local(), first, tensor.shape[0])


# Wrappers of activation checkpointing and torch.compile put these into the names of parameters.
_WRAPPERS = re.compile(r"\b(?:_checkpoint_wrapped_module|_orig_mod|_fsdp_wrapped_module)\.")


def plain_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """``named_parameters`` with the names that the model has without wrappers; ``get_parameter`` takes both."""
    for name, parameter in model.named_parameters():
        yield _WRAPPERS.sub("", name), parameter


def is_sharded(parameters: Iterable[torch.Tensor]) -> bool:
    return any(isinstance(parameter, DTensor) for parameter in parameters)


def shard_group(parameter: torch.Tensor) -> dist.ProcessGroup | None:
    """The ranks that hold the other rows of a parameter (with replicas beside them: only those of this replica)."""
    if not isinstance(parameter, DTensor):
        return None
    for dimension, placement in enumerate(parameter.placements):
        if isinstance(placement, Shard):
            return parameter.device_mesh.get_group(dimension)
    return None


def add_over_ranks(tensors: Sequence[torch.Tensor], group: dist.ProcessGroup | None) -> list[torch.Tensor]:
    """The sums of float32 tensors over the ranks of ``group``, in one all-reduce, all on the device of the first.

    Without a group they are only brought to one device: a model that is spread over several (``device_map="auto"``)
    gives its sums on several.
    """
    if not tensors:
        return []
    device = tensors[0].device
    if group is None:
        return [tensor.float().to(device) for tensor in tensors]
    flat = torch.cat([tensor.float().flatten().to(device) for tensor in tensors])
    dist.all_reduce(flat, group=group)
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors)]


def all_ranks() -> dist.ProcessGroup | None:
    """All processes, if there are several."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return None
    return dist.group.WORLD


def model_fingerprint(named_parameters: Iterable[tuple[str, torch.Tensor]]) -> str:
    """``fingerprint.fingerprint`` of a model that may be sharded: checksums of shards add up, nothing is gathered."""
    entries = []
    for name, parameter in named_parameters:
        rows = local_rows(parameter)
        checksum = tensor_checksum(rows.tensor, first_row=rows.first)
        group = shard_group(parameter)
        if group is not None:
            # int64 sums wrap around modulo 2**64, as the checksum does
            signed = [value - 2**64 if value >= 2**63 else value for value in checksum]
            sums = torch.tensor(signed, dtype=torch.int64, device=rows.tensor.device)
            dist.all_reduce(sums, group=group)
            checksum = (int(sums[0]) % 2**64, int(sums[1]) % 2**64)
        entries.append((name, tuple(parameter.shape), checksum))
    return combine_checksums(entries)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The full tensor, gathered over the ranks if it is sharded: every rank must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
