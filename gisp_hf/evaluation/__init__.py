"""Quality and speed of a model."""

from gisp_hf.evaluation.answers import exact_match
from gisp_hf.evaluation.choices import multiple_choice_accuracy
from gisp_hf.evaluation.levels import evaluate_levels
from gisp_hf.evaluation.mode import evaluation_mode
from gisp_hf.evaluation.perplexity import perplexity
from gisp_hf.evaluation.speed import Speed, measure_speed
from gisp_hf.evaluation.suites import evaluate_suite

__all__ = [
    "Speed",
    "evaluate_levels",
    "evaluate_suite",
    "evaluation_mode",
    "exact_match",
    "measure_speed",
    "multiple_choice_accuracy",
    "perplexity",
]
