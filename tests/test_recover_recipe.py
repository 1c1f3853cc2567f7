"""The comparison of ways to recover a level, on a tiny model and words."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from gisp_hf.evaluation import perplexity
from gisp_hf.levels.info import read_levels
from gisp_hf.recovery.lora_record import Recovery
from recipes import recover
from recipes.demo_data import held_out_tokens
from tests.tiny_domains import domain, use_tiny_domains

ROOT = Path(__file__).parents[1]


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


@pytest.mark.slow
def test_processes_of_a_cpu_train_together(tmp_path: Path, monkeypatch) -> None:
    use_tiny_domains(monkeypatch)
    options = ["--levels", "0.3", "--work", str(tmp_path / "work"), "--output-dir", str(tmp_path / "out"), "--tokens"]
    options += ["8192", "--evaluation-tokens", "512", "--minutes", "0.05", "--only", "0.30-lora"]
    recover.main([*options, "--prepare"])
    monkeypatch.undo()
    command = [str(Path(sys.executable).with_name("accelerate")), "launch"]
    command += ["--config_file", str(ROOT / "recipes" / "accelerate" / "cpu.yaml"), "--main_process_port", "0"]
    command += ["--module", "tests.tiny_recover", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "out" / "sparsity-0.30-lora.json").read_text())
    assert found["processes"] == 2
    assert found["result"]["tokens"] == found["result"]["steps"] * 2 * 2048  # of both
    (level,) = read_levels(next((tmp_path / "work").glob("recovered-*")))
    assert level.recovered
