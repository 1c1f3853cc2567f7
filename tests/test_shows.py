"""Texts and pictures of a run for people: repr, summary, plot, the table of a notebook."""

import sys
import types

import pytest
import torch

from gisp_hf import GISPConfig, GISPPruner
from gisp_hf.models import discover
from tests.runs import make_trainer, tiny_config
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    pruner = GISPPruner({"num_steps": 2, "protect_first": 1, "sparsity_levels": [0.2, 0.4]}, folder / "levels")
    before = repr(pruner)
    model = tiny_model()
    make_trainer(model, folder, pruner=pruner).train()
    return before, pruner, model


def test_a_dict_is_a_config(run) -> None:
    assert run[1].config == GISPConfig(num_steps=2, protect_first=1, sparsity_levels=(0.2, 0.4))
    with pytest.raises(TypeError, match="unknown keys sparsity"):
        GISPPruner({"sparsity": 0.2})
    with pytest.raises(ValueError, match="sparsity levels must lie in"):
        GISPPruner({"sparsity_levels": [20]})


def test_reprs_are_one_line_with_the_numbers_of_the_run(run) -> None:
    before, pruner, model = run
    assert before == "GISPPruner(gisp, levels 0.2, 0.4, 0 of 2 steps, sparsity 0.0000)"
    left = sum(p.numel() for p in model.model.layers.parameters())
    sparsity = 1 - left / discover(tiny_model()).total
    assert repr(pruner) == f"GISPPruner(gisp, levels 0.2, 0.4, 2 of 2 steps, sparsity {sparsity:.4f})"
    gone = sum(block.size for block in discover(tiny_model()).blocks) - sum(b.size for b in discover(model).blocks)
    assert repr(pruner.trajectory) == (
        f"Trajectory(llama, 6 layers, base 'LlamaForCausalLM': {gone} of 168 structures removed, "
        f"sparsity {sparsity:.4f})"
    )


def test_the_summary_counts_what_each_level_has_left(run) -> None:
    _, pruner, model = run
    lines = pruner.trajectory.summary().splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
    assert cells[0] == ["sparsity", "key/value groups", "MLP channels", "decoder-layer parameters"]
    assert [row[0] for row in cells[2:]] == ["0%", "20%", "40%"]
    assert cells[2][1:] == ["24", "144", f"{discover(tiny_model()).total:,}"]
    layout = discover(model)
    left = {kind: sum(block.size for block in layout.blocks if block.kind == kind) for kind in ("attention", "mlp")}
    assert cells[4][1:] == [str(left["attention"]), str(left["mlp"]), f"{layout.total:,}"]


def test_the_plot_shows_the_fractions_of_each_layer(run, tmp_path) -> None:
    _, pruner, model = run
    fractions = pruner.trajectory.removed_by_layer(0.4)
    for name, kind in (("key/value groups", "attention"), ("MLP channels", "mlp")):
        before = [block.size for block in discover(tiny_model()).blocks if block.kind == kind]
        after = [block.size for block in discover(model).blocks if block.kind == kind]
        assert fractions[name] == [1 - left / size for left, size in zip(after, before)]
    pytest.importorskip("matplotlib")
    pruner.trajectory.plot(tmp_path / "removed.png")
    assert (tmp_path / "removed.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_the_table_of_a_notebook_has_a_column_of_sparsity(tmp_path, monkeypatch) -> None:
    display = types.ModuleType("IPython.display")
    display.HTML = str  # type: ignore[attr-defined]
    display.display = lambda *args, **kwargs: types.SimpleNamespace(update=lambda html: None)  # type: ignore
    package = types.ModuleType("IPython")
    package.display = display  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", package)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    from transformers.utils.notebook import NotebookProgressCallback

    pruner = GISPPruner(tiny_config(num_steps=3, sparsity_levels=(0.3,)), tmp_path / "levels")
    trainer = make_trainer(tiny_model(), tmp_path, pruner=pruner)
    shown = NotebookProgressCallback()
    tables = []
    end = shown.on_train_end
    shown.on_train_end = lambda *args, **kwargs: (
        tables.append(shown.training_tracker.inner_table),
        end(*args, **kwargs),
    )
    trainer.add_callback(shown)
    trainer.train()
    (table,) = tables
    assert table[0] == ["Step", "Training Loss", "Sparsity"]
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert not [entry for entry in history if "grad_norm" in entry]
    assert [row[2] for row in table[1:]] == [f"{entry['sparsity']:.4f}" for entry in history]
    assert torch.tensor([row[1] for row in table[1:]]).isfinite().all()
