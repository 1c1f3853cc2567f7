import pytest
import torch

from gisp_hf.config import GISPConfig
from gisp_hf.models import discover
from gisp_hf.models.layout import Block, Layout
from gisp_hf.pruning.selection import (
    check_reachable,
    fractions_of_block,
    highest_sparsity,
    kept_structures,
    minimum_kept,
    parameter_budget,
    removed_mask,
    removed_parameters,
    select,
)
from tests.tiny import FAMILIES, tiny_model


def toy_layout(sizes=((2, 4), (2, 4)), costs=(10, 3)) -> Layout:
    blocks = tuple(
        Block(layer=layer, kind=kind, size=size, cost=cost, members=())
        for layer, pair in enumerate(sizes)
        for kind, size, cost in zip(("attention", "mlp"), pair, costs)
    )
    return Layout("toy", blocks, total=sum(block.size * block.cost for block in blocks) + 8, num_layers=len(sizes))


def fresh_order(layout: Layout) -> list[torch.Tensor]:
    return [torch.full((block.size,), -1, dtype=torch.int32) for block in layout.blocks]


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_counted_exactly(family) -> None:
    model = tiny_model(family)
    layout = discover(model)
    assert layout.num_layers == 6 and len(layout.blocks) == 12
    assert layout.total == sum(parameter.numel() for parameter in model.model.layers.parameters())
    for block in layout.blocks:
        held = sum(model.get_parameter(member.parameter).numel() for member in block.members)
        assert held == block.size * block.cost
        for member in block.members:
            assert model.get_parameter(member.parameter).shape[member.dim] == block.size * member.width
    # What belongs to no structure: norms, and the biases behind o_proj and down_proj.
    free = layout.total - sum(block.size * block.cost for block in layout.blocks)
    names = {member.parameter for block in layout.blocks for member in block.members}
    rest = [p for n, p in model.named_parameters() if n.startswith("model.layers.") and n not in names]
    assert free == sum(parameter.numel() for parameter in rest)


def test_lowest_goes_first_over_layers_and_kinds() -> None:
    layout = toy_layout()
    scores = [torch.tensor(v) for v in ([5.0, 1.0], [0.5, 9.0, 2.0, 8.0], [7.0, 6.0], [3.0, 4.0, 0.1, 9.0])]
    chosen = select(layout, scores, fresh_order(layout), minimum=[1, 1, 1, 1], budget=20)
    assert chosen == [(3, 2), (1, 0), (0, 1), (1, 2), (3, 0)]  # 3 + 3 + 10 + 3 + 3 = 22 >= 20, and 19 < 20


def test_ties_go_by_layer_kind_and_index() -> None:
    layout = toy_layout()
    scores = [torch.ones(block.size) for block in layout.blocks]
    chosen = select(layout, scores, fresh_order(layout), minimum=[0, 0, 0, 0], budget=10**6)
    assert chosen == [(number, index) for number, block in enumerate(layout.blocks) for index in range(block.size)]


def test_minima_and_earlier_removals_are_respected() -> None:
    layout = toy_layout()
    order = fresh_order(layout)
    order[1][3] = 0
    scores = [torch.ones(block.size) for block in layout.blocks]
    chosen = select(layout, scores, order, minimum=[2, 2, 1, 4], budget=10**6)
    assert chosen == [(1, 0), (2, 0)]  # block 1 keeps two, block 2 one, the others all
    assert select(layout, scores, order, minimum=[0, 0, 0, 0], budget=3) == []  # 3 parameters are gone already


def test_channels_are_rounded_up_by_giving_back_the_last() -> None:
    block = Block(layer=0, kind="mlp", size=10, cost=3, members=())
    assert [kept_structures(block, gone, {"mlp": 4}) for gone in range(10)] == [10, 10, 8, 8, 8, 8, 4, 4, 4, 4]
    order = torch.tensor([4, -1, 0, 2, -1, 1, -1, 3, -1, -1], dtype=torch.int32)
    assert removed_mask(block, order, length=5, multiples={"mlp": 1}).nonzero().flatten().tolist() == [0, 2, 3, 5, 7]
    assert removed_mask(block, order, length=5, multiples={"mlp": 4}).nonzero().flatten().tolist() == [2, 5]
    assert removed_mask(block, order, length=1, multiples={"mlp": 4}).sum() == 0
    layout = Layout("toy", (block,), total=30, num_layers=1)
    assert removed_parameters(layout, [order], length=5, multiples={"mlp": 4}) == 6
    # select counts what really goes: two channels of a run of four make no difference yet
    chosen = select(layout, [torch.arange(10.0)], fresh_order(layout), minimum=[1], budget=7, multiples={"mlp": 4})
    assert len(chosen) == 6 and kept_structures(block, 6, {"mlp": 4}) == 4


def test_budget_rounds_up_and_forgives_float_noise() -> None:
    layout = toy_layout()  # 72 parameters
    assert layout.total == 72
    assert parameter_budget(layout, 0.5) == 36
    assert parameter_budget(layout, 0.51) == 37
    assert parameter_budget(layout, 3 * 0.1 / 0.6 * 0.5 + 1e-12) == 18


