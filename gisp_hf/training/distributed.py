"""How the Trainer was launched, and whether all processes agree."""

import hashlib
from collections.abc import Sequence

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from transformers import TrainingArguments
from transformers.training_args import ParallelMode

from gisp_hf.models.shards import all_ranks


class DivergenceError(RuntimeError):
    """Ranks have chosen different structures: their models are no longer the same."""


def is_distributed(args: TrainingArguments) -> bool:
    """Whether DDP or FSDP wraps the model: under a launcher they do so with a single process too."""
    return args.parallel_mode == ParallelMode.DISTRIBUTED


def uses_fsdp(args: TrainingArguments) -> bool:
    """Whether FSDP shards the model, asked for by TrainingArguments or by ``accelerate launch``.

    Must be called after the Trainer has made its Accelerator.
    """
    return bool(args.fsdp) or AcceleratorState().distributed_type == DistributedType.FSDP


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
