"""The bound of local repair, on a tiny model and words."""

import json

import pytest

from recipes import restore_bound
from tests.tiny_domains import use_tiny_domains


@pytest.mark.slow
def test_training_lowers_the_error_of_layers(tmp_path, monkeypatch, capsys) -> None:
    use_tiny_domains(monkeypatch)
    argv = ["--tokens", "4096", "--epochs", "2", "--learning-rate", "1e-3", "--evaluation-tokens", "512"]
    restore_bound.main([*argv, "--work", str(tmp_path / "work"), "--output-dir", str(tmp_path / "out")])
    (file,) = (tmp_path / "out").iterdir()
    found = json.loads(file.read_text())
    assert list(found["rows"]) == ["pruned", "restored", "restored, all weights trained"]
    assert len(found["errors"]) == 6
    assert all(error["after"] <= error["before"] for error in found["errors"])
    assert sum(e["after"] for e in found["errors"]) < sum(e["before"] for e in found["errors"])
    assert "all weights trained" in capsys.readouterr().out
