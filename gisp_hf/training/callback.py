"""``GISPPruner``: a callback that makes a Trainer run a pruning run. It decides *when*; the engine does the work."""

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from tqdm import tqdm
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler
from transformers.training_args import ParallelMode

from gisp_hf.config import GISPConfig, level_name
from gisp_hf.evaluation.levels import measure
from gisp_hf.evaluation.mode import evaluation_mode
from gisp_hf.hub import PushError, PushReport, write_metrics
from gisp_hf.hub.publish import Publisher
from gisp_hf.levels.save import check_output_folder, save_level
from gisp_hf.losses.chunked import ChunkedLoss
from gisp_hf.models import discover
from gisp_hf.models.shards import check_agreement, is_sharded, model_fingerprint
from gisp_hf.models.surgery import as_pruned_model
from gisp_hf.pruning.engine import Engine, NonFiniteGradientError
from gisp_hf.pruning.schedule import targets_of_step
from gisp_hf.pruning.trajectory import Base, Step, Trajectory
from gisp_hf.training.mode import CalibrationMode, check_arguments, check_model, check_run_length
from gisp_hf.training.resume import Progress, checkpoint_folder, drop_weights, load_progress, save_progress

Evaluate = Callable[[PreTrainedModel], dict[str, float]] | Sequence[str]


