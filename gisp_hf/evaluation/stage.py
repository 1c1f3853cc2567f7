"""The stage that measures each level."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from tqdm import tqdm
from transformers import PreTrainedModel

from gisp_hf.config import level_name
from gisp_hf.evaluation.levels import measure
from gisp_hf.evaluation.mode import evaluation_mode
from gisp_hf.levels.info import clean_metrics, write_metrics
from gisp_hf.training.stages import Level, Stage

Evaluate = Callable[[PreTrainedModel], Mapping[str, Any]] | Sequence[str]


class Measure(Stage):
    """Calls a function with the model at each level, or runs lm-eval tasks there.

    Any real number counts as a result. One that is not finite is recorded as None, with a warning; the run goes on.

    Args:
        evaluate: the function, or the names of tasks. With several processes all of them evaluate.

    Raises:
        ValueError: if ``evaluate`` is neither.
    """

    def __init__(self, evaluate: Evaluate) -> None:
        if isinstance(evaluate, str):
            raise ValueError(f"evaluate must be a function or a list of tasks, got {evaluate!r}; write [{evaluate!r}]")
        self.evaluate = evaluate

    def __call__(self, level: Level) -> Level:
        with evaluation_mode(level.model):
            found = (
                self.evaluate(level.model)
                if callable(self.evaluate)
                else measure(level.model, self.run.tokenizer, tasks=self.evaluate)
            )
        metrics = {**level.metrics, **clean_metrics(level_name(level.sparsity), found)}
        if self.run.main_process and metrics:
            write_metrics(level.folder, metrics)
            shown = ", ".join(f"{name} {'-' if value is None else f'{value:.4f}'}" for name, value in metrics.items())
            tqdm.write(f"{level_name(level.sparsity)}: {shown}")
        return replace(level, metrics=metrics)
