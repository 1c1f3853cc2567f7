"""``GISPPruner``: a callback that makes a Trainer run a pruning run. It decides *when*; the engine does the work."""

import inspect
import math
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler

from gisp_hf.architectures import discover
from gisp_hf.checkpoint import check_output_folder, save_level
from gisp_hf.config import GISPConfig, level_name
from gisp_hf.engine import Engine, NonFiniteGradientError
from gisp_hf.fingerprint import fingerprint
from gisp_hf.schedule import targets_of_step
from gisp_hf.surgery import as_pruned_model
from gisp_hf.trajectory import Base, Step, Trajectory


class GISPPruner(TrainerCallback):
    """Prunes the Trainer's model while ``trainer.train()`` runs over the calibration data.

    One optimizer step is one pruning step: the gradients that the Trainer has accumulated become scores, the lowest
    scored structures go, and the optimizer is left with no gradient, so that what survives keeps its weights bit for
    bit. ``gradient_accumulation_steps`` times the batch size is the number of calibration examples per step. Each level
    is saved under ``output_dir/sparsity-0.20`` and so on as soon as it is reached, the removal order under
    ``output_dir/trajectory.*``, and the run ends by itself after ``config.num_steps`` steps.

    Args:
        config: how to prune; the defaults of ``GISPConfig`` if None.
        output_dir: where levels are saved; the Trainer's own ``output_dir`` if None.
        shrink: slice structures out during the run, which makes it cheaper. None: wherever nothing wraps the
            parameters. False: keep zeros in their place, in the model that the Trainer holds; saved levels are sliced.
        base_model: the id of the model that is pruned, for the record; its ``name_or_path`` if None.
        base_revision: the commit of that model; looked up in the Hub cache if None.
        calibration: facts about the calibration data, for the record.

    Attributes:
        trajectory: the removal order so far.
        level_folders: level -> folder, for the levels saved so far.

    Raises:
        ValueError: when the Trainer is built or training begins, if the model or the arguments do not allow pruning.
        FileExistsError, OSError: likewise, if the output folder cannot be used.
        FloatingPointError: during the run, if a loss or gradient is not finite.
    """

    def __init__(
        self,
        config: GISPConfig | None = None,
        output_dir: str | Path | None = None,
        *,
        shrink: bool | None = None,
        base_model: str | None = None,
        base_revision: str | None = None,
        calibration: dict[str, Any] | None = None,
    ) -> None:
        self.config = config or GISPConfig()
        self.output_dir = None if output_dir is None else Path(output_dir)
        self.shrink = shrink
        self.base_model = base_model
        self.base_revision = base_revision
        self.calibration = calibration or {}
        self.level_folders: dict[float, Path] = {}
        self._engine: Engine | None = None
        self._base: Base | None = None
        self._steps: list[Step] = []
        self._saved_flags: dict[str, bool] = {}
        self._saved_dropout: list[tuple[nn.Module, str, float]] = []
        self._saved_use_cache: bool | None = None
        self._was_training = False

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
            if args.world_size > 1:
                raise ValueError(
                    "with several processes GISPPruner must be in Trainer(callbacks=[...]), not in add_callback: "
                    "the model is wrapped with what requires a gradient when training begins"
                )
            _move_before_trackers(self)
            self._prepare(args, model)
        engine = self._engine
        assert engine is not None
        if engine.length:
            raise ValueError(
                "this GISPPruner has pruned already; build a new model, Trainer and GISPPruner for another run"
            )
        try:
            _check_run_length(args, state, self.config.num_steps, train_dataloader)
            self._base = self._identify(model)
        except ValueError:
            self._restore(model)
            raise
        self._saved_dropout = _switch_off_dropout(model)

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        processing_class: Any = None,
        **kwargs: Any,
    ) -> None:
        engine = self._engine
        assert engine is not None
        step = state.global_step + 1
        if step > self.config.num_steps:
            return
        try:
            engine.accumulate()
        except (NonFiniteGradientError, ValueError) as error:
            self._restore(model)
            saved = ", ".join(folder.name for folder in self.level_folders.values()) or "none"
            raise type(error)(
                f"step {step} of {self.config.num_steps}: {error}. Levels saved before: {saved}"
            ) from error
        groups = channels = 0
        targets = targets_of_step(
            step, self.config.num_steps, levels=self.config.sparsity_levels, schedule=self.config.schedule
        )
        for target, level in targets:
            removal = engine.advance(target)
            groups, channels = groups + removal.groups, channels + removal.channels
            if level is not None:
                self._save_level(level, model, tokenizer=processing_class)
        self._steps.append(
            Step(
                step=step,
                target=targets[-1][0],
                sparsity=engine.sparsity,
                parameters=engine.layout.total - engine.removed_parameters,
                groups=groups,
                channels=channels,
            )
        )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        control.should_log = True  # the Trainer measures the loss of a step only if it logs that step
        if state.global_step >= self.config.num_steps:
            control.should_training_stop = True
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
        if logs is None or "loss" not in logs or not self._steps or self._steps[-1].loss is not None:
            return
        loss = float(logs["loss"])
        step = self._steps[-1] = Step(**{**vars(self._steps[-1]), "loss": loss})
        if not math.isfinite(loss):
            self._restore(model)
            raise FloatingPointError(f"step {step.step} of {self.config.num_steps}: the calibration loss is {loss}")
        numbers = {
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

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        engine = self._engine
        assert engine is not None
        self._restore(model)
        done = len(self._steps)
        if done and self.output_dir is not None and state.is_world_process_zero:
            self.trajectory.save(self.output_dir)
        if done < self.config.num_steps:
            raise RuntimeError(
                f"training ended after {done} of {self.config.num_steps} pruning steps: the data ran out, or another "
                f"callback stopped it. Saved so far: {', '.join(map(level_name, self.level_folders)) or 'no level'}"
            )
        if engine.shrink:
            as_pruned_model(model, engine.layout, [len(keep) for keep in engine.kept()])

    # ---- how -----------------------------------------------------------------------------------------------------

    def _prepare(self, args: TrainingArguments, model: PreTrainedModel) -> None:
        """Everything that can be refused is refused here; then only what is scored keeps its gradient."""
        _check_arguments(args)
        _check_model(model)
        wrapped = args.world_size > 1 or args.torch_compile
        if self.shrink and wrapped:
            raise ValueError(
                "shrink=True needs a single process without torch_compile; leave it at None to let zeros stay"
            )
        shrink = not wrapped if self.shrink is None else self.shrink
        engine = Engine(model, discover(model), self.config, shrink=shrink)
        trainer_dir = Path(str(args.output_dir))
        if args.process_index == 0:
            if self.output_dir is None:
                check_output_folder(trainer_dir, may_hold_others=True)
            else:
                check_output_folder(self.output_dir, may_hold_others=False)
        self.output_dir = self.output_dir or trainer_dir
        self._engine = engine
        self._saved_use_cache = getattr(model.config, "use_cache", None)  # the Trainer overwrites it after this
        self._was_training = model.training
        scored = set(engine.scored_parameters)
        for name, parameter in model.named_parameters():
            self._saved_flags[name] = parameter.requires_grad
            parameter.requires_grad_(name in scored)

    def _identify(self, model: PreTrainedModel) -> Base:
        name = self.base_model or model.name_or_path or type(model).__name__
        return Base(
            id=name,
            revision=self.base_revision or _cached_commit(name),
            fingerprint=fingerprint(model.named_parameters()),
        )

    def _save_level(self, level: float, model: PreTrainedModel, *, tokenizer: Any) -> None:
        engine = self._engine
        assert engine is not None and self.output_dir is not None
        self.level_folders[level] = save_level(
            model,
            self.output_dir / level_name(level),
            trajectory=self.trajectory,
            sliced=engine.shrink,
            tokenizer=tokenizer,
            use_cache=self._saved_use_cache,
        )

    def _restore(self, model: PreTrainedModel) -> None:
        """Gives back what was changed for the run: gradient flags, dropout, ``use_cache``, train or eval mode."""
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(self._saved_flags.get(name, parameter.requires_grad))
            parameter.grad = None
        for module, attribute, value in self._saved_dropout:
            setattr(module, attribute, value)
        self._saved_dropout = []
        if self._saved_use_cache is not None:
            model.config.use_cache = self._saved_use_cache
        model.train(self._was_training)


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


def _check_arguments(args: TrainingArguments) -> None:
    if args.fp16:
        raise ValueError(
            "fp16=True scales gradients up and skips steps that overflow, which breaks the scores; use bf16=True, or "
            "load the model in bfloat16"
        )
    if args.deepspeed:
        raise ValueError(
            "deepspeed is not supported: its gradients are not on the parameters; use plain accelerate launch (DDP), "
            "or a single process"
        )
    if args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} GPUs in one process would be nn.DataParallel; start with `accelerate launch`, or make one "
            "GPU visible by CUDA_VISIBLE_DEVICES=0"
        )
    checkpointing = args.activation_checkpointing_kwargs
    if args.activation_checkpointing and isinstance(checkpointing, dict) and checkpointing.get("use_reentrant"):
        raise ValueError(
            "reentrant gradient checkpointing drops the gradients behind frozen embeddings; set "
            "activation_checkpointing_kwargs={'use_reentrant': False}"
        )


