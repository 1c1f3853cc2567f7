"""gisp-activation with several processes, micro-batches and devices: the same scores, and little to send."""

import copy
import gc
import json
from types import SimpleNamespace

import pytest
import torch
from accelerate import dispatch_model
from safetensors.torch import load_file

from gisp_hf import GISPPruner, Trajectory
from gisp_hf.models import discover
from gisp_hf.pruning.engine import Engine
from gisp_hf.training.checks import check_model
from tests import test_gated as gated
from tests.distributed_run import gated_model, steps_with_gates, uneven_blocks
from tests.runs import make_trainer, prune, tiny_config
from tests.test_criteria import assert_equal_orders, tokens
from tests.test_distributed import launch
from tests.test_gated import base, quantizations  # noqa: F401  a fixture
from tests.tiny import tiny_model

CONFIG = tiny_config(method="gisp-activation")


def run(folder, model=None, **options) -> GISPPruner:
    pruner = GISPPruner(CONFIG, folder / "levels", shrink=False)
    make_trainer(model or tiny_model(), folder, pruner=pruner, train_dataset=uneven_blocks(), **options).train()
    return pruner


@pytest.fixture(scope="module")
def one_batch(tmp_path_factory) -> GISPPruner:
    """All 16 blocks in one forward pass."""
    options = {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 1}
    return run(tmp_path_factory.mktemp("one"), **options)


def assert_close_scores(found, expected) -> None:
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(torch.as_tensor(a), b, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("batch_size, batches", [(2, 8), (5, 4)])  # of the latter, the last batch has one block
def test_any_micro_batches_give_the_scores_of_one_batch(batch_size, batches, one_batch, tmp_path) -> None:
    found = run(tmp_path, per_device_train_batch_size=batch_size, gradient_accumulation_steps=batches)
    assert_equal_orders(found.trajectory, one_batch.trajectory)
    assert_close_scores(found.engine.scores, one_batch.engine.scores)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_processes_add_up_scores_and_send_no_gradient_of_a_layer(processes, one_batch, tmp_path) -> None:
    result = launch("ddp", tmp_path, processes=processes, method="gisp-activation", uneven=True)
    assert result.returncode == 0, result.stderr
    assert_equal_orders(Trajectory.load(tmp_path / "levels"), one_batch.trajectory)
    traffic = json.loads((tmp_path / "traffic.json").read_text())
    assert_close_scores(traffic["scores"], one_batch.engine.scores)
    steps, hidden = 5, 32
    assert traffic["buckets"] == steps * hidden  # the gradient of the final norm
    scored = one_batch.trajectory.layout.blocks[2:-2]  # the first layer and the last are protected
    columns = sum(block.size for block in scored)
    sums = [count for count in traffic["all_reduce"] if count > 2]
    assert sums == [columns] * steps  # besides, each check of agreement sends two numbers
    assert traffic["all_reduce"].count(2) == len(traffic["all_reduce"]) - steps


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_sharded_layers_reduce_no_gradient(processes, tmp_path) -> None:
    model, ids = tiny_model(), tokens(16)
    config = tiny_config(sparsity_levels=(0.2, 0.4), method="gisp-activation")
    engine = Engine(model, discover(model), config, shrink=False)
    model.train()
    with engine.watch():
        for target in (0.1, 0.2, 0.3, 0.4):
            model(input_ids=ids, labels=ids).loss.backward()
            engine.accumulate()
            engine.advance(target)
    result = launch("fsdp2", tmp_path, processes=processes, family="llama", method="gisp-activation")
    assert result.returncode == 0, result.stderr
    traffic = json.loads((tmp_path / "traffic.json").read_text())
    assert_close_scores(traffic["scores"], engine.scores)
    assert all(count <= 32 for count in traffic["reduce_scatter"])  # the final norm; a layer has 6,000 parameters


@pytest.mark.slow
# Not torchao: Accelerate moves the model before DDP, and torch refuses to swap its weights once they are watched.
@pytest.mark.parametrize("name", ["lora", *(row for row in quantizations.args[1] if row.values != ("torchao",))])
def test_wrapped_weights_on_two_processes_give_the_order_of_one(name, base, tmp_path) -> None:  # noqa: F811
    expected = gated.prune(gated_model(str(base), name), tmp_path / "one", config=CONFIG)
    result = launch("ddp", tmp_path, processes=2, method="gisp-activation", gated=[str(base), name])
    assert result.returncode == 0, result.stderr
    assert_equal_orders(Trajectory.load(tmp_path / "levels"), expected.trajectory)
    traffic = json.loads((tmp_path / "traffic.json").read_text())
    assert_close_scores(traffic["scores"], expected.engine.scores)
    assert traffic["buckets"] == 5 * 64  # steps x hidden size: the gradient of the final norm alone
    for folder in expected.level_folders.values():  # cut out of the same files
        found = load_file(tmp_path / "levels" / folder.name / "model.safetensors")
        assert all(torch.equal(found[key], tensor) for key, tensor in load_file(folder / "model.safetensors").items())


@pytest.mark.slow
def test_adapters_in_sharded_layers_give_the_order_of_one_process(base, tmp_path) -> None:  # noqa: F811
    config = tiny_config(sparsity_levels=(0.2, 0.4), method="gisp-activation")
    expected = steps_with_gates(gated_model(str(base), "lora"), tokens(16), config)
    result = launch("fsdp2-adapters", tmp_path, processes=2, base=str(base))
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "order.json").read_text()) == [order.tolist() for order in expected.order]
    traffic = json.loads((tmp_path / "traffic.json").read_text())
    assert_close_scores(traffic["scores"], expected.scores)
    assert all(count <= 64 for count in traffic["reduce_scatter"])  # the final norm


