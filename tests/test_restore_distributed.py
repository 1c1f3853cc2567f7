"""Restoration on two processes equals one: real launches over gloo on the CPU."""

import json

import pytest
import torch
from safetensors.torch import load_file

from gisp_hf import GISPPruner, RestoreConfig, restore
from gisp_hf.recovery.record import Restoration
from tests.restoring import pair
from tests.runs import LEVELS, prune, tiny_config
from tests.test_distributed import launch
from tests.tiny import tiny_blocks, tiny_model


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"batch_size": 5}, {"batch_size": 5, "ridge": [1e-2, 0.1, 1.0]}])
def test_two_processes_equal_one(tmp_path, settings) -> None:
    base, level = pair("gemma2")
    record = restore(level, base, tiny_blocks(44), RestoreConfig(**settings), progress=False)
    result = launch("restore", tmp_path, processes=2, **settings)
    assert result.returncode == 0, result.stderr
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in (0, 1))
    for name, parameter in level.named_parameters():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], parameter.detach(), rtol=1e-3, atol=1e-4)
    facts = json.loads((tmp_path / "0.json").read_text())
    assert facts["tokens"] == record.tokens == 44 * 16
    assert [error["ridge"] for error in facts["errors"]] == [error.ridge for error in record.errors]
    for found, wanted in zip(facts["errors"], record.errors):
        assert found["after"] == pytest.approx(wanted.after, rel=1e-3, abs=1e-4)


@pytest.mark.slow
def test_a_run_on_two_processes_saves_the_levels_of_one(tmp_path) -> None:
    config = RestoreConfig(tokens=256, batch_size=4)
    pruner = GISPPruner(tiny_config(), tmp_path / "one" / "levels", shrink=False, restore=config)
    prune(tiny_model(), tmp_path / "one", pruner=pruner)
    result = launch("ddp", tmp_path, processes=2, restore={"tokens": 256, "batch_size": 4})
    assert result.returncode == 0, result.stderr
    for level in LEVELS:
        folder = tmp_path / "levels" / f"sparsity-{level:.2f}"
        found, wanted = (load_file(f / "model.safetensors") for f in (folder, pruner.level_folders[level]))
        for name in wanted:
            torch.testing.assert_close(found[name], wanted[name], rtol=1e-3, atol=1e-4)
        assert Restoration.load(folder).tokens == 256
