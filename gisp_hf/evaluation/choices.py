"""How well a model decides and reasons: multiple-choice accuracy, and exact match of worked answers.

Both ask the model zero-shot and count as the field does (lm-eval 0.4), so that numbers compare with published ones. The
counting is done by two modules of `evaluate`, which load without a network: ``evaluate.load(CHOICE_ACCURACY)`` and
``evaluate.load(FINAL_NUMBER)``. Standard suites, few-shot prompts and other metrics: `gisp_hf.evaluation.suites`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import evaluate
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria

from gisp_hf.evaluation.perplexity import evaluation_mode

CHOICE_ACCURACY = str(Path(__file__).with_name("metrics") / "choice_accuracy")
FINAL_NUMBER = str(Path(__file__).with_name("metrics") / "final_number")


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
    context = _context_length(model)
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


class _Writes(StoppingCriteria):
    """Ends the rows whose text from position ``start`` on holds ``stop``.

    Not ``stop_strings`` of `generate`, which takes vocabularies apart and fails on those of whole words.
    """

    def __init__(self, stop: str, tokenizer: PreTrainedTokenizerBase, *, start: int):
        self.stop, self.tokenizer, self.start = stop, tokenizer, start

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        texts = self.tokenizer.batch_decode(input_ids[:, self.start :], skip_special_tokens=True)
        return torch.tensor([self.stop in text for text in texts], device=input_ids.device)


def _context_length(model: PreTrainedModel) -> int | None:
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


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
    context = _context_length(model)
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
