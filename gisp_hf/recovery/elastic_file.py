"""``write_elastic``: the elastic checkpoint of a run, from its removal order and the files of the base model."""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from gisp_hf.data import Calibration
from gisp_hf.levels.elastic import elastic_class, elastic_table, make_elastic, save_elastic, set_norms
from gisp_hf.levels.files import CONFIG_FILE, GENERATION_FILE, Files, empty_model, read_model_config
from gisp_hf.levels.materialize import load_tokenizer_of, load_trajectory, open_base_of
from gisp_hf.levels.weights import stored_tensors
from gisp_hf.models.dtype import slow_factor
from gisp_hf.pruning.trajectory import Trajectory
from gisp_hf.recovery.batches import Batch
from gisp_hf.recovery.config import RestoreConfig
from gisp_hf.recovery.elastic import FULL, SharedFit, full_weight, level_weights, shared_weights
from gisp_hf.recovery.elastic_norms import train_norms
from gisp_hf.recovery.layers import Layers, ModelWeights, shell_of
from gisp_hf.recovery.restore import batches_for, draw
from gisp_hf.recovery.training import norm_arguments
from gisp_hf.untrusted import odd_contents

Streams = Literal["own", "unpruned"]
Norms = Literal["base", "levels", "all"]


def write_elastic(
    repo_or_folder: str | Path,
    output_dir: str | Path,
    *,
    levels: Sequence[float] | None = None,
    config: RestoreConfig | None = None,
    calibration: Calibration | None = None,
    weights: Mapping[float, float] | None = None,
    streams: Streams = "unpruned",
    full_apart: bool = False,
    norms: Norms = "base",
    base_model: str | Path | None = None,
    base_revision: str | None = None,
    revision: str | None = None,
    token: str | None = None,
    endpoint: str | None = None,
    progress: bool = True,
) -> Path:
    """Writes one checkpoint from which every level can be loaded, and between which a loaded model can switch.

    The unpruned model is in memory once.

    Args:
        repo_or_folder: the output folder of a run, or a repository with its trajectory.
        output_dir: must not exist; it appears once everything is written.
        levels: sparsities in (0, 1) of the table in the config, which the shared weights are made for; those of the run
            if None. Others can be set all the same.
        config: calibration text and ridge of the shared output projections; None, without ``calibration``: all weights
            stay those of the unpruned model.
        calibration: of `load_calibration`, in place of ``config.data``.
        weights: sparsity -> weight in the fit (`level_weights`). Levels have 1 by default, full width 12, and 100 with
            the norms of "levels", which repair the levels.
        streams: as in `shared_weights`.
        full_apart: also keep the unpruned output projections, for full width.
        norms: "base": all levels have those of the unpruned model; "levels": those of each level are trained on the
            calibration text, in one pass (`train_norms`); "all": those of the full width too, which is not the unpruned
            model then. Other text or another training: `train_norms` and `set_norms` on a model of this file.
        base_model, base_revision, revision, token, endpoint: as in `gisp_hf.load_level`.
        progress: show a bar.

    Returns:
        ``output_dir``.

    Raises:
        FileExistsError: if ``output_dir`` exists.
        FileNotFoundError: if there is no trajectory or no base model.
        ValueError: if the base is not the model of the trajectory, its family has no elastic class, or a level lies
            beyond the trajectory. Nothing is written.
        FloatingPointError: if something on the way is not finite. Nothing is written.
    """
    output_dir = Path(output_dir)
    if output_dir.exists():
        raise FileExistsError(f"{output_dir} exists already; remove it or choose another output folder")
    trajectory = load_trajectory(repo_or_folder, revision=revision, token=token, endpoint=endpoint)
    levels = tuple(sorted(levels or trajectory.config.sparsity_levels))
    elastic_table(trajectory, levels)  # refuses levels beyond the trajectory
    shares = level_weights(levels, full_weight(norms), others=weights)
    wanted = config is not None or calibration is not None
    if full_apart and not wanted:
        raise ValueError("full_apart keeps the unpruned output projections beside shared ones; give calibration text")
    if norms != "base" and not wanted:
        raise ValueError("norms are trained on the calibration text; give one")
    base = open_base_of(trajectory, base_model, base_revision, token=token, endpoint=endpoint)
    model = _load_base(base)
    trajectory.check_base(model)
    tokenizer = load_tokenizer_of(base)
    fits: list[SharedFit] = []
    facts: dict[str, Any] | None = None
    if wanted:
        config = config or RestoreConfig()
        calibration = calibration or draw(config, tokenizer)
        batches = batches_for(calibration, config)
        fits = share(model, trajectory, batches, weights=shares, config=config, streams=streams, progress=progress)
        facts = record(fits, shares, config=config, streams=streams, full_apart=full_apart)
        facts |= {"base": asdict(trajectory.base), "calibration": calibration.provenance}
    shared = {fit.parameter: fit.weight for fit in fits}
    make_elastic(model, trajectory, levels=levels, weights=shared, full_apart=full_apart)
    if norms != "base":
        assert calibration is not None and config is not None and facts is not None
        widths = (FULL, *levels) if norms == "all" else levels
        facts["norms"] = give_norms(model, calibration, widths=widths, seed=config.seed)
    return save_elastic(model, output_dir, trajectory=trajectory, tokenizer=tokenizer, facts=facts)


