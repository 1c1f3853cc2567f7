"""One checkpoint for all levels of a run. Its structures are sorted by removal order, so each level is a prefix.

This file travels with elastic checkpoints, beside ``elastic_sizes.py`` and ``modeling_gisp.py``, so that
``from_pretrained(..., trust_remote_code=True)`` works where gisp_hf is not installed. It imports nothing beyond those
files, transformers and what that itself stands on.

A *block* is all structures of one kind in one layer; blocks are ordered by (layer, kind). *Counts* are the structures
that each block keeps at some sparsity. ``config.elastic`` holds, besides ``format``:

    total       parameters of the unpruned decoder layers; sparsity is a fraction of it
    sizes       kind -> structures of each unpruned layer
    costs       kind -> parameters of one structure in each layer
    multiples   kind -> the count of a layer is rounded up to a multiple of it; kinds without rounding are left out
    levels      sparsity, as text -> kind -> count of each layer
    full_apart  whether the file also holds the output projections of the unpruned model, for full width
    norms       sparsities, ascending from 0, that have norm weights of their own; empty: all widths share theirs

The buffer ``removal_order`` holds, block after block, the position of each structure in the removal order (-1: it is
never removed), in the order of the unpruned model. It gives the counts between levels, and the original order.
"""

import copy
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from safetensors import safe_open
from torch import nn
from transformers import Cache, GenerationConfig, PreTrainedConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from .elastic_sizes import CONFIG_KEYS, LAYERS, PROJECTIONS, SizeTable, overrides_of, prefixes
from .modeling_gisp import (
    GispGemma2ForCausalLM,
    GispGemma3ForCausalLM,
    GispLlamaForCausalLM,
    GispMistralForCausalLM,
    GispQwen2ForCausalLM,
    GispQwen3ForCausalLM,
)

FORMAT = 1
ORDER = "removal_order"
FULL = "full_weight"  # buffer of an output projection: its weight in the unpruned model
NORMS = "weight_of_levels"  # buffer of a norm: its weight at each sparsity of the table's ``norms``, (k, d)
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


class ElasticConfigMixin:
    """The config of an elastic checkpoint: that of the unpruned model, with the table of levels."""

    elastic: Any = None
    sparsity: Any = 0.0  # at which ``from_pretrained`` loads the model

    def validate_architecture(self) -> None:
        config: Any = self
        super().validate_architecture()  # type: ignore[misc]
        if config.elastic is None:  # a config of default values
            return
        table, layers = config.elastic, config.num_hidden_layers
        if table["format"] != FORMAT:
            raise ValueError(f"the elastic table has format {table['format']!r}, this file reads format {FORMAT}")
        points = table["norms"]
        if points and (points[0] != 0 or len(points) < 2 or points != sorted(set(points))):
            raise ValueError(f"norms of the elastic table must ascend from 0, got {points}")
        for name, row in {"sizes": table["sizes"], "costs": table["costs"], **table["levels"]}.items():
            if list(row) != list(table["sizes"]) or not set(row) <= set(PROJECTIONS):
                raise ValueError(f"{name} of the elastic table has kinds {', '.join(row)}")
            if any(len(line) != layers or any(type(n) is not int or n < 1 for n in line) for line in row.values()):
                raise ValueError(f"{name} of the elastic table must have {layers} whole numbers above 0 for each kind")


