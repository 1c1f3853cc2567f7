"""``attention_unit="query"``: the same number of query heads goes from each key/value group; keys and values stay."""

import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from gisp_hf import GISPConfig, GISPPruner, Trajectory, load_level
from gisp_hf.models import discover, family_of
from gisp_hf.models.families import MLP
from gisp_hf.models.layout import Block, Layout
from gisp_hf.pruning.selection import removed_mask, select
from tests.runs import make_trainer, tiny_config
from tests.tiny import tiny_blocks, tiny_model

IDS = torch.stack([block["input_ids"] for block in tiny_blocks(2)])
# family, changes: 8 query heads in 2 groups, in 1, with biases, with norms of queries
CASES = {
    "llama": {"num_key_value_heads": 2},
    "llama_bias": {"num_key_value_heads": 1},
    "qwen3": {"num_key_value_heads": 2},
}


def model_of(case: str):
    return tiny_model(case, **CASES[case])


def run(case: str, folder, **options):
    model = model_of(case)
    model.save_pretrained(folder / "base")
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    config = tiny_config(num_steps=3, sparsity_levels=(0.2, 0.4), attention_unit="query")
    pruner = GISPPruner(config, folder / "levels", **options)
    make_trainer(model, folder, pruner=pruner).train()
    return model, pruner


@pytest.fixture(scope="module", params=CASES)
def runs(request, tmp_path_factory):
    """(case, folder, model, pruner) of a run that slices."""
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, folder, *run(request.param, folder)


# ---- the sets --------------------------------------------------------------------------------------------------------


def by_loops(scores: list[list[float]]) -> list[tuple[int, int]]:
    """(part, structure) in the order of removal: one from each part at a time, the lowest of each."""
    left = [dict(enumerate(part)) for part in scores]
    order = []
    while all(left):
        for number, part in enumerate(left):
            lowest = min(part, key=lambda index: part[index])
            order.append((number, lowest))
            del part[lowest]
    return order


def test_sets_are_the_lowest_of_each_part_by_definition() -> None:
    torch.manual_seed(0)
    for parts, per in ((1, 5), (2, 4), (3, 3)):
        block = Block(0, "query", parts * per, 7, parts=parts)
        layout = Layout("x", (block,), 7 * block.size, 1)
        scores = torch.rand(parts, per)
        chosen = select(
            layout, [scores.flatten()], [torch.full((block.size,), -1)], minimum=[parts], budget=7 * (per - 1) * parts
        )
        expected = by_loops(scores.tolist())[: (per - 1) * parts]
        sets = [{index for _, index in chosen[i : i + parts]} for i in range(0, len(chosen), parts)]
        wanted = [
            {part * per + index for part, index in expected[i : i + parts]} for i in range(0, len(expected), parts)
        ]
        assert sets == wanted


def test_sets_of_equal_scores_and_after_an_incomplete_set_are_whole() -> None:
    block = Block(0, "query", 8, 1, parts=2)
    layout = Layout("x", (block,), 8, 1)
    order = torch.full((8,), -1, dtype=torch.int32)
    order[6] = 0  # of the second part alone
    scores = torch.zeros(8)
    scores[:4] = torch.tensor([0.1, 0.2, 0.3, 0.4])
    for position, (_, index) in enumerate(select(layout, [scores], [order], minimum=[2], budget=4), start=1):
        order[index] = position
    for length in range(int(order.max()) + 2):
        gone = removed_mask(block, order, length=length, multiples={})
        assert gone[:4].sum() == gone[4:].sum() == length // 2
    equal = select(layout, [torch.zeros(8)], [torch.full((8,), -1)], minimum=[2], budget=6)
    assert [index for _, index in equal] == [0, 4, 1, 5, 2, 6]


# ---- a run -----------------------------------------------------------------------------------------------------------


