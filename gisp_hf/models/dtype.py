"""The fast dtype of a machine. bfloat16 takes half the memory, but not every processor has units for it."""

import functools
import time

import torch

CANDIDATES = (torch.float32, torch.bfloat16)
SIZE = 192  # a product takes 0.2 ms on a fast core, and 30 ms on one at 0.5 GFLOP/s
REPEATS = 8
ENOUGH = 0.05  # seconds: a product that is slow anyway needs no more repeats


def fast_dtype(device: torch.device | str | None = None) -> torch.dtype:
    """bfloat16 where ``device`` multiplies it at least as fast as float32, else float32.

    A processor is measured (once a process, a few hundredths of a second), a GPU is asked whether it has the units.

    Args:
        device: the one that the Trainer picks, if None: the accelerator if there is one, else the CPU.
    """
    return torch.bfloat16 if slow_factor(torch.bfloat16, device) <= 1 else torch.float32


def slow_factor(dtype: torch.dtype, device: torch.device | str | None = None) -> float:
    """How many times longer a product of matrices takes in ``dtype`` than in float32; below 1: it is faster.

    On a GPU that has bfloat16 units it is 1 without a measurement, and always for float32 and other dtypes.
    """
    device = _device(device)
    if dtype not in CANDIDATES or dtype == torch.float32:
        return 1.0
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return 1.0
    speeds = measure_dtypes(device)
    return speeds[torch.float32] / speeds[dtype]


def measure_dtypes(device: torch.device | str | None = None) -> dict[torch.dtype, float]:
    """GFLOP/s of float32 and bfloat16 products of two 192 x 192 matrices on ``device``, a CPU by one core.

    Measured once a process and device: asking again costs nothing.
    """
    return dict(_measure(_device(device)))


def describe_dtypes(device: torch.device | str | None = None) -> str:
    """Why ``fast_dtype`` chooses as it does, in one line: ``float32 48.0, bfloat16 0.9 GFLOP/s``."""
    speeds = measure_dtypes(device).items()
    return ", ".join(f"{str(dtype).removeprefix('torch.')} {speed:,.1f}" for dtype, speed in speeds) + " GFLOP/s"


@functools.cache
def _measure(device: torch.device) -> tuple[tuple[torch.dtype, float], ...]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several wait for each other where other programs run, and their times tell nothing
    try:
        return tuple((dtype, 2 * SIZE**3 / _seconds(dtype, device) / 1e9) for dtype in CANDIDATES)
    finally:
        torch.set_num_threads(threads)


def _seconds(dtype: torch.dtype, device: torch.device) -> float:
    """Of one product. Other load on the machine can only make it slower, so the fastest counts."""
    left, right = (torch.ones(SIZE, SIZE, dtype=dtype, device=device) for _ in range(2))
    times = []
    (left @ right)[0, 0].item()  # the first one starts threads and chooses a kernel
    for _ in range(REPEATS):
        start = time.perf_counter()
        (left @ right)[0, 0].item()  # waits for the device
        times.append(time.perf_counter() - start)
        if sum(times) > ENOUGH:
            break
    return min(times)


def _device(device: torch.device | str | None) -> torch.device:
    if device is not None:
        return torch.device(device)
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
