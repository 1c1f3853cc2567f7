import pytest

from recipes import quantized_scores


@pytest.mark.slow
def test_quantized_scores_beside_float32(capsys) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    pytest.importorskip("torchao", reason="torchao is not installed")
    options = quantized_scores.parse(["--model", "tiny", "--blocks", "8", "--window", "16"])
    rows = quantized_scores.compare(options)["rows"]
    assert [(row["scored in"], row["level"]) for row in rows][:2] == [("float32", 0.2), ("float32", 0.4)]
    assert all(row["shared"] == 1 and row["channels, correlation"] == pytest.approx(1) for row in rows[:2])
    assert all(row["shared"] > 0.5 and row["channels, correlation"] > 0.5 for row in rows[2:])
    assert all(row["perplexity"] > 1 for row in rows) and "scored in" in capsys.readouterr().out
