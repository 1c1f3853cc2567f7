"""The benchmark of the loss: every way gives the same loss and gradient, and the recipe prints its ratios."""

import json

import pytest
from torch.nn import functional as F

from recipes import benchmark_loss

SIZES = ["--tokens", "64", "--hidden", "16", "--vocabulary", "96", "--chunk-tokens", "16", "--repeats", "1"]


@pytest.mark.parametrize("way", benchmark_loss.WAYS)
def test_every_way_takes_the_same_loss_and_gradient(way) -> None:
    if way.startswith("library") and not hasattr(F, "linear_cross_entropy"):
        pytest.skip("this PyTorch has no linear_cross_entropy")
    row = benchmark_loss.measure(way, "float32", benchmark_loss.parse(SIZES))
    assert row["loss_error"] < 1e-6 and row["gradient_error"] < 1e-6


@pytest.mark.parametrize("way", ["plain", "chunked"])
def test_bfloat16_leaves_the_loss_in_float32(way) -> None:
    row = benchmark_loss.measure(way, "bfloat16", benchmark_loss.parse(SIZES))
    assert row["loss_dtype"] == "float32" and row["loss_error"] < 1e-4


@pytest.mark.slow
def test_recipe_prints_and_writes_the_ratios(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(benchmark_loss, "DTYPES", ("float32",))
    monkeypatch.setattr(benchmark_loss, "WAYS", ("plain", "chunked"))
    benchmark_loss.main([*SIZES, "--output", str(tmp_path / "loss.json")])
    plain, chunked = json.loads((tmp_path / "loss.json").read_text())["rows"]
    assert (plain["time_ratio"], plain["memory_ratio"]) == (1, 1)
    assert chunked["time_ratio"] == chunked["seconds"] / plain["seconds"]
    assert "time / plain" in capsys.readouterr().out
