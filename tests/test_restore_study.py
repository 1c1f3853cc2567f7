"""The study of restoration, on a tiny model and words."""

import json

import pytest

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
