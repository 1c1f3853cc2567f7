"""Runs on models that cannot be sliced: quantized, or with PEFT adapters. Gates stand for zeros."""

import copy
import importlib.util
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, TaskType, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel, TorchAoConfig

from gisp_hf import GISPConfig, GISPPruner, RestoreConfig, Trajectory, load_level, restore, scoring_only
from gisp_hf.levels.manifest import check_manifest
from gisp_hf.levels.materialize import materialize
from gisp_hf.models import discover
from gisp_hf.models.fingerprint import fingerprint
from gisp_hf.models.gates import Gates
from gisp_hf.models.surgery import slice_structures
from gisp_hf.models.wrapped import dense_weight
from gisp_hf.pruning.engine import Engine
from gisp_hf.recovery.record import Restoration
from gisp_hf.upstream import differentiable_4bit
from tests import runs
from tests.runs import LEVELS, tiny_config
from tests.test_criteria import METHODS, assert_equal_orders, tokens
from tests.test_seams import random_keeps, toy  # noqa: F401  a fixture
from tests.tiny import tiny_blocks, tiny_model


def _needs(package: str) -> pytest.MarkDecorator:
    found = importlib.util.find_spec(package) is not None
    return pytest.mark.skipif(not found, reason=f"{package} is not installed")


def _int8_torchao() -> TorchAoConfig:
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


# name -> (makes its config, least rank correlation of a layer's scores with those of the unquantized model)
QUANTIZED = {
    "nf4": (lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"), 0.6),
    "int8": (lambda: BitsAndBytesConfig(load_in_8bit=True), 0.97),
    "torchao": (_int8_torchao, 0.97),
}
quantizations = pytest.mark.parametrize(
    "name",
    [
        pytest.param("nf4", marks=_needs("bitsandbytes")),
        pytest.param("int8", marks=_needs("bitsandbytes")),
        pytest.param("torchao", marks=_needs("torchao")),
    ],
)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny_model(hidden_size=64, intermediate_size=64).save_pretrained(folder)
    return folder


def load(base: Path, name: str | None = None) -> PreTrainedModel:
    options = {} if name is None else {"quantization_config": QUANTIZED[name][0]()}
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, **options)


def prune(model: nn.Module, folder: Path, **options) -> GISPPruner:
    with scoring_only(model):
        trainer = runs.make_trainer(model, folder, **options)
    pruner = next(cb for cb in trainer.callback_handler.callbacks if isinstance(cb, GISPPruner))
    trainer.train(resume_from_checkpoint=options.get("resume_from_checkpoint"))
    return pruner


CONFIG = tiny_config(method="gisp-activation")


# ---- gates -----------------------------------------------------------------------------------------------------------


def shut(gates: Gates, layout, keeps) -> None:
    for number, (block, keep) in enumerate(zip(layout.blocks, keeps)):
        gone = torch.ones(block.size, dtype=torch.bool)
        gone[keep] = False
        gates.shut(number, gone.nonzero().squeeze(1))


@pytest.mark.parametrize("family", ["llama", "llama_bias", "qwen3", "gemma2"])
def test_shut_gates_equal_slices(family) -> None:
    gated, sliced = tiny_model(family), tiny_model(family)
    layout = discover(gated)
    keeps = random_keeps(layout, 1)
    gates = Gates(layout)
    shut(gates, layout, keeps)
    slice_structures(sliced, layout, keeps)
    ids, before = tokens(3), gated(tokens(3)).logits
    with gates.attached(gated):
        torch.testing.assert_close(gated(ids).logits, sliced(ids).logits, rtol=1e-4, atol=1e-5)
    assert torch.equal(gated(ids).logits, before)
    assert not any(module._forward_pre_hooks for module in gated.modules())


def test_shut_gates_equal_slices_with_fused_projections_and_a_kind_of_its_own(toy) -> None:  # noqa: F811
    gated, sliced = toy(), toy()
    layout = discover(gated)
    keeps = random_keeps(layout, 2)
    gates = Gates(layout)
    shut(gates, layout, keeps)
    slice_structures(sliced, layout, keeps)
    with gates.attached(gated):
        torch.testing.assert_close(gated(tokens(2)).logits, sliced(tokens(2)).logits, rtol=1e-4, atol=1e-5)


def test_a_shut_gate_stops_infinity() -> None:
    model = tiny_model(num_hidden_layers=2)
    layout = discover(model)
    gates = Gates(layout)
    gates.shut(1, torch.tensor([3]))
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3] = torch.inf
    with gates.attached(model):
        assert model(tokens(1)).logits.isfinite().all()


