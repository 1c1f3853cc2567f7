"""Files of format 1, written by version 0.1.0, are read by every later version.

The files in tests/golden are never made anew: they are a base model, a run's output folder with two levels (without
tokenizers), the table of a pushed repository, and a checkpoint of the Trainer. They came from a tiny Llama with biases,
4 steps to 15 and 30 %, ``channel_multiple=2``, ``min_channels=2``.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from gisp_hf import GISPConfig, GISPPruner, Trajectory, load_level
from gisp_hf.levels.info import _parse_levels, read_levels
from gisp_hf.models import discover
from gisp_hf.training.resume import Progress, load_progress
from tests.runs import make_trainer, tiny_config
from tests.tiny import tiny_blocks

GOLDEN = Path(__file__).parent / "golden"
IDS = torch.stack([block["input_ids"] for block in tiny_blocks(2)])


def base_model():
    return AutoModelForCausalLM.from_pretrained(GOLDEN / "base", dtype=torch.float32)


def settings() -> GISPConfig:
    return tiny_config(
        num_steps=4, sparsity_levels=(0.15, 0.3), channel_multiple=2, minimum_kept={"attention": 1, "mlp": 2}
    )


def test_the_trajectory_is_read_as_it_was_written() -> None:
    trajectory = Trajectory.load(GOLDEN / "levels")
    facts = json.loads((GOLDEN / "levels" / "trajectory.json").read_text())
    stored = load_file(GOLDEN / "levels" / "trajectory.safetensors")
    assert all(torch.equal(order, stored[b.name]) for order, b in zip(trajectory.order, trajectory.layout.blocks))
    assert trajectory.config == settings()
    assert trajectory.base.fingerprint == facts["base"]["fingerprint"]
    for step, row in zip(trajectory.steps, facts["steps"], strict=True):
        assert (step.groups, step.channels, step.loss) == (row["groups"], row["channels"], row["loss"])
    assert trajectory.layout.identity == discover(base_model()).identity


def test_its_digest_is_that_of_its_checkpoint() -> None:
    digest = json.loads((GOLDEN / "checkpoint-2" / "gisp.json").read_text())["order"]
    assert Trajectory.load(GOLDEN / "checkpoint-2").digest() == digest


@pytest.mark.parametrize("level", [0.15, 0.3])
def test_levels_load_and_are_what_the_trajectory_cuts_out(level) -> None:
    folder = GOLDEN / "levels" / f"sparsity-{level:.2f}"
    saved = AutoModelForCausalLM.from_pretrained(folder)
    applied = Trajectory.load(GOLDEN / "levels").apply(base_model(), sparsity=level)
    cut = load_level(GOLDEN / "levels", sparsity=level, base_model=GOLDEN / "base", dtype=torch.float32)
    for model in (applied, cut):
        assert torch.equal(model(IDS).logits, saved(IDS).logits)


@pytest.mark.parametrize("level", [0.15, 0.3])
def test_levels_load_by_their_own_code(level) -> None:
    folder = GOLDEN / "levels" / f"sparsity-{level:.2f}"
    ours = AutoModelForCausalLM.from_pretrained(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert torch.equal(ours(IDS).logits, theirs(IDS).logits)


def test_the_levels_of_the_folder_and_of_a_repository_are_listed() -> None:
    local = read_levels(GOLDEN / "levels")
    pushed = _parse_levels(GOLDEN / "levels.json", "levels.json")
    assert [level.name for level in local] == ["sparsity-0.15", "sparsity-0.30"]
    for one, other in zip(local, pushed, strict=True):
        assert (one.name, one.sparsity, one.parameters, one.metrics) == (
            other.name,
            other.sparsity,
            other.parameters,
            other.metrics,
        )


def test_the_checkpoint_is_read() -> None:
    before = load_progress(GOLDEN / "checkpoint-2", Progress(2, 1, 16, 1, ""))
    assert len(before.steps) == 2 and before.config == settings()


def test_a_run_goes_on_from_the_checkpoint(tmp_path) -> None:
    shutil.copytree(GOLDEN / "checkpoint-2", tmp_path / "trainer" / "checkpoint-2")
    shutil.copytree(GOLDEN / "levels" / "sparsity-0.15", tmp_path / "levels" / "sparsity-0.15")
    pruner = GISPPruner(settings(), tmp_path / "levels", base_model="golden/base")
    trainer = make_trainer(base_model(), tmp_path, pruner=pruner, save_strategy="steps", save_steps=1)
    trainer.train(resume_from_checkpoint=True)
    expected = Trajectory.load(GOLDEN / "levels")
    assert all(torch.equal(a, b) for a, b in zip(pruner.trajectory.order, expected.order))
    for name in ("model.safetensors", "trajectory.safetensors"):
        written, before = (folder / "sparsity-0.30" / name for folder in (tmp_path / "levels", GOLDEN / "levels"))
        assert written.read_bytes() == before.read_bytes()


def test_the_run_today_gives_the_same_order_and_weights(tmp_path) -> None:
    pruner = GISPPruner(settings(), tmp_path / "levels", base_model="golden/base")
    make_trainer(base_model(), tmp_path, pruner=pruner).train()
    expected = Trajectory.load(GOLDEN / "levels")
    assert all(torch.equal(a, b) for a, b in zip(pruner.trajectory.order, expected.order))
    for level in ("sparsity-0.15", "sparsity-0.30"):
        path = f"{level}/model.safetensors"
        assert (tmp_path / "levels" / path).read_bytes() == (GOLDEN / "levels" / path).read_bytes()


def test_identity_is_sizes_and_costs_not_names_or_constants(tmp_path) -> None:
    """A later version may add facts to a block, or change a constant, without orphaning what is published."""
    shutil.copytree(GOLDEN / "levels", tmp_path / "run")
    facts = json.loads((tmp_path / "run" / "trajectory.json").read_text())
    for block in facts["blocks"]:
        block["reference_cost"] += 1
        block["members"].reverse()
    (tmp_path / "run" / "trajectory.json").write_text(json.dumps(facts))
    changed = Trajectory.load(tmp_path / "run")
    changed.check_base(base_model())
    saved = AutoModelForCausalLM.from_pretrained(GOLDEN / "levels" / "sparsity-0.30")
    assert torch.equal(changed.apply(base_model(), sparsity=0.3)(IDS).logits, saved(IDS).logits)
    cut = load_level(tmp_path / "run", sparsity=0.3, base_model=GOLDEN / "base", dtype=torch.float32)
    assert torch.equal(cut(IDS).logits, saved(IDS).logits)