def test_minima_follow_the_config() -> None:
    layout = discover(tiny_model("llama"))
    sizes = [block.size for block in layout.blocks]
    assert minimum_kept(
        layout, GISPConfig(protect_first=1, protect_last=1, minimum_kept={"attention": 2, "mlp": 5})
    ) == (sizes[:2] + [2, 5] * 4 + sizes[-2:])
    assert minimum_kept(layout, GISPConfig(protect_first=0, protect_last=0, prune="heads")) == [1, 24] * 6
    assert minimum_kept(layout, GISPConfig(protect_first=0, protect_last=0, prune="channels")) == [4, 1] * 6


def test_impossible_targets_name_the_highest_that_can_be_reached() -> None:
    layout = discover(tiny_model("llama"))
    config = GISPConfig(protect_first=2, protect_last=2)
    highest = highest_sparsity(layout, minimum_kept(layout, config), {})
    with pytest.raises(ValueError, match=f"sparsity 0.5 cannot be reached.*highest is {int(highest * 1e4) / 1e4:.4f}"):
        check_reachable(layout, config)
    check_reachable(layout, GISPConfig(protect_first=2, protect_last=2, sparsity_levels=(int(highest * 1e4) / 1e4,)))


def test_highest_sparsity_can_really_be_reached() -> None:
    layout = discover(tiny_model("qwen2"))
    config = GISPConfig(protect_first=1, channel_multiple=8)
    minimum = minimum_kept(layout, config)
    highest = highest_sparsity(layout, minimum, {"mlp": 8})
    scores = [torch.rand(block.size) for block in layout.blocks]
    order = fresh_order(layout)
    budget = parameter_budget(layout, highest)
    chosen = select(layout, scores, order, minimum=minimum, budget=budget, multiples={"mlp": 8})
    for position, (number, index) in enumerate(chosen):
        order[number][index] = position
    assert removed_parameters(layout, order, length=len(chosen), multiples={"mlp": 8}) == budget


def test_more_levels_than_structures() -> None:
    layout = toy_layout(sizes=((2, 2),), costs=(30, 3))
    levels = tuple(0.1 * i for i in range(1, 5))
    with pytest.raises(ValueError, match="4 sparsity levels need as many structures, but only 2 can go"):
        check_reachable(layout, GISPConfig(sparsity_levels=levels, protect_first=0, protect_last=0))


def test_unknown_architectures_list_what_is_supported() -> None:
    from transformers import BertConfig, BertForMaskedLM, LlamaForSequenceClassification

    config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=9)
    with pytest.raises(
        ValueError, match=r"BertForMaskedLM \(model type 'bert'\) cannot be pruned.*LlamaForCausalLM.*row"
    ):
        discover(BertForMaskedLM(config))
    with pytest.raises(ValueError, match="LlamaForSequenceClassification"):
        discover(LlamaForSequenceClassification(tiny_model("llama").config))


# ---- the same share of every layer -----------------------------------------------------------------------------------


def by_shares(layout: Layout, share: float, *, offsets: dict[int, float] | None = None) -> list[int]:
    """Structures that each block loses when the shares rise until ``share``, of random scores."""
    torch.manual_seed(0)
    scores = [torch.rand(block.size) for block in layout.blocks]
    fractions = fractions_of_block(layout, scores, fresh_order(layout), offsets=offsets)
    for score, fraction in zip(scores, fractions):
        assert torch.equal(score.argsort(), fraction.argsort())
    return [int((fraction < share).sum()) for fraction in fractions]


@pytest.mark.parametrize("share", [0.1, 0.2, 0.31, 0.45, 0.55, 0.8, 0.9])
def test_each_block_loses_the_number_nearest_to_the_share(share) -> None:
    layout = toy_layout(sizes=((3, 100), (4, 7), (32, 11)))
    lost = by_shares(layout, share)
    for block, count in zip(layout.blocks, lost):
        nearest = min(range(block.size + 1), key=lambda n: abs(n - share * block.size))
        assert count == nearest


def test_offsets_move_the_share_of_a_layer() -> None:
    layout = toy_layout(sizes=((3, 100), (3, 100), (3, 100)))
    assert by_shares(layout, 0.204, offsets={0: 0.1, 1: -0.1}) == [1, 30, 0, 10, 1, 20]
    assert by_shares(layout, 0.054, offsets={0: 0.1, 1: -0.1}) == [0, 15, 0, 0, 0, 5]  # a share below zero takes none


def test_shares_go_on_where_an_earlier_step_stopped() -> None:
    layout = toy_layout(sizes=((4, 20), (4, 20)))
    scores = [torch.rand(block.size) for block in layout.blocks]
    whole, parts = fresh_order(layout), fresh_order(layout)
    for order, budgets in ((whole, [70]), (parts, [20, 50, 70])):
        length = 0
        for budget in budgets:
            fractions = fractions_of_block(layout, scores, order)
            for number, index in select(layout, fractions, order, minimum=[1] * 4, budget=budget):
                order[number][index] = length
                length += 1
    assert all(torch.equal(a, b) for a, b in zip(whole, parts))
