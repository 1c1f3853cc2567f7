"""Target sparsity per step. Plain floats, nothing else."""

import math
from typing import Literal

Schedule = Literal["linear", "cosine", "exponential"]
SCHEDULES: tuple[Schedule, ...] = ("linear", "cosine", "exponential")


def target_sparsity(step: int, num_steps: int, *, final: float, schedule: Schedule = "linear") -> float:
    """The sparsity (a fraction, 0-1) that the model should have after ``step`` of ``num_steps`` (counted from 1).

    - ``linear``: the same number of parameters goes at every step;
    - ``cosine``: few at first and at the end, most in the middle;
    - ``exponential``: every step removes the same fraction of what is left.

    All reach ``final`` exactly at the last step. The published formula gives step ``k`` the ratio
    ``(k - 1) / (n - 1)``, so that its first pass removes nothing; here it is ``k / n``, so that no pass is wasted.
    """
    if step == num_steps:
        return final
    progress = step / num_steps
    if schedule == "linear":
        return final * progress
    if schedule == "cosine":
        return final * (1 - math.cos(math.pi * progress)) / 2
    if schedule == "exponential":
        return 1 - (1 - final) ** progress
    raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {schedule!r}")


def targets_of_step(
    step: int, num_steps: int, *, levels: tuple[float, ...], schedule: Schedule = "linear"
) -> list[tuple[float, float | None]]:
    """What to do in one step, in order: (target sparsity, the level to save there or None).

    A level that lies between two steps gets a stop of its own on the way, so that it is met exactly and not at the
    next step's larger sparsity.
    """
    start = target_sparsity(step - 1, num_steps, final=levels[-1], schedule=schedule) if step > 1 else 0.0
    end = target_sparsity(step, num_steps, final=levels[-1], schedule=schedule)
    slack = 1e-9  # 0.1 + 0.2 is not 0.3
    stops: list[tuple[float, float | None]] = [
        (level, level) for level in levels if start + slack < level <= end + slack
    ]
    if not stops or stops[-1][0] < end - slack:
        stops.append((end, None))
    return stops
