"""One set of output projections for all levels: the minimiser of the summed squared error, by its definition."""

import pytest
import torch

from gisp_hf.recovery.config import RestoreConfig
from gisp_hf.recovery.elastic import fit_common, fit_levels, kept_inputs, level_weights, shared_weights
from gisp_hf.recovery.grams import Grams, solve_ridge
from gisp_hf.recovery.layers import Layers, ModelWeights, shell_of
from gisp_hf.recovery.restore import restore
from tests.test_materialize import random_trajectory
from tests.tiny import FAMILIES, tiny_blocks, tiny_model

TOKENS, INPUTS, OUTPUTS = 200, 12, 5
KEEPS = [torch.arange(INPUTS) < count for count in (12, 9, 6, 4)]  # nested
WEIGHTS = [12.0, 1.0, 1.0, 0.5]


def numbers(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mixed(seed: int = 0) -> torch.Tensor:
    """Correlated inputs, so that kept ones can stand in for others."""
    return numbers(TOKENS, INPUTS, seed=seed) @ numbers(INPUTS, INPUTS, seed=seed + 1)


def stacked(inputs: list[torch.Tensor], targets: list[torch.Tensor], weight: torch.Tensor, ridges: list[float]):
    """The weight by its definition: one least-squares problem over all levels, the ridges as rows of their own."""
    rows, goals = [], []
    for x, t, keep, w, ridge in zip(inputs, targets, KEEPS, WEIGHTS, ridges):
        rows += [w**0.5 * x * keep, (w * ridge) ** 0.5 * torch.diag(keep.double())]
        goals += [w**0.5 * t, (w * ridge) ** 0.5 * keep.double()[:, None] * weight.T]
    return torch.linalg.lstsq(torch.cat(rows), torch.cat(goals), driver="gelsd").solution.T


@pytest.mark.parametrize("ridge", [0.0, 1e-2])
def test_common_inputs_give_the_minimiser_over_all_levels(ridge: float) -> None:
    x, weight = mixed(), numbers(OUTPUTS, INPUTS, seed=9)
    gram = x.T @ x
    damping = ridge * float(gram.diagonal().mean())
    expected = stacked([x] * 4, [x @ weight.T] * 4, weight, [damping] * 4)
    found = fit_common(gram, KEEPS, WEIGHTS, weight=weight, ridge=ridge)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)
    # the equation of the issue, with M by its definition
    counts = sum(w * keep.double() for w, keep in zip(WEIGHTS, KEEPS))
    shared = torch.tensor([[min(a, b) for b in counts] for a in counts], dtype=torch.float64)
    left = (shared * gram + damping * torch.diag(counts)) @ found.T
    right = torch.diag(counts) @ (gram + damping * torch.eye(INPUTS)) @ weight.T
    torch.testing.assert_close(left, right)


@pytest.mark.parametrize("ridge", [0.0, 1e-2])
def test_own_inputs_give_the_minimiser_over_all_levels(ridge: float) -> None:
    weight = numbers(OUTPUTS, INPUTS, seed=9)
    inputs, targets = [mixed(seed) for seed in range(4)], [numbers(TOKENS, OUTPUTS, seed=20 + n) for n in range(4)]
    sums, ridges = [], []
    for x, t, keep in zip(inputs, targets, KEEPS):
        grams = Grams(INPUTS, OUTPUTS)
        grams.add(x * keep, t - (x * keep) @ weight.T)
        sums.append(grams)
        diagonal = grams.gram.diagonal()[keep].double()
        ridges.append(ridge * float(diagonal.mean()))
    expected = stacked(inputs, targets, weight, ridges)
    found = weight + fit_levels(sums, KEEPS, WEIGHTS, ridge=ridge)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)  # sums in float32
    alone = fit_levels(sums[1:2], KEEPS[1:2], [3.0], ridge=ridge)  # one level: the ordinary re-fit, whatever its weight
    torch.testing.assert_close(alone, solve_ridge(sums[1].gram, sums[1].cross, ridge).T, rtol=1e-8, atol=1e-10)
    assert not alone[:, ~KEEPS[1]].any()


