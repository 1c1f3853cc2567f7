"""Gram matrices and the ridge solve, against the whole matrices and torch.linalg.lstsq."""

import pytest
import torch

from gisp_hf.recovery.grams import Grams, best_ridge, mean_diagonal, solve_ridge


def data(tokens: int = 200, inputs: int = 12, outputs: int = 5, *, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, inputs, generator=generator)
    return x, x @ torch.randn(inputs, outputs, generator=generator) + torch.randn(tokens, outputs, generator=generator)


def grams_of(x: torch.Tensor, t: torch.Tensor, *, batch: int = 32) -> Grams:
    grams = Grams(x.shape[1], t.shape[1])
    for start in range(0, len(x), batch):
        grams.add(x[start : start + batch], t[start : start + batch])
    return grams


def test_streamed_equals_least_squares_on_the_whole_matrix() -> None:
    x, t = data()
    grams = grams_of(x, t)
    expected = torch.linalg.lstsq(x.double(), t.double()).solution
    torch.testing.assert_close(solve_ridge(grams.gram, grams.cross, 0.0), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tokens", [200, 7])
def test_ridge_equals_least_squares_with_added_rows(tokens: int) -> None:
    x, t = data(tokens)
    grams = grams_of(x, t)
    weight = (0.05 * mean_diagonal(x.T @ x)).sqrt()
    rows = torch.cat([x.double(), weight * torch.eye(12, dtype=torch.float64)])
    expected = torch.linalg.lstsq(rows, torch.cat([t.double(), torch.zeros(12, 5, dtype=torch.float64)])).solution
    torch.testing.assert_close(solve_ridge(grams.gram, grams.cross, 0.05), expected, rtol=1e-5, atol=1e-5)


def test_dependent_inputs_without_ridge_give_the_least_norm() -> None:
    x, t = data()
    x[:, 3] = x[:, 0] - 2 * x[:, 1]
    grams = grams_of(x, t)
    expected = torch.linalg.lstsq(
        x.double(), t.double(), rcond=1e-4, driver="gelsd"
    ).solution  # x is rounded to float32
    torch.testing.assert_close(solve_ridge(grams.gram, grams.cross, 0.0), expected, rtol=1e-3, atol=1e-4)


def test_dead_inputs_change_nothing() -> None:
    x, t = data()
    alive = grams_of(x, t)
    wider = torch.zeros(200, 15)
    live = torch.tensor([0, 2, 3, 4, 5, 6, 7, 9, 10, 11, 12, 14])
    wider[:, live] = x
    found = grams_of(wider, t)
    solution = solve_ridge(found.gram, found.cross, 0.1)
    expected = solve_ridge(alive.gram, alive.cross, 0.1)
    torch.testing.assert_close(solution[live], expected, rtol=1e-5, atol=1e-6)
    assert not solution[[1, 8, 13]].any()


@pytest.mark.parametrize("ridge", [0.0, 0.01])
def test_inputs_that_are_all_zero_give_zeros(ridge: float) -> None:
    grams = grams_of(torch.zeros(20, 4), torch.ones(20, 3))
    assert torch.equal(solve_ridge(grams.gram, grams.cross, ridge), torch.zeros(4, 3, dtype=torch.float64))


def test_masked_tokens_do_not_count() -> None:
    x, t = data(48)
    mask = (torch.arange(48) % 3 > 0).view(4, 12)
    masked = Grams(12, 5)
    masked.add(x.view(4, 12, 12), t.view(4, 12, 5), mask=mask.long())
    plain = grams_of(x[mask.flatten()], t[mask.flatten()])
    for one, other in zip(masked._sums(), plain._sums()):
        torch.testing.assert_close(one, other)


def test_products_are_float32_under_autocast() -> None:
    x, t = data()
    plain = grams_of(x, t)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = grams_of(x, t)
    assert torch.equal(cast.gram, plain.gram) and torch.equal(cast.cross, plain.cross)


def test_squared_error_equals_its_definition() -> None:
    x, t = data()
    grams = grams_of(x, t)
    change = 0.3 * torch.randn(5, 12, generator=torch.Generator().manual_seed(1))
    assert grams.squared_error() == pytest.approx(float(t.double().square().sum()), rel=1e-6)
    expected = float((t.double() - x.double() @ change.double().T).square().sum())
    assert grams.squared_error(change) == pytest.approx(expected, rel=1e-5)


def test_best_ridge_is_the_one_of_the_smallest_error_on_other_tokens() -> None:
    x, t = data(40)
    train, held_out = grams_of(x[:20], t[:20]), grams_of(x[20:], t[20:])
    candidates = (1e-4, 1e-2, 1.0, 100.0)
    errors = []
    for ridge in candidates:
        weight = (ridge * mean_diagonal(x[:20].T @ x[:20])).sqrt()
        rows = torch.cat([x[:20].double(), weight * torch.eye(12, dtype=torch.float64)])
        solution = torch.linalg.lstsq(rows, torch.cat([t[:20].double(), torch.zeros(12, 5).double()])).solution
        errors.append(float((t[20:].double() - x[20:].double() @ solution).square().sum()))
    assert best_ridge(train, held_out, candidates) == candidates[errors.index(min(errors))]


def test_merge_equals_all_batches_in_one() -> None:
    x, t = data()
    parts = grams_of(x[:96], t[:96])
    parts.merge(grams_of(x[96:], t[96:]))
    for one, other in zip(parts._sums(), grams_of(x, t)._sums()):
        torch.testing.assert_close(one, other)


def test_nan_is_found() -> None:
    x, t = data()
    x[3, 4] = float("nan")
    assert not grams_of(x, t).is_finite()
    assert grams_of(*data()).is_finite()
