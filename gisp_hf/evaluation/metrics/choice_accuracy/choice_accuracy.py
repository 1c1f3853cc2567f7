"""Multiple-choice accuracy from the log-likelihoods of the choices, as a module of `evaluate`."""

import math
from collections.abc import Sequence

import datasets
import evaluate

_DESCRIPTION = """
The share of questions whose right choice has the highest log-likelihood: as it is (`accuracy`, lm-eval's `acc`), and
divided by the number of characters of the choice (`accuracy_normalized`, lm-eval's `acc_norm`). Of equal choices the
first is taken. Standard errors are those of a mean, with n - 1.
"""

_INPUTS = """
Args:
    predictions: for each question, the log-likelihoods of its choices (nats, summed over tokens).
    references: for each question, the index of the right choice.
    lengths: for each question, the number of characters of its choices.
Returns:
    accuracy, accuracy_normalized: fractions 0-1.
    accuracy_stderr, accuracy_normalized_stderr: their standard errors; None for a single question.
Examples:
    >>> metric = evaluate.load("gisp_hf/evaluation/metrics/choice_accuracy")
    >>> metric.compute(predictions=[[-4.0, -6.0], [-1.0, -2.0]], references=[1, 0], lengths=[[4, 12], [3, 3]])
    {'accuracy': 0.5, 'accuracy_stderr': 0.5, 'accuracy_normalized': 1.0, 'accuracy_normalized_stderr': 0.0}
"""


class ChoiceAccuracy(evaluate.Metric):
    """Compares the likeliest choice of every question with the right one."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features(
                {
                    "predictions": datasets.Sequence(datasets.Value("float64")),
                    "references": datasets.Value("int64"),
                    "lengths": datasets.Sequence(datasets.Value("int64")),
                }
            ),
        )

    def _compute(
        self, predictions: Sequence[Sequence[float]], references: Sequence[int], lengths: Sequence[Sequence[int]]
    ) -> dict[str, float | None]:
        raw: list[float] = []
        normalized: list[float] = []
        for i, (scores, label, sizes) in enumerate(zip(predictions, references, lengths)):
            if not 0 <= label < len(scores):
                raise ValueError(f"question {i}: label {label} is outside its {len(scores)} choices: count from 0")
            if len(sizes) != len(scores) or min(sizes) < 1:
                raise ValueError(f"question {i}: lengths {list(sizes)} must be one positive number for each choice")
            if any(math.isnan(score) for score in scores):
                raise ValueError(f"question {i}: log-likelihoods {list(scores)} hold nan: the model overflows")
            raw.append(float(_first_highest(scores) == label))
            normalized.append(float(_first_highest([score / size for score, size in zip(scores, sizes)]) == label))
        results: dict[str, float | None] = {}
        for name, hits in (("accuracy", raw), ("accuracy_normalized", normalized)):
            mean = sum(hits) / len(hits)
            spread = sum((hit - mean) ** 2 for hit in hits)
            results[name] = mean
            results[f"{name}_stderr"] = math.sqrt(spread / (len(hits) - 1) / len(hits)) if len(hits) > 1 else None
        return results


def _first_highest(scores: Sequence[float]) -> int:
    return max(range(len(scores)), key=scores.__getitem__)  # max keeps the first of equals
