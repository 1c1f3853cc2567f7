"""OWL's shares of layers: against their definition, and through runs of several methods."""

from dataclasses import replace

import pytest
import torch
from transformers import TrainerCallback

from gisp_hf import GISPConfig, GISPPruner
from gisp_hf.criteria.owl import Owl, layer_offsets
from gisp_hf.models import discover
from gisp_hf.pruning.engine import Engine
from gisp_hf.pruning.methods import METHODS, Method, register_method
from tests.runs import LEVELS, make_trainer, prune, tiny_config
from tests.test_criteria import assert_equal_orders, scored, tokens
from tests.tiny import tiny_model


@pytest.fixture
def with_owl():
    """Makes ``NAME-owl`` of a method, with any outlier threshold."""
    names: list[str] = []

    def register(name: str, **changes) -> str:
        names.append(f"{name}-with-owl")
        shares = lambda: Owl(**changes)  # noqa: E731
        register_method(names[-1], replace(METHODS[name], scope="layer", layer_shares=shares))
        return names[-1]

    yield register
    for name in names:
        del METHODS[name]


def outlier_ratios(model, ids: torch.Tensor, *, threshold: float = 5.0) -> dict[int, float]:
    """By loops over weights and their entries, of each layer's seven matrices."""
    inputs: dict[str, torch.Tensor] = {}
    linear = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and ".layers." in n}
    handles = [
        module.register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0].flatten(0, 1)}))
        for name, module in linear.items()
    ]
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    ratios = {}
    for layer in range(len(model.model.layers)):
        entries: list[float] = []
        for name, module in linear.items():
            if name.startswith(f"model.layers.{layer}."):
                norms = [sum(float(v) ** 2 for v in inputs[name][:, c]) ** 0.5 for c in range(inputs[name].shape[1])]
                entries += [abs(w) * norm for row in module.weight.tolist() for w, norm in zip(row, norms)]
        mean = sum(entries) / len(entries)
        ratios[layer] = sum(entry > threshold * mean for entry in entries) / len(entries)
    return ratios


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])  # groups, biases, a head dimension of its own
def test_shares_equal_their_definition(family) -> None:
    model, ids = tiny_model(family, num_hidden_layers=3), tokens()
    engine, _ = scored(model, "wanda-sp-owl", ids[:1], ids[1:])
    ratios = outlier_ratios(model, ids)
    assert len(set(ratios.values())) == 3
    low, high = min(ratios.values()), max(ratios.values())
    density = [(ratio - low) * (1 / (high - low) * 0.08 * 2) for ratio in ratios.values()]
    for layer, value in enumerate(density):
        assert engine.offsets[layer] == pytest.approx(-(value - sum(density) / 3), abs=1e-9)


def test_the_spread_is_the_range_and_the_mean_is_zero() -> None:
    offsets = layer_offsets({2: 0.01, 3: 0.03, 7: 0.02, 9: 0.03}, spread=0.08)
    assert offsets[2] > offsets[7] > offsets[3] == offsets[9]
    assert max(offsets.values()) - min(offsets.values()) == pytest.approx(0.16)
    assert sum(offsets.values()) == pytest.approx(0)
    assert layer_offsets({0: 0.2, 1: 0.2}, spread=0.08) == {0: 0.0, 1: 0.0}


def test_a_run_takes_these_shares_and_meets_the_budget(tmp_path) -> None:
    config = tiny_config(method="wanda-sp-owl", num_steps=1)
    trajectory = prune(tiny_model(), tmp_path, config=config).trajectory
    layers = range(1, 5)  # the others are protected, and do not count
    ratios = outlier_ratios(tiny_model(), tokens(16))
    offsets = layer_offsets({layer: ratios[layer] for layer in layers}, spread=0.08)
    for level in LEVELS:
        kept = trajectory.kept(level)
        length, total = trajectory.prefix(level), trajectory.layout.total
        assert trajectory.sparsity_at(length - 1) < level <= trajectory.sparsity_at(length) + 1 / total
        # One share for all layers, plus the offset of each: to the nearest channel.
        shares = {}
        for number in trajectory.layout.of_kind("mlp")[1:-1]:
            block = trajectory.layout.blocks[number]
            shares[block.layer] = 1 - len(kept[number]) / block.size - offsets[block.layer]
        assert max(shares.values()) - min(shares.values()) <= 1 / 24 + 1e-6
    equal = prune(tiny_model(), tmp_path / "equal", config=replace(config, method="wanda-sp")).trajectory
    assert [len(k) for k in equal.kept(0.3)] != [len(k) for k in trajectory.kept(0.3)]
    for number in trajectory.layout.of_kind("mlp"):  # the scores within a layer are those of wanda-sp
        both = (equal.order[number] >= 0) & (trajectory.order[number] >= 0)
        assert torch.equal(equal.order[number][both].argsort(), trajectory.order[number][both].argsort())