def share(
    model: PreTrainedModel,
    trajectory: Trajectory,
    batches: Sequence[Batch],
    *,
    weights: Mapping[float, float],
    config: RestoreConfig,
    streams: Streams = "unpruned",
    progress: bool = True,
) -> list[SharedFit]:
    """`shared_weights` of a model in memory, on its device; the model is only read."""
    run_in = torch.float32 if slow_factor(model.dtype, model.device) > 1 else model.dtype
    layers = Layers(shell_of(model), ModelWeights(model), device=model.device, dtype=run_in)
    fits = shared_weights(
        layers, trajectory, batches, weights=weights, config=config, streams=streams, progress=progress
    )
    return list(fits)


def give_norms(model: PreTrainedModel, data: Calibration, *, widths: Sequence[float], seed: int = 0) -> dict[str, Any]:
    """Trains the norms of an elastic model at some widths on text and puts them in; returns facts of the trainings."""
    with tempfile.TemporaryDirectory(prefix="gisp-") as folder:
        arguments = norm_arguments(folder, data, seed=seed)
        norms, facts = train_norms(model, data, arguments, widths=widths)
    set_norms(model, norms)
    return facts


def record(
    fits: Sequence[SharedFit],
    weights: Mapping[float, float],
    *,
    config: RestoreConfig,
    streams: Streams,
    full_apart: bool,
) -> dict[str, Any]:
    """How the shared weights were made, and the mean relative error of the projections at each level; JSON-ready."""
    errors = {
        f"{level:g}": [sum(fit.errors[level][side] for fit in fits) / len(fits) for side in (0, 1)] for level in weights
    }
    return {
        "config": config.to_dict(),
        "streams": streams,
        "full_apart": full_apart,
        "weights": {f"{level:g}": weight for level, weight in weights.items()},
        "errors": errors,
    }


def _load_base(base: Files) -> PreTrainedModel:
    """The unpruned model in memory, in the dtype of its files.

    Raises:
        FileNotFoundError: if it has no safetensors.
        ValueError: if a file is damaged, or the family has no elastic class.
    """
    config_file = base.fetch(CONFIG_FILE)
    assert config_file is not None
    elastic_class(empty_model(read_model_config(config_file.parent, label=base.label), label=base.label))
    for filename in (*sorted(set(stored_tensors(base).values())), GENERATION_FILE):
        base.fetch(filename)  # into the cache, from the endpoint and the commit that were asked for
    with odd_contents(f"the model of {base.label}"):
        return AutoModelForCausalLM.from_pretrained(config_file.parent, trust_remote_code=False, dtype="auto")
