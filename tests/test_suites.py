"""The bridge to lm-eval: on a local task it must count exactly what `gisp_hf.evaluation.choices` counts."""

import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest

from gisp_hf.evaluation import evaluate_suite, multiple_choice_accuracy
from tests.tiny import tiny_model, tiny_tokenizer

TASK = """\
task: tiny_choice
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
"""


def make_questions(count: int) -> list[dict[str, Any]]:
    """Prompts of 1 to 12 words, two longer than the context of 16 tokens; choices of 1 to 4 words."""
    generator = random.Random(0)

    def words(length: int) -> str:
        return " ".join(f"w{generator.randrange(4, 64)}" for _ in range(length))

    lengths = [20, 30, *(generator.randrange(1, 13) for _ in range(count - 2))]
    return [
        {
            "prompt": words(length),
            "choices": [words(generator.randrange(1, 5)) for _ in range(4)],
            "label": generator.randrange(4),
        }
        for length in lengths
    ]


@pytest.mark.slow
def test_harness_and_own_accuracy_agree_to_the_last_decimal(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    questions = make_questions(60)
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, questions)), encoding="utf-8")
    (tmp_path / "tiny_choice.yaml").write_text(TASK.format(file=tmp_path / "questions.jsonl"), encoding="utf-8")
    model, tokenizer = tiny_model(max_position_embeddings=16).train(), tiny_tokenizer()
    theirs = evaluate_suite(model, tokenizer, ["tiny_choice"], include_path=tmp_path, batch_size=7)
    assert model.training

    # lm-eval puts a space before each choice, and does not count it
    spaced = [{**question, "choices": [f" {choice}" for choice in question["choices"]]} for question in questions]
    ours = multiple_choice_accuracy(model, tokenizer, spaced)
    assert theirs.keys() == {"tiny_choice"}
    assert theirs["tiny_choice"]["acc"] == ours["accuracy"]
    assert theirs["tiny_choice"]["acc_norm"] == ours["accuracy_normalized"]
    assert ours["accuracy"] != ours["accuracy_normalized"]
    assert theirs["tiny_choice"]["acc_stderr"] == pytest.approx(ours["accuracy_stderr"], rel=1e-12)
    assert theirs["tiny_choice"].keys() == {"acc", "acc_stderr", "acc_norm", "acc_norm_stderr"}

    with pytest.raises(ValueError, match="unknown tasks other_choice: .* include_path is the folder"):
        evaluate_suite(model, tokenizer, ["other_choice"], include_path=tmp_path)


@pytest.mark.parametrize(
    ("tasks", "options", "message"),
    [
        ("piqa", {}, "tasks must be a list of at least one name, got 'piqa'"),
        ([], {}, r"at least one name, got \[\]"),
        (["piqa"], {"limit": 0}, "limit must be at least 1, got 0"),
        (["piqa"], {"num_fewshot": -1}, "num_fewshot must be at least 0, got -1"),
    ],
)
def test_bad_requests_are_refused_before_anything_is_loaded(tasks, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate_suite(tiny_model(), tiny_tokenizer(), tasks, **options)


def test_a_missing_lm_eval_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ImportError, match=r"pip install 'gisp_hf\[eval\]'"):
        evaluate_suite(tiny_model(), tiny_tokenizer(), ["piqa"])
