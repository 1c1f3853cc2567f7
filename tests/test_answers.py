"""Worked answers: generation against greedy steps by hand, and exact match against answers whose count is known."""

import pytest
import torch
from transformers import GenerationConfig

from gisp_hf.evaluation import exact_match
from gisp_hf.evaluation.answers import generate_answers
from tests.tiny import tiny_model, tiny_tokenizer

RECORD = {"prompt": "w5", "completion": "#### 4"}


def test_generated_answers_do_not_depend_on_the_batch() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    prompts = ["w5 w6 w7 w8", "w9", "w10 w11"]
    together = generate_answers(model, tokenizer, prompts, max_new_tokens=6, batch_size=3)
    assert together == [
        answer for prompt in prompts for answer in generate_answers(model, tokenizer, [prompt], max_new_tokens=6)
    ]


def test_generated_answers_are_the_likeliest_tokens() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    (answer,) = generate_answers(model, tokenizer, ["w9"], max_new_tokens=6)
    row = [9]
    with torch.no_grad():
        for _ in range(6):
            row.append(int(model(torch.tensor([row])).logits[0, -1].argmax()))
    assert answer.split() == tokenizer.convert_ids_to_tokens([i for i in row[1:] if i > 2])


def test_answers_end_at_the_stop_string() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    (whole,) = generate_answers(model, tokenizer, ["w5 w6"], max_new_tokens=6)
    stop = whole.split()[2]
    (cut,) = generate_answers(model, tokenizer, ["w5 w6"], max_new_tokens=6, stop=stop)
    assert cut == whole.split(stop)[0] and cut != whole


def test_sampling_settings_of_the_model_are_ignored() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    greedy = generate_answers(model, tokenizer, ["w5 w6"], max_new_tokens=6)
    model.generation_config = GenerationConfig(do_sample=True, temperature=5.0)
    assert generate_answers(model, tokenizer, ["w5 w6"], max_new_tokens=6) == greedy


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


@pytest.mark.parametrize(
    ("records", "options", "message"),
    [
        ([], {}, "records is empty"),
        ([RECORD, {"prompt": "w5", "completion": ""}], {}, "record 1 has no completion"),
        ([RECORD, {"completion": "#### 4"}], {}, "record 1 has no prompt"),
        (
            [{"prompt": "w5", "completion": "four"}],
            {"max_new_tokens": 1},
            "reference 0 ends in 'four'",
        ),
        ([RECORD], {"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ([RECORD], {"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ([RECORD], {"max_new_tokens": 64}, "leaves no room for a prompt in the model's context of 64"),
    ],
)
def test_exact_match_refuses_bad_input(records, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        exact_match(tiny_model(), tiny_tokenizer(), records, **options)


def test_exact_match_needs_a_pad_token() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match="no pad token"):
        exact_match(tiny_model(), tokenizer, [RECORD], max_new_tokens=4)
