"""Scores from bfloat16 and float32 sums, on a tiny model."""

import pytest
import torch

from gisp_hf import GISPConfig
from gisp_hf.models import discover
from gisp_hf.pruning.engine import Engine
from recipes import gradient_precision
from tests.tiny import tiny_model, tiny_tokenizer

ARTICLES = [" ".join(f"w{4 + (i * 7 + n * 13) % 60}" for i in range(200)) for n in range(6)]


def test_float32_sums_give_the_scores_of_the_engine(monkeypatch) -> None:
    """The same micro-batches through the engine, in which autograd adds float32 gradients up."""
    found = []
    scores_from = gradient_precision.scores_from
    monkeypatch.setattr(gradient_precision, "scores_from", lambda *args: found.append(scores_from(*args)) or found[-1])
    calibrations = []
    compare_sums = gradient_precision.compare_sums
    monkeypatch.setattr(
        gradient_precision,
        "compare_sums",
        lambda model, calibration, **rest: (calibrations.append(calibration), compare_sums(model, calibration, **rest))[
            1
        ],
    )
    rows = gradient_precision.run(tiny_model(), tiny_tokenizer(), ARTICLES, micro_batches=6, length=16)
    assert [row["objective"] for row in rows] == ["language modelling", "margin"]
    for number, calibration in enumerate(calibrations):
        model = tiny_model()
        config = GISPConfig(sparsity_levels=(0.5,), protect_first=0, protect_last=0)
        engine = Engine(model, discover(model), config)
        with engine.watch():
            for item in range(6):
                batch = dict(calibration.collator([calibration.dataset[item]]))
                labels = batch.pop("labels")
                (calibration.loss(model(**batch), labels) / 6).backward()
            engine.accumulate()
        coarse, fine = found[2 * number : 2 * number + 2]
        for score, expected in zip(fine, engine.scores, strict=True):
            torch.testing.assert_close(score, expected, rtol=1e-4, atol=1e-9)
        assert not all(torch.equal(a, b) for a, b in zip(coarse, fine))
        assert 0.9 < rows[number]["rank_correlation"] < 1


def test_rank_correlation_and_the_lowest_by_hand() -> None:
    a = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert gradient_precision.rank_correlation(a, 10 * a) == pytest.approx(1)
    assert gradient_precision.rank_correlation(a, -a) == pytest.approx(-1)
    assert gradient_precision.alike(a, torch.tensor([2.0, 1.0, 3.0, 4.0]), 0.5) == 1
    assert gradient_precision.alike(a, torch.tensor([3.0, 1.0, 2.0, 4.0]), 0.5) == 0.5


@pytest.mark.slow
def test_the_command_writes_table_and_numbers(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(gradient_precision, "load_smollm2", lambda dtype: (tiny_model(dtype=dtype), tiny_tokenizer()))
    monkeypatch.setattr(gradient_precision, "load_wikipedia", lambda: ARTICLES * 2)
    gradient_precision.main(["--micro-batches", "4", "--length", "8", "--output-dir", str(tmp_path)])
    assert (tmp_path / "gradient_precision.md").read_text().strip() in capsys.readouterr().out
    assert (tmp_path / "gradient_precision.json").is_file()