def test_shared_lies_between_unrestored_and_each_levels_own() -> None:
    x, weight = mixed(), numbers(OUTPUTS, INPUTS, seed=9)
    gram, output = x.T @ x, x @ weight.T
    shared = fit_common(gram, KEEPS, [1.0] * 4, weight=weight, ridge=0.0)

    def error(kept: torch.Tensor, w: torch.Tensor) -> float:
        return float((output - (x * kept) @ w.T).square().sum())

    own = [fit_common(gram, [keep], [1.0], weight=weight, ridge=0.0) for keep in KEEPS]
    sums = [sum(error(keep, w) for keep, w in zip(KEEPS, kind)) for kind in (own, [shared] * 4, [weight] * 4)]
    assert sums[0] < sums[1] < sums[2]
    heavy = fit_common(gram, KEEPS, [1e9, 1.0, 1.0, 1.0], weight=weight, ridge=0.0)
    torch.testing.assert_close(heavy, weight, rtol=1e-4, atol=1e-4)  # a heavy full width keeps its weights


def test_inputs_that_no_level_keeps_or_that_are_zero_do_not_change() -> None:
    x, weight = mixed(), numbers(OUTPUTS, INPUTS, seed=9)
    x[:, 2] = 0
    found = fit_common(x.T @ x, KEEPS[1:], WEIGHTS[1:], weight=weight, ridge=1e-2)
    unchanged = ~KEEPS[1]
    unchanged[2] = True
    assert torch.equal(found[:, unchanged], weight[:, unchanged]) and bool(found.isfinite().all())
    assert not torch.allclose(found[:, ~unchanged], weight[:, ~unchanged])


@pytest.mark.parametrize(("family", "blend"), [*((family, 0.5) for family in FAMILIES), ("llama", 0.0), ("llama", 1.0)])
def test_one_level_alone_gets_the_weights_of_its_own_restoration(family: str, blend: float) -> None:
    model = tiny_model(family)
    trajectory = random_trajectory(model, "some/base", last=4)
    batches = [
        {"input_ids": torch.stack([row["input_ids"] for row in tiny_blocks(16, length=16, seed=n)])} for n in (0, 1)
    ]
    config = RestoreConfig(blend=blend, ridge=0.01, tokens=None)
    level = trajectory.apply(tiny_model(family), sparsity=0.4)
    restore(level, tiny_model(family), batches, config, progress=False)
    layers = Layers(shell_of(model), ModelWeights(model), device=torch.device("cpu"), dtype=torch.float32)
    keeps = kept_inputs(trajectory, 0.4)
    fits = shared_weights(layers, trajectory, batches, weights={0.4: 2.0}, config=config, streams="own", progress=False)
    for fit in fits:
        expected = level.get_parameter(fit.parameter)
        torch.testing.assert_close(fit.weight[:, keeps[fit.parameter]], expected, rtol=1e-2, atol=2e-3)
        before, after = fit.errors[0.4]
        assert after <= before * (1 + 1e-6)
    trajectory.check_base(model)  # it was only read


def test_full_width_alone_keeps_its_weights() -> None:
    model = tiny_model()
    trajectory = random_trajectory(model, "some/base")
    batches = tiny_blocks(16)
    batches = [{"input_ids": torch.stack([row["input_ids"] for row in batches])}]
    for streams in ("own", "unpruned"):
        layers = Layers(shell_of(model), ModelWeights(model), device=torch.device("cpu"), dtype=torch.float32)
        fits = list(shared_weights(layers, trajectory, batches, weights={0.0: 1.0}, streams=streams, progress=False))
        assert len(fits) == 12
        for fit in fits:
            torch.testing.assert_close(fit.weight, model.get_parameter(fit.parameter).data, rtol=1e-4, atol=1e-4)


def test_weights_of_levels_are_checked() -> None:
    assert level_weights([0.5, 0.2]) == {0.0: 12.0, 0.2: 1.0, 0.5: 1.0}
    assert level_weights([0.2], full=3, others={0.2: 2})[0.2] == 2.0
    with pytest.raises(ValueError, match="weight for level 0.3, but the levels are 0.2"):
        level_weights([0.2], others={0.3: 1})
    with pytest.raises(ValueError, match="weight of level 0.2 must be positive and finite, got -1"):
        level_weights([0.2], others={0.2: -1})
