"""The one place that knows about ranks and shards.

Three ways of running are told apart here and nowhere else: one process; copies of the model on every rank, whose
gradients DDP has averaged; and parameters cut into rows over the ranks (FSDP2, ``torch.distributed.fsdp.fully_shard``),
where each rank holds some rows of every weight and the same rows of its gradient.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from gisp_hf.models.fingerprint import combine_checksums, tensor_checksum


class DivergenceError(RuntimeError):
    """Ranks have chosen different structures: their models are no longer the same."""


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
    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return Rows(tensor.to_local(), offset[0], tensor.shape[0])


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


def add_over_shards(vectors: Sequence[torch.Tensor], group: dist.ProcessGroup | None) -> list[torch.Tensor]:
    """The sums of float32 vectors over the ranks of ``group``, in one all-reduce; unchanged without a group."""
    if group is None:
        return list(vectors)
    flat = torch.cat([vector.float() for vector in vectors])
    dist.all_reduce(flat, group=group)
    return list(flat.split([len(vector) for vector in vectors]))


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


def check_agreement(ranks: Sequence[torch.Tensor], *, step: int, device: torch.device) -> None:
    """Makes sure that all processes have the same removal order: one all-reduce of two numbers.

    Raises:
        DivergenceError: on every process at once, so that none waits for the others.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return
    digest = hashlib.sha256()
    for rank in ranks:
        digest.update(rank.numpy().tobytes())
    number = int.from_bytes(digest.digest()[:7], "big")
    extremes = torch.tensor([number, -number], dtype=torch.int64, device=device)
    dist.all_reduce(extremes, op=dist.ReduceOp.MIN)
    if int(extremes[0]) != -int(extremes[1]):
        raise DivergenceError(
            f"step {step}: the processes chose different structures, so their gradients differ. Every process must "
            "load the same weights, and gradients must be averaged over all of them (leave DDP's synchronisation on)"
        )
