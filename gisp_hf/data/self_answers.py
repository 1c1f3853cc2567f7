"""Answers that the model gives itself, as calibration data: the loss is on the answers alone.

Pruning by human text takes away what a model needs for its own way of answering (RESP, arXiv 2512.02185).
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from gisp_hf.atomic import write_text_atomic
from gisp_hf.data.encoding import Encoded, encode_prompt, pad_token_id
from gisp_hf.data.records import Messages
from gisp_hf.losses.objectives import IGNORE_INDEX
from gisp_hf.models.fingerprint import fingerprint
from gisp_hf.untrusted import read_json


@dataclass(frozen=True)
class AnswerSettings:
    """How the model answers.

    Attributes:
        max_new_tokens: most tokens of an answer, its end token included.
        batch_size: answers written at once.
        temperature: of sampling; 0 takes the most likely token each time.
        cache_dir: folder where the base model's answers are kept, and read again by the next run with the same model,
            prompts and settings; None keeps none.

    Raises:
        ValueError: if a value is out of range.
    """

    max_new_tokens: int = 256
    batch_size: int = 8
    temperature: float = 0.0
    cache_dir: str | Path | None = None

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.temperature < 0:
            raise ValueError(f"temperature must be 0 (the most likely token) or above, got {self.temperature:g}")


class AnsweredPrompts(Dataset):
    """Prompts with the answers that a model has given: ``input_ids`` and ``labels``, -100 on the prompt.

    A Trainer's data set that `answer` fills anew, in place, during a run. The number of items stays.

    Args:
        prompts: token ids of each.
        tokenizer: needs a pad token.
        settings: how to answer.
        seed: of sampling; each batch of each round has its own.
    """

    def __init__(
        self,
        prompts: Sequence[list[int]],
        tokenizer: PreTrainedTokenizerBase,
        *,
        settings: AnswerSettings,
        seed: int,
    ) -> None:
        self.prompts = [list(prompt) for prompt in prompts]
        self.tokenizer = tokenizer
        self.settings = settings
        self.seed = seed
        self.rows: list[Encoded] = []
        self.rounds: list[dict[str, Any]] = []  # one entry for each call of `answer`, for the record

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return {"input_ids": self.rows[index].input_ids, "labels": self.rows[index].labels}

    def answer(self, model: PreTrainedModel, /, **facts: Any) -> None:
        """Lets ``model`` answer all prompts, and takes these answers in the place of those before.

        Args:
            facts: about the model, for the record.
        """
        self.take(self.generate(model), **facts)

    def generate(self, model: PreTrainedModel) -> list[list[int]]:
        """The answers of ``model`` to all prompts, from the seed of this round. They are not taken yet."""
        seed = self.seed + len(self.rounds)
        return generate(model, self.prompts, self.tokenizer, settings=self.settings, seed=seed)

    def take(self, answers: Sequence[list[int]], **facts: Any) -> None:
        """Takes answers, token ids of one for each prompt, in the place of those before."""
        self.rows = [
            Encoded([*prompt, *answer], [IGNORE_INDEX] * len(prompt) + list(answer))
            for prompt, answer in zip(self.prompts, answers, strict=True)
        ]
        self.rounds.append({**facts, "answer_tokens": sum(map(len, answers)), "sha256": _sha256(answers)})

    @property
    def answers(self) -> list[list[int]]:
        """Token ids of the answers."""
        return [row.input_ids[len(prompt) :] for prompt, row in zip(self.prompts, self.rows)]


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    settings: AnswerSettings,
    seed: int,
) -> list[list[int]]:
    """Token ids of the model's answer to each prompt, up to its end token, which is the last one.

    The model's modes and the state of the random numbers are as before afterwards.
    """
    pad = pad_token_id(tokenizer)
    own = model.generation_config.eos_token_id if model.generation_config else None
    ends = own if own is not None else tokenizer.eos_token_id
    config = GenerationConfig(
        max_new_tokens=settings.max_new_tokens,
        do_sample=settings.temperature > 0,
        eos_token_id=ends,
        pad_token_id=pad,
        **({"temperature": settings.temperature, "top_k": 0, "top_p": 1.0} if settings.temperature > 0 else {}),
    )
    stops = set(ends if isinstance(ends, list) else [ends])
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))  # little padding
    answers: list[list[int]] = [[] for _ in prompts]
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices):
            for start in range(0, len(order), settings.batch_size):
                rows = order[start : start + settings.batch_size]
                longest = max(len(prompts[row]) for row in rows)
                ids = torch.full((len(rows), longest), pad)
                mask = torch.zeros_like(ids)
                for line, row in enumerate(rows):
                    ids[line, longest - len(prompts[row]) :] = torch.tensor(prompts[row])
                    mask[line, longest - len(prompts[row]) :] = 1
                torch.manual_seed(seed * 1_000_003 + start)
                output = model.generate(  # type: ignore[operator]
                    input_ids=ids.to(model.device),
                    attention_mask=mask.to(model.device),
                    generation_config=config,
                    use_cache=True,  # a Trainer switches it off in the model's config
                )
                for line, row in enumerate(rows):
                    answers[row] = _up_to_end(output[line, longest:].tolist(), stops)
    finally:
        for module, mode in modes:
            module.training = mode
    return answers


def _up_to_end(ids: list[int], stops: set[int | None]) -> list[int]:
    end = next((position for position, token in enumerate(ids) if token in stops), len(ids) - 1)
    return ids[: end + 1]


def answered_prompts(
    model: PreTrainedModel,
    prompts: Sequence[str | Messages],
    tokenizer: PreTrainedTokenizerBase,
    *,
    block_size: int,
    settings: AnswerSettings,
    seed: int,
) -> AnsweredPrompts:
    """Prompts with the answers of ``model``, from the cache where it holds them.

    Args:
        block_size: most tokens of prompt and answer; a longer prompt loses its left end.

    Raises:
        ValueError: if an answer of ``max_new_tokens`` leaves no room for a prompt, or a prompt has no token.
    """
    room = block_size - settings.max_new_tokens
    if room < 1:
        raise ValueError(
            f"max_new_tokens={settings.max_new_tokens} leaves no room for a prompt in block_size={block_size}; raise "
            "block_size, or lower max_new_tokens"
        )
    ids = [encode_prompt(prompt, tokenizer)[-room:] for prompt in prompts]
    for number, prompt in enumerate(ids):
        if not prompt:
            raise ValueError(f"prompt {number} has no token; drop it, or give it text")
    data = AnsweredPrompts(ids, tokenizer, settings=settings, seed=seed)
    weights = fingerprint(model.named_parameters())
    facts = {"model": model.name_or_path, "fingerprint": weights, "sparsity": 0.0}
    if settings.cache_dir is None:
        data.answer(model, **facts)
        return data
    wanted = {**asdict(settings), "seed": seed, "fingerprint": weights, "prompts": _sha256(ids)}
    del wanted["cache_dir"]
    key = hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()[:16]
    path = Path(settings.cache_dir) / f"answers-{key}.json"
    found = read_answers(path, wanted)
    if found is None:
        data.answer(model, **facts)
        write_answers(path, data.answers, wanted)
    else:
        data.take(found, **facts)
    return data


def write_answers(path: Path, answers: Sequence[list[int]], provenance: dict[str, Any]) -> None:
    """Writes answers with what they were made from, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomic(path, json.dumps({"provenance": provenance, "answers": list(answers)}) + "\n")


def read_answers(path: Path, provenance: dict[str, Any]) -> list[list[int]] | None:
    """The answers of a file, or None if there is none, or it was made from something else.

    Raises:
        ValueError: if the file is damaged.
    """
    if not path.is_file():
        return None
    found = read_json(path)
    if not isinstance(found, dict) or found.get("provenance") != provenance:
        return None
    answers = found.get("answers")
    whole = isinstance(answers, list) and all(
        isinstance(answer, list) and answer and all(type(token) is int and token >= 0 for token in answer)
        for answer in answers
    )
    if not whole:
        raise ValueError(f"{path} holds no answers; remove it, and they are generated anew")
    return answers


def _sha256(sequences: Sequence[list[int]]) -> str:
    return hashlib.sha256(json.dumps([list(sequence) for sequence in sequences]).encode()).hexdigest()
