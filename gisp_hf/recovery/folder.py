"""A restored level as a folder, from a run's folder or repository and the files of the base model.

No model is in memory: layers are read one at a time, from the level and from the base, and each restored weight is
written over the old one in a copy of the level.
"""

import shutil
from dataclasses import asdict
from pathlib import Path

import torch

from gisp_hf.atomic import replace_folder, unique_beside
from gisp_hf.config import level_name
from gisp_hf.data import Calibration
from gisp_hf.levels.files import Files, empty_model, read_model_config
from gisp_hf.levels.manifest import CHANGING_FILES, MANIFEST_FILE, check_manifest, write_manifest
from gisp_hf.levels.materialize import load_tokenizer_of, load_trajectory, materialize, open_base_of
from gisp_hf.levels.weights import FileWeights, overwrite_tensors
from gisp_hf.models.shards import all_ranks
from gisp_hf.pruning.trajectory import Trajectory
from gisp_hf.recovery.config import RestoreConfig
from gisp_hf.recovery.fit import Fit
from gisp_hf.recovery.lora_record import is_recovered
from gisp_hf.recovery.record import Restoration, is_restored
from gisp_hf.recovery.restore import batches_for, draw, open_base, record_of, restored_fits


def restore_level(
    repo_or_folder: str | Path,
    output_dir: str | Path,
    *,
    sparsity: float,
    config: RestoreConfig,
    calibration: Calibration | None = None,
    base_model: str | Path | None = None,
    base_revision: str | None = None,
    revision: str | None = None,
    token: str | None = None,
    endpoint: str | None = None,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> Path:
    """Writes a restored level as an ordinary checkpoint, with ``restoration.json`` beside it.

    A level that the folder holds is copied; any other is cut out of the base model first, which takes the memory of the
    pruned model. After that, memory holds one layer of each model, a Gram matrix and the hidden states.

    Args:
        repo_or_folder: the output folder of a run, or a repository with its levels.
        output_dir: must not exist; it appears once everything is written.
        sparsity: a fraction of the decoder layers' parameters.
        config: settings; ``config.data`` names the calibration text if ``calibration`` is None.
        calibration: of `load_calibration`, with the tokenizer of the base model.
        base_model, base_revision, revision, token, endpoint: as in `gisp_hf.load_level`.
        device: where layers run; the accelerator if there is one, else the CPU.
        progress: show a bar.

    Returns:
        ``output_dir``.

    Raises:
        FileExistsError: if ``output_dir`` exists.
        FileNotFoundError, ValueError: as `gisp_hf.load_level`; also if the level is restored already, or several
            processes call this.
        FloatingPointError: if something on the way is not finite. Nothing is written then.
    """
    output_dir = Path(output_dir)
    if all_ranks() is not None:
        raise ValueError(
            "restore_level runs in one process; with several, restore the model in memory: gisp_hf.restore"
        )
    if output_dir.exists():
        raise FileExistsError(f"{output_dir} exists already; remove it or choose another output folder")
    saved = Path(repo_or_folder) / level_name(sparsity)
    temporary = unique_beside(output_dir)
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    try:
        if saved.is_dir():
            if is_recovered(saved):
                raise ValueError(f"{saved} was trained after pruning; restore the level first, then train it")
            if is_restored(saved):
                raise ValueError(f"{saved} is restored already; use it as it is, or restore from a run that is not")
            check_manifest(saved)
            trajectory = Trajectory.load(saved)
        else:
            trajectory = load_trajectory(repo_or_folder, revision=revision, token=token, endpoint=endpoint)
            trajectory.prefix(sparsity)  # refuses what lies beyond its end
        base = open_base_of(trajectory, base_model, base_revision, token=token, endpoint=endpoint)
        calibration = calibration or draw(config, load_tokenizer_of(base))  # before the weights, which take time
        if saved.is_dir():
            shutil.copytree(saved, temporary, ignore=shutil.ignore_patterns(*CHANGING_FILES, MANIFEST_FILE, ".*"))
        else:
            materialize(
                repo_or_folder,
                temporary,
                sparsity=sparsity,
                base_model=base_model,
                base_revision=base_revision,
                revision=revision,
                token=token,
                endpoint=endpoint,
            )
        _restore_files(
            temporary,
            base,
            trajectory=trajectory,
            calibration=calibration,
            config=config,
            device=device,
            progress=progress,
        )
        replace_folder(temporary, output_dir)
    except BaseException:  # Ctrl-C too: nothing half-written stays behind
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return output_dir


def _restore_files(
    folder: Path,
    base: Files,
    *,
    trajectory: Trajectory,
    calibration: Calibration,
    config: RestoreConfig,
    device: str | torch.device | None,
    progress: bool,
) -> None:
    """Restores the level in a folder, which nobody else uses, in place."""
    base_shell, base_weights = open_base(base)
    assert isinstance(base_weights, FileWeights)
    if (there := base_weights.fingerprint()) != trajectory.base.fingerprint:
        raise ValueError(
            f"the weights of {base.label} are not those that the level was made from: fingerprint {there[:12]}, "
            f"expected {trajectory.base.fingerprint[:12]}; base_model= names the unpruned model"
        )
    shell = empty_model(read_model_config(folder), label=str(folder))
    weights = FileWeights(Files(folder, None, None, None), shell)
    device = torch.device(device or torch.accelerator.current_accelerator(check_available=True) or "cpu")
    fits = restored_fits(
        shell,
        weights,
        base_shell,
        base_weights,
        batches_for(calibration, config),
        config=config,
        device=device,
        dtype=shell.config.dtype or torch.float32,  # type: ignore[arg-type]
        progress=progress,
    )
    found: list[Fit] = []
    for fit in fits:
        filename, name = weights.places(fit.parameter)
        overwrite_tensors(folder / filename, {name: fit.weight})
        found.append(fit.without_weight())
    record = record_of(
        found, shell, base_shell, config=config, provenance=calibration.provenance, facts=asdict(trajectory.base)
    )
    record.save(folder)
    write_manifest(folder)


def write_restored(folder: Path, record: Restoration, weights: dict[str, torch.Tensor]) -> None:
    """Puts restored weights into a level's folder, which is whole before and after.

    Args:
        weights: parameter -> tensor, in the dtype of the folder.
    """
    shell = empty_model(read_model_config(folder), label=str(folder))
    places = FileWeights(Files(folder, None, None, None), shell)
    temporary = unique_beside(folder)
    try:
        shutil.copytree(folder, temporary)
        for parameter, weight in weights.items():
            filename, name = places.places(parameter)
            overwrite_tensors(temporary / filename, {name: weight})
        record.save(temporary)
        write_manifest(temporary)
        replace_folder(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
