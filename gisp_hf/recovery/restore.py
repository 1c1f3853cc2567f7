"""``restore``: a level in memory, made better by a re-fit of its output projections in closed form."""

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gisp_hf.data import Calibration, load_calibration
from gisp_hf.levels.files import CONFIG_FILE, Files, empty_model, pin, read_model_config
from gisp_hf.levels.weights import FileWeights
from gisp_hf.models import discover
from gisp_hf.models.dtype import slow_factor
from gisp_hf.models.fingerprint import combine_checksums
from gisp_hf.models.shards import is_sharded
from gisp_hf.recovery.batches import Batch, batches_of, mask_of
from gisp_hf.recovery.config import RestoreConfig
from gisp_hf.recovery.fit import Fit, restored_weights
from gisp_hf.recovery.layers import Layers, ModelWeights, Weights, shell_of
from gisp_hf.recovery.record import Restoration

logger = logging.getLogger(__name__)

ENOUGH_TOKENS = 10  # for each input of a projection; with fewer the ridge decides

Text = Calibration | Iterable[Mapping[str, Any]]


def restore(
    level: PreTrainedModel,
    base: PreTrainedModel | Files | str | Path,
    calibration: Text,
    config: RestoreConfig | None = None,
    *,
    base_revision: str | None = None,
    progress: bool = True,
) -> Restoration:
    """Fits the output projections of a pruned model anew, in place, so that it does again what the base model does.

    For each decoder layer in order, first ``o_proj``, then ``down_proj``, by ridge regression on the calibration
    tokens (`gisp_hf.recovery.fit`). Everything else stays bit-identical. With several processes
    (``torch.distributed``) each takes its share of the batches; all must call this and get the same weights.

    Args:
        level: the pruned model. Layers run on its device.
        base: the unpruned model: in memory; or a folder or Hub id with safetensors, which is read layer by layer.
        calibration: of `load_calibration`; or batches (``input_ids`` (B, T), perhaps ``attention_mask``) or examples
            (``input_ids`` (T,)). Every token of the attention mask counts, or those of answers alone (``positions``).
        config: the defaults of `RestoreConfig` if None. Its ``data`` and ``seed`` are not used here.
        base_revision: of ``base`` on the Hub.
        progress: show a bar with the relative error of each projection before and after.

    Returns:
        the record: settings, tokens, errors of every projection.

    Raises:
        ValueError: if the two models do not belong together, or there are no tokens.
        FloatingPointError: if something on the way is not finite. The level is then as it was.
    """
    config = config or RestoreConfig()
    if is_sharded(level.parameters()):
        raise ValueError("the level is sharded over processes; save it, and restore the folder on one process each")
    shell, weights = open_base(base, revision=base_revision)
    fits = restored_fits(
        shell_of(level),
        ModelWeights(level),
        shell,
        weights,
        batches_for(calibration, config),
        config=config,
        device=level.device,
        dtype=level.dtype,
        progress=progress,
    )
    found = list(fits)  # all of them before the first is put in its place
    with torch.no_grad():
        for fit in found:
            level.get_parameter(fit.parameter).copy_(fit.weight)
    provenance = calibration.provenance if isinstance(calibration, Calibration) else {}
    return record_of(found, shell_of(level), shell, config=config, provenance=provenance)


def open_base(
    base: PreTrainedModel | Files | str | Path, *, revision: str | None = None
) -> tuple[PreTrainedModel, Weights]:
    """The unpruned model without weights, and its weights: in memory, or in files.

    Raises:
        FileNotFoundError: if there is no such folder or repository, or no safetensors in it.
        ValueError: if the checkpoint is damaged.
    """
    if isinstance(base, PreTrainedModel):
        return shell_of(base), ModelWeights(base)
    asked = base if isinstance(base, Files) else Files(base, revision, None, None)
    files, config_file = pin(asked, CONFIG_FILE)
    if config_file is None:
        raise FileNotFoundError(f"the base model was not found: {files.label} holds no {CONFIG_FILE}")
    shell = empty_model(read_model_config(config_file.parent, label=files.label), label=files.label)
    return shell, FileWeights(files, shell)