class GISPPruner(TrainerCallback):
    """Prunes the Trainer's model while ``trainer.train()`` runs over the calibration data.

    One optimizer step is one pruning step: the gradients that the Trainer has accumulated become scores, the lowest
    scored structures go, and the optimizer is left with no gradient, so that what survives keeps its weights bit for
    bit. ``gradient_accumulation_steps`` times the batch size is the number of calibration examples per step. Each level
    is saved under ``output_dir/sparsity-0.20`` and so on as soon as it is reached, the removal order under
    ``output_dir/trajectory.*``, and the run ends by itself after ``config.num_steps`` steps.

    Works under ``accelerate launch`` too: with DDP every process makes the same choice (checked at every step), with
    FSDP2 scores are added up over the shards. With the Trainer's own checkpoints (``save_strategy="steps"``) a killed
    run goes on by ``trainer.train(resume_from_checkpoint=True)``.

    Args:
        config: how to prune; the defaults of ``GISPConfig`` if None.
        output_dir: where levels are saved; the Trainer's own ``output_dir`` if None.
        shrink: slice structures out during the run, which makes it cheaper. None: wherever nothing wraps the
            parameters. False: keep zeros in their place, in the model that the Trainer holds; saved levels are sliced.
        layer_groups: bounds the memory of gradients by scoring the layers in this many groups, one pass over the data
            for each: a step then takes as many optimizer steps, and the data set must be just one step's examples.
        chunk_tokens: compute the model's own loss this many tokens at a time, which saves the memory of a batch's
            logits; None: as the model does it. Not with ``compute_loss_func``, nor with capped logits (Gemma 2).
        evaluate: called with the model at each level (in eval mode, without gradients), or names of lm-eval tasks to
            run there; the numbers reach the log, ``level_metrics``, ``levels.json`` and the cards. With several
            processes all of them evaluate.
        hub_model_id: a Hub repository that gets each level as a branch while the run goes on, and ``main`` at its end;
            created if it does not exist. Only the main process pushes.
        hub_private: whether a new repository is private.
        hub_token: one that may write there; the one you are logged in with if None.
        base_model: the id of the model that is pruned, for the record; its ``name_or_path`` if None.
        base_revision: the commit of that model; looked up in the Hub cache if None.
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
        config: GISPConfig | None = None,
        output_dir: str | Path | None = None,
        *,
        shrink: bool | None = None,
        layer_groups: int = 1,
        chunk_tokens: int | None = None,
        evaluate: Evaluate | None = None,
        hub_model_id: str | None = None,
        hub_private: bool | None = None,
        hub_token: str | None = None,
        base_model: str | None = None,
        base_revision: str | None = None,
        calibration: dict[str, Any] | None = None,
    ) -> None:
        self.config = config or GISPConfig()
        self.output_dir = None if output_dir is None else Path(output_dir)
        self.shrink = shrink
        self.layer_groups = layer_groups
        self.chunk_tokens = chunk_tokens
        self.evaluate = evaluate
        self.hub_model_id = hub_model_id
        self.hub_private = hub_private
        self.hub_token = hub_token
        self.push_report: PushReport | None = None
        self.base_model = base_model
        self.base_revision = base_revision
        self.calibration = calibration or {}
        self.level_folders: dict[float, Path] = {}
        self.level_metrics: dict[float, dict[str, float]] = {}
        self._engine: Engine | None = None
        self._mode: CalibrationMode | None = None
        self._base: Base | None = None
        self._steps: list[Step] = []
        self._losses: list[float] = []  # of the passes since the last pruning step
        self._resumed = False
        self._publisher: Publisher | None = None
        self._chunked: ChunkedLoss | None = None

    @property
    def trajectory(self) -> Trajectory:
        if self._engine is None or self._base is None:
            raise RuntimeError("there is no trajectory before trainer.train() has begun")
        return Trajectory(
            layout=self._engine.layout,
            ranks=tuple(rank.clone() for rank in self._engine.ranks),
            config=self.config,
            base=self._base,
            steps=tuple(self._steps),
            calibration=self.calibration,
        )

    @property
    def engine(self) -> Engine:
        assert self._engine is not None, "the Trainer has not called on_init_end or on_train_begin yet"
        return self._engine

    # ---- when ----------------------------------------------------------------------------------------------------

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        _move_before_trackers(self)
        self._prepare(args, model)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        train_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        if self._engine is None:  # added by trainer.add_callback, after on_init_end
            if _is_distributed(args):
                raise ValueError(
                    "with several processes GISPPruner must be in Trainer(callbacks=[...]), not in add_callback: "
                    "the model is wrapped with what requires a gradient when training begins"
                )
            _move_before_trackers(self)
            self._prepare(args, model)
        if self.engine.length:
            raise ValueError(
                "this GISPPruner has pruned already; build a new model, Trainer and GISPPruner for another run"
            )
        self.engine.model = model  # FSDP2 has put another object in its place
        assert self._mode is not None
        try:
            check_run_length(
                args, state, num_steps=self.config.num_steps, passes=self.layer_groups, dataloader=train_dataloader
            )
            self._open_output(args, resumed=state.global_step > 0)
            if self.hub_model_id is not None and state.is_world_process_zero:
                self._publisher = Publisher(self.hub_model_id, private=self.hub_private, token=self.hub_token)
            if state.global_step:
                self._resume(args, state, model)
            else:
                self._base = self._identify(model)
        except (ValueError, OSError, PushError):
            self._mode.leave(model)
            raise
        self._mode.switch_off_dropout(model)
        if self.chunk_tokens is not None:
            self._chunked = ChunkedLoss(model, self.chunk_tokens)
        if not _is_distributed(args) and args.gradient_accumulation_steps == 1:
            self.engine.score_early()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        if self.layer_groups > 1 and self._mode is not None:
            group = state.global_step % self.layer_groups
            self._mode.require_gradients(model, self.engine.scored_parameters(group))

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        processing_class: Any = None,
        **kwargs: Any,
    ) -> None:
        step, group = state.global_step // self.layer_groups + 1, state.global_step % self.layer_groups
        if step > self.config.num_steps:
            return
        try:
            if self._chunked is not None:
                self._chunked.check_used()
            self.engine.accumulate(group)
        except (NonFiniteGradientError, ValueError) as error:
            self._leave(model)
            saved = ", ".join(folder.name for folder in self.level_folders.values()) or "none"
            raise type(error)(
                f"step {step} of {self.config.num_steps}: {error}. Levels saved before: {saved}"
            ) from error
        if group < self.layer_groups - 1:
            return
        targets = targets_of_step(
            step, self.config.num_steps, levels=self.config.sparsity_levels, schedule=self.config.schedule
        )
        groups = channels = 0
        for target, level in targets:
            removal = self.engine.advance(target)
            check_agreement(self.engine.ranks, step=step, device=args.device)
            groups, channels = groups + removal.groups, channels + removal.channels
            if level is not None:
                self._save_level(level, model, tokenizer=processing_class, main_process=state.is_world_process_zero)
                self._evaluate_level(level, model, state, tokenizer=processing_class)
                if self._publisher is not None:
                    self._publisher.add_level(
                        level, self._level_folder(level), trajectory=self.trajectory, metrics=self.level_metrics
                    )
        self._steps.append(
            Step(
                step=step,
                target=targets[-1][0],
                sparsity=self.engine.sparsity,
                parameters=self.engine.layout.total - self.engine.removed_parameters,
                groups=groups,
                channels=channels,
            )
        )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        control.should_log = True  # the Trainer measures the loss of a step only if it logs that step
        if state.global_step >= self.config.num_steps * self.layer_groups:
            control.should_training_stop = True
        if state.global_step % self.layer_groups:
            control.should_save = False  # in the middle of a pruning step there is nothing to go on from
        return control

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        if logs is None or "loss" not in logs:
            return
        self._losses.append(float(logs["loss"]))
        if not self._steps or self._steps[-1].loss is not None:  # the step has passes to come
            return
        # All passes of a step see the same data and the same model, up to the order of summing.
        loss, self._losses = sum(self._losses) / len(self._losses), []
        step = self._steps[-1] = replace(self._steps[-1], loss=loss)
        if not math.isfinite(loss):
            self._leave(model)
            raise FloatingPointError(f"step {step.step} of {self.config.num_steps}: the calibration loss is {loss}")
        numbers: dict[str, float] = {
            "sparsity": step.sparsity,
            "decoder_parameters": step.parameters,
            "groups_removed": step.groups,
            "channels_removed": step.channels,
        }
        logs.update(numbers)  # for the trackers and the progress bar, which come after this callback
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(numbers)
        if state.is_world_process_zero:
            tqdm.write(
                f"GISP step {step.step}/{self.config.num_steps}: sparsity {step.sparsity:.4f}, loss {loss:.4f}, "
                f"removed {step.groups} groups and {step.channels:,} channels, {step.parameters / 1e6:,.1f}M "
                "parameters left in the decoder layers"
            )
            if control.should_save:  # before the Trainer's own files: a complete checkpoint always has the order
                folder = checkpoint_folder(str(args.output_dir), state.global_step)
                save_progress(folder, self.trajectory, self._progress(args, state))

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        folder = checkpoint_folder(str(args.output_dir), state.global_step)
        if state.is_world_process_zero and not is_sharded(model.parameters()) and folder.is_dir():
            drop_weights(folder)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        self._leave(model)
        done = len(self._steps)
        if done and self.output_dir is not None and state.is_world_process_zero:
            self.trajectory.save(self.output_dir)
        if done < self.config.num_steps:
            raise RuntimeError(
                f"training ended after {done} of {self.config.num_steps} pruning steps: the data ran out, or another "
                f"callback stopped it. Saved so far: {', '.join(map(level_name, self.level_folders)) or 'no level'}"
            )
        if self.engine.shrink:
            as_pruned_model(model, self.engine.layout, [len(keep) for keep in self.engine.kept()])
        if self._publisher is not None and self.output_dir is not None:
            self.push_report = self._publisher.finish(
                self.output_dir, trajectory=self.trajectory, metrics=self.level_metrics
            )
            tqdm.write(f"GISP: {len(self.level_folders)} levels and main are at {self.push_report.url}")

    # ---- how -----------------------------------------------------------------------------------------------------

    def _prepare(self, args: TrainingArguments, model: PreTrainedModel) -> None:
        """Everything that can be refused is refused here; then only what is scored keeps its gradient."""
        check_arguments(args)
        check_model(model)
        wrapped = _is_distributed(args) or args.torch_compile or is_sharded(model.parameters())
        if self.shrink and wrapped:
            raise ValueError(
                "shrink=True needs a single process, without torch_compile and launcher; None lets zeros stay"
            )
        if isinstance(self.evaluate, str):
            raise ValueError(
                f"evaluate must be a function or a list of tasks, got {self.evaluate!r}; write [{self.evaluate!r}]"
            )
        if self.layer_groups > 1 and _is_distributed(args) and not args.fsdp:
            raise ValueError(
                f"layer_groups={self.layer_groups} changes which parameters have a gradient, which DDP cannot follow; "
                "use FSDP2, a single process, or layer_groups=1"
            )
        shrink = not wrapped if self.shrink is None else self.shrink
        self._engine = Engine(model, discover(model), self.config, shrink=shrink, layer_groups=self.layer_groups)
        self._mode = CalibrationMode(model, self._engine.scored_parameters())

    def _open_output(self, args: TrainingArguments, *, resumed: bool) -> None:
        trainer_dir = Path(str(args.output_dir))
        if args.process_index == 0 and not resumed:
            own = self.output_dir is not None and self.output_dir != trainer_dir
            check_output_folder(self.output_dir or trainer_dir, may_hold_others=not own)
        self.output_dir = self.output_dir or trainer_dir

    def _identify(self, model: PreTrainedModel) -> Base:
        name = self.base_model or model.name_or_path or type(model).__name__
        if self.hub_model_id is not None and Path(name).is_dir():
            name = Path(name).resolve().name  # what is pushed should not tell where it lay on this machine
        return Base(
            id=name,
            revision=self.base_revision or _cached_commit(name),
            fingerprint=model_fingerprint(model.named_parameters()),
        )

    def _progress(self, args: TrainingArguments, state: TrainerState) -> Progress:
        return Progress(
            global_step=state.global_step,
            world_size=args.world_size,
            examples_per_step=args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size,
            layer_groups=self.layer_groups,
            order=self.trajectory.digest() if self._base else "",
        )

    def _resume(self, args: TrainingArguments, state: TrainerState, model: PreTrainedModel) -> None:
        """Takes up the removal order of the checkpoint that the Trainer has just read its own state from."""
        folder = checkpoint_folder(str(args.output_dir), state.global_step)
        before = load_progress(folder, self._progress(args, state))
        if before.config != self.config or before.layout != self.engine.layout:
            raise ValueError(
                f"the checkpoint {folder} was made with another GISPConfig or model; resume with {before.config}"
            )
        if not is_sharded(model.parameters()):  # the Trainer has loaded the zeros into a sharded model already
            before.check_base(model)
        self._base, self._steps, self._resumed = before.base, list(before.steps), True
        for level in self.config.sparsity_levels:
            reached = before.highest_sparsity() >= level - 1e-9
            if reached and self._level_folder(level).is_dir():
                self.level_folders[level] = self._level_folder(level)
            elif reached:
                raise ValueError(
                    f"the checkpoint is beyond {level_name(level)}, but {self._level_folder(level)} is gone; put it "
                    "back or start anew"
                )
        self.engine.restore(before.ranks)

    def _level_folder(self, level: float) -> Path:
        assert self.output_dir is not None
        return self.output_dir / level_name(level)

    def _save_level(self, level: float, model: PreTrainedModel, *, tokenizer: Any, main_process: bool) -> None:
        assert self._mode is not None
        folder = self._level_folder(level)
        if main_process or is_sharded(model.parameters()):
            save_level(
                model,
                folder,
                trajectory=self.trajectory,
                sliced=self.engine.shrink,
                tokenizer=tokenizer,
                use_cache=self._mode.use_cache,
                main_process=main_process,
                replace=self._resumed,  # a level saved after the checkpoint, by the run that was killed
            )
        self.level_folders[level] = folder

    def _evaluate_level(self, level: float, model: PreTrainedModel, state: TrainerState, *, tokenizer: Any) -> None:
        if self.evaluate is None:
            return
        if self._chunked is not None:
            self._chunked.detach()
        with evaluation_mode(model):
            self.level_metrics[level] = (
                dict(self.evaluate(model))
                if callable(self.evaluate)
                else measure(model, tokenizer, tasks=self.evaluate)
            )
        if self._chunked is not None:
            self._chunked = ChunkedLoss(model, self._chunked.size)
        state.log_history.append({"level": level, **self.level_metrics[level], "step": state.global_step + 1})
        if state.is_world_process_zero:
            write_metrics(self._level_folder(level), self.level_metrics[level])
            numbers = ", ".join(f"{name} {value:.4f}" for name, value in self.level_metrics[level].items())
            tqdm.write(f"{level_name(level)}: {numbers}")

    def _leave(self, model: PreTrainedModel) -> None:
        assert self._mode is not None
        self._mode.leave(model)
        if self._chunked is not None:
            self._chunked.detach()
            self._chunked = None


def _move_before_trackers(callback: GISPPruner) -> None:
    """Lets this callback see logs first, so that what it adds to them reaches the trackers of ``report_to``.

    The Trainer puts the trackers before the callbacks of ``callbacks=[...]``, and hands a callback no way to its
    handler; the caller's frame is the only one.
    """
    frame = inspect.currentframe()
    while frame is not None and not isinstance(frame.f_locals.get("self"), CallbackHandler):
        frame = frame.f_back
    if frame is not None:
        callbacks = frame.f_locals["self"].callbacks
        callbacks.remove(callback)
        callbacks.insert(1, callback)  # after DefaultFlowCallback, which decides what is logged


def _is_distributed(args: TrainingArguments) -> bool:
    """Whether DDP or FSDP wraps the model: under a launcher they do so with a single process too."""
    return args.parallel_mode == ParallelMode.DISTRIBUTED


def _cached_commit(model_id: str) -> str | None:
    """The commit of a Hub model, read from the name of its folder in the local cache."""
    try:
        path = try_to_load_from_cache(model_id, "config.json")
    except ValueError:  # not a repository id: a local folder
        return None
    return Path(path).parent.name if isinstance(path, str) else None