class ElasticModelMixin:
    """A model whose width is set at run time. Narrower levels are views of the same weights."""

    config_class: Any = None
    pruned_model: Any = None  # the class of its levels

    def __init__(self, config, *args, **kwargs):
        if config.elastic is None:
            raise ValueError("this config has no elastic table; `gisp-hf elastic` writes elastic checkpoints")
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        self._make_elastic()

    def _make_elastic(self) -> None:
        """Adds to a pruned or unpruned model what an elastic one has: the removal order, and checks of the cache."""
        model: Any = self
        table = model.config.elastic
        structures = sum(sum(sizes) for sizes in table["sizes"].values())
        model.register_buffer(ORDER, torch.full((structures,), -1, dtype=torch.int32))
        self._blocks = [(n, kind) for n in range(model.config.num_hidden_layers) for kind in table["sizes"]]
        self._full = [table["sizes"][kind][layer] for layer, kind in self._blocks]
        layers = [model.config.per_layer_config[layer] for layer in range(model.config.num_hidden_layers)]
        self._heads_per_group = layers[0].num_attention_heads // layers[0].num_key_value_heads
        self._counts = [getattr(layers[layer], CONFIG_KEYS[kind][-1]) for layer, kind in self._blocks]
        self._widest = list(self._counts)  # less than the full width, if no more was loaded
        self._sparsity = float(model.config.sparsity) if self._widest != self._full else 0.0
        self._uniform = not model.config.is_heterogeneous  # unpruned layers have the same sizes
        self._whole: dict[str, torch.Tensor] = {}  # weights at the widest, while parameters are parts of them
        if table["full_apart"] and self._widest == self._full:
            for projection in self._output_projections():
                projection.register_buffer(FULL, torch.empty_like(projection.weight.data))
        self._make_norms()
        model.register_forward_pre_hook(_check_cache, with_kwargs=True)
        model.register_forward_hook(_mark_cache)

    def _make_norms(self) -> None:
        """Room for the norm weights of each sparsity in the table's ``norms``."""
        points: Any = self.config.elastic["norms"]  # type: ignore[attr-defined]
        for norm in self._norms().values() if points else ():
            weight = norm.weight.data
            norm.register_buffer(NORMS, weight.expand(len(points), *weight.shape).clone())

    # ---- width -------------------------------------------------------------------------------------------------------

    @property
    def sparsity(self) -> float:
        """As asked for last: a fraction of the unpruned decoder layers' parameters; 0 is full width."""
        return self._sparsity

    def set_sparsity(self, sparsity: float) -> Any:
        """Narrows or widens the model, in place, by views: no matrix is copied.

        Between two sparsities that have norm weights of their own, these are mixed by their distance.

        Args:
            sparsity: from 0 (full width) to the end of the removal order. The fewest removals that reach it are made.

        Returns:
            The model itself.

        Raises:
            ValueError: if the sparsity lies outside, or was not loaded.
        """
        self._set_counts(self._counts_at(sparsity))
        self._sparsity = float(sparsity)
        self._set_norms(self._sparsity)
        return self

    def at(self, sparsity: float) -> Any:
        """An ordinary model of the level at ``sparsity``. Its matrices are views of this model's: no copy.

        It can be the ``assistant_model`` of this one. At sparsity 0 it is of the unpruned class. Move this model to its
        device first: ``to`` copies weights, and the two share none from then on.

        Raises:
            ValueError: as `set_sparsity`.
        """
        counts, before = self._counts_at(sparsity), self._counts
        model: Any = self
        self._set_counts(counts)
        self._set_norms(sparsity)
        try:
            with torch.device("meta"):
                level = self._level_shell()
            made: dict[int, nn.Parameter] = {}  # a tied weight is one parameter of two modules
            for path, module in level.named_modules():
                source = model.get_submodule(path)
                for name, own in source._parameters.items():
                    if own is not None and id(own) not in made:
                        made[id(own)] = nn.Parameter(own.data, requires_grad=own.requires_grad)
                    module._parameters[name] = None if own is None else made[id(own)]
                for name in module._buffers:
                    module._buffers[name] = source._buffers[name]
        finally:
            self._set_counts(before)
            self._set_norms(self._sparsity)
        level.generation_config = copy.deepcopy(model.generation_config)
        level.name_or_path = model.name_or_path
        return level.train(model.training)

    def _table(self) -> SizeTable:
        return SizeTable(self.config.elastic, getattr(self, ORDER))  # type: ignore[attr-defined]

    def _counts_at(self, sparsity: float) -> list[int]:
        counts = self._table().counts(sparsity)
        if any(count > most for count, most in zip(counts, self._widest)):
            loaded = self.config.sparsity  # type: ignore[attr-defined]
            raise ValueError(
                f"sparsity {sparsity:g} needs weights that were not loaded: the model was loaded with "
                f"sparsity={loaded:g}; load it with sparsity={sparsity:g} or less"
            )
        return counts

    @torch.no_grad()
    def _set_counts(self, counts: list[int]) -> None:
        model: Any = self
        if not self._whole:
            self._whole = {name: parameter.data for name, parameter, _, _ in self._cut_parameters()}
        for name, parameter, dim, block in self._cut_parameters():
            whole = self._whole[name]
            length = whole.shape[dim] // self._widest[block] * counts[block]
            if length != parameter.shape[dim]:
                parameter.grad = None  # of another shape
            parameter.data = whole.narrow(dim, 0, length)
        apart = [projection for projection in self._output_projections() if hasattr(projection, FULL)]
        if counts == self._full:
            for projection in apart:
                projection.weight.data = getattr(projection, FULL)
        if counts == self._widest and not apart:
            self._whole = {}
        for (layer, kind), count in zip(self._blocks, counts):
            for path, _ in PROJECTIONS[kind]:
                projection = model.get_submodule(f"{LAYERS}.{layer}.{path}")
                projection.out_features, projection.in_features = projection.weight.shape
            if kind == "mlp":
                model.get_submodule(f"{LAYERS}.{layer}.mlp").intermediate_size = count
        self._counts = list(counts)
        model.config.per_layer_config = self._overrides(counts)

    @torch.no_grad()
    def _set_norms(self, sparsity: float) -> None:
        """Takes the norm weights of this sparsity. They are copies: a model of `at` keeps its own."""
        points: Any = self.config.elastic["norms"]  # type: ignore[attr-defined]
        if not points:
            return
        right = min(max(bisect_left(points, sparsity), 1), len(points) - 1)
        left = right - 1
        share = (min(sparsity, points[-1]) - points[left]) / (points[right] - points[left])
        for norm in self._norms().values():
            of_levels = getattr(norm, NORMS)
            # lerp gives its ends to the bit
            norm.weight.data = torch.lerp(of_levels[left], of_levels[right], share)

    def _norms(self) -> dict[str, Any]:
        """Name -> module of every norm."""
        model: Any = self
        modules = model.named_modules()
        return {name: own for name, own in modules if getattr(own._parameters.get("weight"), "ndim", 0) == 1}

    def _overrides(self, counts: Sequence[int]) -> dict[int | str, dict[str, int]] | None:
        """``per_layer_config`` of a model with these counts."""
        if self._uniform and counts == self._full:
            return None
        return overrides_of(self._blocks, counts, self._heads_per_group)

    def _cut_parameters(self) -> Iterator[tuple[str, nn.Parameter, int, int]]:
        """(name, parameter, dimension, number of the block) of every parameter that structures share out."""
        model: Any = self
        for number, (layer, kind) in enumerate(self._blocks):
            for path, dim in PROJECTIONS[kind]:
                module = model.get_submodule(f"{LAYERS}.{layer}.{path}")
                for name in ("weight", "bias") if dim == 0 else ("weight",):
                    if (parameter := getattr(module, name)) is not None:
                        yield f"{LAYERS}.{layer}.{path}.{name}", parameter, dim, number

    def _output_projections(self) -> list[Any]:
        model: Any = self
        return [model.get_submodule(f"{LAYERS}.{layer}.{PROJECTIONS[kind][-1][0]}") for layer, kind in self._blocks]

    @contextmanager
    def _at_the_widest(self) -> Iterator[None]:
        """The parameters as they were loaded, with the output projections that all levels share."""
        before, whole = self._counts, dict(self._whole)
        if whole:
            self._set_counts(self._widest)
            for name, parameter, _, _ in self._cut_parameters():
                parameter.data = whole[name]
            self._whole = {}
        self._set_norms(0.0 if self._widest == self._full else float(self.config.sparsity))  # type: ignore[attr-defined]
        try:
            yield
        finally:
            if whole:
                self._set_counts(before)
            self._set_norms(self._sparsity)

    def _apply(self, fn, recurse=True):
        with self._at_the_widest():  # `to` makes new storage, which all widths are to share again
            return super()._apply(fn, recurse)  # type: ignore[misc]

    # ---- saving ------------------------------------------------------------------------------------------------------

    def save_pretrained(self, save_directory, *, state_dict=None, **kwargs):
        """Saves the level at the current sparsity as an ordinary checkpoint, structures in their original order.

        ``save_elastic`` saves all levels.
        """
        level = self.at(self._sparsity)
        names = level.state_dict().keys()
        state = {k: v for k, v in (state_dict or level.state_dict()).items() if k in names}
        table = self._table()
        places = [table.sorted_structures(n)[:count].argsort() for n, count in enumerate(self._counts)]
        for name, parameter, dim, block in self._cut_parameters():
            width = parameter.shape[dim] // self._counts[block]
            rows = (places[block][:, None] * width + torch.arange(width)).flatten()
            state[name] = state[name].index_select(dim, rows.to(state[name].device))
        level.save_pretrained(save_directory, state_dict=state, **kwargs)

    def save_elastic(self, save_directory, **kwargs):
        """Saves the elastic checkpoint, whatever the current sparsity. Takes the arguments of ``save_pretrained``.

        Raises:
            ValueError: if it was not loaded in full.
        """
        if self._widest != self._full:
            raise ValueError(
                f"the model was loaded with sparsity={self.config.sparsity:g}, so its other weights cannot be saved; "  # type: ignore[attr-defined]
                "load it with sparsity=0"
            )
        with self._at_the_widest():
            super().save_pretrained(save_directory, **kwargs)  # type: ignore[misc]

    def _level_shell(self) -> Any:
        """A model at the current width, of an ordinary class, built where the caller says."""
        config = copy.deepcopy(self.config)  # type: ignore[attr-defined]
        model_class = self.pruned_model
        if not config.is_heterogeneous:
            model_class = next(base for base in model_class.__mro__ if base.__module__.startswith("transformers."))
        config.__class__ = model_class.config_class
        for key in ("elastic", "sparsity", "auto_map"):
            vars(config).pop(key, None)
        return model_class(config)

    # ---- loading -----------------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, source, *args, config=None, sparsity=None, **kwargs):
        """As every ``from_pretrained``; ``sparsity`` reads no more weights than the level there has."""
        owner: Any = cls
        hub = {key: kwargs[key] for key in HUB_OPTIONS if key in kwargs}
        if not isinstance(config, PreTrainedConfig):
            config = owner.config_class.from_pretrained(config or source, **hub)
        config = copy.deepcopy(config)
        config.sparsity = float(config.sparsity if sparsity is None else sparsity)
        if config.sparsity:
            files = _files(source, hub)
            table = SizeTable(config.elastic, _read_order(files))
            counts = table.counts(config.sparsity)
            groups = config.per_layer_config[0]
            heads_per_group = groups.num_attention_heads // groups.num_key_value_heads
            config.per_layer_config = overrides_of(table.blocks, counts, heads_per_group)
            kwargs = {key: value for key, value in kwargs.items() if key not in HUB_OPTIONS}
            kwargs["state_dict"] = _read_prefixes(files, prefixes(table, counts))
            loaded = super().from_pretrained(None, *args, config=config, **kwargs)  # type: ignore[misc]
        else:
            loaded = super().from_pretrained(source, *args, config=config, **kwargs)  # type: ignore[misc]
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if config.sparsity:
            model.name_or_path = str(source)
            model._set_norms(config.sparsity)
            if cached_file(source, "generation_config.json", _raise_exceptions_for_missing_entries=False, **hub):
                model.generation_config = GenerationConfig.from_pretrained(source, **hub)
        else:
            model.set_sparsity(0.0)  # takes the output projections of the unpruned model, if they are in the file
        return loaded


