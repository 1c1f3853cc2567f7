"""The two metric modules of `evaluate`, by the rules of lm-eval."""

from pathlib import Path

import evaluate
import pytest

from gisp_hf.evaluation.answers import FINAL_NUMBER
from gisp_hf.evaluation.choices import CHOICE_ACCURACY


@pytest.mark.parametrize(
    "text, strict, flexible",
    [
        ("#### 72", True, True),
        ("#### 72.\nQuestion", True, True),
        ("#### -72", False, False),
        ("the answer is 72", False, True),
        ("#### $72", False, True),  # as lm-eval: the mark must be followed by the number
        ("72 apples, or 73", False, False),
        ("", False, False),
    ],
)
def test_final_number_follows_the_rules_of_lm_eval(text: str, strict: bool, flexible: bool) -> None:
    results = evaluate.load(FINAL_NUMBER).compute(predictions=[text], references=["70 + 2\n#### 72"])
    assert (results["exact_match_strict"], results["exact_match_flexible"]) == (strict, flexible)


def test_the_metric_modules_show_what_they_compute() -> None:
    """The examples in their descriptions, word for word."""
    for path in (CHOICE_ACCURACY, FINAL_NUMBER):
        metric = evaluate.load(path)
        assert (Path(path) / f"{metric.name}.py").is_file()
        lines = metric.inputs_description.split(">>> ")[2].splitlines()
        assert eval(lines[0], {"metric": metric}) == eval(lines[1])  # our own text


def test_choice_accuracy_refuses_what_does_not_belong_together() -> None:
    metric = evaluate.load(CHOICE_ACCURACY)
    with pytest.raises(ValueError, match="label 2 is outside its 2 choices"):
        metric.compute(predictions=[[-1.0, -2.0]], references=[2], lengths=[[3, 3]])
    with pytest.raises(ValueError, match="one positive number for each choice"):
        metric.compute(predictions=[[-1.0, -2.0]], references=[1], lengths=[[3, 0]])
