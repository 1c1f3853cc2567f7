import pytest
import torch

from gisp_hf.config import GISPConfig
from gisp_hf.criteria.base import share_out
from gisp_hf.criteria.taylor import score_entries
from gisp_hf.models import discover
from gisp_hf.models.layout import Member
from gisp_hf.pruning.engine import Engine
from gisp_hf.pruning.normalization import normalizer
from tests.tiny import FAMILIES, tiny_blocks, tiny_model

CONFIG = GISPConfig(protect_first=0, protect_last=0)


def calibration_loss(model, blocks):
    ids = torch.stack([block["input_ids"] for block in blocks])
    return model(input_ids=ids, labels=ids).loss


def scores_by_loops(model, layer: int) -> tuple[list[float], list[float]]:
    """The definition, weight by weight: a group owns its query heads' rows of q, columns of o, and its k and v."""
    config, block = model.config, model.model.layers[layer]
    head_dim = block.self_attn.head_dim
    queries = config.num_attention_heads // config.num_key_value_heads
    attention = block.self_attn

    def importance(parameter, index) -> float:
        return abs(parameter[index].item() * parameter.grad[index].item())

    groups = []
    for group in range(config.num_key_value_heads):
        score = 0.0
        query_rows = [(group * queries + q) * head_dim + i for q in range(queries) for i in range(head_dim)]
        key_rows = [group * head_dim + i for i in range(head_dim)]
        for projection, rows in (
            (attention.q_proj, query_rows),
            (attention.k_proj, key_rows),
            (attention.v_proj, key_rows),
        ):
            for row in rows:
                score += sum(importance(projection.weight, (row, column)) for column in range(config.hidden_size))
                if projection.bias is not None:
                    score += importance(projection.bias, row)
        for column in query_rows:
            score += sum(importance(attention.o_proj.weight, (row, column)) for row in range(config.hidden_size))
        groups.append(score)
    channels = []
    for channel in range(config.intermediate_size):
        score = 0.0
        for projection in (block.mlp.gate_proj, block.mlp.up_proj):
            score += sum(importance(projection.weight, (channel, column)) for column in range(config.hidden_size))
            if projection.bias is not None:
                score += importance(projection.bias, channel)
        score += sum(importance(block.mlp.down_proj.weight, (row, channel)) for row in range(config.hidden_size))
        channels.append(score)
    return groups, channels


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_equal_their_definition(family) -> None:
    model = tiny_model(family, num_hidden_layers=1)
    calibration_loss(model, tiny_blocks(4)).backward()
    groups, channels = scores_by_loops(model, layer=0)
    engine = Engine(model, discover(model), GISPConfig(protect_first=0, protect_last=0, sparsity_levels=(0.2,)))
    attention, mlp = engine.layout.blocks
    costs = (attention.cost, mlp.cost)
    with engine.watch():
        engine.accumulate()
    torch.testing.assert_close(engine.scores[0], torch.tensor(groups) / costs[0], rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(engine.scores[1], torch.tensor(channels) / costs[1], rtol=1e-4, atol=1e-9)


def test_gradient_is_summed_before_the_absolute_value() -> None:
    # Two batches that pull in opposite directions cancel out: |w * (g1 + g2)|, not |w * g1| + |w * g2|.
    weight = torch.nn.Parameter(torch.tensor([[2.0, -1.0]]))
    (weight * torch.tensor([[3.0, 1.0]])).sum().backward()
    (weight * torch.tensor([[-3.0, 1.0]])).sum().backward()
    assert score_entries(weight, weight.grad, dim=0).tolist() == [2.0]


def test_scores_of_bfloat16_are_taken_in_float32_and_leave_the_weights_alone() -> None:
    torch.manual_seed(0)
    weight, gradient = torch.randn(6, 50).bfloat16(), torch.randn(6, 50).bfloat16()
    before = weight.clone()
    expected = (weight.double() * gradient.double()).abs().view(3, 2, 50).sum(dim=(1, 2))
    scores = share_out(score_entries(weight, gradient, dim=0), Member("weight", 0, 2), 3)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.double(), expected, rtol=1e-6, atol=0)
    full = weight.float()
    score_entries(full, gradient.float(), dim=1)
    assert torch.equal(full, before.float()) and torch.equal(weight, before)


def test_bad_shapes_are_named() -> None:
    with pytest.raises(ValueError, match=r"weight \(4, 2\) and gradient \(2, 4\)"):
        score_entries(torch.ones(4, 2), torch.ones(2, 4), dim=0)


def test_normalizers_are_those_of_paper_and_published_code() -> None:
    attention, mlp = discover(tiny_model("llama_mha")).blocks[:2]
    hidden, head_dim, channels = 32, 4, 24
    assert normalizer(attention, "params") == 4 * head_dim * hidden  # Eq. 9
    assert normalizer(mlp, "params") == 3 * hidden
    assert normalizer(attention, "reference") == 4 * head_dim * hidden
    assert normalizer(mlp, "reference") == 3 * channels
    assert normalizer(mlp, "none") == 1
    group = discover(tiny_model("llama")).blocks[0]  # two query heads, one key and one value head
    assert normalizer(group, "params") == (2 + 1 + 1 + 2) * head_dim * hidden
    assert normalizer(group, "reference") == 2 * 4 * head_dim * hidden
    with pytest.raises(ValueError, match="normalization must be"):
        normalizer(group, "sum")