@pytest.mark.parametrize("method", METHODS)
def test_masked_gated_and_sliced_give_the_same_order(method) -> None:
    orders = []
    ids = tokens(16)
    for options in ({"shrink": True}, {"shrink": False}, {"shrink": False, "gates": True}):
        model = tiny_model().requires_grad_(False)
        model.model.norm.weight.requires_grad_()
        engine = Engine(model, discover(model), tiny_config(method=method), **options)
        before = [p.detach().clone() for p in model.parameters()]
        model.train()
        with engine.watch():
            for target in (0.1, 0.2, 0.3, 0.4, 0.5):
                model(input_ids=ids, labels=ids).loss.backward()
                engine.accumulate()
                engine.advance(target)
            logits = model.eval()(ids).logits
        orders.append((engine.order, logits))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before))  # the last one, with gates
    for order, logits in orders[1:]:
        assert all(torch.equal(a, b) for a, b in zip(order, orders[0][0]))
        torch.testing.assert_close(logits, orders[0][1], rtol=1e-4, atol=1e-4)


# ---- quantized models ------------------------------------------------------------------------------------------------


@quantizations
def test_a_quantized_model_has_the_layout_of_its_checkpoint(name, base) -> None:
    plain = load(base)
    assert discover(load(base, name)) == discover(plain)
    weight = dense_weight(load(base, name), "model.layers.1.mlp.down_proj.weight").float()
    error = (weight - plain.model.layers[1].mlp.down_proj.weight).norm() / weight.norm()
    assert error < (0.15 if name == "nf4" else 0.02)


def scores_of(model: PreTrainedModel, method: str = "gisp-activation") -> list[torch.Tensor]:
    engine = Engine(model, discover(model), GISPConfig(method=method, sparsity_levels=(0.2,)), shrink=False, gates=True)
    model.train()
    for parameter in model.parameters():
        parameter.requires_grad_(parameter is model.model.norm.weight)
    with engine.watch():
        model(input_ids=tokens(16), labels=tokens(16)).loss.backward()
        engine.accumulate()
    return [score for score in engine.scores if score is not None]


def spearman(a: torch.Tensor, b: torch.Tensor) -> float:
    ranks = torch.stack([a.argsort().argsort().double(), b.argsort().argsort().double()])
    return float(torch.corrcoef(ranks)[0, 1])


@quantizations
def test_scores_of_a_quantized_model_rank_as_those_of_the_checkpoint(name, base) -> None:
    found, expected = scores_of(load(base, name)), scores_of(load(base))
    channels = [spearman(a, b) for a, b in zip(found, expected) if len(a) == 64]
    assert len(channels) == 5 and min(channels) > QUANTIZED[name][1], channels


@quantizations
def test_a_quantized_run_cuts_what_its_scores_say_out_of_the_checkpoint(name, base, tmp_path) -> None:
    model = load(base, name)
    before = model(tokens(2)).logits
    pruner = prune(model, tmp_path, config=CONFIG)
    assert model.is_quantized and torch.equal(model.eval()(tokens(2)).logits, before)  # given back whole
    plain = load(base)
    trajectory = Trajectory.load(tmp_path / "levels")
    assert trajectory.base.fingerprint == fingerprint(plain.named_parameters())
    assert trajectory.base.id == str(base)

    # The order is that of gates by hand, on the quantized model.
    again = load(base, name).train()
    engine = Engine(again, discover(again), CONFIG, shrink=False, gates=True)
    for parameter in again.parameters():
        parameter.requires_grad_(parameter is again.model.norm.weight)
    with engine.watch():
        for step in range(5):
            again(input_ids=tokens(16), labels=tokens(16)).loss.backward()
            engine.accumulate()
            engine.advance(0.5 * (step + 1) / 5)
    same = [(a >= 0).equal(b >= 0) for a, b in zip(engine.order, trajectory.order)]
    assert sum(same) >= len(same) - 1  # a batch of 16 and two of 8 round differently

    for level in LEVELS:
        folder = pruner.level_folders[level]
        materialize(tmp_path / "levels", tmp_path / f"cut-{level}", sparsity=level)
        a, b = load_file(folder / "model.safetensors"), load_file(tmp_path / f"cut-{level}" / "model.safetensors")
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        applied = trajectory.apply(copy.deepcopy(plain), sparsity=level)
        assert getattr(loaded.config, "quantization_config", None) is None
        assert torch.equal(loaded(tokens(2)).logits, applied(tokens(2)).logits)


@_needs("bitsandbytes")
def test_an_evaluation_does_not_change_the_scores_of_a_4_bit_model(base, tmp_path) -> None:
    """On a CPU with AVX512-BF16, bitsandbytes changes the format of weights when it evaluates."""
    expected = prune(load(base, "nf4"), tmp_path / "plain", config=CONFIG)
    model = load(base, "nf4")

    def evaluate(model) -> dict[str, float]:
        return {"loss": float(model(input_ids=tokens(2), labels=tokens(2)).loss)}

    found = prune(model, tmp_path / "b", pruner=GISPPruner(CONFIG, tmp_path / "b" / "levels", evaluate=evaluate))
    assert_equal_orders(found.trajectory, expected.trajectory)
    assert len({metrics["loss"] for metrics in found.level_metrics.values()}) == len(LEVELS)


