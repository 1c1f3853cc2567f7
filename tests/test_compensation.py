"""Bias compensation: the biases by their definition, in the saved levels and in evaluation, and nowhere else."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, TrainerCallback

from gisp_hf import GISPConfig, GISPPruner, Trajectory
from gisp_hf.levels.info import read_levels
from gisp_hf.levels.materialize import load_level
from gisp_hf.models import discover, modeling_gisp
from gisp_hf.models.surgery import compensated, slice_structures
from gisp_hf.pruning.engine import Engine
from tests.runs import LEVELS, make_trainer, prune, tiny_config
from tests.test_checkpoint import REMOTE
from tests.test_criteria import assert_equal_orders, inputs_of, projections, tokens
from tests.test_distributed import launch
from tests.tiny import FAMILIES, tiny_model

ONCE = {"method": "flap-compensated", "num_steps": 1}


def load(folder, level: float):
    return AutoModelForCausalLM.from_pretrained(folder / "levels" / f"sparsity-{level:.2f}")


def lost_outputs(model, removed: list[torch.Tensor], ids: torch.Tensor) -> list[torch.Tensor]:
    """Per block, the mean output over tokens that removed structures give: by loops over tokens and columns."""
    found = []
    for (module, width), x, structures in zip(projections(model), inputs_of(model, ids), removed):
        weight = module.weight.detach().double()
        total = torch.zeros(weight.shape[0], dtype=torch.float64)
        for structure in structures.tolist():
            for column in range(structure * width, (structure + 1) * width):
                mean = sum(float(token[column]) for token in x) / len(x)
                total += weight[:, column] * mean
        found.append(total)
    return found


def gone(trajectory: Trajectory, level: float) -> list[torch.Tensor]:
    kept = trajectory.kept(level)
    return [
        torch.tensor([i for i in range(block.size) if i not in keep.tolist()], dtype=torch.int64)
        for block, keep in zip(trajectory.layout.blocks, kept)
    ]


@pytest.mark.parametrize("family", ["llama", "llama_bias", "qwen3", "gemma2"])
def test_biases_equal_their_definition(family, tmp_path) -> None:
    """Every level, in one step; a bias that was there before is added to."""
    trajectory = prune(tiny_model(family), tmp_path, config=tiny_config(**ONCE)).trajectory
    base, ids = tiny_model(family), tokens(16)
    for level in (0.2, 0.5):
        expected = lost_outputs(base, gone(trajectory, level), ids)
        assert sum(bool(bias.any()) for bias in expected) >= 4
        loaded = load(tmp_path, level)
        for (module, _), (before, _), bias in zip(projections(loaded), projections(base), expected):
            bias = bias if before.bias is None else bias + before.bias.detach()
            torch.testing.assert_close(module.bias.detach().double(), bias, rtol=1e-4, atol=1e-6)


def test_the_mean_output_of_a_layer_is_kept() -> None:
    model, ids = tiny_model(), tokens(16)
    config = tiny_config(protect_first=0, protect_last=0, sparsity_levels=(0.4,), **ONCE)
    engine = Engine(model, discover(model), config)
    outputs: list[torch.Tensor] = []
    attention = model.model.layers[0].self_attn.o_proj  # its inputs are not changed by other removals
    handle = attention.register_forward_hook(lambda module, args, output: outputs.append(output.mean(dim=(0, 1))))
    model.train()
    with engine.watch():
        model(input_ids=ids, labels=ids).loss.backward()
        engine.accumulate()
    engine.advance(0.4)
    assert engine.gone[0].any()
    with engine.as_level(), torch.no_grad():
        model(ids)
    with torch.no_grad():
        model(ids)
    handle.remove()
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-6)
    assert (outputs[2] - outputs[0]).abs().max() > 100 * (outputs[1] - outputs[0]).abs().max()


def test_evaluation_sees_the_saved_level_and_the_run_does_not(tmp_path) -> None:
    logits: list[torch.Tensor] = []
    ids, base = tokens(4), tiny_model()

    def evaluate(model) -> dict[str, int]:
        logits.append(model(ids).logits)
        return {"parameters": sum(parameter.numel() for parameter in model.parameters())}

    pruner = GISPPruner(tiny_config(**ONCE), tmp_path / "levels", evaluate=evaluate)
    model = tiny_model()
    prune(model, tmp_path, pruner=pruner)
    for level, seen in zip(LEVELS, logits):
        loaded = load(tmp_path, level)
        assert torch.equal(loaded(ids).logits, seen)
        assert pruner.level_metrics[level]["parameters"] == sum(p.numel() for p in loaded.parameters())
        biases = {name for name, _ in loaded.named_parameters() if name.endswith("bias")}
        assert pruner.levels[level].changed == biases and len(biases) == 12
        assert not loaded.model.layers[0].mlp.down_proj.bias.any()  # protected
    assert [info.parameters for info in read_levels(tmp_path / "levels")] == [
        pruner.level_metrics[level]["parameters"] for level in LEVELS
    ]
    # The order is that of flap, and the model of the run has the weights of the base and no bias.
    plain = tiny_model()
    flap = prune(plain, tmp_path / "flap", config=tiny_config(method="flap", num_steps=1)).trajectory
    assert_equal_orders(pruner.trajectory, flap)
    assert not hasattr(model.config, "compensation_bias") and "compensation_bias" not in plain.config.to_dict()
    assert (
        dict(model.named_parameters()).keys()
        == dict(plain.named_parameters()).keys()
        == {name for name, _ in base.named_parameters()}
    )
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters()))
    assert not hasattr(load(tmp_path / "flap", 0.2).config, "compensation_bias")


@pytest.mark.parametrize("shrink", [True, False])
def test_each_step_adds_the_means_of_the_model_before_it(shrink, tmp_path) -> None:
    """Two steps: the second one's removals have the means of the model that the first one left."""
    config = tiny_config(method="flap-compensated", num_steps=2, sparsity_levels=(0.25, 0.5))
    pruner = GISPPruner(config, tmp_path / "levels", shrink=shrink)
    trajectory = prune(tiny_model(), tmp_path, pruner=pruner).trajectory
    assert [step.target for step in trajectory.steps] == [0.25, 0.5]
    ids, base = tokens(16), tiny_model()
    first = lost_outputs(base, gone(trajectory, 0.25), ids)
    kept = trajectory.kept(0.25)
    slice_structures(base, discover(base), kept)
    later = [
        torch.tensor([keep.tolist().index(i) for i in both.tolist() if i in keep.tolist()], dtype=torch.int64)
        for keep, both in zip(kept, gone(trajectory, 0.5))
    ]
    second = lost_outputs(base, later, ids)
    assert any(bias.any() for bias in second)
    for (module, _), one, two in zip(projections(load(tmp_path, 0.5)), first, second):
        torch.testing.assert_close(module.bias.detach().double(), one + two, rtol=1e-4, atol=1e-6)


