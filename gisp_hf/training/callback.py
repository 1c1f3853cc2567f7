"""The callback that prunes during training. It decides when; the engine and the stages do the work."""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from gisp_hf.config import GISPConfig, level_name
from gisp_hf.losses.chunked import ChunkedLoss
from gisp_hf.models import discover
from gisp_hf.models.shards import is_sharded, plain_parameters
from gisp_hf.models.wrapped import bare_model, is_plain
from gisp_hf.pruning.engine import Engine, NonFiniteGradientError
from gisp_hf.pruning.methods import find_method
from gisp_hf.pruning.schedule import targets_of_step
from gisp_hf.pruning.trajectory import Base, Step, Trajectory
from gisp_hf.training.checks import (
    check_arguments,
    check_model,
    check_run_length,
    check_sizes,
    note_of_few_groups,
    warn_of_slow_dtype,
)
from gisp_hf.training.distributed import check_agreement, is_distributed, uses_fsdp, will_shard
from gisp_hf.training.ending import describe, slice_zeros
from gisp_hf.training.identity import identify, note_of_pruned_base
from gisp_hf.training.log import log_step, move_before_trackers
from gisp_hf.training.mode import CalibrationMode
from gisp_hf.training.resume import (
    Progress,
    checkpoint_folder,
    load_averages,
    load_progress,
    save_checkpoint,
    save_progress,
    set_aside_broken,
)
from gisp_hf.training.stages import Level, Run, Stage
from gisp_hf.upstream import differentiable_4bit, handler_of

logger = logging.getLogger(__name__)