@_needs("bitsandbytes")
def test_a_4_bit_model_that_was_evaluated_has_right_gradients_again(base) -> None:
    """`gisp_hf.upstream.differentiable_4bit`; going to the other format and back rounds a little."""
    model = load(base, "nf4")
    with differentiable_4bit(model):
        expected = scores_of(model)
    with torch.no_grad():
        model.eval()(tokens(2))
    with differentiable_4bit(model):
        found = scores_of(model)
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=0.1, atol=0.05 * float(b.mean()))


@_needs("bitsandbytes")
@pytest.mark.parametrize("method", ["wanda-sp", "flap", "second-order"])
def test_criteria_that_read_weights_read_the_dequantized_ones(method, base) -> None:
    found, expected = scores_of(load(base, "int8"), method), scores_of(load(base), method)
    channels = [spearman(a, b) for a, b in zip(found, expected) if len(a) == 64]
    assert min(channels) > 0.9, channels


@_needs("bitsandbytes")
@pytest.mark.slow
def test_a_quantized_run_resumes(base, tmp_path) -> None:
    whole = prune(load(base, "nf4"), tmp_path / "whole", config=CONFIG, save_strategy="steps", save_steps=1)
    for folder in (tmp_path / "whole" / "trainer").iterdir():
        if folder.name.startswith("checkpoint-") and folder.name != "checkpoint-3":
            for path in sorted(folder.rglob("*"), reverse=True):
                path.unlink()
            folder.rmdir()
    resumed = prune(load(base, "nf4"), tmp_path / "whole", config=CONFIG, resume_from_checkpoint=True)
    assert_equal_orders(resumed.trajectory, whole.trajectory)
    assert len(resumed.trajectory.steps) == 5


# ---- adapters --------------------------------------------------------------------------------------------------------


def adapted(model: PreTrainedModel, *, seed: int | None = None):
    modules = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
    wrapped = get_peft_model(model, LoraConfig(r=4, target_modules=modules, lora_dropout=0.1, task_type="CAUSAL_LM"))
    if seed is not None:
        torch.manual_seed(seed)
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.3)
    return wrapped


@pytest.mark.parametrize("method", ["gisp-activation", "wanda-sp"])
def test_an_adapter_that_does_nothing_changes_nothing(method, base, tmp_path) -> None:
    config = tiny_config(method=method)
    expected = prune(load(base), tmp_path / "plain", config=config)
    found = prune(adapted(load(base)), tmp_path / "peft", config=config)
    assert_equal_orders(found.trajectory, expected.trajectory)
    for level in LEVELS:
        a, b = (load_file(pruner.level_folders[level] / "model.safetensors") for pruner in (found, expected))
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_the_effect_of_an_adapter_counts(base, tmp_path) -> None:
    model = adapted(load(base), seed=1)
    merged = copy.deepcopy(model).merge_and_unload()
    plain = prune(load(base), tmp_path / "plain", config=CONFIG).trajectory
    expected = prune(merged, tmp_path / "merged", config=CONFIG).trajectory
    found = prune(model, tmp_path / "peft", config=CONFIG).trajectory
    assert_equal_orders(found, expected)
    assert any(not torch.equal(a, b) for a, b in zip(found.order, plain.order))
    assert found.base.fingerprint == plain.base.fingerprint  # levels are the base's, without the adapter


def test_an_adapter_is_given_back(base, tmp_path) -> None:
    model = adapted(load(base), seed=1)
    before = {name: (p.clone(), p.requires_grad) for name, p in model.named_parameters()}
    prune(model, tmp_path, config=CONFIG)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name][0]) and parameter.requires_grad == before[name][1]


@_needs("bitsandbytes")
def test_a_quantized_model_with_an_adapter_needs_no_help(base, tmp_path) -> None:
    expected = prune(load(base, "nf4"), tmp_path / "plain", config=CONFIG)
    pruner = GISPPruner(CONFIG, tmp_path / "peft" / "levels")
    trainer = runs.make_trainer(adapted(load(base, "nf4")), tmp_path / "peft", pruner=pruner)
    trainer.train()
    assert_equal_orders(pruner.trajectory, expected.trajectory)


