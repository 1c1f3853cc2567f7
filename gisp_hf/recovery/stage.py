"""The stage that restores each level as it is saved."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import cast

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel

from gisp_hf.config import level_name
from gisp_hf.levels.files import CONFIG_FILE, Files, empty_model, read_model_config
from gisp_hf.levels.unpruned import Unpruned
from gisp_hf.levels.weights import FileWeights
from gisp_hf.models.layout import Rows
from gisp_hf.models.shards import local_rows, plain_parameters
from gisp_hf.models.surgery import pruned_shell
from gisp_hf.pruning.trajectory import Base, Trajectory
from gisp_hf.recovery.batches import Batch, batches_of
from gisp_hf.recovery.config import RestoreConfig
from gisp_hf.recovery.fit import Fit
from gisp_hf.recovery.folder import write_restored
from gisp_hf.recovery.layers import CutWeights, ModelWeights, StoredWeights, Weights, shell_of
from gisp_hf.recovery.restore import batches_for, draw, open_base, record_of, restored_fits
from gisp_hf.training.stages import Level, Run, Stage


class Restore(Stage):
    """Restores each level's folder, right after it was saved.

    The model of the run keeps its weights, so that the removal order does not change. Only while ``then`` runs does it
    hold the restored ones: numbers measured there are those of the level in the folder.

    The unpruned weights are read layer by layer from the files that the model came from, if they are on this machine
    and hold the same weights; otherwise a copy of them stays in host memory. If the model is quantized or has adapters,
    the level is cut out of the unquantized files, as in its folder; the model of the run has no part in it.

    Args:
        config: settings. Without ``config.data`` the text is the run's own calibration data.
        then: stages that see the restored model.
        unpruned: the files to cut levels out of, where the model of the run has gates.

    Raises:
        ValueError: when the run begins, if there is no calibration text or no copy of the unpruned weights, or if
            ``then`` has stages and the model is quantized or has adapters: it cannot hold restored weights.
        FloatingPointError: if something on the way is not finite; the level in the folder is whole, and unrestored.
    """

    def __init__(self, config: RestoreConfig, then: Sequence[Stage] = (), *, unpruned: Unpruned | None = None) -> None:
        self.config = config
        self.then = list(then)
        self.unpruned = unpruned

    def begin(self, run: Run) -> None:
        super().begin(run)
        if run.gated and self.then:
            names = ", ".join(type(stage).__name__ for stage in self.then)
            raise ValueError(
                f"the model is quantized or has adapters and cannot hold restored weights, which evaluate= and stages= "
                f"({names}) are to see; leave these out and measure the saved levels (gisp-hf eval), or leave "
                "restore= out and restore them after the run (gisp-hf restore)"
            )
        for stage in self.then:
            stage.begin(run)
        self._calibration = None if self.config.data is None else draw(self.config, run.tokenizer)
        self._batches = self._draw_batches(run)
        if run.gated:
            assert self.unpruned is not None, "a run with gates cannot restore from its own weights"
            self._base_shell, self._base_weights = open_base(self.unpruned.files)
        else:
            self._base_shell, self._base_weights = _keep_base(run)

    def __call__(self, level: Level) -> Level:
        run, trajectory = self.run, level.trajectory
        kept = trajectory.kept_at(len(trajectory))
        cuts: Rows = {} if run.sliced else trajectory.layout.rows_kept(kept)
        weights: Weights = CutWeights(self._base_weights, cuts) if run.gated else ModelWeights(level.model, cuts)
        stored = self._base_shell.config.dtype or torch.float32
        shell = pruned_shell(self._base_shell, trajectory.layout, [len(keep) for keep in kept])
        fits = list(
            restored_fits(
                shell,
                weights,
                shell_of(self._base_shell),
                self._base_weights,
                self._batches,
                config=self.config,
                device=level.model.device,
                dtype=cast(torch.dtype, stored) if run.gated else level.model.dtype,
                progress=run.main_process,
            )
        )
        record = record_of(
            fits,
            shell,
            self._base_shell,
            config=self.config,
            provenance=trajectory.calibration if self._calibration is None else self._calibration.provenance,
            facts=asdict(trajectory.base),
        )
        if run.main_process:
            write_restored(level.folder, record, {fit.parameter: fit.weight for fit in fits})
            before, after = (sum(getattr(e, key) for e in record.errors) / len(record.errors) for key in _ERRORS)
            tqdm.write(
                f"{level_name(level.sparsity)}: restored on {record.tokens:,} tokens, mean relative error of the "
                f"projections {before:.3f} -> {after:.3f}"
            )
        level = replace(level, changed=level.changed | set(record.changed))
        if self.then:
            with with_weights(level.model, fits, cuts):
                for stage in self.then:
                    level = stage(level)
        return level

    def finish(self, trajectory: Trajectory, levels: Mapping[float, Level]) -> None:
        for stage in self.then:
            stage.finish(trajectory, levels)

    def _draw_batches(self, run: Run) -> list[Batch]:
        if self._calibration is not None:
            return batches_for(self._calibration, self.config)
        dataset = getattr(run.dataloader, "dataset", None)
        if dataset is None:
            raise ValueError("the run's calibration data cannot be read again; RestoreConfig(data=...) names a text")
        return batches_of(
            dataset,
            batch_size=self.config.batch_size,
            tokens=self.config.tokens,
            collate=run.dataloader.collate_fn,
            answers=self.config.answers,
        )


_ERRORS = ("before", "after")


@contextmanager
def with_weights(model: nn.Module, fits: Sequence[Fit], cuts: Rows) -> Iterator[None]:
    """The model with restored weights inside, and with its own again afterwards, bit for bit.

    Args:
        cuts: the rows that the level keeps of parameters that hold zeros for what is gone.
    """
    own: dict[str, torch.Tensor] = {}
    parameters = dict(plain_parameters(model))
    try:
        with torch.no_grad():
            for fit in fits:
                part = local_rows(parameters[fit.parameter])
                own[fit.parameter] = part.tensor.detach().clone()
                weight = fit.weight
                for dim, rows in reversed(cuts.get(fit.parameter, ())):
                    shape = list(weight.shape)
                    shape[dim] = parameters[fit.parameter].shape[dim]
                    weight = torch.zeros(shape, dtype=weight.dtype).index_copy_(dim, rows, weight)
                part.tensor.copy_(weight[part.first : part.first + len(part.tensor)])
        yield
    finally:
        with torch.no_grad():
            for name, tensor in own.items():
                local_rows(parameters[name]).tensor.copy_(tensor)


def _keep_base(run: Run) -> tuple[PreTrainedModel, Weights]:
    """The unpruned model without weights, and where they can be read during the run."""
    base = run.trajectory.base
    for folder in _folders_of(run.model, base):
        files = Files(folder, None, None, None)
        try:
            shell = empty_model(read_model_config(folder), label=files.label)
            weights = FileWeights(files, shell)
            if weights.fingerprint() == base.fingerprint:
                return shell, weights
        except (FileNotFoundError, ValueError):  # other files than those of the model, or pickled ones
            continue
    if run.sharded:
        raise ValueError(
            f"restoration needs the unpruned weights, and the files of {base.id} are not here, or hold other "
            "weights; a model that is sharded over processes cannot be copied: load it from a folder with safetensors"
        )
    if run.main_process:
        tqdm.write(f"GISP: a copy of the weights of {base.id} stays in memory for restoration")
    return shell_of(run.model), StoredWeights({**dict(run.model.named_buffers()), **dict(plain_parameters(run.model))})


def _folders_of(model: PreTrainedModel, base: Base) -> list[Path]:
    """Folders of this machine that may hold the model's checkpoint; nothing is downloaded."""
    found = [Path(name) for name in dict.fromkeys((str(model.name_or_path), base.id)) if name and Path(name).is_dir()]
    try:
        cached = try_to_load_from_cache(base.id, CONFIG_FILE, revision=base.revision)
    except HFValidationError:  # not the form of an id
        cached = None
    return found + ([Path(cached).parent] if isinstance(cached, str) else [])
