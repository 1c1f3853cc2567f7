import json
import math

import pytest

from recipes import restore_answers


@pytest.mark.slow
def test_every_way_of_restoring_is_measured(tmp_path, capsys) -> None:
    argv = ["--model", "tiny", "--prompts", "16", "--max-new-tokens", "6", "--steps", "2", "--sparsity", "0.3"]
    argv += ["--evaluation-tokens", "512", "--output-dir", str(tmp_path)]
    restore_answers.main(argv)
    facts = json.loads((tmp_path / "seed0.json").read_text())
    dense, pruned, *restored = facts["rows"]
    assert dense["level"] == "dense" and pruned["level"] == "pruned on own answers" and len(restored) == 4
    assert all(math.isfinite(row["loss"]) and math.isfinite(row["mean"]) for row in facts["rows"])
    assert len({row["loss"] for row in facts["rows"]}) == 6  # each way changed the weights
    counts = {row["level"].removeprefix("restored on "): row["tokens"] for row in restored}
    everything, text = counts["own answers and their questions"], counts["Wikipedia"]  # tiny text has longer blocks
    assert 0 < counts["own answers alone"] < everything < counts["half Wikipedia, half own"] < text
    assert "restored on own answers alone" in capsys.readouterr().out