def _check_model(model: PreTrainedModel) -> None:
    if "PeftModel" in {cls.__name__ for cls in type(model).__mro__} or getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(
            "the model has PEFT adapters, which would hide its own weights from the scores; call merge_and_unload() "
            "first, or prune the base model and train adapters on a pruned level"
        )
    if getattr(model, "is_quantized", False) or getattr(model, "hf_quantizer", None) is not None:
        raise ValueError(
            "the model is quantized, and quantized weights have no gradients; load it in bfloat16, prune, and quantize "
            "the pruned level"
        )
    for name, parameter in model.named_parameters():
        if parameter.is_inference() or not parameter.is_floating_point():
            raise ValueError(
                f"{name} cannot have a gradient (dtype {parameter.dtype}, made under inference_mode: "
                f"{parameter.is_inference()}); load the model in bfloat16 or float32, outside torch.inference_mode()"
            )


def _check_run_length(args: TrainingArguments, state: TrainerState, num_steps: int, dataloader: Any) -> None:
    per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    try:
        examples = len(dataloader.dataset)
    except (AttributeError, TypeError):  # a stream
        examples = None
    if examples == 0:
        raise ValueError("the training data set is empty; pruning needs calibration examples")
    if state.max_steps < num_steps:
        size = f" ({examples} examples, {per_step} per step, {args.num_train_epochs:g} epochs)" if examples else ""
        raise ValueError(
            f"{num_steps} pruning steps were asked for, but this run has only {state.max_steps}{size}: set "
            f"TrainingArguments(max_steps={num_steps}), or GISPConfig(num_steps={state.max_steps})"
        )


def _switch_off_dropout(model: nn.Module) -> list[tuple[nn.Module, str, float]]:
    """Sets every dropout probability to 0, and returns what it was. The Trainer puts the model in train mode itself."""
    changed = []
    for module in model.modules():
        attribute = "p" if isinstance(module, nn.modules.dropout._DropoutNd) else "attention_dropout"
        value = getattr(module, attribute, None)
        if isinstance(value, float) and value > 0:
            changed.append((module, attribute, value))
            setattr(module, attribute, 0.0)
    return changed


def _cached_commit(model_id: str) -> str | None:
    """The commit of a Hub model, read from the name of its folder in the local cache."""
    try:
        path = try_to_load_from_cache(model_id, "config.json")
    except ValueError:  # not a repository id: a local folder
        return None
    return Path(path).parent.name if isinstance(path, str) else None