@pytest.mark.parametrize("kind", ["adapter", pytest.param("nf4", marks=_needs("bitsandbytes"))])
def test_levels_are_restored_as_they_are_in_their_folders(kind, base, tmp_path) -> None:
    """The definition: `restore` on a level that was loaded from its folder, with the run's own calibration data."""
    model = adapted(load(base), seed=1) if kind == "adapter" else load(base, kind)
    before = {name: p.clone() for name, p in model.named_parameters()}
    pruner = GISPPruner(CONFIG, tmp_path / "levels", base_model=str(base), restore=RestoreConfig())
    found = prune(model, tmp_path, pruner=pruner)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    ids = torch.stack([block["input_ids"] for block in tiny_blocks(16)])
    for level in LEVELS:
        folder = found.level_folders[level]
        check_manifest(folder)
        expected = found.trajectory.apply(load(base), sparsity=level)
        record = restore(expected, base, [{"input_ids": part} for part in ids.split(8)], progress=False)
        saved = Restoration.load(folder)
        assert saved.changed == record.changed and saved.tokens == record.tokens
        tensors = load_file(folder / "model.safetensors")
        for name, parameter in expected.named_parameters():
            torch.testing.assert_close(tensors[name], parameter.detach(), rtol=1e-4, atol=1e-6)


def test_an_evaluation_of_restored_levels_that_the_model_cannot_hold_is_refused(base, tmp_path) -> None:
    options = {"restore": RestoreConfig(), "evaluate": lambda model: {"loss": 0.0}}
    pruner = GISPPruner(CONFIG, tmp_path / "levels", base_model=str(base), **options)
    with pytest.raises(ValueError, match=r"cannot hold restored weights.*\(Measure\) are to see; leave these out"):
        prune(adapted(load(base)), tmp_path, pruner=pruner)
    assert not (tmp_path / "levels").exists()


# ---- refusals --------------------------------------------------------------------------------------------------------


@_needs("bitsandbytes")
def test_weight_gradients_are_refused_with_the_way_out(base, tmp_path) -> None:
    for model, reason in ((load(base, "nf4"), "the model is quantized"), (adapted(load(base)), "has PEFT adapters")):
        with pytest.raises(ValueError, match=rf"{reason}.*method='gisp-activation'"):
            prune(model, tmp_path, config=tiny_config())


def test_virtual_tokens_are_refused(base, tmp_path) -> None:
    config = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=4)
    with pytest.raises(ValueError, match="PromptTuningConfig puts tokens of its own before the text"):
        prune(get_peft_model(load(base), config), tmp_path, config=CONFIG)


@pytest.mark.parametrize(
    "case, error, message",
    [
        ("missing", FileNotFoundError, r"which were not found.*GISPPruner\(base_model=...\) names one"),
        ("empty", FileNotFoundError, "holds no config.json"),
        ("other shape", ValueError, "is of another shape than the model"),
        ("other weights", ValueError, "of the model is not that of .*made from another one"),
        ("no weights", FileNotFoundError, "holds neither model.safetensors nor"),
    ],
)
def test_a_base_that_cannot_be_cut_is_refused_before_the_first_step(case, error, message, base, tmp_path) -> None:
    folder = tmp_path / "base"
    model = adapted(load(base))
    if case == "other shape":
        tiny_model().save_pretrained(folder)
    elif case == "other weights":
        tiny_model(hidden_size=64, intermediate_size=64, seed=7).save_pretrained(folder)
    elif case != "missing":
        folder.mkdir()
        if case == "no weights":
            (folder / "config.json").write_bytes((base / "config.json").read_bytes())
    pruner = GISPPruner(CONFIG, tmp_path / "levels", base_model=str(folder))
    seen: list[int] = []
    model.register_forward_hook(lambda *_: seen.append(1))
    with pytest.raises(error, match=message):
        prune(model, tmp_path, pruner=pruner)
    assert seen == [] and not list((tmp_path / "levels").glob("sparsity*"))


@_needs("bitsandbytes")
def test_a_checkpoint_that_is_quantized_itself_is_no_base(base, tmp_path) -> None:
    load(base, "nf4").save_pretrained(tmp_path / "nf4")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "nf4")
    with pytest.raises(ValueError, match=r"is quantized itself; GISPPruner\(base_model=...\)"):
        prune(model, tmp_path, config=CONFIG)
    named = GISPPruner(CONFIG, tmp_path / "levels", base_model=str(base))
    prune(AutoModelForCausalLM.from_pretrained(tmp_path / "nf4"), tmp_path, pruner=named)
    assert load_level(tmp_path / "levels", sparsity=0.3).num_parameters() > 0


def test_the_model_says_that_it_is_quantized_again_after_an_error() -> None:
    model = tiny_model()
    model.is_quantized = True
    with pytest.raises(RuntimeError), scoring_only(model):
        assert model.is_quantized is False
        raise RuntimeError
    assert model.is_quantized is True