def test_a_quantized_model_is_not_sharded() -> None:
    model = tiny_model()
    model.hf_quantizer = SimpleNamespace(quantization_config=SimpleNamespace(quant_method="bitsandbytes"))
    check_model(model, "activation_gradients")
    with pytest.raises(ValueError, match="quantized by bitsandbytes, and FSDP would cut its packed weights.*use DDP"):
        check_model(model, "activation_gradients", sharded=True)


def test_a_model_spread_over_devices_gives_the_order_of_one(one_batch, tmp_path) -> None:
    """Every layer has the hooks of ``device_map="auto"``; this machine has one device only."""
    model = tiny_model()
    names = [
        "model.embed_tokens",
        *(f"model.layers.{n}" for n in range(6)),
        "model.rotary_emb",
        "model.norm",
        "lm_head",
    ]
    model = dispatch_model(model, dict.fromkeys(names, "cpu"), main_device="cpu", force_hooks=True)
    assert hasattr(model.model.layers[3].self_attn.o_proj, "_hf_hook")
    found = run(tmp_path, model, per_device_train_batch_size=16, gradient_accumulation_steps=1)
    assert_equal_orders(found.trajectory, one_batch.trajectory)


@pytest.mark.parametrize("method", ["gisp-activation", "wanda-sp", "flap", "second-order"])
def test_checkpointed_layers_count_each_token_once(method) -> None:
    plain = tiny_model(num_hidden_layers=3)
    twice = copy.deepcopy(plain)
    twice.activation_checkpointing_enable({"use_reentrant": False})
    twice.enable_input_require_grads()  # as PEFT does it: layers run again in the backward pass
    forwards: list[int] = []
    twice.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda *_: forwards.append(1))
    scores = []
    for model in (plain, twice):
        config = tiny_config(method=method, sparsity_levels=(0.2,), protect_first=0, protect_last=0)
        engine = Engine(model, discover(model), config, shrink=False)
        model.train().requires_grad_(False)
        model.model.norm.weight.requires_grad_()
        with engine.watch():
            for ids in (tokens(2), tokens(4)[2:]):
                model(input_ids=ids, labels=ids).loss.backward()
            engine.accumulate()
        scores.append(engine.scores)
    assert len(forwards) == 4  # two batches, each one forward and one again
    assert_close_scores(*scores)


def test_checkpointing_drops_the_watched_inputs() -> None:
    """Inputs are held by the backward pass alone, which checkpointing replaces."""
    width_of_channels = (2, 16, 24)
    assert width_of_channels in saved_shapes(checkpointing=False)
    assert width_of_channels not in saved_shapes(checkpointing=True)


def saved_shapes(*, checkpointing: bool) -> set[tuple[int, ...]]:
    """Shapes of the tensors that a forward pass keeps for the backward pass: saved by autograd, or held by hooks."""
    model = tiny_model(num_hidden_layers=3).requires_grad_(False)
    model.model.norm.weight.requires_grad_()
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    config = tiny_config(method="gisp-activation", sparsity_levels=(0.2,))
    engine = Engine(model, discover(model), config, shrink=False)
    model.train()
    saved: set[tuple[int, ...]] = set()

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved.add(tuple(tensor.shape))
        return tensor.detach()  # an operation that saves its own result would otherwise hold itself

    with engine.watch(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(input_ids=tokens(2), labels=tokens(2))
        gc.collect()
        saved |= {tuple(held.shape) for held in gc.get_objects() if type(held) is torch.Tensor}
    assert output.loss.requires_grad
    return saved


# ---- errors ----------------------------------------------------------------------------------------------------------


def scored(model, loss_of) -> None:
    engine = Engine(model, discover(model), CONFIG, shrink=False)
    model.train()
    with engine.watch():
        loss_of(model(input_ids=tokens(2), labels=tokens(2))).backward()
        engine.accumulate()


def test_detached_activations_are_an_error() -> None:
    model = tiny_model()
    model.model.layers[4].register_forward_hook(lambda _, args, output: output.detach())
    with pytest.raises(ValueError, match="no gradient has reached the input of model.layers.1.self_attn.o_proj.weight"):
        scored(model, lambda output: output.loss)


def test_frozen_weights_are_none(tmp_path) -> None:
    frozen = tiny_model().requires_grad_(False)
    expected = prune(tiny_model(), tmp_path / "a", config=CONFIG).trajectory
    assert_equal_orders(prune(frozen, tmp_path / "b", config=CONFIG).trajectory, expected)
    assert not any(p.requires_grad for p in frozen.parameters())


def test_an_activation_that_is_not_a_number_is_named() -> None:
    model = tiny_model()
    model.model.layers[2].mlp.up_proj.weight.data[0] = torch.nan
    with pytest.raises(FloatingPointError, match="the gradient of the input of .* is not finite"):
        scored(model, lambda output: output.loss)


def test_a_loss_that_depends_on_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="all scores are zero"):
        scored(tiny_model(), lambda output: output.loss * 0)
