"""The dtype follows the machine."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gisp_hf.models import dtype

REPORT = """
import time, torch
from gisp_hf.models.dtype import fast_dtype, measure_dtypes, slow_factor
start = time.perf_counter()
print(fast_dtype("cpu"), slow_factor(torch.bfloat16, "cpu"), time.perf_counter() - start)
"""


@pytest.mark.parametrize("bfloat16, wanted", [(400.0, torch.bfloat16), (50.0, torch.bfloat16), (0.9, torch.float32)])
def test_bfloat16_only_where_it_is_not_slower(bfloat16, wanted, monkeypatch) -> None:
    monkeypatch.setattr(dtype, "measure_dtypes", lambda _: {torch.float32: 50.0, torch.bfloat16: bfloat16})
    assert dtype.fast_dtype("cpu") == wanted
    assert dtype.slow_factor(torch.bfloat16, "cpu") == 50.0 / bfloat16
    assert dtype.slow_factor(torch.float32, "cpu") == 1.0


@pytest.mark.parametrize("has_units, wanted", [(True, torch.bfloat16), (False, torch.float32)])
def test_a_gpu_is_asked_first(has_units, wanted, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_units)
    monkeypatch.setattr(dtype, "measure_dtypes", lambda _: {torch.float32: 8000.0, torch.bfloat16: 900.0})
    assert dtype.fast_dtype("cuda") == wanted


def test_a_product_is_timed_once_a_process(monkeypatch) -> None:
    threads = torch.get_num_threads()
    first = dtype.measure_dtypes("cpu")
    assert set(first) == set(dtype.CANDIDATES) and all(speed > 0 for speed in first.values())
    assert torch.get_num_threads() == threads
    monkeypatch.setattr(dtype, "_seconds", lambda *_: 1.0)
    assert dtype.measure_dtypes("cpu") == first
    float32, bfloat16 = first.values()
    assert dtype.describe_dtypes("cpu") == f"float32 {float32:,.1f}, bfloat16 {bfloat16:,.1f} GFLOP/s"


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="names of x86 processors")
def test_without_bfloat16_units_float32_is_taken(tmp_path) -> None:
    # the libraries leave out all instructions beyond AVX2, which is what most laptops have
    slow = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "PYTHONPATH": str(Path(__file__).parents[1])}
    run = subprocess.run(
        [sys.executable, "-c", REPORT], env=os.environ | slow, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    chosen, factor, seconds = run.stdout.split()
    assert chosen == "torch.float32" and float(factor) > 5 and float(seconds) < 5
