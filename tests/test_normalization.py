"""Normalisations and the moving average of scores, against their definitions."""

import statistics

import pytest
import torch

from gisp_hf import GISPConfig
from gisp_hf.models import discover
from gisp_hf.pruning.engine import Engine
from gisp_hf.pruning.normalization import normalizer, standardize
from tests.tiny import tiny_blocks, tiny_model


def scored(layout, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(block.size, generator=generator) for block in layout.blocks]


def test_root_is_the_square_root_of_the_parameters() -> None:
    layout = discover(tiny_model())
    for block in layout.blocks:
        assert normalizer(block, "root") ** 2 == pytest.approx(block.cost)
        assert normalizer(block, "standardized") == 1


def test_standardized_scores_have_mean_0_and_deviation_1_in_each_kind() -> None:
    layout = discover(tiny_model())
    scores: list[torch.Tensor | None] = list(scored(layout))
    scores[0] = scores[1] = None  # a protected layer
    order = [torch.full((block.size,), -1, dtype=torch.int32) for block in layout.blocks]
    order[2][1], order[3][5] = 0, 1  # gone before
    found = standardize(layout, scores, order)
    assert found[0] is None and found[1] is None
    for kind in ("attention", "mlp"):
        values = [
            (number, index, float(scores[number][index]))
            for number in layout.of_kind(kind)
            if scores[number] is not None
            for index in range(layout.blocks[number].size)
            if order[number][index] < 0
        ]
        mean = statistics.fmean(value for *_, value in values)
        deviation = statistics.pstdev(value for *_, value in values)
        for number, index, value in values:
            assert float(found[number][index]) == pytest.approx((value - mean) / deviation, abs=1e-5)


def test_equal_scores_standardise_to_zero() -> None:
    layout = discover(tiny_model())
    order = [torch.full((block.size,), -1, dtype=torch.int32) for block in layout.blocks]
    found = standardize(layout, [torch.ones(block.size) for block in layout.blocks], order)
    assert all(not score.any() for score in found if score is not None)


@pytest.mark.parametrize("shrink", [True, False])
def test_the_moving_average_is_that_of_its_definition(shrink) -> None:
    """By loops, over three passes with removals in between; gone structures stay out."""
    config = GISPConfig(sparsity_levels=(0.5,), num_steps=3, protect_first=1, score_momentum=0.6)
    model = tiny_model()
    engine = Engine(model, discover(model), config, shrink=shrink)
    plain_model = tiny_model()
    plain = Engine(
        plain_model, discover(plain_model), GISPConfig.from_dict({**config.to_dict(), "score_momentum": 0.0})
    )
    expected: list[torch.Tensor] | None = None
    for step in range(3):
        for one, owner in [(engine, model), (plain, plain_model)]:
            owner.zero_grad()
            with one.watch():
                ids = torch.stack([block["input_ids"] for block in tiny_blocks(4, seed=step)])
                owner(input_ids=ids, labels=ids).loss.backward()
                one.accumulate()
        fresh = [score for score in plain.scores if score is not None]
        averaged = [score for score in engine.scores if score is not None]
        expected = (
            fresh if expected is None else [0.6 * old + 0.4 * new for old, new in zip(expected, fresh, strict=True)]
        )
        for one, other, order in zip(
            expected, averaged, [o for o, s in zip(engine.order, engine.scores) if s is not None], strict=True
        ):
            left = order < 0
            torch.testing.assert_close(other[left], one[left], rtol=1e-4, atol=1e-7)
        target = 0.1 * (step + 1)
        engine.advance(target)
        plain.order = [positions.clone() for positions in engine.order]  # the same removals
        plain.length = engine.length
        plain._operate()
