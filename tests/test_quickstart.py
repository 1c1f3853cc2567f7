"""The quickstart's own functions, on a tiny model: everything but the size is real."""

import json

import torch

from gisp_hf import GISPConfig
from recipes import quickstart
from tests.tiny import tiny_blocks, tiny_model, tiny_tokenizer


def test_quickstart_measures_what_it_says(tmp_path, capsys) -> None:
    torch.manual_seed(0)
    held_out = torch.randint(4, 64, (1024,))
    rows = quickstart.run(
        tiny_model(),
        tiny_tokenizer(),
        blocks=tiny_blocks(16),
        held_out=held_out,
        output_dir=tmp_path / "quickstart",
        config=GISPConfig(num_steps=4, protect_first=1, sparsity_levels=(0.2, 0.5)),
        prompt="w5 w6",
    )
    assert [row["level"] for row in rows] == ["dense", "sparsity-0.20", "sparsity-0.50"]
    dense, mild, strong = rows
    assert dense["parameters"] == sum(parameter.numel() for parameter in tiny_model().parameters())
    assert dense["parameters"] > mild["parameters"] > strong["parameters"]
    layers = sum(parameter.numel() for parameter in tiny_model().model.layers.parameters())
    assert dense["parameters"] - strong["parameters"] == round(strong["sparsity"] * layers)
    assert strong["channels_removed"] > mild["channels_removed"] >= 0
    assert all(row["perplexity_128"] > 1 and row["prefill"] > 0 and row["decode"] > 0 for row in rows)
    assert json.loads((tmp_path / "quickstart" / "results.json").read_text()) == rows
    output = capsys.readouterr().out
    assert (tmp_path / "quickstart" / "results.md").read_text().strip() in output
    assert "sparsity-0.20: 'w5 w6" in output
    for name in ("perplexity.png", "removed.png", "loss.png"):
        assert (tmp_path / "quickstart" / name).stat().st_size > 10_000
