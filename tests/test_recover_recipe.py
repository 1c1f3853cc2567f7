"""The comparison of ways to recover a level, on a tiny model and words."""

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from gisp_hf.evaluation import perplexity
from gisp_hf.levels.info import read_levels
from gisp_hf.recovery.lora_record import Recovery
from recipes import recover
from recipes.demo_data import held_out_tokens
from tests.tiny_domains import domain, use_tiny_domains


@pytest.mark.slow
def test_cells_run_once_and_give_a_table(tmp_path: Path, monkeypatch, capsys) -> None:
    use_tiny_domains(monkeypatch)
    argv = ["--levels", "0.3", "--work", str(tmp_path / "work"), "--output-dir", str(tmp_path / "out")]
    argv += ["--evaluation-tokens", "512", "--tokens", "6144", "--minutes", "0.01", "--only"]
    recover.main([*argv, "restored", "--prepare"])
    assert not list((tmp_path / "out").glob("*.json"))
    for only in ("0.30-pruned", "0.30-restored-distillation"):
        recover.main([*argv, only])
    assert len(list((tmp_path / "out").glob("*.json"))) == 2
    found = json.loads((tmp_path / "out" / "sparsity-0.30-restored-distillation.json").read_text())["result"]
    assert found["steps"] >= 1 and found["tokens"] == found["steps"] * 2048 and found["restoration_seconds"] > 0
    (folder,) = (tmp_path / "work").glob("recovered-*")
    (level,) = read_levels(folder)
    assert level.restored and level.recovered
    model = AutoModelForCausalLM.from_pretrained(folder / level.name)
    ids = held_out_tokens(domain("news").held_out, AutoTokenizer.from_pretrained(tmp_path / "work" / "base"), count=512)
    assert found["perplexity"]["news"] == pytest.approx(perplexity(model, ids, window=256), rel=0.02)
    text = (tmp_path / "out" / "results.md").read_text()
    assert sorted(line.split("|")[2].strip() for line in text.splitlines()[2:]) == ["pruned", "restored, distillation"]
    capsys.readouterr()
    recover.main([*argv, "0.30-pruned"])  # has its result
    assert text.strip() == capsys.readouterr().out.strip()
    recover.main(["--report", "--output-dir", str(tmp_path / "out")])
    assert text.strip() in capsys.readouterr().out
    recover.main([*argv, "0.30-restored-scales"])
    (folder,) = (tmp_path / "work").glob("recovered-*-scales-*")
    record = Recovery.load(folder / level.name)
    assert record.train == "scales" and record.training["learning_rate"] == 5e-3
    assert "restored, scales" in (tmp_path / "out" / "results.md").read_text()
