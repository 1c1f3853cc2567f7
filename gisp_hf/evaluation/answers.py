"""Exact match of worked answers: greedy decoding, and the final number of each answer.

The rules are those of lm-eval 0.4, so that numbers compare with published ones. The metric is a module of `evaluate`
and loads without a network: ``evaluate.load(FINAL_NUMBER)``.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria

from gisp_hf.evaluation.choices import context_length
from gisp_hf.evaluation.mode import evaluation_mode

FINAL_NUMBER = str(Path(__file__).with_name("metrics") / "final_number")


def exact_match(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[Mapping[str, str]],
    *,
    max_new_tokens: int = 256,
    batch_size: int = 8,
    stop: str | None = "Question:",
) -> dict[str, float | None]:
    """The share of questions that the model works out to the right final number, with greedy decoding.

    Args:
        model: as in `multiple_choice_accuracy`.
        tokenizer: needs a pad token.
        records: ``{"prompt": text, "completion": worked answer}``, as for calibration; the completion ends in GSM8K's
            ``#### number``, or is the bare number.
        max_new_tokens: most tokens of an answer. One that is cut before its number counts as wrong.
        batch_size: answers written at once.
        stop: an answer ends where the model begins to write this; None lets it go on to its end token.

    Returns:
        ``exact_match_strict`` (the number behind ``####``) and ``exact_match_flexible`` (the last number of the
        answer), fractions 0-1, each with its ``_stderr``. The rules are in ``evaluate.load(FINAL_NUMBER).description``.

    Raises:
        ValueError: there are no records, a prompt or completion is empty, a completion does not end in a number, a
            count is below 1, the answer leaves no room for a prompt, or the tokenizer has no pad token.
    """
    if not records:
        raise ValueError("records is empty: give at least one")
    for i, record in enumerate(records):
        for key in ("prompt", "completion"):
            if not record.get(key, "").strip():
                raise ValueError(f"record {i} has no {key}: give its text, or drop the record")
    answers = generate_answers(
        model,
        tokenizer,
        [record["prompt"] for record in records],
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        stop=stop,
    )
    import evaluate  # takes three seconds

    return evaluate.load(FINAL_NUMBER, keep_in_memory=True).compute(
        predictions=answers, references=[record["completion"] for record in records]
    )


def generate_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    batch_size: int = 8,
    stop: str | None = None,
) -> list[str]:
    """What the model writes after each prompt, greedily, without special tokens and without ``stop`` and what follows.

    Raises:
        ValueError: as in `exact_match`.
    """
    for name, value in {"max_new_tokens": max_new_tokens, "batch_size": batch_size}.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if tokenizer.pad_token_id is None:
        raise ValueError("the tokenizer has no pad token: set one, such as tokenizer.pad_token = tokenizer.eos_token")
    context = context_length(model)
    if context is not None and max_new_tokens >= context:
        raise ValueError(
            f"max_new_tokens ({max_new_tokens}) leaves no room for a prompt in the model's context of {context}"
        )
    room = None if context is None else context - max_new_tokens
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    answers = [""] * len(prompts)
    # a fresh one: sampling settings that come with an instruction-tuned model must not change a measurement
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=model.generation_config.eos_token_id if model.generation_config else tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with evaluation_mode(model):
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            inputs = tokenizer(
                [prompts[i] for i in rows], return_tensors="pt", padding=True, padding_side="left", verbose=False
            )
            ids, mask = inputs["input_ids"], inputs["attention_mask"]
            if room is not None:
                ids, mask = ids[:, -room:], mask[:, -room:]
            output = model.generate(  # type: ignore[operator]  # nn.Module.__getattr__ hides the method
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                generation_config=config,
                stopping_criteria=[_Writes(stop, tokenizer, start=ids.shape[1])] if stop else [],
            )
            texts = tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
            for i, text in zip(rows, texts):
                answers[i] = text.split(stop)[0] if stop else text
    return answers


class _Writes(StoppingCriteria):
    """Ends the rows whose text from position ``start`` on holds ``stop``.

    Not ``stop_strings`` of `generate`, which takes vocabularies apart and fails on those of whole words.
    """

    def __init__(self, stop: str, tokenizer: PreTrainedTokenizerBase, *, start: int):
        self.stop, self.tokenizer, self.start = stop, tokenizer, start

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        texts = self.tokenizer.batch_decode(input_ids[:, self.start :], skip_special_tokens=True)
        return torch.tensor([self.stop in text for text in texts], device=input_ids.device)
