"""Standard suites through lm-eval (the extra ``eval``): BoolQ, PIQA, ..., GSM8K, or a task of your own.

::

    model = AutoModelForCausalLM.from_pretrained("runs/.../sparsity-0.50", dtype="auto")
    evaluate_suite(model, tokenizer, ["boolq", "piqa", "hellaswag"])

lm-eval downloads the data of its own tasks. A task whose YAML names local files needs no network.
"""

import math
from collections.abc import Sequence
from os import PathLike
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gisp_hf.evaluation.mode import evaluation_mode

# The seven decision tasks of arXiv 2510.18030, by lm-eval's names.
CMQA_TASKS = ("boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")


def evaluate_suite(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    include_path: str | PathLike[str] | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
) -> dict[str, dict[str, float | None]]:
    """Runs lm-eval on a model that is loaded already, pruned or not.

    Log-probabilities are taken in float32, whatever the model's dtype: in bfloat16, lm-eval's default for such a model,
    they have three digits, and choices tie. lm-eval seeds Python's, NumPy's and torch's generators.

    Args:
        model: a causal language model on its device. Train and eval modes are left as they were.
        tokenizer: the model's own.
        tasks: names of tasks or groups of tasks.
        include_path: a folder with task files (YAML) of your own, searched beside lm-eval's.
        num_fewshot: worked examples before each question; None leaves it to the task.
        limit: only so many questions of each task, for a quick look; None for all.
        batch_size: sequences at once.

    Returns:
        task -> metric -> value, for groups as well. Metrics have lm-eval's names, without its filter ``none``: ``acc``,
        ``acc_norm``, ``acc_stderr``, ``exact_match,strict-match``. A standard error that lm-eval could not take is
        None.

    Raises:
        ImportError: lm-eval is not installed.
        ValueError: ``tasks`` is empty or holds an unknown name, or a count is out of range.
    """
    if isinstance(tasks, str) or not tasks:
        raise ValueError(f"tasks must be a list of at least one name, got {tasks!r}")
    for name, value, least in (("batch_size", batch_size, 1), ("limit", limit, 1), ("num_fewshot", num_fewshot, 0)):
        if value is not None and value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ImportError("standard suites need lm-eval: pip install 'gisp_hf[eval]'") from error

    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    if unknown := sorted(set(tasks) - set(manager.all_tasks)):
        raise ValueError(
            f"unknown tasks {', '.join(unknown)}: `lm-eval ls tasks` lists what there is; for a task of your own, "
            "include_path is the folder with its YAML file"
        )
    with evaluation_mode(model):
        bridge = HFLM(
            pretrained=model,
            tokenizer=tokenizer,
            backend="causal",  # not guessed from the name of a pruned architecture
            batch_size=batch_size,
            softmax_dtype="float32",
        )
        results = simple_evaluate(
            model=bridge,
            tasks=list(tasks),
            task_manager=manager,
            num_fewshot=num_fewshot,
            limit=limit,
            log_samples=False,
        )
    assert results is not None  # None on all processes but the first, and there is one
    return {task: _numbers(metrics) for task, metrics in results["results"].items()}


def _numbers(metrics: dict[str, Any]) -> dict[str, float | None]:
    """What is a number among the metrics of one task, under short names."""
    numbers: dict[str, float | None] = {}
    for name, value in metrics.items():
        metric, comma, kind = name.partition(",")
        if not comma:
            continue  # the task's name, and counts of samples
        number = None if value == "N/A" else float(value)
        numbers[metric if kind == "none" else name] = None if number is None or math.isnan(number) else number
    return numbers