class PruningCallback(TrainerCallback):
    """Prunes the Trainer's model while ``trainer.train()`` runs. `gisp_hf.GISPPruner` is this with its usual stages."""

    def __init__(
        self,
        config: GISPConfig,
        output_dir: str | Path | None,
        *,
        stages: Sequence[Stage],
        shrink: bool | None,
        layer_passes: int,
        chunk_tokens: int | None,
        base_model: str | None,
        base_revision: str | None,
        hide_path: bool,
        calibration: dict[str, Any] | None,
        identify_files: Callable[..., Base] | None = None,
    ) -> None:
        self.config = config
        self.output_dir = None if output_dir is None else Path(output_dir)
        self.stages = list(stages)
        self.shrink = shrink
        self.layer_passes = layer_passes
        self.chunk_tokens = chunk_tokens
        self.base_model = base_model
        self.base_revision = base_revision
        self.calibration = calibration or {}
        self.restoration: dict[str, Any] | None = None  # settings of a stage that changes the levels' weights
        self.levels: dict[float, Level] = {}
        self._hide_path = hide_path
        self._identify_files = identify_files  # of the unquantized checkpoint, for a model that has gates
        self._engine: Engine | None = None
        self._mode: CalibrationMode | None = None
        self._use_cache: bool | None = None
        self._base: Base | None = None
        self._steps: list[Step] = []
        self._losses: list[float] = []  # of the passes since the last pruning step
        self._chunked: ChunkedLoss | None = None

    def __repr__(self) -> str:
        levels = ", ".join(f"{level:g}" for level in self.config.sparsity_levels)
        sparsity = 0.0 if self._engine is None else self._engine.sparsity
        return (
            f"{type(self).__name__}({self.config.method}, levels {levels}, {len(self._steps)} of "
            f"{self.config.num_steps} steps, sparsity {sparsity:.4f})"
        )

    @property
    def trajectory(self) -> Trajectory:
        """The removal order so far."""
        if self._engine is None or self._base is None:
            raise RuntimeError("there is no trajectory before trainer.train() has begun")
        return Trajectory(
            layout=self._engine.layout,
            order=tuple(positions.clone() for positions in self._engine.order),
            config=self.config,
            base=self._base,
            steps=tuple(self._steps),
            calibration=self.calibration,
            restoration=self.restoration,
        )

    @property
    def engine(self) -> Engine:
        assert self._engine is not None, "the Trainer has not called on_init_end or on_train_begin yet"
        return self._engine

    @property
    def level_folders(self) -> dict[float, Path]:
        """Level -> folder, for the levels reached so far."""
        return {sparsity: level.folder for sparsity, level in self.levels.items()}

    @property
    def level_metrics(self) -> dict[float, dict[str, float | None]]:
        """Level -> what its evaluation returned; None for a number that is not finite."""
        return {sparsity: dict(level.metrics) for sparsity, level in self.levels.items() if level.metrics}

    # ---- when ----------------------------------------------------------------------------------------------------

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        move_before_trackers(self, handler_of(self))
        with args.main_process_first(local=False, desc="looking at checkpoints"):
            if args.process_index == 0 and args.output_dir is not None:
                set_aside_broken(args.output_dir)
        with self._giving_back():
            self.prepare(args, model, use_cache=getattr(model.config, "use_cache", None))

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        train_dataloader: Any = None,
        processing_class: Any = None,
        **kwargs: Any,
    ) -> None:
        handler = handler_of(self)
        with self._giving_back():
            if handler is not None and sum(isinstance(other, PruningCallback) for other in handler.callbacks) > 1:
                raise ValueError("the Trainer has several GISPPruners, and only one can prune its model; give it one")
            if self._engine is None:  # added by trainer.add_callback, after on_init_end
                if is_distributed(args):
                    raise ValueError(
                        "with several processes GISPPruner must be in Trainer(callbacks=[...]) or started by "
                        "gisp_hf.prune(trainer), not in add_callback: the model is wrapped with what requires a "
                        "gradient when training begins"
                    )
                move_before_trackers(self, handler)
                self.prepare(args, model, use_cache=None)
            if self.engine.length:
                raise ValueError(
                    "this GISPPruner has pruned already; build a new model, Trainer and GISPPruner for another run"
                )
            self._begin(args, state, model, dataloader=train_dataloader, tokenizer=processing_class)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        if self.layer_passes > 1 and self._mode is not None:
            self._mode.require_gradients(self.engine.scored_parameters(state.global_step % self.layer_passes))

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        step, layer_pass = state.global_step // self.layer_passes + 1, state.global_step % self.layer_passes
        if step > self.config.num_steps:
            return
        with self._giving_back():
            self._score(step, layer_pass, model)
            if layer_pass == self.layer_passes - 1:
                self._remove(step, args, state, bare_model(model))

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        control.should_log = True  # the Trainer measures the loss of a step only if it logs that step
        if state.global_step >= self.config.num_steps * self.layer_passes:
            control.should_training_stop = True
        if state.global_step % self.layer_passes:
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
        if logs is None or "loss" not in logs or self._mode is None:
            return
        self._losses.append(float(logs["loss"]))
        if not self._steps or self._steps[-1].loss is not None:  # the step has passes to come
            return
        with self._giving_back():
            self._log_step(args, state, logs)
            self._save_checkpoint(args, state, control, model)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        with self._giving_back():
            self._save_checkpoint(args, state, control, model)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        self.close()
        done = len(self._steps)
        if done and self.output_dir is not None and state.is_world_process_zero:
            self.trajectory.save(self.output_dir)
        if done < self.config.num_steps:
            saved = ", ".join(map(level_name, self.levels)) or "no level"
            push = f"; `gisp-hf push {self.output_dir} --repo USER/NAME` publishes them" if self.levels else ""
            raise RuntimeError(
                f"training ended after {done} of {self.config.num_steps} pruning steps: the data ran out, or another "
                f"callback stopped it. Saved so far: {saved}{push}"
            )
        wrapped = self.shrink is False or is_distributed(args) or is_sharded(model.parameters())
        slice_zeros(model, self.engine, wrapped=wrapped, main_process=state.is_world_process_zero)
        for stage in self.stages:
            stage.finish(self.trajectory, self.levels)

    # ---- how -----------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Gives the model back: flags, dropout, loss, hooks, modes. It keeps the structures that it has left.

        The callback does this at the end of a run and on every error that passes through it; `gisp_hf.prune` does it
        whatever happens. After an interruption elsewhere, such as Ctrl-C under a plain ``trainer.train()``, call it.
        Closing again does nothing.
        """
        if self._mode is None:
            return
        mode, self._mode, self._chunked = self._mode, None, None
        mode.close()
        describe(mode.model, self.engine)

    @contextmanager
    def _giving_back(self) -> Iterator[None]:
        """Gives the model back on every error, Ctrl-C included."""
        try:
            yield
        except BaseException:
            self.close()
            raise

    def prepare(self, args: TrainingArguments, model: PreTrainedModel, *, use_cache: bool | None) -> None:
        """Refuses what can be refused before training. With several processes, only what is scored keeps its gradient.

        Args:
            use_cache: of the model's config, before the Trainer changes it; None if that is not known.
        """
        needs = find_method(self.config.method).criterion().needs
        check_arguments(args, needs)
        check_model(model, needs, sharded=will_shard(args, model))
        gates, model = not is_plain(model), bare_model(model)
        wrapped = gates or is_distributed(args) or args.torch_compile or is_sharded(model.parameters())
        if self.shrink and wrapped:
            raise ValueError(
                "shrink=True needs a single process, without torch_compile, launcher, quantization and adapters; None "
                "lets zeros stay"
            )
        if self.layer_passes > 1 and is_distributed(args) and not uses_fsdp(args):
            raise ValueError(
                f"layer_passes={self.layer_passes} changes which parameters have a gradient, which DDP cannot follow; "
                "use FSDP2, a single process, or layer_passes=1"
            )
        shrink = not wrapped if self.shrink is None else self.shrink
        layout = discover(model, find_method(self.config.method).kinds, attention_unit=self.config.attention_unit)
        if not gates:
            check_sizes(model, layout)
        self._engine = Engine(model, layout, self.config, shrink=shrink, layer_passes=self.layer_passes, gates=gates)
        self._use_cache = use_cache
        if is_distributed(args):  # the wrapper looks at the flags before training begins
            self._mode = CalibrationMode(model)
            self._mode.freeze_all_but(self.engine.trained_parameters())

    def _begin(
        self, args: TrainingArguments, state: TrainerState, model: PreTrainedModel, *, dataloader: Any, tokenizer: Any
    ) -> None:
        """Refuses what only the data and the folders show, then puts the model in the state of a run."""
        model = bare_model(model)
        if self._mode is None:
            self._mode = CalibrationMode(model)
            self._mode.freeze_all_but(self.engine.trained_parameters())
        mode = self._mode
        mode.model = self.engine.model = model  # FSDP2 has put another object in its place
        mode.claim()
        mode.keep_modes()
        if self._use_cache is not None:
            mode.on_close(lambda: setattr(model.config, "use_cache", self._use_cache))
        check_run_length(args, state, num_steps=self.config.num_steps, passes=self.layer_passes, dataloader=dataloader)
        resumed = state.global_step > 0
        self.shared_dir = self.output_dir is None or self.output_dir == Path(str(args.output_dir))
        self.output_dir = self.output_dir or Path(str(args.output_dir))
        before = self._load_checkpoint(args, state, model) if resumed else None
        self._base = self._find_base(model, before)
        run = Run(
            output_dir=self.output_dir,
            shared_dir=self.shared_dir,
            main_process=state.is_world_process_zero,
            resumed=resumed,
            sliced=self.engine.shrink,
            gated=self.engine.gates is not None,
            sharded=is_sharded(model.parameters()),
            use_cache=True if self._use_cache is None else self._use_cache,
            tokenizer=tokenizer,
            trajectory=self.trajectory if before is None else before,
            model=model,
            dataloader=dataloader,
        )
        for stage in self.stages:
            stage.begin(run)
        if before is not None:
            self._restore(before, args, state, model)
        if state.is_world_process_zero:
            warn_of_slow_dtype(model)
            for note in (note_of_pruned_base(self.trajectory), note_of_few_groups(self.engine.layout, self.config)):
                if note is not None:
                    tqdm.write(note)
        mode.switch_off_dropout()
        clipped = mode.switch_off_clipping(args)
        if clipped and state.is_world_process_zero:
            tqdm.write(f"GISP: max_grad_norm={clipped:g} is off for this run, since clipping would change the scores")
        if self.chunk_tokens is not None:
            self._chunked = mode.enter(ChunkedLoss(model, self.chunk_tokens))
        micro_batches = 0 if is_distributed(args) else args.gradient_accumulation_steps
        mode.enter(differentiable_4bit(model))
        mode.enter(self.engine.watch(micro_batches=micro_batches))

    def _find_base(self, model: PreTrainedModel, before: Trajectory | None) -> Base:
        """The base of this run, which is that of ``before``, the trajectory of a checkpoint."""
        if self.engine.gates is not None and self._identify_files is not None:
            expected = None if before is None else before.base
            return self._identify_files(model, self.engine.layout, hide_path=self._hide_path, expected=expected)
        if before is not None:
            return before.base
        return identify(model, name=self.base_model, revision=self.base_revision, hide_path=self._hide_path)

    def _score(self, step: int, layer_pass: int, model: nn.Module) -> None:
        try:
            if self._chunked is not None:
                self._chunked.check_used()
            self.engine.accumulate(layer_pass)
        except (NonFiniteGradientError, ValueError) as error:
            saved = ", ".join(map(level_name, self.levels)) or "none"
            raise type(error)(
                f"step {step} of {self.config.num_steps}: {error}. Levels saved before: {saved}"
            ) from error
        for _, parameter in plain_parameters(model):
            parameter.grad = None  # nothing for the optimizer to do: weights stay as they are

    def _remove(self, step: int, args: TrainingArguments, state: TrainerState, model: PreTrainedModel) -> None:
        """Removes what the step's targets ask for, and sends each level that is reached through the stages."""
        targets = targets_of_step(
            step, self.config.num_steps, levels=self.config.sparsity_levels, schedule=self.config.schedule
        )
        removed: dict[str, int] = {kind.name: 0 for kind in self.engine.layout.kinds}
        for target, sparsity in targets:
            for kind, count in self.engine.advance(target).items():
                removed[kind] += count
            check_agreement(self.engine.order, step=step, device=args.device)
            if sparsity is not None:
                self._reach(sparsity, model, state)
        self._steps.append(
            Step(
                step=step,
                target=targets[-1][0],
                sparsity=self.engine.sparsity,
                parameters=self.engine.layout.total - self.engine.removed_parameters,
                removed=removed,
            )
        )

    def _reach(self, sparsity: float, model: PreTrainedModel, state: TrainerState) -> None:
        with self.engine.as_level() as changed:
            level = Level(sparsity, self.trajectory, model, self._level_folder(sparsity), changed=changed)
            for stage in self.stages:
                level = stage(level)
        self.levels[sparsity] = level
        if level.metrics:
            entry: dict[str, Any] = {"level": sparsity, **level.metrics, "step": state.global_step + 1}
            state.log_history.append(entry)

    def _level_folder(self, sparsity: float) -> Path:
        assert self.output_dir is not None
        return self.output_dir / level_name(sparsity)

    def _log_step(self, args: TrainingArguments, state: TrainerState, logs: dict[str, Any]) -> None:
        # All passes of a step see the same data and the same model, up to the order of summing.
        loss, self._losses = sum(self._losses) / len(self._losses), []
        step = self._steps[-1] = replace(self._steps[-1], loss=loss)
        if not math.isfinite(loss):
            raise FloatingPointError(f"step {step.step} of {self.config.num_steps}: the calibration loss is {loss}")
        pruned_base = self._base is not None and self._base.unpruned is not None
        log_step(
            self,
            step,
            num_steps=self.config.num_steps,
            sparsity_of_unpruned=self.trajectory.of_unpruned(step.sparsity) if pruned_base else None,
            args=args,
            state=state,
            logs=logs,
        )

    # ---- checkpoints ---------------------------------------------------------------------------------------------

    def _save_checkpoint(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: PreTrainedModel
    ) -> None:
        """Writes the checkpoint that the Trainer is about to write, in its place: whole at once, and without weights.

        A sharded model's is left to the Trainer, which gathers weights that only it can load again.
        """
        if not control.should_save or self._mode is None:
            return
        sharded = is_sharded(model.parameters())
        if state.is_world_process_zero:
            progress = self._progress(args, state)
            if sharded:  # before the Trainer's own files: a complete checkpoint always has the order
                folder = checkpoint_folder(str(args.output_dir), state.global_step)
                save_progress(folder, self.trajectory, progress, self.engine.averages())
            else:
                save_checkpoint(
                    str(args.output_dir),
                    trajectory=self.trajectory,
                    progress=progress,
                    averages=self.engine.averages(),
                    state=state,
                    limit=args.save_total_limit,
                )
        control.should_save = sharded

    def _progress(self, args: TrainingArguments, state: TrainerState) -> Progress:
        return Progress(
            global_step=state.global_step,
            world_size=args.world_size,
            examples_per_step=args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size,
            layer_passes=self.layer_passes,
            order=self.trajectory.digest() if self._base else "",
        )

    def _load_checkpoint(self, args: TrainingArguments, state: TrainerState, model: PreTrainedModel) -> Trajectory:
        """The removal order of the checkpoint that the Trainer has just read its own state from."""
        folder = checkpoint_folder(str(args.output_dir), state.global_step)
        before = load_progress(folder, self._progress(args, state))
        if before.config != self.config or before.layout.identity != self.engine.layout.identity:
            raise ValueError(
                f"the checkpoint {folder} was made with another GISPConfig or model; resume with {before.config}"
            )
        # The Trainer has loaded the zeros into a sharded model already; quantized weights are not the base's.
        if not is_sharded(model.parameters()) and self.engine.gates is None:
            before.check_base(model)
        for sparsity in self._levels_of(before):
            if not self._level_folder(sparsity).is_dir():
                raise ValueError(
                    f"the checkpoint is beyond {level_name(sparsity)}, but {self._level_folder(sparsity)} is gone; put "
                    "it back or start anew"
                )
        return before

    def _restore(
        self, before: Trajectory, args: TrainingArguments, state: TrainerState, model: PreTrainedModel
    ) -> None:
        self._steps = list(before.steps)
        folder = checkpoint_folder(str(args.output_dir), state.global_step)
        self.engine.restore(before.order, load_averages(folder, before))
        for sparsity in self._levels_of(before):
            folder = self._level_folder(sparsity)
            self.levels[sparsity] = Level(sparsity, Trajectory.load(folder), model, folder)

    def _levels_of(self, before: Trajectory) -> list[float]:
        """The levels that its steps aimed at. Whole layers can go beyond a level before its step has come."""
        target = before.steps[-1].target if before.steps else 0.0
        return [sparsity for sparsity in self.config.sparsity_levels if sparsity <= target + 1e-9]