def _files(source: Any, hub: dict[str, Any]) -> list[str]:
    """Paths of the files that hold the weights."""
    if path := cached_file(source, SAFE_WEIGHTS_NAME, _raise_exceptions_for_missing_entries=False, **hub):
        return [path]
    index = cached_file(source, SAFE_WEIGHTS_INDEX_NAME, **hub)
    return get_checkpoint_shard_files(source, index, **hub)[0]


def _read_order(files: Sequence[str]) -> torch.Tensor:
    for path in files:
        with safe_open(path, framework="pt") as file:
            if ORDER in file.keys():  # noqa: SIM118
                return file.get_tensor(ORDER)
    raise ValueError(f"{', '.join(map(str, files))}: there is no tensor {ORDER}; write the elastic checkpoint again")


def _read_prefixes(files: Sequence[str], cuts: dict[str, tuple[int, int, int]]) -> dict[str, torch.Tensor]:
    """The weights of one level: of a parameter that is cut, no other rows or columns are read."""
    tensors = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                if name.endswith(f".{FULL}"):
                    continue
                if name not in cuts:
                    tensors[name] = file.get_tensor(name)
                    continue
                dim, count, size = cuts[name]
                part = file.get_slice(name)
                length = part.get_shape()[dim] // size * count
                tensors[name] = part[:length] if dim == 0 else part[:, :length]
    return tensors


