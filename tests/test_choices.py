"""Multiple choice: log-likelihoods against those taken token by token, and accuracy by hand."""

import math

import pytest
import torch

from gisp_hf.evaluation import multiple_choice_accuracy
from gisp_hf.evaluation.choices import continuation_log_likelihoods
from tests.tiny import tiny_model, tiny_tokenizer

PAIRS = [("w5 w6 w7", " w8"), ("w9", " w10 w11 w12 w13"), ("w20 w21 w22 w23 w24", " w30 w31"), ("w5", " w5 w5 w5")]


QUESTION = {"prompt": "w5 w6", "choices": [" w7", " w8 w9"], "label": 0}


def by_hand(model, prompt: list[int], answer: list[int]) -> float:
    """log p(answer | prompt), one unpadded forward pass for every token."""
    total = 0.0
    for i, token in enumerate(answer):
        logits = model(torch.tensor([prompt + answer[:i]])).logits[0, -1].double()
        total += float(torch.log_softmax(logits, -1)[token])
    return total


def ids(text: str) -> list[int]:
    return [int(word[1:]) for word in text.split()]


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_log_likelihood_is_the_sum_over_the_continuation(family: str) -> None:
    model = tiny_model(family)
    scores = continuation_log_likelihoods(model, tiny_tokenizer(), PAIRS, batch_size=4)
    with torch.no_grad():
        wanted = [by_hand(model, ids(prompt), ids(text)) for prompt, text in PAIRS]
    torch.testing.assert_close(scores, torch.tensor(wanted, dtype=torch.float64), rtol=1e-5, atol=1e-5)


def test_log_likelihood_does_not_depend_on_batch_order_or_padding() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    alone = continuation_log_likelihoods(model, tokenizer, PAIRS, batch_size=1)
    together = continuation_log_likelihoods(model, tokenizer, PAIRS, batch_size=4)
    turned = continuation_log_likelihoods(model, tokenizer, PAIRS[::-1], batch_size=3).flip(0)
    tokenizer.pad_token = "<eos>"
    other_padding = continuation_log_likelihoods(model, tokenizer, PAIRS, batch_size=4)
    for scores in (together, turned, other_padding):
        torch.testing.assert_close(scores, alone, rtol=1e-5, atol=1e-5)


def test_long_prompts_lose_their_left_end() -> None:
    model = tiny_model(max_position_embeddings=8)
    words = " ".join(f"w{i}" for i in range(10, 30))
    (score,) = continuation_log_likelihoods(model, tiny_tokenizer(), [(words, " w40 w41")])
    with torch.no_grad():
        # 9 tokens in all, of which the model reads 8: the last one is only predicted
        logits = model(torch.tensor([[*range(23, 30), 40]])).logits[0].double().log_softmax(-1)
    assert float(score) == pytest.approx(float(logits[-2, 40] + logits[-1, 41]), abs=1e-5)


def test_white_space_at_the_end_of_the_prompt_belongs_to_the_continuation() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    one, other = continuation_log_likelihoods(model, tokenizer, [("w5 w6 ", "w7"), ("w5 w6", " w7")])
    assert float(one) == float(other)


def test_accuracy_counts_raw_and_normalized_by_characters() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    choices = [" w7", " w8 w9 w10", " w11 w12"]
    with torch.no_grad():
        scores = [by_hand(model, [5, 6], ids(choice)) for choice in choices]
    raw = max(range(3), key=lambda i: scores[i])
    normalized = max(range(3), key=lambda i: scores[i] / len(choices[i].strip()))
    assert raw != normalized  # else the two counts could be swapped unseen
    questions = [{"prompt": "w5 w6", "choices": choices, "label": label} for label in (raw, normalized, normalized)]
    results = multiple_choice_accuracy(model, tokenizer, questions)
    assert results["accuracy"] == pytest.approx(1 / 3)
    assert results["accuracy_normalized"] == pytest.approx(2 / 3)
    # a mean of three values 1, 0, 0: sqrt(((2/3)**2 + 2 * (1/3)**2) / 2 / 3)
    assert results["accuracy_stderr"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("label, accuracy", [(0, 1.0), (1, 0.0)])
def test_the_first_of_equal_choices_is_taken(label: int, accuracy: float) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight.zero_()  # every token is as likely as any other
    question = {"prompt": "w5", "choices": [" w7", " w8"], "label": label}
    results = multiple_choice_accuracy(model, tiny_tokenizer(), [question])
    assert results["accuracy"] == results["accuracy_normalized"] == accuracy
    assert results["accuracy_stderr"] is None


def test_modes_are_left_as_they_were() -> None:
    model = tiny_model().train()
    model.model.layers[0].eval()
    multiple_choice_accuracy(model, tiny_tokenizer(), [QUESTION])
    assert model.training and not model.model.layers[0].training


@pytest.mark.parametrize(
    "change, message",
    [
        ({"label": 2}, "question 1: label 2 is outside its 2 choices"),
        ({"label": -1}, "question 1: label -1 is outside"),
        ({"label": "0"}, "question 1: label '0' is outside"),
        ({"label": True}, "question 1: label True is outside"),
        ({"choices": [" w7", " "]}, "question 1 has the empty choice ' '"),
        ({"choices": [" w7"]}, "a right and at least one wrong one"),
        ({"choices": " w7"}, "a right and at least one wrong one"),
        ({"prompt": " "}, "question 1 has the empty prompt ' '"),
    ],
)
def test_bad_questions_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        multiple_choice_accuracy(tiny_model(), tiny_tokenizer(), [QUESTION, {**QUESTION, **change}])


def test_no_questions_are_refused() -> None:
    with pytest.raises(ValueError, match="questions is empty"):
        multiple_choice_accuracy(tiny_model(), tiny_tokenizer(), [])


def test_a_question_without_a_label_is_refused() -> None:
    with pytest.raises(ValueError, match=r"question 0 lacks \['label'\]"):
        multiple_choice_accuracy(tiny_model(), tiny_tokenizer(), [{"prompt": "w5", "choices": [" w7", " w8"]}])


def test_a_batch_size_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        multiple_choice_accuracy(tiny_model(), tiny_tokenizer(), [QUESTION], batch_size=0)


def test_a_continuation_longer_than_the_context_is_refused() -> None:
    model = tiny_model(max_position_embeddings=4)
    with pytest.raises(ValueError, match="continuation of 5 tokens does not fit into the model's context of 4"):
        continuation_log_likelihoods(model, tiny_tokenizer(), [("w5", " w6 w7 w8 w9 w10")])


def test_a_model_that_overflows_is_named_by_its_question() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight.fill_(math.nan)
    with pytest.raises(ValueError, match="question 0: log-likelihoods .* hold nan"):
        multiple_choice_accuracy(model, tiny_tokenizer(), [QUESTION])
