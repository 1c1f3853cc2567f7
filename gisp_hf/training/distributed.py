"""How the Trainer was launched, and whether all processes agree."""

import hashlib
import os
from collections.abc import Sequence

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import nn
from transformers import TrainingArguments
from transformers.training_args import ParallelMode

from gisp_hf.models.shards import all_ranks, is_sharded


class DivergenceError(RuntimeError):
    """Ranks have chosen different structures: their models are no longer the same."""


def is_distributed(args: TrainingArguments) -> bool:
    """Whether DDP or FSDP wraps the model: under a launcher they do so with a single process too."""
    return args.parallel_mode == ParallelMode.DISTRIBUTED


def check_connected(args: TrainingArguments) -> None:
    """Refuses processes that were launched together and know nothing of each other.

    Accelerate connects the processes of a CPU only if it is told to use the CPU.

    Raises:
        ValueError: with what to do instead.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1")) if "LOCAL_RANK" in os.environ else 1
    if launched > 1 and args.world_size == 1:
        raise ValueError(
            f"{launched} processes were launched, and they are not connected: each would do all the work and write to "
            "the same folder. On a CPU set TrainingArguments(use_cpu=True) (--use_cpu); elsewhere look why torch sees "
            "no device"
        )


def uses_fsdp(args: TrainingArguments) -> bool:
    """Whether FSDP shards the model, asked for by TrainingArguments or by ``accelerate launch``.

    Must be called after the Trainer has made its Accelerator.
    """
    return bool(args.fsdp) or AcceleratorState().distributed_type == DistributedType.FSDP


def will_shard(args: TrainingArguments, model: nn.Module) -> bool:
    """Whether FSDP has sharded the model, or will when training begins. Call it as late as `uses_fsdp`."""
    return is_sharded(model.parameters()) or (is_distributed(args) and uses_fsdp(args))


def check_agreement(order: Sequence[torch.Tensor], *, step: int, device: torch.device) -> None:
    """Makes sure that all processes have the same removal order: one all-reduce of two numbers.

    Raises:
        DivergenceError: on every process at once, so that none waits for the others.
    """
    if all_ranks() is None:
        return
    digest = hashlib.sha256()
    for positions in order:
        digest.update(positions.numpy().tobytes())
    number = int.from_bytes(digest.digest()[:7], "big")
    extremes = torch.tensor([number, -number], dtype=torch.int64, device=device)
    dist.all_reduce(extremes, op=dist.ReduceOp.MIN)
    if int(extremes[0]) != -int(extremes[1]):
        raise DivergenceError(
            f"step {step}: the processes chose different structures, so their gradients differ. Every process must "
            "load the same weights, and gradients must be averaged over all of them (leave DDP's synchronisation on)"
        )


def from_first_rank(sequences: Sequence[list[int]], *, device: torch.device) -> list[list[int]]:
    """The token ids that the first process has, on every process: one broadcast of lengths and one of ids.

    Args:
        sequences: of the first process; on the others only their number counts, which must be the same.
        device: that the backend sends from.
    """
    if all_ranks() is None:
        return [list(sequence) for sequence in sequences]
    lengths = torch.tensor([len(sequence) for sequence in sequences], dtype=torch.int64, device=device)
    dist.broadcast(lengths, src=0)
    counts = lengths.tolist()
    flat = torch.zeros(sum(counts), dtype=torch.int64, device=device)
    if dist.get_rank() == 0:
        tokens = [token for sequence in sequences for token in sequence]
        flat = torch.tensor(tokens, dtype=torch.int64, device=device)
    dist.broadcast(flat, src=0)
    return [part.tolist() for part in flat.cpu().split(counts)]
