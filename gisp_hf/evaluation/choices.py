"""Multiple-choice accuracy: the share of questions whose right choice is the likeliest continuation.

Zero-shot, by the rules of lm-eval 0.4, so that numbers compare with published ones. The metric is a module of
`evaluate` and loads without a network: ``evaluate.load(CHOICE_ACCURACY)``. Standard suites, few-shot prompts and other
metrics: `gisp_hf.evaluation.suites`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gisp_hf.evaluation.mode import evaluation_mode

CHOICE_ACCURACY = str(Path(__file__).with_name("metrics") / "choice_accuracy")


def multiple_choice_accuracy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Mapping[str, Any]],
    *,
    batch_size: int = 16,
) -> dict[str, float | None]:
    """The share of questions whose right choice is the likeliest continuation of its prompt.

    Args:
        model: a causal language model, on any device and in any dtype. Train and eval modes are left as they were.
        tokenizer: its own special tokens are added, as it is set up to.
        questions: ``{"prompt": text, "choices": [text, ...], "label": index of the right choice}``. A choice follows
            the prompt as it stands: begin it with a space where the language wants one.
        batch_size: choices scored at once. Changes speed and memory, not the protocol.

    Returns:
        ``accuracy`` (lm-eval: ``acc``) ranks choices by the sum of their tokens' log-probabilities;
        ``accuracy_normalized`` (``acc_norm``) divides it by the choice's number of characters, white space around it
        not counted. Both are fractions 0-1, with ``accuracy_stderr`` and ``accuracy_normalized_stderr``. Of equal
        choices the first counts, so keep the right answer from always standing first.

    Raises:
        ValueError: a question has no prompt, fewer than two choices, an empty choice, or a label outside its choices; a
            choice is longer than the model's context; there are no questions; or a log-likelihood is nan.
    """
    check_questions(questions)
    pairs = [(question["prompt"], choice) for question in questions for choice in question["choices"]]
    scores = iter(continuation_log_likelihoods(model, tokenizer, pairs, batch_size=batch_size).tolist())
    import evaluate  # takes three seconds

    return evaluate.load(CHOICE_ACCURACY, keep_in_memory=True).compute(
        predictions=[[next(scores) for _ in question["choices"]] for question in questions],
        references=[question["label"] for question in questions],
        lengths=[[len(choice.strip()) for choice in question["choices"]] for question in questions],
    )


def check_questions(questions: Sequence[Mapping[str, Any]]) -> None:
    """Refuses questions that cannot be scored.

    Raises:
        ValueError: as in `multiple_choice_accuracy`; the message names the question by its index.
    """
    if not questions:
        raise ValueError("questions is empty: give at least one")
    for i, question in enumerate(questions):
        if missing := {"prompt", "choices", "label"} - question.keys():
            raise ValueError(f"question {i} lacks {sorted(missing)}: give prompt, choices and label")
        choices, label = question["choices"], question["label"]
        if not question["prompt"].strip():
            raise ValueError(f"question {i} has the empty prompt {question['prompt']!r}: nothing predicts its choices")
        if isinstance(choices, str) or len(choices) < 2:
            raise ValueError(f"question {i} has choices {choices!r}: give a right and at least one wrong one")
        for choice in choices:
            if not choice.strip():
                raise ValueError(f"question {i} has the empty choice {choice!r}: give its text, or drop the question")
        if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < len(choices):
            raise ValueError(f"question {i}: label {label!r} is outside its {len(choices)} choices: count from 0")


def continuation_log_likelihoods(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[tuple[str, str]],
    *,
    batch_size: int = 16,
) -> torch.Tensor:
    """``log p(continuation | prompt)`` in nats, summed over the continuation's tokens: (len(pairs),) float64, CPU.

    Log-probabilities are taken in float32. What exceeds the model's context is cut from the left of the prompt.

    Raises:
        ValueError: a continuation has no token of its own or does not fit into the context, a prompt has no token, or
            ``batch_size`` is below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    context = context_length(model)
    encoded = [_encode_pair(prompt, text, tokenizer=tokenizer, context=context) for prompt, text in pairs]
    # long ones first: little padding, and a batch that does not fit into memory fails at once
    order = sorted(range(len(encoded)), key=lambda i: -len(encoded[i][0]))
    results = torch.zeros(len(encoded), dtype=torch.float64)
    with evaluation_mode(model):
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            ids = [torch.tensor(encoded[i][0]) for i in rows]
            lengths = torch.tensor([len(row) - 1 for row in ids])
            answers = torch.tensor([encoded[i][1] for i in rows])  # tokens of each continuation
            batch = pad_sequence(ids, batch_first=True).to(model.device)  # (B, T); the mask makes any pad token good
            starts = lengths - answers  # the position that predicts the first token of each continuation
            first = int(starts.min())
            position = torch.arange(batch.shape[1] - 1)
            mask = position < lengths[:, None]  # (B, T - 1)
            logits = model(
                input_ids=batch[:, :-1],
                attention_mask=mask.long().to(model.device),
                use_cache=False,
                logits_to_keep=batch.shape[1] - 1 - first,  # none for the prompts: they are most of the work
            ).logits  # (B, T - 1 - first, V)
            scored = (mask & (position >= starts[:, None]))[:, first:].to(logits.device)
            targets = batch[:, 1 + first :].to(logits.device)[scored]
            losses = F.cross_entropy(logits[scored].float(), targets, reduction="none")
            sums = torch.stack([part.sum() for part in losses.split(answers.tolist())])
            results[rows] = -sums.to("cpu").double()
    return results


def _encode_pair(
    prompt: str, text: str, *, tokenizer: PreTrainedTokenizerBase, context: int | None
) -> tuple[list[int], int]:
    """Token ids of prompt and continuation, and how many of them belong to the continuation.

    As lm-eval does: white space at the end of the prompt moves to the continuation, both are tokenized in one go, and
    what the prompt alone does not have tokens for is the continuation.
    """
    bare = prompt.rstrip()
    text = prompt[len(bare) :] + text
    start = len(tokenizer(bare, verbose=False)["input_ids"])
    ids = tokenizer(bare + text, verbose=False)["input_ids"]
    count = len(ids) - start
    if start < 1:
        raise ValueError(f"prompt {prompt!r} has no token: nothing predicts the first token of {text!r}")
    if count < 1:
        raise ValueError(f"continuation {text!r} adds no token to its prompt {bare[-40:]!r}: give a longer text")
    if context is not None and count > context:
        raise ValueError(f"continuation of {count} tokens does not fit into the model's context of {context}: cut it")
    return (ids if context is None else ids[-(context + 1) :]), count  # the last token is never read, only predicted


def context_length(model: PreTrainedModel) -> int | None:
    """The most tokens that the model was made for; None if its config does not say."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)
