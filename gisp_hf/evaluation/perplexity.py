"""How good and how fast a model is: perplexity by the published protocol, and tokens per second."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import DynamicCache, PreTrainedModel
from transformers.utils import logging


@dataclass(frozen=True)
class Speed:
    """Throughput of one model, in tokens per second summed over the batch.

    ``prefill`` counts prompt tokens, all read in one forward pass. ``decode`` counts new tokens, made one at a time
    with the key/value cache.
    """

    prefill: float
    decode: float


@contextmanager
def evaluation_mode(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode and no gradients inside; the mode of every single module is as before afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:  # not model.train(mode): a user may have frozen only some modules in eval mode
            module.training = mode


def perplexity(
    model: PreTrainedModel, input_ids: torch.Tensor, *, window: int, batch_size: int = 8, progress: bool = False
) -> float:
    """Perplexity of ``model`` on one long text, cut into windows that do not overlap.

    Every window is scored alone, with no context from the one before; its first token is given, so ``window - 1`` of
    its tokens are predicted. The tokens after the last whole window are dropped. The result is
    ``exp(sum of -log p / number of predicted tokens)``. Numbers compare only between runs with the same window: a
    longer one gives more context and a lower perplexity. GISP (arXiv 2510.18030) reports WikiText-2 with windows of
    128 tokens.

    Args:
        model: a causal language model, on any device and in any dtype. Train and eval modes are left as they were.
        input_ids: (n_tokens,), integers, on any device: the whole text as one sequence.
        window: tokens in a window, at least 2.
        batch_size: windows scored at once. Changes speed and memory, not the protocol. One batch holds
            ``batch_size * window * vocabulary`` logits in float32.
        progress: show a progress bar over the batches.

    Returns:
        The perplexity, 1 or more. Losses are taken in float32 and added up in float64. A model that overflows gives
        ``inf`` or ``nan``, as it is.

    Raises:
        ValueError: ``input_ids`` is not one-dimensional or shorter than one window, ``window`` is below 2, or
            ``batch_size`` below 1.
    """
    if window < 2:
        raise ValueError(f"window must be at least 2, got {window}: the first token of a window is never predicted")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if input_ids.ndim != 1:
        raise ValueError(
            f"input_ids must be one sequence of shape (n_tokens,), got shape {tuple(input_ids.shape)}: "
            "concatenate the texts to one tensor"
        )
    count = len(input_ids) // window
    if count == 0:
        raise ValueError(
            f"input_ids holds {len(input_ids)} tokens, fewer than one window of {window}: "
            "give a longer text or a smaller window"
        )

    windows = input_ids[: count * window].reshape(count, window)  # (count, window)
    total = torch.zeros((), dtype=torch.float64)
    with evaluation_mode(model):
        for batch in logging.tqdm(windows.split(batch_size), desc="perplexity", disable=not progress):
            batch = batch.to(model.device)  # (B, window)
            logits = model(input_ids=batch, use_cache=False).logits[:, :-1].float()  # (B, window - 1, V)
            # a model split over devices returns its logits on the last one
            targets = batch[:, 1:].to(logits.device)
            losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
            total += losses.to("cpu").double().sum()  # on the CPU: not every accelerator knows float64
    return float(torch.exp(total / (count * (window - 1))))


def _read_clock(device: torch.device) -> float:
    """Seconds, once all work queued on ``device`` is done."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def _time_once(model: PreTrainedModel, prompt: torch.Tensor, *, new_tokens: int) -> tuple[float, float]:
    """Seconds for the prompt (B, T), and for ``new_tokens`` greedy steps after it."""
    cache = DynamicCache(config=model.config)
    start = _read_clock(model.device)
    # as in generate(): only the last position goes through the LM head
    logits = model(input_ids=prompt, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    token = logits[:, -1:].argmax(-1).to(prompt.device)  # (B, 1)
    prefilled = _read_clock(model.device)
    for _ in range(new_tokens):  # explicit steps: an end-of-text token must not shorten the run of one model
        logits = model(input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
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