@pytest.mark.parametrize("name", ["local-taylor", "second-order", "magnitude"])  # gradients, activations, weights
def test_any_method_that_ranks_by_layer_can_have_them(name, with_owl) -> None:
    model, ids = tiny_model(), tokens(8)
    engine, found = scored(model, with_owl(name), ids)
    _, expected = scored(tiny_model(), name, ids)
    assert all(torch.equal(a, b) for a, b in zip(found, expected))
    layers = range(6)
    ratios = outlier_ratios(tiny_model(), ids)
    wanted = layer_offsets({layer: ratios[layer] for layer in layers}, spread=0.08)
    assert engine.offsets == pytest.approx(wanted, abs=1e-9)
    engine.advance(0.2)
    lost = [int(engine.gone[number].sum()) for number in engine.layout.of_kind("mlp")]
    assert lost[max(wanted, key=wanted.get)] > lost[min(wanted, key=wanted.get)]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["local-taylor", "second-order"])
def test_steps_with_zeros_and_with_slices_have_the_same_shares(name, with_owl, tmp_path) -> None:
    config = tiny_config(method=with_owl(name, threshold=4.0), num_steps=4)
    sliced = prune(tiny_model(), tmp_path / "a", config=config)
    zeros = GISPPruner(config, tmp_path / "b" / "levels", shrink=False)
    prune(tiny_model(), tmp_path / "b", pruner=zeros)
    assert zeros.engine.offsets == pytest.approx(sliced.engine.offsets, abs=1e-9)
    assert_equal_orders(zeros.trajectory, sliced.trajectory)


@pytest.mark.slow
def test_layer_passes_have_the_same_shares(with_owl, tmp_path) -> None:
    config = tiny_config(method=with_owl("local-taylor"), num_steps=2)
    once = prune(tiny_model(), tmp_path / "a", config=config)
    passes = GISPPruner(config, tmp_path / "b" / "levels", layer_passes=2)
    prune(tiny_model(), tmp_path / "b", pruner=passes, max_steps=4)
    assert_equal_orders(passes.trajectory, once.trajectory)


class Die(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 2:
            raise KeyboardInterrupt


@pytest.mark.slow
def test_a_resumed_run_has_the_same_shares(with_owl, tmp_path) -> None:
    config = tiny_config(method=with_owl("second-order"), num_steps=4)
    expected = prune(tiny_model(), tmp_path / "whole", config=config).trajectory
    saving = {"save_strategy": "steps", "save_steps": 1}
    first = make_trainer(tiny_model(), tmp_path / "run", config=config, **saving)
    first.add_callback(Die())
    with pytest.raises(KeyboardInterrupt):
        first.train()
    pruner = GISPPruner(config, tmp_path / "run" / "levels")
    second = make_trainer(tiny_model(), tmp_path / "run", pruner=pruner, **saving)
    second.train(resume_from_checkpoint=str(tmp_path / "run" / "trainer" / "checkpoint-2"))
    assert_equal_orders(pruner.trajectory, expected)


def test_one_ranking_has_no_shares() -> None:
    with pytest.raises(ValueError, match="layer_shares needs scope='layer', got 'model'"):
        Method(METHODS["gisp"].criterion, layer_shares=Owl)


def test_protected_layers_are_not_watched() -> None:
    model = tiny_model()
    config = GISPConfig(method="wanda-sp-owl", sparsity_levels=(0.2,), protect_first=2, protect_last=1)
    engine = Engine(model, discover(model), config)
    with engine.watch():
        hooked = {name for name, module in model.named_modules() if module._forward_pre_hooks}
    linear = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert hooked == {"model"} | {n for n in linear if n.startswith(tuple(f"model.layers.{i}." for i in (2, 3, 4)))}
