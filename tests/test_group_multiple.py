"""``group_multiple``: the key/value groups that a layer keeps are a multiple, for tensor parallelism."""

import copy
import random
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainerCallback

from gisp_hf import GISPConfig, GISPPruner, Trajectory, load_level
from gisp_hf.cli.main import main
from gisp_hf.levels.materialize import materialize
from gisp_hf.models import discover
from gisp_hf.pruning.selection import allowed_sizes, check_reachable, kept_counts, removed_masks, select
from gisp_hf.pruning.uniform import select_rounds
from tests.runs import make_trainer, prune, tiny_config
from tests.test_selection import fresh_order, toy_layout
from tests.tiny import tiny_blocks, tiny_model

LEVELS = (0.2, 0.4)


def rounded_config(**changes) -> GISPConfig:
    return tiny_config(**{"sparsity_levels": LEVELS, "num_steps": 4, "group_multiple": 2, **changes})


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.stack([block["input_ids"] for block in tiny_blocks(4)])).logits


def groups_of(model) -> list[int]:
    return [layer.self_attn.k_proj.out_features // layer.self_attn.head_dim for layer in model.model.layers]


def assert_same(model, expected) -> None:
    assert type(model) is type(expected)
    found, wanted = model.state_dict(), expected.state_dict()
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(base model, its folder, pruner) of a run with 8 groups in each layer, kept in pairs."""
    folder = tmp_path_factory.mktemp("run")
    tiny_model("llama_mha").save_pretrained(folder / "base")
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    base = copy.deepcopy(model)
    config = rounded_config(channel_multiple=4)
    return base, folder / "base", prune(model, folder, pruner=GISPPruner(config, folder / "levels"))


# ---- selection -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("multiple", [1, 2, 3, 6])
def test_counts_by_loops(multiple) -> None:
    layout = toy_layout(sizes=((6, 5), (6, 5)))
    for gone in range(7):
        found = kept_counts(layout, [gone, 2, 0, 0], {"attention": multiple, "mlp": 1})
        kept = 6 - gone
        while kept % multiple:  # give back one by one
            kept += 1
        assert found == [kept, 3, 6, 5]


def test_the_groups_removed_last_come_back_and_the_budget_counts_what_really_goes() -> None:
    layout = toy_layout(sizes=((6, 4), (6, 4)))
    order = fresh_order(layout)
    for position, (number, index) in enumerate([(0, 4), (2, 1), (0, 0), (0, 5), (2, 3), (2, 0)]):
        order[number][index] = position
    gone = [
        [
            mask.nonzero().flatten().tolist()
            for mask in removed_masks(layout, order, length=n, multiples={"attention": 2})
        ]
        for n in range(7)
    ]
    assert [masks[0] for masks in gone] == [[], [], [], [0, 4], [0, 4], [0, 4], [0, 4]]
    assert [masks[2] for masks in gone] == [[], [], [], [], [], [1, 3], [1, 3]]
    scores = [torch.arange(6.0), None, torch.arange(6.0) + 10, None]
    chosen = select(layout, scores, fresh_order(layout), minimum=[1, 4, 1, 4], budget=25, multiples={"attention": 2})
    assert chosen == [(0, 0), (0, 1), (0, 2), (0, 3)]  # pairs of cost 20: one is too few, the third group is nothing


def test_plain_sizes_are_multiples() -> None:
    """12 groups; the family takes the divisors of 36 only, of which 9 is no multiple of 4."""
    layout = replace(toy_layout(sizes=((12, 2), (12, 2))), plain_sizes={"attention": (1, 2, 3, 4, 6, 9, 12)})
    multiples = {"attention": 4, "mlp": 1}
    assert allowed_sizes(layout, "attention", multiples) == [4, 12] and allowed_sizes(layout, "mlp", multiples) == []
    for gone in range(12):
        counts = kept_counts(layout, [gone, 0, gone, 0], multiples, uniform=True)
        assert counts == [12 if gone < 8 else 4, 2] * 2
    scores = [torch.arange(12.0), None, torch.arange(12.0), None]
    chosen = select_rounds(
        layout, scores, fresh_order(layout), minimum=[1, 2, 1, 2], budget=1, limit=10**6, multiples=multiples
    )
    assert len(chosen) == 16  # rounds of two until four groups are left


# ---- a run -----------------------------------------------------------------------------------------------------------


def test_levels_have_multiples_and_compute_what_the_masked_base_does(run) -> None:
    base, _, pruner = run
    before, seen = None, set()
    for level in LEVELS:
        loaded = AutoModelForCausalLM.from_pretrained(pruner.level_folders[level])
        groups = groups_of(loaded)
        assert all(count % 2 == 0 for count in groups)
        assert all(layer.mlp.up_proj.out_features % 4 == 0 for layer in loaded.model.layers)
        seen |= set(groups)
        kept = pruner.trajectory.kept(level)
        assert [len(keep) for keep in kept[::2]] == groups
        assert before is None or all(set(a.tolist()) <= set(b.tolist()) for a, b in zip(kept, before))
        before = kept
        assert 1 - discover(loaded).total / discover(base).total >= level - 1e-9
        masked = copy.deepcopy(base)
        with torch.no_grad():
            for block, keep in zip(pruner.trajectory.layout.blocks, kept):
                for member in block.members:
                    for index in set(range(block.size)) - set(keep.tolist()):
                        start = index * member.width
                        masked.get_parameter(member.parameter).narrow(member.dim, start, member.width).zero_()
        assert torch.allclose(logits(loaded), logits(masked), atol=1e-4)
    assert seen - {8}, "no layer has lost groups, so that nothing was tested"


def test_load_level_equals_apply_and_the_saved_level(run, tmp_path) -> None:
    _, base_folder, pruner = run
    levels = pruner.level_folders[LEVELS[0]].parent
    trajectory = Trajectory.load(levels)
    assert trajectory.config == pruner.config and trajectory.config.group_multiple == 2
    for level in LEVELS:
        found = load_level(levels, sparsity=level)
        assert_same(found, AutoModelForCausalLM.from_pretrained(pruner.level_folders[level]))
        assert_same(found, trajectory.apply(AutoModelForCausalLM.from_pretrained(base_folder), sparsity=level))
    for multiple in (1, 4):  # another one than the run's
        dense = AutoModelForCausalLM.from_pretrained(base_folder)
        expected = trajectory.apply(dense, sparsity=0.25, group_multiple=multiple)
        assert all(count % multiple == 0 for count in groups_of(expected))
        assert_same(load_level(levels, sparsity=0.25, group_multiple=multiple), expected)
        written = materialize(levels, tmp_path / f"cut-{multiple}", sparsity=0.25, group_multiple=multiple)
        assert_same(AutoModelForCausalLM.from_pretrained(written), expected)
        config = Trajectory.load(written).config
        assert (config.group_multiple, config.channel_multiple) == (multiple, 4)
    assert_same(load_level(written, sparsity=0.25), expected)
    output = tmp_path / "command"
    assert (
        main(["materialize", str(levels), "--sparsity", "0.25", "--group-multiple", "4", "--output", str(output)]) == 0
    )
    assert (output / "model.safetensors").read_bytes() == (written / "model.safetensors").read_bytes()


@pytest.mark.parametrize("multiple", [1, 2, 4, 8])
def test_random_sparsities_are_nested(run, multiple) -> None:
    trajectory = run[2].trajectory
    rng = random.Random(0)
    highest = trajectory.highest_sparsity(group_multiple=multiple)
    before = None
    for sparsity in sorted(rng.uniform(0.001, highest) for _ in range(20)):
        length = trajectory.prefix(sparsity, group_multiple=multiple)
        assert trajectory.sparsity_at(length, group_multiple=multiple) >= sparsity - 1e-9
        assert length == 1 or trajectory.sparsity_at(length - 1, group_multiple=multiple) < sparsity
        kept = [set(keep.tolist()) for keep in trajectory.kept(sparsity, group_multiple=multiple)]
        assert all(len(keep) % multiple == 0 for keep in kept[::2])
        assert before is None or all(a <= b for a, b in zip(kept, before))
        before = kept


def test_zeros_remove_what_slicing_removes(run, tmp_path) -> None:
    base, _, pruner = run
    zeros = prune(copy.deepcopy(base), tmp_path, pruner=GISPPruner(pruner.config, tmp_path / "levels", shrink=False))
    assert zeros.trajectory.digest() == pruner.trajectory.digest()
    for level in LEVELS:
        found, expected = (load_file(p.level_folders[level] / "model.safetensors") for p in (zeros, pruner))
        assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("multiple", [2, 4])
def test_uniform_layers(multiple, tmp_path) -> None:
    base = tiny_model("llama_mha")
    config = rounded_config(layout="uniform", protect_first=0, group_multiple=multiple, sparsity_levels=(0.3, 0.6))
    pruner = prune(copy.deepcopy(base), tmp_path, config=config)
    for level in config.sparsity_levels:
        loaded = AutoModelForCausalLM.from_pretrained(pruner.level_folders[level])
        assert type(loaded) is type(base) and loaded.config.num_key_value_heads % multiple == 0
        assert [len(keep) for keep in pruner.trajectory.kept(level)[::2]] == groups_of(loaded)
        assert 1 - discover(loaded).total / discover(base).total >= level - 1e-9
    assert loaded.config.num_key_value_heads < 8


@pytest.mark.slow
def test_a_stopped_run_goes_on_as_if_nothing_had_happened(tmp_path) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                raise InterruptedError

    saving = {"save_strategy": "steps", "save_steps": 1}
    whole = prune(tiny_model("llama_mha"), tmp_path / "whole", config=rounded_config())
    trainer = make_trainer(tiny_model("llama_mha"), tmp_path / "stopped", config=rounded_config(), **saving)
    trainer.add_callback(Stop())
    with pytest.raises(InterruptedError):
        trainer.train()
    other = make_trainer(
        tiny_model("llama_mha"), tmp_path / "stopped", config=rounded_config(group_multiple=1), **saving
    )
    with pytest.raises(ValueError, match="group_multiple"):
        other.train(resume_from_checkpoint=True)
    again = make_trainer(tiny_model("llama_mha"), tmp_path / "stopped", config=rounded_config(), **saving)
    again.train(resume_from_checkpoint=True)
    for level in LEVELS:
        name = f"levels/sparsity-{level:.2f}"
        for file in ("model.safetensors", "config.json", "trajectory.safetensors"):
            assert (tmp_path / "stopped" / name / file).read_bytes() == (tmp_path / "whole" / name / file).read_bytes()
    assert whole.trajectory.digest() == Trajectory.load(tmp_path / "stopped" / "levels").digest()


# ---- refusals --------------------------------------------------------------------------------------------------------


def test_refusals(run) -> None:
    trajectory = run[2].trajectory
    with pytest.raises(ValueError, match="group_multiple must be a whole number of at least 1, got 0"):
        GISPConfig(group_multiple=0)
    message = "group_multiple=3 does not divide the 8 key/value groups of a layer, .*use a divisor of 8"
    with pytest.raises(ValueError, match=message):
        check_reachable(trajectory.layout, rounded_config(group_multiple=3))
    with pytest.raises(ValueError, match=message):
        trajectory.prefix(0.2, group_multiple=3)
    folder = run[2].level_folders[LEVELS[0]].parent
    with pytest.raises(ValueError, match="group_multiple must be at least 1, got 0"):
        load_level(folder, sparsity=0.2, group_multiple=0)
    with pytest.raises(ValueError, match="with channel_multiple=4, group_multiple=2; ask for less"):
        load_level(folder, sparsity=0.9)
    queries = discover(tiny_model(), ["query", "mlp"])
    with pytest.raises(
        ValueError, match="group_multiple=2 rounds the number of groups, but only query_heads, channels"
    ):
        check_reachable(queries, rounded_config(attention_unit="query"))
    with pytest.raises(ValueError, match=r"cannot be reached: .*group_multiple=8"):
        check_reachable(trajectory.layout, rounded_config(group_multiple=8, prune="heads"))


def test_a_config_from_before_has_multiple_one() -> None:
    facts = GISPConfig().to_dict()
    del facts["group_multiple"]
    assert GISPConfig.from_dict(facts) == GISPConfig() and GISPConfig().group_multiple == 1
