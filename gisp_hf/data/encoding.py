"""Records -> token ids and labels, token ids -> blocks, and items -> padded batches."""

from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any, NamedTuple, cast

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from gisp_hf.data.records import Candidate, Messages, Objective, Record
from gisp_hf.losses.objectives import IGNORE_INDEX, encode_weight


class EmptyCompletionError(ValueError):
    """An answer without a token: there is no loss to take on it."""


class LongCompletionError(ValueError):
    """An answer that does not fit beside one token of its prompt."""


class CandidateCollator:
    """Pads sequences on the right, and lays the candidates of each question out as rows of their own.

    Takes items with ``input_ids`` and ``labels``: one sequence, or a list of sequences (the candidates of a question).
    Returns ``input_ids``, ``attention_mask`` and ``labels``, each (rows, longest), int64; padding is the pad token, 0
    and -100. The batch size of the Trainer thus counts *items*: a batch of 4 questions of 4 candidates has 16 rows.

    Args:
        tokenizer: gives the pad token.

    Raises:
        ValueError: the tokenizer has no pad token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.pad_token_id = pad_token_id(tokenizer)

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        input_ids = [sequence for item in features for sequence in _sequences(item["input_ids"])]
        labels = [sequence for item in features for sequence in _sequences(item["labels"])]
        lengths = torch.tensor([len(sequence) for sequence in input_ids])
        return {
            "input_ids": pad_sequence(input_ids, batch_first=True, padding_value=self.pad_token_id),
            "attention_mask": (torch.arange(int(lengths.max())) < lengths[:, None]).long(),
            "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX),
        }


class Encoded(NamedTuple):
    """One sequence of token ids, its labels (same length), and whether it is a correct answer."""

    input_ids: list[int]
    labels: list[int]
    correct: bool = True


def encode_completion(
    prompt: str | Messages, completion: str, *, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> dict[str, list[int]]:
    """Token ids of a prompt with its completion, and labels that leave only the completion in the loss.

    Both are tokenized in one go, as a model sees them in use; a token that spans the border belongs to the completion.
    Chat messages go through the tokenizer's chat template, the completion being the assistant's turn with the end mark
    that the template gives it. What exceeds ``max_length`` is cut from the left of the prompt, except for a
    beginning-of-text token, without which many models fall apart.

    Args:
        prompt: text, or a list of chat messages.
        completion: follows the prompt as it stands, including the space between them.
        tokenizer: its own special tokens are added to text, the template's to messages.
        max_length: most tokens in the result, at least 2.

    Returns:
        ``input_ids`` and ``labels`` of the same length; labels are -100 on the prompt.

    Raises:
        EmptyCompletionError: the completion has no token, or only white space.
        LongCompletionError: it has ``max_length`` tokens or more.
        ValueError: the prompt has no token, so the first answer token cannot be predicted; or messages were given to a
            tokenizer without a chat template.
    """
    if not completion.strip():
        raise EmptyCompletionError(f"completion {completion!r} is empty: give the answer's text")
    prompt_ids, ids = _tokenize_pair(prompt, completion, tokenizer)
    start = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(prompt_ids, ids, strict=False)))
    length = len(ids) - start  # of the completion
    if length == 0:
        raise EmptyCompletionError(f"completion {completion!r} adds no token to its prompt: give the answer's text")
    if start == 0:
        raise ValueError(
            f"prompt {prompt!r} has no token before completion {completion!r}: the answer's first token needs one to "
            "be predicted from"
        )
    if length >= max_length:
        raise LongCompletionError(
            f"completion of {length} tokens leaves no room for its prompt in max_length={max_length}: "
            f"use at least {length + 1}"
        )
    room = max_length - length
    kept = ids[:start]
    if start > room:
        first = kept[:1] if kept[0] == tokenizer.bos_token_id and room > 1 else []
        kept = first + kept[start - room + len(first) :]
    return {"input_ids": kept + ids[start:], "labels": [IGNORE_INDEX] * len(kept) + ids[start:]}


def encode_record(
    record: Record, tokenizer: PreTrainedTokenizerBase, *, objective: Objective, block_size: int
) -> list[Encoded]:
    """The sequences of one record: a text, or the candidates that the objective uses. An empty text has none.

    Raises:
        EmptyCompletionError, LongCompletionError: as `encode_completion`.
        ValueError: there is no correct candidate, or (margin) no incorrect one; and as `encode_completion`.
    """
    if isinstance(record, str):
        return [_document(tokenize(record, tokenizer), tokenizer)] if record.strip() else []
    _check_sides(record, objective)
    used = [candidate for candidate in record if candidate.correct or objective == "margin"]
    if objective == "language_modeling":
        pairs = [_tokenize_pair(candidate.prompt, candidate.completion, tokenizer) for candidate in used]
        return [_document(answered, tokenizer) for _, answered in pairs]
    pieces = []
    for candidate in used:
        row = encode_completion(candidate.prompt, candidate.completion, tokenizer=tokenizer, max_length=block_size)
        pieces.append(Encoded(row["input_ids"], row["labels"], candidate.correct))
    return pieces


def encode_question(piece: Sequence[Encoded], *, correct: int, incorrect: int) -> dict[str, list[list[int]]]:
    """A question as an item for the margin, each candidate's weight in the first of its labels.

    Args:
        piece: the candidates.
        correct: correct candidates in the whole calibration set.
        incorrect: the same for incorrect ones.
    """
    weights = {True: encode_weight(correct=True, count=correct), False: encode_weight(correct=False, count=incorrect)}
    return {
        "input_ids": [sequence.input_ids for sequence in piece],
        "labels": [[weights[sequence.correct], *sequence.labels[1:]] for sequence in piece],
    }


def pack_blocks(ids: Sequence[int], block_size: int) -> list[Encoded]:
    """Consecutive blocks of ``block_size`` token ids, all of them targets; an incomplete one at the end is dropped."""
    whole = len(ids) // block_size * block_size
    blocks = [list(ids[start : start + block_size]) for start in range(0, whole, block_size)]
    return [Encoded(block, block) for block in blocks]


def _check_sides(record: Sequence[Candidate], objective: Objective) -> None:
    sides = {candidate.correct for candidate in record}
    if True not in sides:
        raise ValueError("the question has no correct candidate: give at least one")
    if objective == "margin" and False not in sides:
        raise ValueError("the question has no incorrect candidate: add one, or use objective 'completion'")


def _document(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> Encoded:
    """A text, closed by the end-of-text token, so that the next one in a block starts afresh."""
    end = tokenizer.eos_token_id
    closed = ids if end is None or ids[-1:] == [end] else [*ids, end]
    return Encoded(closed, closed)


def _tokenize_pair(
    prompt: str | Messages, completion: str, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[int]]:
    """Token ids of the prompt alone, and of prompt and completion together."""
    if isinstance(prompt, str):
        return tokenize(prompt, tokenizer), tokenize(prompt + completion, tokenizer)
    messages = [dict(message) for message in prompt]
    answer = {"role": "assistant", "content": completion}
    alone = encode_prompt(prompt, tokenizer)
    answered = cast(str, tokenizer.apply_chat_template([*messages, answer], tokenize=False))
    # The template has written its special tokens already.
    return alone, tokenize(answered, tokenizer, special=False)


def encode_prompt(prompt: str | Messages, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of a prompt, as a model sees it before it answers: text, or chat messages through the template.

    Raises:
        ValueError: messages were given to a tokenizer without a chat template.
    """
    if isinstance(prompt, str):
        return tokenize(prompt, tokenizer)
    if tokenizer.chat_template is None:
        raise ValueError(
            f"prompt {prompt!r} is a list of messages, but the tokenizer has no chat template: give the prompt as "
            "text, or set tokenizer.chat_template"
        )
    messages = [dict(message) for message in prompt]
    alone = cast(str, tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    return tokenize(alone, tokenizer, special=False)


def tokenize(text: str, tokenizer: PreTrainedTokenizerBase, *, special: bool = True) -> list[int]:
    """Token ids, with the tokenizer's own special tokens or without, and without a warning about the length."""
    return tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Raises ValueError if there is none."""
    if tokenizer.pad_token_id is None:
        raise ValueError(
            "the tokenizer has no pad token: set one, for instance tokenizer.pad_token = tokenizer.eos_token "
            "(padding is masked, so which one does not matter)"
        )
    return tokenizer.pad_token_id


def _sequences(value: Any) -> list[torch.Tensor]:
    """An item's sequences, whether it holds one or a list of them."""
    nested = torch.as_tensor(value[0]).ndim == 1
    return [torch.as_tensor(sequence, dtype=torch.long) for sequence in (value if nested else [value])]
