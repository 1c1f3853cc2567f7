"""The notebook runs from its first cell to its last, on a tiny model and tiny texts, and loads what it wrote."""

import os
import re
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from gisp_hf import Trajectory

NOTEBOOK = Path(__file__).parents[1] / "recipes" / "tour.ipynb"
# The first cell of the test: it puts the tiny model and texts of random words in the place of the real ones.
SMALL = """
import torch
import datasets.config
from recipes import demo_data
from tests.tiny import tiny_model, tiny_tokenizer

def words(seed):
    numbers = torch.randint(4, 64, (300,), generator=torch.Generator().manual_seed(seed))
    return " ".join(f"w{number}" for number in numbers.tolist())

datasets.config.HF_DATASETS_CACHE = "cache"
demo_data.load_smollm2 = lambda: (tiny_model(max_position_embeddings=256), tiny_tokenizer())
for number, name in enumerate(demo_data.DOMAINS):
    demo_data.DOMAINS[name] = lambda number=number: [words(100 * number + n) for n in range(30)]
"""


def read():
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed: pip install '.[notebook]'")
    return nbformat.read(NOTEBOOK, as_version=4)


def test_ten_cells_without_outputs() -> None:
    cells = [cell for cell in read().cells if cell.cell_type == "code"]
    assert len(cells) == 10
    assert all(not cell.outputs and cell.execution_count is None for cell in cells)


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed: pip install '.[notebook]'")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed: pip install '.[notebook]'")
    from nbformat.v4 import new_code_cell

    notebook = read()
    notebook.cells.insert(0, new_code_cell(SMALL))
    (tmp_path / "recipes").mkdir()  # the notebook writes beside its own folder
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(NOTEBOOK.parents[1]), os.environ.get("PYTHONPATH", "")]))
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    resources = {"metadata": {"path": str(tmp_path / "recipes")}}
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()

    run = tmp_path / "runs" / "tour"
    small, *_, summary, plot, table, saved, between, texts = [
        cell for cell in notebook.cells if cell.cell_type == "code"
    ]
    assert small.source == SMALL
    assert Trajectory.load(run).summary() in shown(summary)
    assert "image/png" in plot.outputs[0].data and (run / "removed.png").stat().st_size > 10_000
    level = AutoModelForCausalLM.from_pretrained(run / "sparsity-0.20")
    count, value = re.search(r"([\d,]+) parameters, perplexity ([\d.,]+)", shown(saved)).groups()
    rows = table.outputs[0].data["text/markdown"].splitlines()
    (row,) = [row for row in rows if "sparsity-0.20" in row]
    assert row.split("|")[2].strip() == count == f"{level.num_parameters():,}"
    assert float(row.split("|")[3].replace(",", "")) == pytest.approx(float(value.replace(",", "")), rel=1e-3)
    most = int(re.search(r"([\d,]+) parameters", shown(between))[1].replace(",", ""))
    assert AutoModelForCausalLM.from_pretrained(run / "sparsity-0.40").num_parameters() < most < level.num_parameters()
    assert all(f"{name}: " in shown(texts) for name in ("base model", "20 %", "30 %"))


def shown(cell) -> str:
    return "".join(output.text for output in cell.outputs if output.output_type == "stream" and output.name == "stdout")
