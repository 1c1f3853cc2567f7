"""Norm weights for each width of an elastic model, trained on text. Every matrix stays as it is, shared by all widths.

The norms of a level are a few thousandths of its parameters, so a file that holds them for every level hardly grows.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments, set_seed

from gisp_hf.data import Calibration
from gisp_hf.models.dtype import slow_factor
from gisp_hf.models.modeling_elastic import ElasticModelMixin
from gisp_hf.recovery.training import check_data, train_norms_of


def train_norms(
    model: PreTrainedModel,
    data: Calibration,
    arguments: TrainingArguments,
    *,
    widths: Sequence[float],
    teacher: PreTrainedModel | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> tuple[dict[float, dict[str, torch.Tensor]], dict[str, Any]]:
    """Trains the norms of an elastic model at some widths, one after the other, with the Trainer.

    Each width starts from the model's own norms. On several processes with DDP all get the same.

    Args:
        model: of `gisp_hf.levels.elastic.make_elastic`; it is only read.
        data: of `load_calibration`, for language modelling or completion.
        arguments: of the Trainer, for each width.
        widths: sparsities; 0 is the full width.
        teacher: as in `gisp_hf.recovery.lora.recover_level`.
        callbacks: for the Trainer.

    Returns:
        sparsity -> parameter -> weight, for `gisp_hf.levels.elastic.set_norms`; and facts of the trainings, by sparsity
        as text.

    Raises:
        ValueError: if the model is not elastic, the data are not for this, a width lies beyond the model, or FSDP or
            DeepSpeed shard it.
        FloatingPointError: if a loss or a weight is not finite.
    """
    if not isinstance(model, ElasticModelMixin):
        raise ValueError(f"{type(model).__name__} has one width; train the norms of a level with recover_level")
    check_data(data)
    for width in widths:
        model._counts_at(width)  # refuses what the model has not, before any work
    slow = slow_factor(model.dtype, arguments.device) > 1
    norms: dict[float, dict[str, torch.Tensor]] = {}
    facts: dict[str, Any] = {}
    for width in widths:
        level = model.at(width)
        if slow:
            level = level.float()
        set_seed(arguments.seed)
        facts[f"{width:g}"] = train_norms_of(level, data, arguments, teacher=teacher, callbacks=callbacks)
        names = [f"{name}.weight" for name in model._norms()]
        norms[width] = {name: level.get_parameter(name).detach().to("cpu", model.dtype) for name in names}
        if not all(bool(weight.isfinite().all()) for weight in norms[width].values()):
            raise FloatingPointError(f"norms at sparsity {width:g} are not finite; lower the learning rate")
    return norms, facts
