"""Recovery: adapters or vectors are trained on a saved level, merged into its weights, and saved as a level again."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import AutoModelForCausalLM, PreTrainedModel, TrainerCallback, TrainingArguments, set_seed

from gisp_hf.atomic import replace_folder, unique_beside
from gisp_hf.data import Calibration
from gisp_hf.levels.files import Files, empty_model, read_model_config
from gisp_hf.levels.manifest import CHANGING_FILES, MANIFEST_FILE, check_manifest, write_manifest
from gisp_hf.levels.weights import FileWeights, overwrite_tensors
from gisp_hf.losses.distillation import check_teacher
from gisp_hf.models.dtype import slow_factor
from gisp_hf.models.fingerprint import fingerprint
from gisp_hf.models.shards import model_fingerprint, plain_parameters
from gisp_hf.pruning.trajectory import Trajectory
from gisp_hf.recovery.lora_record import TRAINED, Recovery, is_recovered
from gisp_hf.recovery.record import is_restored
from gisp_hf.recovery.training import check_data, train_on
from gisp_hf.recovery.vectors import attach_vectors, fold_vectors

LORA_KEYS = ("r", "lora_alpha", "lora_dropout", "bias", "use_dora", "use_rslora")


def recover_level(
    level: str | Path,
    output_dir: str | Path,
    *,
    data: Calibration,
    arguments: TrainingArguments,
    train: Literal["lora", "norms", "scales"] = "lora",
    lora: LoraConfig | None = None,
    teacher: PreTrainedModel | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> Path:
    """Trains a few parameters of a level with the Trainer and writes the merged model, with ``recovery.json``.

    Only parameters that the training changed differ from those of the level; all other files and tensors are the same,
    byte for byte. A level that was restored before keeps its ``restoration.json``. Works on several processes with DDP
    (``accelerate launch``): all call this, the first one writes.

    Args:
        level: the folder of a saved level, which stays as it is.
        output_dir: must not exist; it appears once everything is written. Called ``sparsity-0.30`` in a folder of its
            own, it is a run for ``gisp-hf push`` and ``gisp-hf levels``.
        data: of `load_calibration`, for language modelling or completion: text for training, not the calibration set.
        arguments: of the Trainer. ``seed`` also fixes the start of the adapters.
        train: "lora": low-rank adapters; "norms": the weights of norms; "scales": a factor for each input of ``o_proj``
            and ``down_proj`` (`gisp_hf.recovery.vectors`). The last two are few, and take a higher learning rate.
        lora: adapters; ``LoraConfig()`` takes the modules that PEFT has for the unpruned family.
        teacher: a model with the same vocabulary, such as the unpruned model, or an elastic one at full width: the loss
            is then the forward KL divergence from its logits (`gisp_hf.losses.Distillation`). It is moved to the
            device of the training. None: language modelling.
        callbacks: for the Trainer, such as `gisp_hf.recovery.time_limit.TimeLimit`.

    Returns:
        ``output_dir``.

    Raises:
        FileExistsError: if ``output_dir`` exists.
        FileNotFoundError: if ``level`` is no level.
        ValueError: if the level is recovered already or not as it was saved, the teacher has another vocabulary or is
            not at full width, the data are not for this, ``lora`` comes with another ``train``, adapters are on tied
            weights, or parameters are sharded.
        FloatingPointError: if the loss or a merged weight is not finite. Nothing is written then.
    """
    level, output_dir = Path(level), Path(output_dir)
    if output_dir.exists():
        raise FileExistsError(f"{output_dir} exists already; remove it or choose another output folder")
    if is_recovered(level):
        raise ValueError(f"{level} is recovered already; use it as it is, or recover the level that it was made from")
    if train not in TRAINED:
        raise ValueError(f"train must be one of {', '.join(TRAINED)}, got {train!r}")
    if lora is not None and train != "lora":
        raise ValueError(f"lora= has settings of adapters, and train={train!r} trains none; leave one of the two out")
    check_data(data)
    if lora is not None and lora.modules_to_save:
        raise ValueError(
            f"modules_to_save is {lora.modules_to_save}: whole modules, which this does not train; name them in "
            "target_modules, or leave them out"
        )
    trajectory = Trajectory.load(level)
    check_manifest(level)
    shell = empty_model(read_model_config(level), label=str(level))
    if teacher is not None:
        check_teacher(shell, teacher)
    stored: torch.dtype = shell.config.dtype or torch.float32  # type: ignore[assignment]
    run_in = torch.float32 if slow_factor(stored, arguments.device) > 1 else stored
    adapted: PeftModel | PreTrainedModel = AutoModelForCausalLM.from_pretrained(level, dtype=run_in)
    set_seed(arguments.seed)
    if train == "lora":
        adapted = get_peft_model(adapted, lora or LoraConfig(task_type="CAUSAL_LM"))
        _check_untied(adapted)
    else:
        attach_vectors(adapted, train)
    trainer, trained = train_on(adapted, data, arguments, teacher=teacher, callbacks=callbacks)
    if trainer.is_world_process_zero():
        facts: dict[str, Any] = {
            **trained,
            "train": train,
            "lora": _describe_lora(adapted),
            "teacher": {} if teacher is None else _describe(teacher),
            "data": data.provenance,
            "base": asdict(trajectory.base),
        }
        _write(merge(adapted), level, output_dir, facts)
    trainer.accelerator.wait_for_everyone()
    return output_dir


def merge(model: PeftModel | PreTrainedModel) -> PreTrainedModel:
    """The model with what was trained on it in its weights. ``model`` cannot be used afterwards."""
    if isinstance(model, PeftModel):
        return merge_adapters(model)
    fold_vectors(model)
    return cast(PreTrainedModel, model.eval())


def merge_adapters(model: PeftModel) -> PreTrainedModel:
    """The model that a PEFT model wraps, with the adapters added to its weights. ``model`` cannot be used afterwards.

    Adapted layers are in float32 afterwards, so that weights are rounded once, when they are saved.
    """
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.get_base_layer().float()
    return cast(PreTrainedModel, cast(Any, model).merge_and_unload().eval())


def _check_untied(model: PeftModel) -> None:
    """Refuses adapters on weights that two modules share: merged, they would change both."""
    adapted = [module.get_base_layer() for module in model.modules() if isinstance(module, BaseTunerLayer)]
    owners = {id(parameter): layer for layer in adapted for parameter in layer.parameters(recurse=False)}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if owners.get(id(parameter), module) is not module:
                raise ValueError(
                    f"the adapted weight is also {path}.{name}: merged, the adapter would change both; leave the "
                    "embeddings and the LM head out of target_modules"
                )


def _describe_lora(model: PeftModel | PreTrainedModel) -> dict[str, Any]:
    if not isinstance(model, PeftModel):
        return {}
    lora = cast(LoraConfig, model.peft_config["default"])
    return {**{key: getattr(lora, key) for key in LORA_KEYS}, "target_modules": _modules(lora)}


def _modules(lora: LoraConfig) -> str | list[str] | None:
    found = lora.target_modules
    return found if found is None or isinstance(found, str) else sorted(found)


def _describe(teacher: PreTrainedModel) -> dict[str, str | None]:
    """Class, name and fingerprint of a teacher; of a folder the last name only."""
    name = teacher.name_or_path
    return {
        "class": type(teacher).__name__,
        "name": Path(name).resolve().name if name and Path(name).exists() else name,
        "fingerprint": model_fingerprint(plain_parameters(teacher)),
    }


def _write(merged: PreTrainedModel, level: Path, output_dir: Path, facts: Mapping[str, Any]) -> None:
    """A copy of the level's folder with the tensors of ``merged`` that differ from its own."""
    places = FileWeights(Files(level, None, None, None), merged)
    temporary = unique_beside(output_dir)
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    changed: dict[str, torch.Tensor] = {}
    try:
        shutil.copytree(level, temporary, ignore=shutil.ignore_patterns(*CHANGING_FILES, MANIFEST_FILE, ".*"))
        for name, parameter in merged.named_parameters():
            before = places.read([name])[name]
            after = parameter.detach().to("cpu", before.dtype)
            if not after.isfinite().all():
                raise FloatingPointError(f"{name} is not finite in {before.dtype} once the training is merged")
            if not torch.equal(before, after):
                filename, own = places.places(name)
                overwrite_tensors(temporary / filename, {own: after})
                changed[name] = after
        record = Recovery(
            **facts,
            restored=is_restored(level),
            changed=tuple(changed),
            fingerprint=fingerprint(changed.items()),
        )
        record.save(temporary)
        write_manifest(temporary)
        replace_folder(temporary, output_dir)
    except BaseException:  # Ctrl-C too: nothing half-written stays behind
        shutil.rmtree(temporary, ignore_errors=True)
        raise
