"""Multiple-choice accuracy: the share of questions whose right choice is the likeliest continuation.

Zero-shot, by the rules of lm-eval 0.4, so that numbers compare with published ones. The metric is a module of
`evaluate` and loads without a network: ``evaluate.load(CHOICE_ACCURACY)``. Standard suites, few-shot prompts and other
metrics: `gisp_hf.evaluation.suites`.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from gisp_hf.evaluation.mode import evaluation_mode
from gisp_hf.upstream import cache_argument

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


class _Row(NamedTuple):
    """Token ids of a prompt and its continuation, and how many of them are the continuation's."""

    ids: list[int]
    answer: int


def continuation_log_likelihoods(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[tuple[str, str]],
    *,
    batch_size: int = 16,
) -> torch.Tensor:
    """``log p(continuation | prompt)`` in nats, summed over the continuation's tokens: (len(pairs),) float64, CPU.

    Log-probabilities are taken in float32. What exceeds the model's context is cut from the left of the prompt. Pairs
    with the same prompt read it once, if they stand in one batch.

    Raises:
        ValueError: a continuation has no token of its own or does not fit into the context, a prompt has no token, or
            ``batch_size`` is below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    context = context_length(model)
    rows = [_encode_pair(prompt, text, tokenizer=tokenizer, context=context) for prompt, text in pairs]
    results = torch.zeros(len(rows), dtype=torch.float64)
    with evaluation_mode(model):
        for groups in _batches([prompt for prompt, _ in pairs], rows, batch_size=batch_size):
            results[[i for group in groups for i in group]] = _score(model, [[rows[i] for i in g] for g in groups])
    return results


def _batches(prompts: Sequence[str], rows: Sequence[_Row], *, batch_size: int) -> Iterator[list[list[int]]]:
    """Batches of at most ``batch_size`` row numbers, grouped by prompt.

    Long ones first: little padding, and a batch that does not fit into memory fails at once.
    """
    by_prompt: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompts):
        by_prompt.setdefault(prompt, []).append(i)
    batch: list[list[int]] = []
    for numbers in sorted(by_prompt.values(), key=lambda numbers: -max(len(rows[i].ids) for i in numbers)):
        for start in range(0, len(numbers), batch_size):
            group = numbers[start : start + batch_size]
            if batch and sum(map(len, batch)) + len(group) > batch_size:
                yield batch
                batch = []
            batch.append(group)
    if batch:
        yield batch


def _score(model: PreTrainedModel, groups: Sequence[Sequence[_Row]]) -> torch.Tensor:
    """Log-likelihoods of the rows of all groups, one after the other: (n,) float64, CPU.

    What all rows of a group begin with is read once, into the key/value cache, and each row goes on from there.
    """
    heads = [_shared(group) for group in groups]
    owner = torch.tensor([number for number, group in enumerate(groups) for _ in group])  # (n,)
    rests = [torch.tensor(row.ids[len(head) :]) for head, group in zip(heads, groups) for row in group]
    answers = torch.tensor([row.answer for group in groups for row in group])  # tokens of each continuation
    lengths = torch.tensor([len(rest) - 1 for rest in rests])
    batch = pad_sequence(rests, batch_first=True).to(model.device)  # (n, T); the mask makes any pad token good
    starts = lengths - answers  # the position that predicts the first token of each continuation
    first = int(starts.min())
    position = torch.arange(batch.shape[1] - 1)
    mask = position < lengths[:, None]  # (n, T - 1)
    cache: dict[str, Any] = {"use_cache": False}
    seen = mask
    if any(heads):
        cache, read = _read(model, heads, owner)
        seen = torch.cat([read, mask], dim=1)  # (n, H + T - 1)
        cache["position_ids"] = (read.sum(1, keepdim=True) + position).to(model.device)
    logits = model(
        input_ids=batch[:, :-1],
        attention_mask=seen.long().to(model.device),
        logits_to_keep=batch.shape[1] - 1 - first,  # none for the prompts: they are most of the work
        **cache,
    ).logits  # (n, T - 1 - first, V)
    scored = (mask & (position >= starts[:, None]))[:, first:].to(logits.device)
    targets = batch[:, 1 + first :].to(logits.device)[scored]
    losses = F.cross_entropy(logits[scored].float(), targets, reduction="none")
    return -torch.stack([part.sum() for part in losses.split(answers.tolist())]).to("cpu").double()


def _shared(group: Sequence[_Row]) -> list[int]:
    """The tokens that all rows of a group begin with, before the first position that predicts a continuation's."""
    if len(group) == 1:  # it would be read alone in any case
        return []
    return list(os.path.commonprefix([row.ids[: len(row.ids) - 1 - row.answer] for row in group]))


def _read(
    model: PreTrainedModel, heads: Sequence[list[int]], owner: torch.Tensor
) -> tuple[dict[str, Any], torch.Tensor]:
    """Reads the beginnings of rows.

    Args:
        heads: one beginning a group; some may be empty.
        owner: (n,), the group of each row.

    Returns:
        the cache as an argument of the forward pass, with a copy for each row, and the mask of its positions, (n, H).
    """
    ids = pad_sequence([torch.tensor(head, dtype=torch.long) for head in heads], batch_first=True, padding_side="left")
    lengths = torch.tensor([len(head) for head in heads])
    mask = torch.arange(ids.shape[1]) >= ids.shape[1] - lengths[:, None]  # (G, H)
    cache = DynamicCache(config=model.config)
    argument = cache_argument(model, cache)
    model(
        input_ids=ids.to(model.device),
        attention_mask=mask.long().to(model.device),
        position_ids=(mask.cumsum(1) - 1).clamp(min=0).to(model.device),
        use_cache=True,
        logits_to_keep=1,
        **argument,
    )
    cache.batch_select_indices(owner.to(model.device))
    return {"use_cache": True, **argument}, mask[owner]


def _encode_pair(prompt: str, text: str, *, tokenizer: PreTrainedTokenizerBase, context: int | None) -> _Row:
    """Token ids of prompt and continuation.

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
    return _Row(ids if context is None else ids[-(context + 1) :], count)  # the last one is never read, only predicted


def context_length(model: PreTrainedModel) -> int | None:
    """The most tokens that the model was made for; None if its config does not say."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)