def test_each_group_keeps_as_many_query_heads_and_all_keys_and_values(runs) -> None:
    case, _, model, pruner = runs
    base = dict(model_of(case).named_parameters())
    groups = CASES[case]["num_key_value_heads"]
    assert any(len(keep) < 8 for keep in pruner.trajectory.kept(0.4)[::2])
    for layout_block, keep in zip(pruner.trajectory.layout.blocks, pruner.trajectory.kept(0.4)):
        if layout_block.kind == "query":
            counts = (keep // (8 // groups)).bincount(minlength=groups)
            assert len(set(counts.tolist())) == 1 and counts[0] >= 1
            attention = model.model.layers[layout_block.layer].self_attn
            assert attention.num_key_value_groups == len(keep) // groups
            assert model.config.per_layer_config[layout_block.layer].num_attention_heads == len(keep)
            assert model.config.per_layer_config[layout_block.layer].num_key_value_heads == groups
    for name, parameter in model.named_parameters():
        if "k_proj" in name or "v_proj" in name:
            assert torch.equal(parameter, base[name]), name


def test_saved_applied_and_cut_are_the_model_in_memory(runs) -> None:
    _, folder, model, pruner = runs
    expected = model(IDS).logits
    assert torch.equal(AutoModelForCausalLM.from_pretrained(pruner.level_folders[0.4])(IDS).logits, expected)
    trajectory = Trajectory.load(folder / "levels")
    assert trajectory.layout == pruner.trajectory.layout and trajectory.config.attention_unit == "query"
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    assert torch.equal(trajectory.apply(base, sparsity=0.4)(IDS).logits, expected)
    assert torch.equal(load_level(folder / "levels", sparsity=0.4)(IDS).logits, expected)


def test_a_level_in_between_is_cut_with_whole_sets(runs) -> None:
    case, folder, _, pruner = runs
    before = [set() for _ in pruner.trajectory.layout.blocks]
    for sparsity in (0.07, 0.13, 0.27, 0.33):
        cut = load_level(folder / "levels", sparsity=sparsity)
        total = discover(model_of(case)).total
        assert 1 - sum(p.numel() for p in cut.model.layers.parameters()) / total >= sparsity
        kept = pruner.trajectory.kept(sparsity)
        gone = [set(range(b.size)) - set(k.tolist()) for b, k in zip(pruner.trajectory.layout.blocks, kept)]
        assert all(old <= new for old, new in zip(before, gone))  # nested
        before = gone


def test_zeros_give_the_same_order_and_the_same_logits(runs, tmp_path) -> None:
    case, _, model, pruner = runs
    masked, other = run(case, tmp_path, shrink=False)
    assert all(torch.equal(a, b) for a, b in zip(pruner.trajectory.order, other.trajectory.order))
    torch.testing.assert_close(masked(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-4)


def test_a_level_can_be_pruned_again_by_groups(tmp_path) -> None:
    _, pruner = run("llama", tmp_path)
    level = AutoModelForCausalLM.from_pretrained(pruner.level_folders[0.4])
    config = tiny_config(num_steps=1, sparsity_levels=(0.2,))
    second = GISPPruner(config, tmp_path / "second")
    make_trainer(level, tmp_path / "again", pruner=second).train()
    saved = AutoModelForCausalLM.from_pretrained(second.level_folders[0.2])
    assert torch.equal(saved(IDS).logits, level(IDS).logits)
    assert torch.equal(load_level(tmp_path / "second", sparsity=0.2)(IDS).logits, level(IDS).logits)


# ---- messages --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_a_model_with_few_groups_is_told_so_in_numbers(groups, tmp_path, capsys) -> None:
    model = tiny_model(num_key_value_heads=groups)
    layout = discover(model)
    config = tiny_config(num_steps=1, sparsity_levels=(0.1,))
    make_trainer(model, tmp_path, pruner=GISPPruner(config, tmp_path / "levels")).train()
    out = capsys.readouterr().out
    if groups == 4:
        assert "attention_unit" not in out
        return
    blocks = [block for block in layout.blocks if block.kind == "attention"]
    can_go = sum((groups - 1) * block.cost for block in blocks if 0 < block.layer < 5)  # first and last are protected
    share = can_go / sum(block.size * block.cost for block in blocks)
    assert f"have {groups} key/value group{'s' if groups > 1 else ''}, and each keeps one: {share:.0%} of" in out
    assert f"{can_go / layout.total:.1%} of the decoder layers'" in out and "attention_unit='query'" in out


def test_requests_that_make_no_sense_are_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="attention_unit must be one of group, query, got 'head'"):
        GISPConfig(attention_unit="head")
    mha = tiny_model("llama_mha")  # one query head in each group: none can go
    pruner = GISPPruner(tiny_config(prune="heads", attention_unit="query"), tmp_path / "levels")
    with pytest.raises(ValueError, match="cannot be reached"):
        make_trainer(mha, tmp_path, pruner=pruner)
    odd = replace(family_of(mha), blocks=(MLP,))
    with pytest.raises(ValueError, match="no separate query projection.*use attention_unit='group'"):
        odd.rows("query")


@pytest.mark.parametrize("parts", [0, 3, 9, "2"])
def test_odd_parts_in_a_file_are_refused(runs, tmp_path, parts) -> None:
    runs[3].trajectory.save(tmp_path)
    facts = json.loads((tmp_path / "trajectory.json").read_text())
    facts["blocks"][0]["parts"] = parts
    (tmp_path / "trajectory.json").write_text(json.dumps(facts))
    with pytest.raises(ValueError, match=r"blocks\[0\].parts"):
        Trajectory.load(tmp_path)