def test_rounded_channels_are_compensated_when_they_really_go(tmp_path) -> None:
    config = tiny_config(channel_multiple=8, sparsity_levels=(0.2, 0.4), **ONCE)
    trajectory = prune(tiny_model(), tmp_path, config=config).trajectory
    for level in config.sparsity_levels:
        expected = lost_outputs(tiny_model(), gone(trajectory, level), tokens(16))
        for (module, _), bias in zip(projections(load(tmp_path, level)), expected):
            torch.testing.assert_close(module.bias.detach().double(), bias, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_levels_of_every_family_save_and_load_again(family, tmp_path) -> None:
    prune(tiny_model(family), tmp_path, config=tiny_config(sparsity_levels=(0.4,), **ONCE))
    loaded, ids = load(tmp_path, 0.4), tokens(2)
    assert all(module.bias is not None for module, _ in projections(loaded))
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(again(ids).logits, loaded(ids).logits)
    assert json.loads((tmp_path / "again" / "config.json").read_text())["compensation_bias"] is True


def test_a_classifier_keeps_the_biases_of_the_level_below_it(tmp_path) -> None:
    prune(tiny_model(), tmp_path, config=tiny_config(sparsity_levels=(0.4,), **ONCE))
    folder = tmp_path / "levels" / "sparsity-0.40"
    saved = {n: p for n, p in load(tmp_path, 0.4).named_parameters() if n.endswith("bias")}
    classifier = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    base = AutoModel.from_pretrained(folder)
    for name, bias in saved.items():
        assert torch.equal(classifier.get_parameter(name), bias)
        assert torch.equal(base.get_parameter(name.removeprefix("model.")), bias)


def test_a_level_with_biases_can_be_pruned_further(tmp_path) -> None:
    prune(tiny_model(), tmp_path / "a", config=tiny_config(sparsity_levels=(0.2,), **ONCE))
    base = load(tmp_path / "a", 0.2)
    before = {name: parameter.detach().clone() for name, parameter in base.named_parameters()}
    prune(base, tmp_path / "b", config=tiny_config(sparsity_levels=(0.2,), num_steps=1))
    loaded = load(tmp_path / "b", 0.2)
    assert all(torch.equal(p, before[n]) for n, p in loaded.named_parameters() if n.endswith("bias"))
    more = load(tmp_path / "a", 0.2)
    trajectory = prune(more, tmp_path / "c", config=tiny_config(sparsity_levels=(0.2,), **ONCE)).trajectory
    assert more.config.compensation_bias is True
    expected = lost_outputs(load(tmp_path / "a", 0.2), gone(trajectory, 0.2), tokens(16))
    for (module, _), (old, _), bias in zip(projections(load(tmp_path / "c", 0.2)), projections(more), expected):
        torch.testing.assert_close(
            module.bias.detach().double(), old.bias.detach().double() + bias, rtol=1e-4, atol=1e-6
        )


def test_biases_are_taken_out_after_an_error() -> None:
    model = tiny_model("llama_bias")
    layout = discover(model)
    before = dict(model.named_parameters())
    with pytest.raises(KeyboardInterrupt), compensated(model, layout, {}):
        raise KeyboardInterrupt
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    assert not hasattr(model.config, "compensation_bias")


# ---- what is refused, and what is said -------------------------------------------------------------------------------


def test_a_family_without_a_place_for_the_biases_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(modeling_gisp, "add_compensation_biases", lambda layer: None)
    model = tiny_model()
    with pytest.raises(
        ValueError, match=r"GispLlamaForCausalLM has no model\.layers\.0\.mlp\.down_proj\.bias \(nor 11"
    ):
        Engine(model, discover(model), GISPConfig(**ONCE))
    assert model.model.layers[0].mlp.down_proj.bias is None


def test_sharded_parameters_are_refused(monkeypatch) -> None:
    model = tiny_model()
    engine = Engine(model, discover(model), GISPConfig(**ONCE))
    monkeypatch.setattr("gisp_hf.pruning.engine.is_sharded", lambda parameters: True)
    with pytest.raises(ValueError, match="'flap-compensated' gives levels more biases.*not sharded; use DDP"):
        engine.watch()


class Die(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1:
            raise KeyboardInterrupt


def test_a_run_cannot_be_resumed_and_says_why(tmp_path) -> None:
    config = tiny_config(method="flap-compensated", num_steps=3)
    saving = {"save_strategy": "steps", "save_steps": 1}
    first = make_trainer(tiny_model(), tmp_path, config=config, **saving)
    first.add_callback(Die())
    with pytest.raises(KeyboardInterrupt):
        first.train()
    second = make_trainer(tiny_model(), tmp_path, config=config, **saving)
    with pytest.raises(ValueError, match="cannot be resumed: its checkpoints do not hold the mean outputs"):
        second.train(resume_from_checkpoint=str(tmp_path / "trainer" / "checkpoint-1"))


def test_a_level_built_from_the_order_says_that_it_has_no_biases(tmp_path, caplog) -> None:
    tiny_model().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    prune(base, tmp_path, config=tiny_config(**ONCE))
    model = load_level(tmp_path / "levels", sparsity=0.3, base_model=tmp_path / "base")
    assert "have biases in the place of removed structures (method flap-compensated)" in caplog.text
    assert not [name for name, _ in model.named_parameters() if name.endswith("bias")]
    saved = dict(load(tmp_path, 0.3).named_parameters())
    assert all(torch.equal(parameter, saved[name]) for name, parameter in model.named_parameters())
    caplog.clear()
    Trajectory.load(tmp_path / "levels").apply(tiny_model(), sparsity=0.3)
    assert "a level built from the removal order has none" in caplog.text


# ---- other machines --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_remote_code_loads_the_biases_without_the_package(tmp_path) -> None:
    prune(tiny_model(), tmp_path, config=tiny_config(sparsity_levels=(0.4,), **ONCE))
    ids = tokens(2)
    expected = load(tmp_path, 0.4)(ids).logits
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    command = [sys.executable, "-c", REMOTE, json.dumps(ids.tolist()), str(tmp_path / "levels" / "sparsity-0.40")]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    torch.testing.assert_close(torch.tensor(json.loads(result.stdout)), expected.flatten(), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_two_processes_save_the_biases_of_one(tmp_path) -> None:
    prune(tiny_model(), tmp_path / "one", config=tiny_config(method="flap-compensated"))
    result = launch("ddp", tmp_path, processes=2, method="flap-compensated")
    assert result.returncode == 0, result.stderr
    for level in LEVELS:
        one, two = load(tmp_path / "one", level), load(tmp_path, level)
        for (name, a), (other, b) in zip(one.named_parameters(), two.named_parameters()):
            assert name == other
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)
        assert any(module.bias.any() for module, _ in projections(two) if isinstance(module, nn.Linear))


def test_bfloat16_weights_get_bfloat16_biases(tmp_path) -> None:
    model = tiny_model(dtype=torch.bfloat16)
    layout = discover(model)
    name = "model.layers.0.mlp.down_proj.weight"
    with compensated(model, layout, {name: torch.full((32,), 0.1)}) as names:
        assert {model.get_parameter(n).dtype for n in names} == {torch.bfloat16}
        assert torch.equal(model.model.layers[0].mlp.down_proj.bias, torch.full((32,), 0.1, dtype=torch.bfloat16))
    assert replace(layout) == discover(model)
