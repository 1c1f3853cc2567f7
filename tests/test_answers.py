"""Worked answers: generation against greedy steps by hand, and exact match against answers whose count is known."""

import pytest
import torch
from transformers import GenerationConfig

from gisp_hf.evaluation import exact_match
from gisp_hf.evaluation.answers import generate_answers
from tests.tiny import tiny_model, tiny_tokenizer


def ids(text: str) -> list[int]:
    return [int(word[1:]) for word in text.split()]


def test_generated_answers_do_not_depend_on_the_batch() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    prompts = ["w5 w6 w7 w8", "w9", "w10 w11"]
    together = generate_answers(model, tokenizer, prompts, max_new_tokens=6, batch_size=3)
    assert together == [
        answer for prompt in prompts for answer in generate_answers(model, tokenizer, [prompt], max_new_tokens=6)
    ]
    with torch.no_grad():
        row = ids(prompts[1])
        for _ in range(6):
            row.append(int(model(torch.tensor([row])).logits[0, -1].argmax()))
    assert together[1].split() == tokenizer.convert_ids_to_tokens([i for i in row[1:] if i > 2])


def test_answers_end_at_the_stop_string_and_ignore_sampling_settings() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    (whole,) = generate_answers(model, tokenizer, ["w5 w6"], max_new_tokens=6)
    stop = whole.split()[2]
    model.generation_config = GenerationConfig(do_sample=True, temperature=5.0)
    (cut,) = generate_answers(model, tokenizer, ["w5 w6"], max_new_tokens=6, stop=stop)
    assert cut == whole.split(stop)[0] and cut != whole


def test_exact_match_counts_the_generated_number(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {"a": " 3 + 4 = 7\n#### 7", "b": " so it is $1,200.", "c": " #### 5 or 6", "d": " no idea"}
    monkeypatch.setattr(
        "gisp_hf.evaluation.answers.generate_answers",
        lambda model, tokenizer, prompts, **_: [answers[p] for p in prompts],
    )
    wanted = {"a": "3 and 4 make 7\n#### 7", "b": "1200", "c": "x\n#### 6", "d": "#### 1"}
    records = [{"prompt": key, "completion": wanted[key]} for key in answers]
    results = exact_match(tiny_model(), tiny_tokenizer(), records)
    assert results["exact_match_strict"] == 0.25  # a; c marks the wrong number first
    assert results["exact_match_flexible"] == 0.75  # a, b, c


def test_exact_match_refuses_bad_input() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    record = {"prompt": "w5", "completion": "#### 4"}
    with pytest.raises(ValueError, match="records is empty"):
        exact_match(model, tokenizer, [])
    with pytest.raises(ValueError, match="record 1 has no completion"):
        exact_match(model, tokenizer, [record, {"prompt": "w5", "completion": ""}])
    with pytest.raises(ValueError, match="reference 0 ends in 'four', not in a number"):
        exact_match(model, tokenizer, [{"prompt": "w5", "completion": "four"}], max_new_tokens=1)
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1, got 0"):
        exact_match(model, tokenizer, [record], max_new_tokens=0)
    with pytest.raises(ValueError, match="leaves no room for a prompt in the model's context of 64"):
        exact_match(model, tokenizer, [record], max_new_tokens=64)
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match="no pad token"):
        exact_match(model, tokenizer, [record], max_new_tokens=4)
