"""The scripts of the README, on a tiny model and local files in place of the Hub's."""

import json
import re
from pathlib import Path

import datasets
import pytest
import torch

from gisp_hf import GISPConfig, GISPPruner, Trajectory
from tests.tiny import tiny_model, tiny_tokenizer

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
SCRIPTS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
CONFIG = GISPConfig(sparsity_levels=(0.2, 0.5), num_steps=4, protect_first=1)


def script(word: str, replacements: dict[str, str] | None = None) -> str:
    (found,) = (text for text in SCRIPTS if word in text)
    for old, new in (replacements or {}).items():
        assert old in found, f"the README's script no longer holds {old!r}"
        found = found.replace(old, new)
    return found


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    questions = [
        {"prompt": f"w{4 + i} w{5 + i}", "correct": [f" w{6 + i}"], "incorrect": [f" w{9 + i} w5"]} for i in range(24)
    ]
    Path("questions.jsonl").write_text("\n".join(map(json.dumps, questions)))
    return tmp_path


def test_first_script(folder) -> None:
    tiny_model().save_pretrained(folder / "meta-llama" / "Llama-2-7b-hf")
    tiny_tokenizer().save_pretrained(folder / "meta-llama" / "Llama-2-7b-hf")
    torch.manual_seed(0)
    rows = torch.randint(4, 64, (128, 8)).tolist()
    blocks = datasets.Dataset.from_dict({"input_ids": rows, "labels": rows})
    small = {"80": "4", ', hub_model_id="me/llama-2-7b-gisp"': "", '"out"': '"out", use_cpu=True, save_strategy="no"'}
    text = script("train_dataset=blocks", small).replace("num_steps=4", "num_steps=4, protect_first=1")
    exec(text, {"blocks": blocks})
    assert sorted(path.name for path in folder.glob("pruned/sparsity-*")) == ["sparsity-0.20", "sparsity-0.50"]


def test_task_script_and_a_loss_of_ones_own(folder) -> None:
    small = {'"cmqa"': '"questions.jsonl"', "512_000": "168", "max_steps=80": "max_steps=4, use_cpu=True"}
    names = {"tokenizer": tiny_tokenizer(), "config": CONFIG, "GISPPruner": GISPPruner}
    exec("from transformers import Trainer, TrainingArguments", names)
    exec(script("load_calibration", small), names | {"model": tiny_model()})
    margin = Trajectory.load("pruned")
    assert margin.calibration["items"] == 24

    exec(script("preference_loss"), names)
    own = small | {"calibration.loss": "preference_loss", '"pruned"': '"own"'}
    exec(script("load_calibration", own), names | {"model": tiny_model()})
    assert any(not torch.equal(a, b) for a, b in zip(margin.order, Trajectory.load("own").order))
