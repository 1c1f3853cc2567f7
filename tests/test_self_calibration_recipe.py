import math

import pytest

from recipes import self_calibration


@pytest.mark.slow
def test_own_answers_beside_wikipedia(tmp_path, capsys) -> None:
    argv = [
        "--model",
        "tiny",
        "--prompts",
        "8",
        "--max-new-tokens",
        "4",
        "--steps",
        "2",
        "--methods",
        "gisp-activation",
    ]
    options = self_calibration.parse([*argv, "--regenerate-every", "0.15", "--cache-dir", str(tmp_path)])
    results = self_calibration.compare(options)
    assert [row["calibration"] for row in results["rows"]] == [
        "dense model",
        "wikipedia",
        "own answers",
        "own answers, anew",
    ]
    assert all(math.isfinite(row["loss"]) for row in results["rows"])
    assert results["calibration_prompts"] == 6 and results["held_out_prompts"] == 2
    assert "has answered 6 prompts anew" in capsys.readouterr().out
