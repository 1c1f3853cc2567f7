"""A checksum of a model's weights that survives a change of dtype and can be added up over shards. Torch alone."""

import hashlib
from collections.abc import Iterable

import torch

CHUNK = 1 << 22  # elements looked at together: bounds the extra memory


def tensor_checksum(tensor: torch.Tensor, *, first_row: int = 0) -> tuple[int, int]:
    """Two position-weighted sums over the bit patterns of a tensor in bfloat16: exact, whatever the order of summing.

    Values are compared in bfloat16, so that a model loaded in float32 and the same model in bfloat16 agree.

    Args:
        tensor: a whole parameter, or rows of it from ``first_row`` on; the sums of all its shards add up (modulo 2**64)
            to those of the whole.
    """
    matrix = tensor.detach().reshape(tensor.shape[0] if tensor.ndim else 1, -1)
    columns = torch.arange(1, matrix.shape[1] + 1, device=matrix.device)
    by_row = by_column = 0
    step = max(1, CHUNK // max(1, matrix.shape[1]))
    for start in range(0, matrix.shape[0], step):
        bits = matrix[start : start + step].bfloat16().contiguous().view(torch.int16)
        rows = torch.arange(first_row + start + 1, first_row + start + 1 + len(bits), device=matrix.device)
        by_row += int((bits.sum(dim=1, dtype=torch.int64) * rows).sum())
        by_column += int((bits.sum(dim=0, dtype=torch.int64) * columns).sum())
    return by_row % 2**64, by_column % 2**64


def fingerprint(named_tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """64 hex digits that two models share only if all their parameters have the same names, shapes and values."""
    return combine_checksums((name, tuple(tensor.shape), tensor_checksum(tensor)) for name, tensor in named_tensors)


def combine_checksums(entries: Iterable[tuple[str, tuple[int, ...], tuple[int, int]]]) -> str:
    """The fingerprint from (name, full shape, checksum) of each parameter, in any order."""
    digest = hashlib.sha256()
    for name, shape, (by_row, by_column) in sorted(entries):
        digest.update(f"{name} {list(shape)} {by_row:016x} {by_column:016x}\n".encode())
    return digest.hexdigest()
