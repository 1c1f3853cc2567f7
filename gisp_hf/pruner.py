"""``GISPPruner`` and ``prune``: the additions to a Trainer script."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import Trainer

from gisp_hf.config import GISPConfig
from gisp_hf.deprecated import accept_old_arguments
from gisp_hf.evaluation.stage import Evaluate, Measure
from gisp_hf.hub import PushReport
from gisp_hf.hub.stage import Publish
from gisp_hf.levels.stage import Save
from gisp_hf.levels.unpruned import Unpruned
from gisp_hf.pruning.methods import find_method
from gisp_hf.recovery.config import RestoreConfig
from gisp_hf.recovery.stage import Restore
from gisp_hf.training.callback import PruningCallback
from gisp_hf.training.log import move_before_trackers
from gisp_hf.training.resume import newest_checkpoint, set_aside_broken
from gisp_hf.training.stages import Stage


@accept_old_arguments({"layer_groups": "layer_passes"})
class GISPPruner(PruningCallback):
    """Prunes the Trainer's model while ``trainer.train()`` runs over the calibration data.

    One optimizer step is one pruning step: the gradients that the Trainer has accumulated become scores, the lowest
    scored structures go, and the optimizer is left with no gradient, so that remaining weights stay bit-identical.
    ``gradient_accumulation_steps`` times the batch size is the number of calibration examples per step. Each level is
    saved under ``output_dir/sparsity-0.20`` and so on as soon as it is reached, the removal order under
    ``output_dir/trajectory.*``, and the run ends by itself after ``config.num_steps`` steps.

    Works under ``accelerate launch`` too: with DDP every process makes the same choice (checked at every step), with
    FSDP2 scores are added up over the shards. With checkpoints (``save_strategy="steps"``) a killed run goes on by
    ``trainer.train(resume_from_checkpoint=True)``.

    Args:
        config: how to prune, a ``GISPConfig`` or a dict of its fields; its defaults if None.
        output_dir: where levels are saved; the Trainer's own ``output_dir`` if None.
        shrink: slice structures out during the run, which makes it cheaper. None: wherever nothing wraps the
            parameters; with ``torch_compile``, at the end of the run. False: keep zeros in their place, in the model
            that the Trainer holds; saved levels are sliced.
        layer_passes: bounds the memory of gradients by scoring the layers in this many parts, one pass over the data
            for each: a step then takes as many optimizer steps, and the data set must be just one step's examples.
        chunk_tokens: compute the model's own loss this many tokens at a time, which saves the memory of a batch's
            logits; None: as the model does it. Not with ``compute_loss_func``, nor with capped logits (Gemma 2).
        evaluate: called with the model at each level (in eval mode, without gradients), or names of lm-eval tasks to
            run there; the numbers reach the log, ``level_metrics``, ``levels.json`` and the cards. With several
            processes all of them evaluate.
        restore: fit the output projections of each level anew as it is saved (`gisp_hf.recovery`). The model of the
            run keeps its weights, and the removal order does not change; ``evaluate`` and ``stages`` see the restored
            level; both are refused with it if the model is quantized or has adapters. None: levels hold the weights of
            the base model.
        stages: more to do with each level, after evaluation and before publishing (`gisp_hf.training.stages`).
        hub_model_id: a Hub repository that gets each level as a branch while the run goes on, and ``main`` at its end;
            created if it does not exist. Only the main process pushes.
        hub_private: whether a new repository is private.
        hub_token: one that may write there; the one you are logged in with if None.
        hub_replace: overwrite a repository that holds another run; refused otherwise.
        base_model: the id of the model that is pruned, for the record; its ``name_or_path`` if None. Of a quantized
            model, or one with PEFT adapters: the id or folder of the unquantized checkpoint, which levels are cut from.
        base_revision: the commit of that model; if None, the one in the Hub cache, where there is just one.
        calibration: facts about the calibration data, for the record.

    Attributes:
        trajectory: the removal order so far.
        level_folders: level -> folder, for the levels saved so far.
        level_metrics: level -> what ``evaluate`` returned.
        push_report: what the Hub has confirmed, after the run.

    Raises:
        ValueError: when the Trainer is built or training begins, if the model or the arguments do not allow pruning.
        FileExistsError, OSError: when training begins, if the output folder cannot be used.
        PushError: when training begins, if the Hub repository cannot be written to; at its end, if a push failed for
            good: the levels are safe in ``output_dir`` then.
        FloatingPointError: during the run, if a loss or gradient is not finite.
        DivergenceError: during the run, if processes choose different structures.
    """

    def __init__(
        self,
        config: GISPConfig | Mapping[str, Any] | None = None,
        output_dir: str | Path | None = None,
        *,
        shrink: bool | None = None,
        layer_passes: int = 1,
        chunk_tokens: int | None = None,
        evaluate: Evaluate | None = None,
        restore: RestoreConfig | None = None,
        stages: Sequence[Stage] = (),
        hub_model_id: str | None = None,
        hub_private: bool | None = None,
        hub_token: str | None = None,
        hub_replace: bool = False,
        base_model: str | None = None,
        base_revision: str | None = None,
        calibration: dict[str, Any] | None = None,
    ) -> None:
        if not isinstance(config, GISPConfig):
            config = GISPConfig.from_dict(dict(config or {}))
        find_method(config.method)
        unpruned = Unpruned(base_model, base_revision)
        measured = [] if evaluate is None else [Measure(evaluate)]
        then: list[Stage] = [*measured, *stages]
        if restore is not None:
            then = [Restore(restore, then, unpruned=unpruned)]
        self._publish = (
            None
            if hub_model_id is None
            else Publish(hub_model_id, private=hub_private, token=hub_token, replace=hub_replace)
        )
        super().__init__(
            config,
            output_dir,
            stages=[Save(unpruned), *then, *([self._publish] if self._publish else [])],
            shrink=shrink,
            layer_passes=layer_passes,
            chunk_tokens=chunk_tokens,
            base_model=base_model,
            base_revision=base_revision,
            hide_path=hub_model_id is not None,  # what is pushed should not tell where a base lay on this machine
            calibration=calibration,
            identify_files=unpruned.identify,
        )
        self.restoration = None if restore is None else restore.to_dict()

    @property
    def push_report(self) -> PushReport | None:
        return self._publish.report if self._publish else None


def prune(
    trainer: Trainer,
    config: GISPConfig | Mapping[str, Any] | None = None,
    output_dir: str | Path | None = None,
    *,
    resume_from_checkpoint: bool | str | None = None,
    **options: Any,
) -> GISPPruner:
    """Prunes the model of a finished Trainer, of any subclass, and gives the model back whatever happens.

    The same as a ``GISPPruner`` in ``callbacks=[...]`` and ``trainer.train()``; but the model is given back after
    Ctrl-C and after errors of the Trainer itself too, and the Trainer afterwards has no pruner any more.

    Args:
        resume_from_checkpoint: a checkpoint folder, or True for the newest whole one in the Trainer's output folder.
        options: those of `GISPPruner`.

    Returns:
        the pruner, with its trajectory and levels.

    Raises:
        ValueError: also if the Trainer has a GISPPruner already, or there is no checkpoint to resume from.
    """
    if any(isinstance(callback, PruningCallback) for callback in trainer.callback_handler.callbacks):
        raise ValueError(
            "the Trainer has a GISPPruner already; call trainer.train(), or leave it out of callbacks=[...] and call "
            "gisp_hf.prune(trainer, ...)"
        )
    pruner = GISPPruner(config, output_dir, **options)
    if resume_from_checkpoint is True:
        with trainer.args.main_process_first(local=False, desc="looking at checkpoints"):
            if trainer.args.process_index == 0:
                set_aside_broken(str(trainer.args.output_dir))
        found = newest_checkpoint(str(trainer.args.output_dir))
        if found is None:
            raise ValueError(
                f"{trainer.args.output_dir} holds no whole checkpoint of a pruning run; leave out "
                "resume_from_checkpoint"
            )
        resume_from_checkpoint = str(found)
    try:
        pruner.prepare(trainer.args, trainer.model, use_cache=None)  # type: ignore[arg-type]
        trainer.add_callback(pruner)
        move_before_trackers(pruner, trainer.callback_handler)
        trainer.train(resume_from_checkpoint=resume_from_checkpoint or None)
    finally:
        pruner.close()
        if pruner in trainer.callback_handler.callbacks:
            trainer.remove_callback(pruner)
    return pruner
