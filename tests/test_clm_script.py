"""A language-modelling script of the usual shape prunes with three added lines, and is otherwise as it was."""

import json
import math
import sys
import types
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from gisp_hf import Trajectory
from tests.tiny import tiny_blocks, tiny_model, tiny_tokenizer

SCRIPT = Path(__file__).parent / "clm_script.py"
IDS = torch.stack([block["input_ids"] for block in tiny_blocks(2)])


def run(source: str, folder: Path, *arguments: str):
    """The Trainer after the script's ``main``."""
    model = tiny_model()
    model.save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    for name, seed in (("train", 0), ("valid", 1)):
        rows = tiny_blocks(16, seed=seed)
        text = "\n".join(" ".join(f"w{max(4, int(token))}" for token in row["input_ids"]) for row in rows)
        (folder / f"{name}.txt").write_text(text + "\n")
    script = sys.modules["clm_script_under_test"] = types.ModuleType("clm_script_under_test")
    exec(compile(source, str(SCRIPT), "exec"), vars(script))
    return script.main(
        [
            *("--model_name_or_path", str(folder / "model"), "--output_dir", str(folder / "output")),
            *("--train_file", str(folder / "train.txt"), "--validation_file", str(folder / "valid.txt")),
            *("--do_train", "--do_eval", "--max_steps", "4", "--per_device_train_batch_size", "8"),
            *("--gradient_accumulation_steps", "2", "--learning_rate", "0.01", "--use_cpu", "--report_to", "none"),
            *("--save_strategy", "no", "--disable_tqdm", "true", *arguments),
        ]
    )


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setitem(sys.modules, "clm_script_under_test", types.ModuleType("clm_script_under_test"))


def test_three_added_lines_prune(tmp_path) -> None:
    source = SCRIPT.read_text()
    added = [line for line in source.splitlines() if line.endswith("# pruning")]
    assert len(added) == 3
    trainer = run(source, tmp_path)
    output = tmp_path / "output"
    trajectory = Trajectory.load(output)
    saved = AutoModelForCausalLM.from_pretrained(output)  # by trainer.save_model()
    level = AutoModelForCausalLM.from_pretrained(output / "sparsity-0.40")
    cut = trajectory.apply(AutoModelForCausalLM.from_pretrained(tmp_path / "model"), sparsity=0.4)
    assert torch.equal(saved(IDS).logits, level(IDS).logits) and torch.equal(cut(IDS).logits, level(IDS).logits)
    assert len(trajectory.steps) == 4 and (output / "sparsity-0.20" / "model.safetensors").is_file()
    metrics = json.loads((output / "eval_results.json").read_text())
    loss = metrics["eval_loss"]
    assert math.isclose(metrics["perplexity"], math.exp(loss)) and 0 <= metrics["eval_accuracy"] <= 1
    rows = torch.tensor(trainer.eval_dataset["input_ids"])
    torch.testing.assert_close(saved(rows, labels=rows).loss.item(), loss, rtol=1e-4, atol=1e-4)


def test_without_them_the_script_trains_as_ever(tmp_path) -> None:
    source = "\n".join(line for line in SCRIPT.read_text().splitlines() if not line.endswith("# pruning"))
    assert "gisp" not in source
    trainer = run(source, tmp_path)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "output")
    assert type(saved) is type(tiny_model())
    before = dict(tiny_model().named_parameters())
    assert not all(torch.equal(parameter, before[name]) for name, parameter in saved.named_parameters())
    assert not list((tmp_path / "output").glob("sparsity-*")) and trainer.state.global_step == 4
