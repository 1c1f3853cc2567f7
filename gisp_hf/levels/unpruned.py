"""The unquantized checkpoint of a model that cannot be sliced: levels are cut out of its files."""

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from gisp_hf.levels.files import Files, empty_model, pin, read_model_config
from gisp_hf.levels.materialize import cut_level, read_tensor
from gisp_hf.levels.save import save_level
from gisp_hf.levels.weights import names_by_file
from gisp_hf.models import discover
from gisp_hf.models.fingerprint import combine_checksums, tensor_checksum
from gisp_hf.models.layout import Layout
from gisp_hf.pruning.trajectory import Base, Trajectory
from gisp_hf.training.identity import cached_commit


class Unpruned:
    """The files of a run's base model, where the model in memory is quantized or has PEFT adapters.

    Args:
        name: Hub id or folder of safetensors; what the model was loaded from if None.
        revision: of a repository on the Hub; the one in the cache if None and there is just one, else ``main``.
    """

    def __init__(self, name: str | None, revision: str | None) -> None:
        self.name = name
        self.revision = revision
        self._files: Files | None = None

    def identify(self, model: PreTrainedModel, layout: Layout, *, hide_path: bool, expected: Base | None) -> Base:
        """Makes sure that levels can be cut out of the files, which are read once for their fingerprint.

        Args:
            model: quantized or with adapters. Its norms, which are neither, must be those of the files.
            layout: its blocks.
            hide_path: of a folder, record the last name only.
            expected: the base of the checkpoint that the run goes on from.

        Raises:
            FileNotFoundError: if there is no such checkpoint, or no safetensors in it.
            ValueError: if it is quantized, of another model, or not the ``expected`` one.
        """
        name = self.name or str(model.name_or_path)
        files, dense = _open(name, self.revision or cached_commit(name), layout=layout)
        fingerprint = _fingerprint(files, dense, model)
        if expected is not None and expected.fingerprint != fingerprint:
            raise ValueError(
                f"the checkpoint of this run was made with {expected.id} (fingerprint {expected.fingerprint[:12]}), "
                f"and {files.label} is another model (fingerprint {fingerprint[:12]}); give the same base_model"
            )
        self._files = files
        shown = Path(name).resolve().name if hide_path and Path(name).is_dir() else name
        return Base(id=shown, revision=files.revision, fingerprint=fingerprint)

    @property
    def files(self) -> Files:
        """The checkpoint that `identify` has found."""
        assert self._files is not None, "identify comes first"
        return self._files

    def save_level(self, level: Trajectory, folder: Path, **options: Any) -> None:
        """Cuts a level out of the files and saves it.

        Args:
            level: the removal order up to it, and no further.
            options: tokenizer, use_cache and replace of `gisp_hf.levels.save.save_level`.
        """
        save_level(cut_level(level, self.files, None), folder, trajectory=level, sliced=True, **options)


def _open(name: str, revision: str | None, *, layout: Layout) -> tuple[Files, PreTrainedModel]:
    """The files of the checkpoint, and its model without weights."""
    why = "the model is quantized or has adapters, so levels are cut out of the files of its unquantized checkpoint"
    hint = "GISPPruner(base_model=...) names one, by Hub id or folder"
    try:
        files, config_file = pin(Files(name, revision, None, None), "config.json")
    except (FileNotFoundError, OSError) as error:
        raise FileNotFoundError(f"{why}, which were not found: {error}; {hint}") from error
    if config_file is None:
        raise FileNotFoundError(f"{why}, and {name} holds no config.json; {hint}")
    config = read_model_config(config_file.parent, label=files.label)
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"{why}, and {files.label} is quantized itself; {hint}")
    dense = empty_model(config, label=files.label)
    if discover(dense).identity != layout.identity:
        raise ValueError(f"{why}, and {files.label} is of another shape than the model; {hint}")
    names_by_file(files, dense, (parameter for parameter, _ in dense.named_parameters()))  # refuses what is missing
    return files, dense


@torch.no_grad()
def _fingerprint(files: Files, dense: PreTrainedModel, model: PreTrainedModel) -> str:
    """The fingerprint of the files, once it is sure that the model has their norms."""
    shapes = {name: tuple(parameter.shape) for name, parameter in dense.named_parameters()}
    held = {name: p for name, p in model.named_parameters() if p.ndim == 1 and p.is_floating_point()}
    checksums = []
    with logging.tqdm(total=len(shapes), desc=f"Reading {files.source}") as progress:
        for filename, names in names_by_file(files, dense, shapes).items():
            with files.opened(filename) as file:
                for stored, name in names:
                    tensor = read_tensor(file, stored, shape=shapes[name])
                    if name in held and not _close(held[name], tensor):
                        raise ValueError(
                            f"{name} of the model is not that of {files.label}: the model was made from another one. "
                            "GISPPruner(base_model=...) must name its own unquantized checkpoint"
                        )
                    checksums.append((name, shapes[name], tensor_checksum(tensor)))
                    progress.update()
    return combine_checksums(checksums)


def _close(held: torch.Tensor, stored: torch.Tensor) -> bool:
    """Whether two tensors are the same but for the rounding of half precision."""
    return held.shape == stored.shape and torch.allclose(held.float().cpu(), stored.float(), rtol=1e-2, atol=1e-4)
