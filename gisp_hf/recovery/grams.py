"""Gram matrices of a projection's inputs, and the ridge regression that they allow. Torch alone.

Notation: ``X`` (tokens, n) what enters a projection, ``T`` (tokens, m) what its output should change by, ``G = X^T X``,
``C = X^T T``. ``D`` (m, n) minimises ``sum_t |T_t - D X_t|^2 + ridge * mean(diag G) * |D|^2``.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist

from gisp_hf.models.shards import add_over_ranks


class Grams:
    """Sums over tokens, batch by batch, in float32 products without TF32 or autocast.

    Args:
        inputs: ``n``.
        outputs: ``m``; 0 if only the Gram matrix is needed.
        device: of the sums.

    Attributes:
        gram: ``X^T X``, float32 of shape ``(n, n)``.
        cross: ``X^T T``, float32 of shape ``(n, m)``.
        squares: ``sum |T|^2``, float32 without dimensions.
        tokens: how many were added, float32 without dimensions.
    """

    def __init__(self, inputs: int, outputs: int = 0, *, device: torch.device | str | None = None) -> None:
        self.gram = torch.zeros(inputs, inputs, dtype=torch.float32, device=device)
        self.cross = torch.zeros(inputs, outputs, dtype=torch.float32, device=device)
        self.squares = torch.zeros((), dtype=torch.float32, device=device)
        self.tokens = torch.zeros((), dtype=torch.float32, device=device)

    @torch.no_grad()
    def add(
        self, inputs: torch.Tensor, targets: torch.Tensor | None = None, *, mask: torch.Tensor | None = None
    ) -> None:
        """Takes in one batch.

        Args:
            inputs: ``(..., n)``, of any floating dtype.
            targets: ``(..., m)``; None adds zeros to ``cross``.
            mask: ``(...)``; tokens where it is zero are left out. None: all count.
        """
        with full_float32(self.gram.device):
            x = tokens_that_count(inputs, mask).to(self.gram.device)  # (t, n)
            self.gram.addmm_(x.T, x)
            self.tokens += len(x)
            if targets is not None:
                t = tokens_that_count(targets, mask).to(self.gram.device)  # (t, m)
                self.cross.addmm_(x.T, t)
                self.squares += t.square().sum()

    def merge(self, other: "Grams") -> None:
        """Adds the sums of ``other``."""
        for mine, theirs in zip(self._sums(), other._sums()):
            mine += theirs.to(mine.device)

    def add_over_ranks(self, group: dist.ProcessGroup | None) -> None:
        """Adds up the sums of all processes of ``group``; afterwards all of them hold the same."""
        if group is not None:
            self.gram, self.cross, self.squares, self.tokens = add_over_ranks(self._sums(), group)

    def is_finite(self) -> bool:
        return bool(torch.stack([part.isfinite().all() for part in self._sums()]).all())  # one wait for the device

    def squared_error(self, change: torch.Tensor | None = None) -> float:
        """``sum_t |T_t - D X_t|^2`` for the change ``D`` of shape ``(m, n)``, in float64; ``sum |T|^2`` for None."""
        squares = float(self.squares)
        if change is None:
            return squares
        d = change.to(self.gram.device, torch.float64)
        quadratic = ((d @ self.gram.double()) * d).sum()
        return max(0.0, squares - 2 * float((d.T * self.cross.double()).sum()) + float(quadratic))

    def _sums(self) -> list[torch.Tensor]:
        return [self.gram, self.cross, self.squares, self.tokens]


def tokens_that_count(values: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Tokens outside the mask are left out: (..., n) -> float32 of shape (tokens, n)."""
    if mask is not None:
        return values[mask.to(values.device).bool()].float()
    return values.flatten(0, -2).float()


@contextmanager
def full_float32(device: torch.device | str) -> Iterator[None]:
    """Products of float32 matrices in float32: neither autocast nor TF32 shorten them."""
    device = torch.device(device)
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision if device.type == "cuda" else None
    try:
        if device.type == "cuda":
            settings.fp32_precision = "ieee"
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        if before is not None:
            settings.fp32_precision = before


def mean_diagonal(gram: torch.Tensor) -> torch.Tensor:
    """The mean of the diagonal, in float64, over inputs that are not always zero; 0 if there is none."""
    diagonal = gram.diagonal().double()
    return diagonal.sum() / (diagonal > 0).sum().clamp_min(1)


def solve_ridge(gram: torch.Tensor, cross: torch.Tensor, ridge: float) -> torch.Tensor:
    """``D^T = (G + ridge * mean(diag G) * I)^-1 C``, in float64 of shape ``(n, m)``.

    Inputs that are always zero get zeros, and do not count in the mean. With ``ridge`` 0 and dependent inputs it is the
    solution of least norm.
    """
    damping = ridge * mean_diagonal(gram)
    matrix = gram.double()
    matrix.diagonal().add_(damping)
    dead = gram.diagonal() <= 0
    solution = solve_positive(matrix, cross.double())
    solution[dead] = 0
    return solution


def solve_positive(matrix: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """``matrix^-1 right`` for a symmetric positive matrix in float64.

    If dependent inputs leave it singular, up to the rounding of float32 sums, the pseudo-inverse takes the place of the
    inverse, so that the solution is the one of least norm.
    """
    rounding = 10 * torch.finfo(torch.float32).eps
    factor, info = torch.linalg.cholesky_ex(matrix)
    pivots = factor.diagonal().square()
    if not bool(info) and bool(pivots.min() > rounding * matrix.diagonal().max()):
        return torch.cholesky_solve(right, factor)
    values, vectors = torch.linalg.eigh(matrix)
    inverse = torch.where(values > rounding * values.max(), values.reciprocal(), 0.0)
    return vectors @ (inverse[:, None] * (vectors.T @ right))


def best_ridge(train: Grams, held_out: Grams, candidates: Sequence[float]) -> float:
    """The candidate whose solution on ``train`` has the smallest squared error on ``held_out``."""
    errors = [held_out.squared_error(solve_ridge(train.gram, train.cross, ridge).T) for ridge in candidates]
    return candidates[min(range(len(candidates)), key=errors.__getitem__)]
