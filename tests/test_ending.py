"""The model that a finished run leaves: with torch_compile too, ``trainer.save_model()`` writes the pruned model."""

import torch
from transformers import AutoModelForCausalLM

from gisp_hf import GISPPruner
from gisp_hf.models import discover
from tests.runs import make_trainer, tiny_config
from tests.tiny import tiny_blocks, tiny_model

IDS = torch.stack([block["input_ids"] for block in tiny_blocks(2)])


def finished(folder, *, shrink=None, **arguments):
    """(trainer, pruner) after a run of two levels; compiled by the backend that only traces."""
    pruner = GISPPruner(tiny_config(num_steps=2, sparsity_levels=(0.2, 0.4)), folder / "levels", shrink=shrink)
    trainer = make_trainer(tiny_model(), folder, pruner=pruner, **arguments)
    trainer.train()
    return trainer, pruner


def test_a_compiled_run_ends_with_the_pruned_model(tmp_path, caplog) -> None:
    trainer, pruner = finished(tmp_path / "compiled", torch_compile=True, torch_compile_backend="eager")
    _, plain = finished(tmp_path / "plain")
    assert all(torch.equal(a, b) for a, b in zip(pruner.trajectory.order, plain.trajectory.order))
    trainer.save_model(tmp_path / "saved")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    level = AutoModelForCausalLM.from_pretrained(pruner.level_folders[0.4])
    assert type(saved) is type(level) is type(trainer.model)
    for (name, ours), (other, theirs) in zip(saved.named_parameters(), level.named_parameters(), strict=True):
        assert name == other and torch.equal(ours, theirs), name
    assert torch.equal(trainer.model(IDS).logits, level(IDS).logits)
    assert [block.size for block in discover(trainer.model).blocks] == [
        block.size for block in pruner.engine.now.blocks
    ]
    assert "full size" not in caplog.text
    assert trainer.evaluate(tiny_blocks(4))["eval_loss"] > 0  # the compiled model takes the new sizes


def test_zeros_that_were_asked_for_stay_with_a_warning(tmp_path, caplog) -> None:
    trainer, pruner = finished(tmp_path, shrink=False)
    assert "has its full size" in caplog.text and "the saved levels are sliced" in caplog.text
    assert discover(trainer.model).identity == pruner.engine.layout.identity
    assert trainer.model.config.model_type == "llama"