def draw(config: RestoreConfig, tokenizer: PreTrainedTokenizerBase | None) -> Calibration:
    """The calibration set that the settings name.

    Raises:
        ValueError: if they name none, there is no tokenizer, or the data cannot give the tokens.
    """
    if config.data is None:
        raise ValueError(
            "restoration needs calibration text: RestoreConfig(data=...) names it, as load_calibration does"
        )
    if tokenizer is None:
        raise ValueError("the base model has no tokenizer, so no calibration text can be encoded; add its files")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # padding is masked
    return load_calibration(config.data, tokenizer, tokens=config.tokens, seed=config.seed)


def batches_for(calibration: Text, config: RestoreConfig) -> list[Batch]:
    """At most ``config.tokens`` tokens of the calibration set.

    Raises:
        ValueError: if it holds none, or none in answers where these alone count.
    """
    if isinstance(calibration, Calibration):
        return batches_of(
            calibration.dataset,
            batch_size=config.batch_size,
            tokens=config.tokens,
            collate=calibration.collator,
            answers=config.answers,
        )
    return batches_of(calibration, batch_size=config.batch_size, tokens=config.tokens, answers=config.answers)


def restored_fits(
    shell: PreTrainedModel,
    weights: Weights,
    base_shell: PreTrainedModel,
    base_weights: Weights,
    batches: list[Batch],
    *,
    config: RestoreConfig,
    device: torch.device,
    dtype: torch.dtype,
    progress: bool = True,
) -> Iterable[Fit]:
    """The restored weights of a level, one after the other (`gisp_hf.recovery.fit.restored_weights`).

    Args:
        shell, weights: the level.
        base_shell, base_weights: the unpruned model.
        device: where layers run.
        dtype: of the level. Layers run in it, or in float32 where that is faster.

    Raises:
        ValueError: if the two models do not belong together.
    """
    sparsity = sparsity_between(shell, base_shell)
    run_in = torch.float32 if slow_factor(dtype, device) > 1 else dtype
    tokens = sum(_count(batch) for batch in batches)
    widest = max(block.size * block.members[-1].width for block in discover(shell).blocks)
    if tokens < ENOUGH_TOKENS * widest:
        logger.warning(
            "%d calibration tokens for projections of up to %d inputs: ten tokens an input are better", tokens, widest
        )
    return restored_weights(
        Layers(shell, weights, device=device, dtype=run_in),
        Layers(base_shell, base_weights, device=device, dtype=run_in),
        batches,
        config=config,
        blend=config.blend_at(sparsity),
        progress=progress,
    )


def sparsity_between(level: PreTrainedModel, base: PreTrainedModel) -> float:
    """The share of the base's decoder parameters that a level of it lacks.

    Raises:
        ValueError: if the level cannot be one of this base.
    """
    small, large = discover(level), discover(base)
    fits = (
        small.architecture == large.architecture
        and [block.name for block in small.blocks] == [block.name for block in large.blocks]
        and all(one.cost == other.cost and one.size <= other.size for one, other in zip(small.blocks, large.blocks))
    )
    if not fits:
        raise ValueError(
            f"the level ({small.architecture}, {small.num_layers} layers, {small.total:,} parameters in them) cannot "
            f"come from this base ({large.architecture}, {large.num_layers} layers, {large.total:,} parameters); give "
            "the unpruned model that it was cut from"
        )
    return 1 - small.total / large.total


def record_of(
    fits: list[Fit],
    level: PreTrainedModel,
    base: PreTrainedModel,
    *,
    config: RestoreConfig,
    provenance: Mapping[str, Any],
    facts: Mapping[str, Any] | None = None,
) -> Restoration:
    """The record of what was done.

    Args:
        level, base: with or without weights; their sizes are read.
        provenance: of the calibration text.
        facts: of the base: id, revision, fingerprint.
    """
    sparsity = sparsity_between(level, base)
    return Restoration(
        config=config,
        sparsity=sparsity,
        blend=config.blend_at(sparsity),
        tokens=fits[0].tokens,
        errors=tuple(fit.error for fit in fits),
        changed=tuple(fit.parameter for fit in fits),
        fingerprint=combine_checksums(fit.checksum for fit in fits),
        calibration=provenance,
        base=facts or {},
    )


def _count(batch: Batch) -> int:
    mask = mask_of(batch)
    return batch["input_ids"].numel() if mask is None else int(mask.sum())