def _caches(values: Any) -> list[Cache]:
    return [value for value in values if isinstance(value, Cache)]


def _check_cache(model: Any, args: Any, kwargs: Any) -> None:
    for cache in _caches((*args, *kwargs.values())):
        filled_at = getattr(cache, "_elastic_width", None)
        if filled_at is not None and filled_at[0] != model._counts and cache.get_seq_length():
            raise ValueError(
                f"this key/value cache was filled at sparsity {filled_at[1]:g}, and the model is at sparsity "
                f"{model.sparsity:g} now; start with a new cache, or call set_sparsity({filled_at[1]:g})"
            )
        cache._elastic_width = (model._counts, model.sparsity)  # type: ignore[attr-defined]


def _mark_cache(model: Any, args: Any, output: Any) -> None:
    for cache in _caches(output.values() if isinstance(output, dict) else output):
        cache._elastic_width = (model._counts, model.sparsity)  # type: ignore[attr-defined]


def _elastic(pruned_model: Any) -> tuple[Any, Any]:
    """The elastic config and model of a family."""
    name = pruned_model.__name__.replace("Gisp", "Elastic")
    family = pruned_model.config_class.model_type.removeprefix("gisp_")
    config_name = pruned_model.config_class.__name__.replace("Gisp", "Elastic")
    auto_map = {"AutoConfig": config_name, "AutoModelForCausalLM": name}
    config: Any = type(
        config_name,
        (ElasticConfigMixin, pruned_model.config_class),
        {
            "__module__": __name__,
            "model_type": f"gisp_elastic_{family}",
            "auto_classes": {auto: f"modeling_elastic.{own}" for auto, own in auto_map.items()},
        },
    )
    config = strict(config)
    config.register_for_auto_class("AutoConfig")
    body = {"__module__": __name__, "config_class": config, "pruned_model": pruned_model}
    model: Any = type(name, (ElasticModelMixin, pruned_model), body)
    model.register_for_auto_class("AutoModelForCausalLM")
    return config, model


ElasticLlamaConfig, ElasticLlamaForCausalLM = _elastic(GispLlamaForCausalLM)
ElasticMistralConfig, ElasticMistralForCausalLM = _elastic(GispMistralForCausalLM)
ElasticQwen2Config, ElasticQwen2ForCausalLM = _elastic(GispQwen2ForCausalLM)
ElasticQwen3Config, ElasticQwen3ForCausalLM = _elastic(GispQwen3ForCausalLM)
ElasticGemma2Config, ElasticGemma2ForCausalLM = _elastic(GispGemma2ForCausalLM)
ElasticGemma3TextConfig, ElasticGemma3ForCausalLM = _elastic(GispGemma3ForCausalLM)
