"""The study of restoration, on a tiny model and words."""

import json
from dataclasses import replace

import pytest
import torch

from recipes import restore_study
from tests.tiny_domains import use_tiny_domains


@pytest.mark.slow
def test_cells_run_once_and_give_a_table(tmp_path, monkeypatch, capsys) -> None:
    use_tiny_domains(monkeypatch)
    argv = ["--levels", "0.3", "--work", str(tmp_path / "work"), "--output-dir", str(tmp_path / "out")]
    argv += ["--evaluation-tokens", "512", "--only"]
    for only in ("dense", "0.30-unrestored", "0.30-mixture-16512-blend0.5-ridge0.01-seed0"):
        restore_study.main([*argv, only])
    assert len(list((tmp_path / "out").glob("*.json"))) == 3
    text = (tmp_path / "out" / "results.md").read_text()
    assert [line.split("|")[1].strip() for line in text.splitlines()[2:]] == ["dense", "30%", "30%"]
    found = json.loads((tmp_path / "out" / "sparsity-0.30-mixture-16512-blend0.5-ridge0.01-seed0.json").read_text())
    errors = found["result"]["errors"]
    assert len(errors) == 12 and all(
        error["after"] <= error["before"] + 1e-3 for error in errors
    )  # 0 where all is left
    assert sum(error["after"] for error in errors) < sum(error["before"] for error in errors)
    capsys.readouterr()
    restore_study.main([*argv, "dense"])  # has its result
    assert "dense.json" not in capsys.readouterr().out
    restore_study.main(["--report", "--output-dir", str(tmp_path / "out")])
    assert text.strip() in capsys.readouterr().out


@pytest.mark.slow
def test_norms_are_trained_after_restoration_on_the_same_text(tmp_path, monkeypatch) -> None:
    use_tiny_domains(monkeypatch)
    material = restore_study.prepare(tmp_path, evaluation_tokens=512, dtype=torch.float32)
    cell = restore_study.Cell(0.3, tokens=1024, ridge=(0.01,))
    trained = replace(cell, norms=768)
    assert trained.file == cell.file.replace(".json", "-norms768.json") and replace(trained, norms=0) == cell
    models = []
    monkeypatch.setattr(
        restore_study.Material, "perplexities", lambda self, model: models.append(model) or {"news": 2.0}
    )
    results = [restore_study.run_cell(each, material) for each in (cell, trained)]
    assert results[0]["errors"] == results[1]["errors"]
    plain, changed = (dict(model.named_parameters()) for model in models)
    assert plain.keys() == changed.keys() and not models[1].training
    for name, parameter in plain.items():
        assert torch.equal(parameter, changed[name]) == (parameter.ndim > 1), name
