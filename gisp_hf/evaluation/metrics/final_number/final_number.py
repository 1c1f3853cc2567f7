"""Exact match of the final number of worked answers (GSM8K), as a module of `evaluate`."""

import math
import re
from collections.abc import Sequence

import datasets
import evaluate

_DESCRIPTION = """
The share of worked answers that end in the right number. `exact_match_strict` wants the mark of GSM8K and takes the
first number after `####`; `exact_match_flexible` takes the last number of the text. Commas, dollar signs and a full
stop at the end do not count; beyond that numbers are compared as they are written, so 72.0 is not 72. These are the
rules of lm-eval's task gsm8k (version 3). Standard errors are those of a mean, with n - 1.
"""

_INPUTS = """
Args:
    predictions: the generated answers.
    references: the worked answers, each with its `#### number`; or the bare numbers.
Returns:
    exact_match_strict, exact_match_flexible: fractions 0-1.
    exact_match_strict_stderr, exact_match_flexible_stderr: their standard errors; None for a single answer.
Examples:
    >>> metric = evaluate.load("gisp_hf/evaluation/metrics/final_number")
    >>> metric.compute(predictions=["2 + 2 = 4. #### 4"], references=["2 and 2 make 4\\n#### 4"])["exact_match_strict"]
    1.0
"""

MARKED = re.compile(r"#### (-?[0-9.,]+)")
ANY_NUMBER = re.compile(r"-?[$0-9.,]{2,}|-?[0-9]+")


def strict_number(text: str) -> str | None:
    """The first number behind ``####``, cleaned; None if there is none."""
    found = MARKED.search(text)
    return _clean(found[1]) if found else None


def flexible_number(text: str) -> str | None:
    """The last number of the text, cleaned; None if there is none."""
    found = ANY_NUMBER.findall(text)
    return _clean(found[-1]) if found else None


def _clean(number: str) -> str:
    return re.sub(r"\.$", "", number.replace(",", "").replace("$", ""))


class FinalNumber(evaluate.Metric):
    """Compares the final numbers of generated and of given answers."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="@article{cobbe2021gsm8k, title={Training Verifiers to Solve Math Word Problems}, "
            "journal={arXiv:2110.14168}, year={2021}}",
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, predictions: Sequence[str], references: Sequence[str]) -> dict[str, float | None]:
        wanted = [_clean(text.split("#### ")[-1].strip()) for text in references]
        for i, number in enumerate(wanted):
            if not re.fullmatch(r"-?[0-9.]+", number):
                raise ValueError(f"reference {i} ends in {number[-40:]!r}, not in a number: end it with '#### 42'")
        results: dict[str, float | None] = {}
        for name, extract in (("strict", strict_number), ("flexible", flexible_number)):
            hits = [float(extract(text) == number) for text, number in zip(predictions, wanted)]
            mean = sum(hits) / len(hits)
            spread = sum((hit - mean) ** 2 for hit in hits)
            results[f"exact_match_{name}"] = mean
            results[f"exact_match_{name}_stderr"] = (
                math.sqrt(spread / (len(hits) - 1) / len(hits)) if len(hits) > 1 else None
            )
        return results
