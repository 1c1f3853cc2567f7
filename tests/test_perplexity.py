"""Perplexity against a loop by hand."""

import importlib
import math

import pytest
import torch
from torch import nn

from gisp_hf.evaluation import perplexity
from tests.tiny import VOCAB_SIZE, tiny_model


def random_tokens(count: int) -> torch.Tensor:
    return torch.randint(3, VOCAB_SIZE, (count,), generator=torch.Generator().manual_seed(1))


def perplexity_by_hand(model, input_ids, window):
    """One window and one position at a time, from the definition."""
    nll = []
    for start in range(0, len(input_ids) - window + 1, window):
        tokens = input_ids[start : start + window]
        for t in range(1, window):
            with torch.no_grad():
                logits = model(input_ids=tokens[None, :t]).logits[0, -1].double()
            nll.append(-torch.log_softmax(logits, -1)[tokens[t]].item())
    return math.exp(sum(nll) / len(nll))


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize(("window", "batch_size"), [(8, 1), (8, 3), (13, 8), (2, 8)])
def test_perplexity_equals_its_definition(family, window, batch_size):
    model, tokens = tiny_model(family), random_tokens(45)
    assert perplexity(model, tokens, window=window, batch_size=batch_size) == pytest.approx(
        perplexity_by_hand(model, tokens, window), rel=1e-5
    )


def test_perplexity_of_uniform_logits_is_the_vocabulary_size():
    model = tiny_model()
    nn.init.zeros_(model.lm_head.weight)
    assert perplexity(model, random_tokens(40), window=10) == pytest.approx(VOCAB_SIZE, rel=1e-6)


def test_perplexity_drops_the_remainder():
    model, tokens = tiny_model(), random_tokens(31)
    assert perplexity(model, tokens, window=8) == perplexity(model, tokens[:24], window=8)
    assert perplexity(model, tokens, window=8) != perplexity(model, tokens[1:], window=8)


def test_perplexity_takes_the_loss_of_bfloat16_logits_in_float32():
    model, tokens = tiny_model(dtype=torch.bfloat16), random_tokens(64)
    with torch.no_grad():
        logits = model(input_ids=tokens.view(4, 16)).logits[:, :-1].double()
    targets = tokens.view(4, 16)[:, 1:]
    expected = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).exp().item()
    assert perplexity(model, tokens, window=16) == pytest.approx(expected, rel=1e-5)


def test_perplexity_scores_without_dropout_or_gradients_and_restores_every_mode():
    model, tokens = tiny_model(attention_dropout=0.5), random_tokens(32)
    expected = perplexity(model, tokens, window=8)
    model.train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    assert perplexity(model, tokens, window=8) == expected
    assert [module.training for module in model.modules()] == modes
    assert torch.is_grad_enabled()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_perplexity_shows_progress_only_when_asked(capsys):
    model, tokens = tiny_model(), random_tokens(32)
    perplexity(model, tokens, window=8)
    assert capsys.readouterr().err == ""
    perplexity(model, tokens, window=8, progress=True)
    assert "perplexity" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("tokens", "changes", "message"),
    [
        (20, {"window": 1}, "window must be at least 2, got 1"),
        (20, {"window": 32}, "holds 20 tokens, fewer than one window of 32"),
        (20, {"window": 4, "batch_size": 0}, "batch_size must be at least 1, got 0"),
    ],
)
def test_perplexity_names_the_numbers_it_cannot_use(tokens, changes, message):
    with pytest.raises(ValueError, match=message):
        perplexity(tiny_model(), random_tokens(tokens), **changes)


def test_perplexity_refuses_a_batch():
    with pytest.raises(ValueError, match=r"got shape \(2, 10\)"):
        perplexity(tiny_model(), random_tokens(20).view(2, 10), window=4)


def test_the_function_has_the_name_of_its_module_also_after_the_module_is_imported():
    importlib.import_module("gisp_hf.evaluation.perplexity")
    from gisp_hf import evaluation

    assert evaluation.perplexity is perplexity and callable(perplexity)
