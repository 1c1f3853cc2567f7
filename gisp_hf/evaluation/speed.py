"""Tokens per second of several models, measured side by side."""

import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from transformers import DynamicCache, PreTrainedModel

from gisp_hf.evaluation.mode import evaluation_mode
from gisp_hf.upstream import cache_argument


@dataclass(frozen=True)
class Speed:
    """Throughput of one model, in tokens per second summed over the batch.

    ``prefill`` counts prompt tokens, all read in one forward pass. ``decode`` counts new tokens, made one at a time
    with the key/value cache.
    """

    prefill: float
    decode: float


def _read_clock(device: torch.device) -> float:
    """Seconds, once all work queued on ``device`` is done."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def _time_once(model: PreTrainedModel, prompt: torch.Tensor, *, new_tokens: int) -> tuple[float, float]:
    """Seconds for the prompt (B, T), and for ``new_tokens`` greedy steps after it."""
    cache = cache_argument(model, DynamicCache(config=model.config))
    start = _read_clock(model.device)
    # as in generate(): only the last position goes through the LM head
    logits = model(input_ids=prompt, **cache, use_cache=True, logits_to_keep=1).logits
    token = logits[:, -1:].argmax(-1).to(prompt.device)  # (B, 1)
    prefilled = _read_clock(model.device)
    for _ in range(new_tokens):  # explicit steps: an end-of-text token must not shorten the run of one model
        logits = model(input_ids=token, **cache, use_cache=True, logits_to_keep=1).logits
        token = logits[:, -1:].argmax(-1).to(prompt.device)
    return prefilled - start, _read_clock(model.device) - prefilled


def measure_speed(
    models: Mapping[str, PreTrainedModel],
    *,
    prompt_tokens: int = 256,
    new_tokens: int = 32,
    batch_size: int = 1,
    repeats: int = 3,
) -> dict[str, Speed]:
    """Prefill and decode speed of several models, measured side by side.

    The models take turns, so that a slow moment of the machine hits all of them, and each keeps its best repeat:
    other load can only make a run slower. Every model runs once beforehand, untimed. The prompt is random tokens from
    a fixed seed; decoding is greedy, with a ``DynamicCache``, and goes on past any end-of-text token.

    Args:
        models: name -> causal language model, each on its own device and in its own dtype. All are held in memory at
            once. Train and eval modes are left as they were.
        prompt_tokens: length of the prompt in tokens.
        new_tokens: forward passes of one token each after the prompt.
        batch_size: sequences at once.
        repeats: timed runs of each model.

    Returns:
        name -> ``Speed``, in the order of ``models``.

    Raises:
        ValueError: no model is given, or one of the counts is below 1.
    """
    counts = {
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "batch_size": batch_size,
        "repeats": repeats,
    }
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if not models:
        raise ValueError("models is empty: give at least one model to measure")

    times: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    for turn in range(repeats + 1):
        for name, model in models.items():
            generator = torch.Generator().manual_seed(0)
            prompt = torch.randint(model.config.vocab_size, (batch_size, prompt_tokens), generator=generator)
            with evaluation_mode(model):
                seconds = _time_once(model, prompt.to(model.device), new_tokens=new_tokens)
            if turn > 0:  # the first turn warms up
                times[name].append(seconds)
    return {
        name: Speed(
            prefill=batch_size * prompt_tokens / min(prefill for prefill, _ in runs),
            decode=batch_size * new_tokens / min(decode for _, decode in runs),
        )
        for name, runs in times.items()
    }
