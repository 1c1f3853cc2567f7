"""Writes the elastic checkpoint of a run: one file for all levels, with structures sorted by removal order."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gisp_hf.atomic import replace_folder, unique_beside, write_text_atomic
from gisp_hf.levels.manifest import write_manifest
from gisp_hf.models import discover, family_of
from gisp_hf.models import modeling_elastic as elastic
from gisp_hf.pruning.trajectory import Trajectory

FACTS_FILE = "elastic.json"


def elastic_class(model: PreTrainedModel) -> Any:
    """The elastic class of a model's family.

    Raises:
        ValueError: if it has none, or its structures are not each one part of a parameter.
    """
    pruned = family_of(model).pruned_model
    for candidate in elastic.ElasticModelMixin.__subclasses__():
        if candidate.pruned_model is pruned:
            return candidate
    known = ", ".join(candidate.__name__ for candidate in elastic.ElasticModelMixin.__subclasses__())
    raise ValueError(
        f"{type(model).__name__} has no elastic class (there are {known}): a level must be a prefix of every "
        "parameter, which fused projections and other kinds of structures do not allow. Use `gisp-hf materialize`"
    )


def elastic_table(trajectory: Trajectory, levels: Sequence[float], *, full_apart: bool = False) -> dict[str, Any]:
    """``config.elastic`` of a run; its keys are explained in `gisp_hf.models.modeling_elastic`.

    Raises:
        ValueError: if a level lies beyond the trajectory.
    """
    layout, kinds = trajectory.layout, [kind.name for kind in trajectory.layout.kinds]

    def by_kind(values: Sequence[int]) -> dict[str, list[int]]:
        return {kind: [values[number] for number in layout.of_kind(kind)] for kind in kinds}

    counts = {f"{level:g}": [len(keep) for keep in trajectory.kept(level)] for level in sorted(levels)}
    return {
        "format": elastic.FORMAT,
        "total": layout.total,
        "sizes": by_kind([block.size for block in layout.blocks]),
        "costs": by_kind([block.cost for block in layout.blocks]),
        "multiples": {kind: n for kind, n in trajectory.config.multiples.items() if n > 1},
        "levels": {level: by_kind(numbers) for level, numbers in counts.items()},
        "full_apart": full_apart,
        "norms": [],
    }


@torch.no_grad()
def make_elastic(
    model: PreTrainedModel,
    trajectory: Trajectory,
    *,
    levels: Sequence[float] | None = None,
    weights: Mapping[str, torch.Tensor] | None = None,
    full_apart: bool = False,
) -> PreTrainedModel:
    """Turns the unpruned model, in place, into an elastic one at full width.

    Args:
        model: the one that the trajectory was made from.
        levels: of the table in the config, sparsities in (0, 1); those of the run if None. Any other can be set too.
        weights: parameter -> weight that all levels share, of the unpruned shape and order
            (`gisp_hf.recovery.elastic.shared_weights`); the unpruned ones for those that are left out.
        full_apart: keep the unpruned weights of ``weights`` for full width; a larger file.

    Raises:
        ValueError: if the model is not the base, has no elastic class, or ``weights`` does not fit.
    """
    trajectory.check_base(model)
    model_class = elastic_class(model)
    table = elastic_table(trajectory, levels or trajectory.config.sparsity_levels, full_apart=full_apart)
    apart = {name: model.get_parameter(name).detach().clone() for name in weights or {}} if full_apart else {}
    for name, weight in (weights or {}).items():
        parameter = model.get_parameter(name)
        if parameter.shape != weight.shape:
            raise ValueError(f"{name} has shape {tuple(parameter.shape)}, its weights {tuple(weight.shape)}")
        parameter.copy_(weight)
    places = _sort(trajectory)
    for block, order in zip(discover(model).blocks, places):
        for member in block.members:
            parameter = model.get_parameter(member.parameter)
            rows = member.rows(order).flatten().to(parameter.device)
            parameter.data = parameter.data.index_select(member.dim, rows)
            if member.parameter in apart:
                apart[member.parameter] = apart[member.parameter].index_select(member.dim, rows)
    config: Any = model.config
    if getattr(config, "head_dim", None) is None:
        config.head_dim = config.hidden_size // config.num_attention_heads
    config.__class__ = model_class.config_class
    config.elastic, config.sparsity = table, 0.0
    made: Any = model
    made.__class__ = model_class
    made._make_elastic()
    made.removal_order.copy_(torch.cat(trajectory.order))
    for name, module in made.named_modules():
        if hasattr(module, elastic.FULL):
            getattr(module, elastic.FULL).copy_(apart.get(f"{name}.weight", module.weight))
    made.set_sparsity(0.0)
    return model


@torch.no_grad()
def set_norms(model: PreTrainedModel, weights: Mapping[float, Mapping[str, torch.Tensor]]) -> None:
    """Gives widths of an elastic model norm weights of their own; those between two of them mix theirs.

    Args:
        model: loaded in full (`make_elastic`). Its sparsity stays as it is.
        weights: sparsity -> parameter -> weight, for all norms of the model. The full width keeps its own if 0 is left
            out.

    Raises:
        ValueError: if there is no sparsity above 0, or a norm is missing or of another shape.
    """
    made: Any = model
    norms, before, at_full = made._norms(), made.sparsity, made.at(0.0)  # refused if it was not loaded in full
    full = {f"{name}.weight": at_full.get_parameter(f"{name}.weight").detach().clone() for name in norms}
    weights = {0.0: full, **weights}
    points = sorted(weights)
    if len(points) < 2:
        raise ValueError("weights has no sparsity above 0, so no level would have norms of its own")
    for point in points:
        made._counts_at(point)  # refuses one beyond the end of the order
        for name, weight in full.items():
            if name not in weights[point] or weights[point][name].shape != weight.shape:
                raise ValueError(f"the norms at sparsity {point:g} have no {name} of shape {tuple(weight.shape)}")
    made.config.elastic = {**made.config.elastic, "norms": points}
    made._make_norms()
    for name, norm in norms.items():
        getattr(norm, elastic.NORMS).copy_(torch.stack([weights[point][f"{name}.weight"] for point in points]))
    made.set_sparsity(before)


def save_elastic(
    model: PreTrainedModel,
    folder: str | Path,
    *,
    trajectory: Trajectory,
    tokenizer: PreTrainedTokenizerBase | None = None,
    facts: Mapping[str, Any] | None = None,
) -> Path:
    """Writes an elastic model (`make_elastic`) with its code, its tokenizer and the removal order, atomically.

    Args:
        folder: must not exist; it appears once everything is written.
        facts: how the shared weights were made, for ``elastic.json``; nothing is written if None.

    Raises:
        FileExistsError: if ``folder`` exists.
    """
    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f"{folder} exists already; remove it or choose another output folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = unique_beside(folder)
    temporary.mkdir()
    try:
        elastic_model: Any = model
        elastic_model.save_elastic(temporary)
        trajectory.save(temporary)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        if facts is not None:
            write_text_atomic(temporary / FACTS_FILE, json.dumps(facts, indent=1, sort_keys=True) + "\n")
        write_manifest(temporary)
        replace_folder(temporary, folder)
    except BaseException:  # Ctrl-C too: nothing half-written stays behind
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return folder


def _sort(trajectory: Trajectory) -> list[torch.Tensor]:
    """Per block, the structures in the order of the file: those that stay, then the others, the first to go last."""
    last = torch.iinfo(torch.int32).max
    return [
        torch.where(positions < 0, last, positions).argsort(descending=True, stable=True)
        for positions in trajectory.order
    ]
