import json
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
    argv += ["--regenerate-every", "0.15", "--cache-dir", str(tmp_path / "answers"), "--seeds", "0", "1"]
    output = tmp_path / "rows.json"
    results = self_calibration.compare(self_calibration.parse([*argv, "--output", str(output)]))
    kinds = ["dense model", "wikipedia", "own answers", "own answers, anew"]
    assert [(row["seed"], row["calibration"]) for row in results["rows"]] == [(s, k) for s in (0, 1) for k in kinds]
    assert all(math.isfinite(row["loss"]) for row in results["rows"])
    assert {(row["calibration_prompts"], row["held_out_prompts"]) for row in results["rows"]} == {(6, 2)}
    assert "has answered 6 prompts anew" in capsys.readouterr().out

    # A killed run goes on after its last row, and ends with the same numbers.
    assert json.loads(output.read_text()) == results
    kept = results["rows"][:6]
    output.write_text(json.dumps({**results, "rows": kept}))
    again = self_calibration.compare(self_calibration.parse([*argv, "--output", str(output)]))
    assert again["rows"][:6] == kept
    assert [row["loss"] for row in again["rows"]] == [row["loss"] for row in results["rows"]]
    with pytest.raises(ValueError, match="rows.json was made with steps=2, not 3; give another --output"):
        self_calibration.compare(self_calibration.parse([*argv, "--output", str(output), "--steps", "3"]))


def test_the_split_is_of_the_seed_alone() -> None:
    splits = [self_calibration.load_prompts("smollm2", 0, seed=seed) for seed in (0, 0, 1)]
    assert splits[0] == splits[1] != splits[2]
    for calibration, held_out in splits:
        assert (len(calibration), len(held_out)) == (120, 40)
        assert len({json.dumps(prompt) for prompt in calibration + held_out}) == 160
