"""Perplexity by the published protocol: windows that do not overlap."""

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel
from transformers.utils import logging

from gisp_hf.evaluation.mode import evaluation_mode


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
