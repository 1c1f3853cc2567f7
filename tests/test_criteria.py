"""Criteria that watch activations: each score against its definition, written out in loops."""

import importlib
import math
import statistics
import sys
import weakref

import pytest
import torch

from gisp_hf import GISPConfig, GISPPruner, Trajectory
from gisp_hf.criteria.gate import Gate
from gisp_hf.criteria.refit import Refit, refit_errors
from gisp_hf.models import discover
from gisp_hf.models.surgery import zero_structures
from gisp_hf.pruning import methods
from gisp_hf.pruning.engine import Engine
from tests.runs import prune, tiny_config
from tests.test_distributed import launch
from tests.tiny import tiny_blocks, tiny_model

METHODS = ["wanda-sp", "gisp-activation", "flap", "second-order", "second-order-tyr"]
RUNS = [*METHODS, "wanda-sp-owl", "flap-compensated"]  # and methods with more than a criterion
FAMILIES = ["llama", "llama_mha", "qwen3"]  # groups of two heads, of one, and a head dimension of its own


def tokens(count: int = 4) -> torch.Tensor:
    return torch.stack([block["input_ids"] for block in tiny_blocks(count)])


def scored(model, method: str, *batches: torch.Tensor, **inputs) -> tuple[Engine, list[torch.Tensor]]:
    """The engine's scores after one pass over the batches."""
    config = GISPConfig(method=method, sparsity_levels=(0.2,), protect_first=0, protect_last=0)
    engine = Engine(model, discover(model), config)
    model.train()
    with engine.watch():
        for ids in batches:
            (model(input_ids=ids, labels=ids, **inputs).loss / len(batches)).backward()
        engine.accumulate()
    return engine, engine.scores


def projections(model) -> list[tuple[torch.nn.Linear, int]]:
    """Per block, the projection that reads its structures, and the columns of one structure."""
    found = []
    for layer in model.model.layers:
        groups = layer.self_attn.k_proj.out_features // layer.self_attn.head_dim
        found += [(layer.self_attn.o_proj, layer.self_attn.o_proj.in_features // groups), (layer.mlp.down_proj, 1)]
    return found


def inputs_of(model, ids: torch.Tensor) -> list[torch.Tensor]:
    """Per block, the inputs of its projection, token by token: (n, length)."""
    seen: dict[int, torch.Tensor] = {}
    handles = [
        module.register_forward_pre_hook(lambda _, args, number=number: seen.update({number: args[0].flatten(0, 1)}))
        for number, (module, _) in enumerate(projections(model))
    ]
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    return [seen[number] for number in range(len(seen))]


def assert_equal_orders(found, expected) -> None:
    assert all(torch.equal(a, b) for a, b in zip(found.order, expected.order))
    assert len(found) == len(expected) > 0


# ---- definitions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_wanda_sp_equals_its_definition(family) -> None:
    model, ids = tiny_model(family, num_hidden_layers=2), tokens()
    _, found = scored(model, "wanda-sp", ids[:1], ids[1:])
    for (module, width), x, scores in zip(projections(model), inputs_of(model, ids), found):
        expected = []
        for first in range(0, x.shape[1], width):
            total = 0.0
            for column in range(first, first + width):
                norm = math.sqrt(sum(float(value) ** 2 for value in x[:, column]))
                total += sum(abs(float(weight)) * norm for weight in module.weight.detach()[:, column])
            expected.append(total)
        torch.testing.assert_close(scores, torch.tensor(expected), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_gisp_activation_equals_the_derivative_of_real_gates(family, monkeypatch) -> None:
    """Finite differences in float64: a gate on each structure and token."""
    model, ids = tiny_model(family, num_hidden_layers=2, dtype=torch.float64), tokens(2)[:, :4]
    monkeypatch.setattr(torch, "float32", torch.float64)  # norms and softmax name it, and differences need more digits
    engine = Engine(model, discover(model), GISPConfig(method="gisp-activation", sparsity_levels=(0.2,)))
    criterion = engine.criterion
    model.train()
    with criterion.watch(model, engine.layout):
        cross_entropy(model, ids).backward()
        numbers = list(range(len(engine.layout.blocks)))
        found = criterion.scores(engine.layout, numbers, criterion.sums(engine.layout, numbers))
    for (module, width), scores in zip(projections(model), found):
        for index in (0, 1, len(scores) - 1):
            columns = slice(index * width, (index + 1) * width)
            slopes = [slope(model, module, columns, ids, row, t) for row in range(2) for t in range(4)]
            norm = sum(abs(value) ** 1.25 for value in slopes) ** 0.8
            assert float(scores[index]) == pytest.approx(norm, rel=1e-5)


def slope(model, module, columns: slice, ids: torch.Tensor, row: int, token: int, *, step: float = 1e-4) -> float:
    """dL/dz of a gate on these inputs of one token, by a central difference."""
    losses = []
    for gate in (1 + step, 1 - step):

        def close(_, args, gate=gate):
            inputs = args[0].clone()
            inputs[row, token, columns] *= gate
            return (inputs,)

        handle = module.register_forward_pre_hook(close)
        with torch.no_grad():
            losses.append(float(cross_entropy(model, ids)))
        handle.remove()
    return (losses[0] - losses[1]) / (2 * step)


def cross_entropy(model, ids: torch.Tensor) -> torch.Tensor:
    """The model's own loss, in float64; the model would round its logits."""
    logits = model(ids).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


@pytest.fixture
def activation_variants():
    """The methods of `recipes.activation_variants`, for one test."""
    before = dict(methods.METHODS)
    sys.modules.pop("recipes.activation_variants", None)
    importlib.import_module("recipes.activation_variants")
    yield
    methods.METHODS.clear()
    methods.METHODS.update(before)


POWERS = {"gisp-activation": 1.25, "activation-absolute": 1, "activation-power-1.5": 1.5, "activation-squared": 2}


@pytest.mark.parametrize("method", [*POWERS, "activation-per-sequence"])
def test_scores_of_gates_equal_loops_over_tokens_and_structures(method, activation_variants) -> None:
    model, ids = tiny_model(num_hidden_layers=2), tokens()
    _, found = scored(model, method, ids[:2], ids[2:])
    kept: list[torch.Tensor] = []

    def keep(module, args, output) -> None:
        args[0].retain_grad()
        kept.append(args[0])

    handles = [module.register_forward_hook(keep) for module, _ in projections(model)]
    embedding = model.model.embed_tokens(ids).detach().requires_grad_()
    model(inputs_embeds=embedding, labels=ids).loss.backward()
    for handle in handles:
        handle.remove()
    for x, (_, width), scores in zip(kept, projections(model), found):
        expected = []
        for first in range(0, x.shape[-1], width):
            total = 0.0
            for values, gradients in zip(x.detach(), x.grad):  # of a sequence
                slopes = [
                    sum(float(value[c]) * float(gradient[c]) for c in range(first, first + width))
                    for value, gradient in zip(values, gradients)
                ]
                if method == "activation-per-sequence":
                    total += abs(sum(slopes))
                else:
                    total += sum(abs(slope) ** POWERS[method] for slope in slopes)
            expected.append(total ** (1 / POWERS.get(method, 1)))
        torch.testing.assert_close(scores, torch.tensor(expected), rtol=1e-4, atol=1e-7)


def test_the_power_of_derivatives_is_taken_part_by_part(monkeypatch) -> None:
    torch.manual_seed(0)
    gates = torch.randn(2, 5, 7)
    expected = gates.abs().pow(1.25).sum(dim=(0, 1))
    for part in (1, 14, 30, 70, 1000):  # numbers at a time: one token, two, four, all
        monkeypatch.setattr("gisp_hf.criteria.gate._PART", part)
        torch.testing.assert_close(Gate().reduce(gates.clone()), expected)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_gisp_activation_keeps_the_factors_of_a_gated_mlp_alone(family, monkeypatch) -> None:
    """Fewer activations kept for the backward pass, and the same scores and gradients to the bit."""

    class Kept:
        def __init__(self, tensor: torch.Tensor) -> None:
            self.tensor = tensor

    def measured() -> tuple[int, list[torch.Tensor], torch.Tensor]:
        model, ids = tiny_model(family), tokens()
        model.requires_grad_(False)
        embedding = model.get_input_embeddings().weight.requires_grad_()
        config = GISPConfig(method="gisp-activation", sparsity_levels=(0.2,), protect_first=0, protect_last=0)
        engine = Engine(model, discover(model), config)
        alive: weakref.WeakSet[Kept] = weakref.WeakSet()

        def pack(tensor: torch.Tensor) -> Kept:
            kept = Kept(tensor)
            alive.add(kept)
            return kept

        model.train()
        with engine.watch():
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
                loss = model(input_ids=ids, labels=ids).loss
            width = model.config.intermediate_size
            storages = {kept.tensor.untyped_storage().data_ptr() for kept in alive if width in kept.tensor.shape[-1:]}
            loss.backward()
            engine.accumulate()
        return len(storages), [scores for scores in engine.scores if scores is not None], embedding.grad

    count, scores, gradient = measured()
    monkeypatch.setattr("gisp_hf.criteria.gate._gated_mlp", lambda model, parameter: None)
    plain_count, plain_scores, plain_gradient = measured()
    assert count == plain_count - 2 * tiny_model(family).config.num_hidden_layers  # the activation and the product
    assert torch.equal(gradient, plain_gradient)
    for found, expected in zip(scores, plain_scores):
        assert torch.equal(found, expected)


def test_gisp_activation_gives_no_weight_a_gradient(tmp_path) -> None:
    model, seen = tiny_model(), {}
    hooks = [p.register_post_accumulate_grad_hook(lambda p: seen.update({id(p): p})) for p in model.parameters()]
    prune(model, tmp_path, config=tiny_config(method="gisp-activation"))
    assert [id(model.model.norm.weight)] == list(seen)  # the one that the Trainer's backward pass needs
    for hook in hooks:
        hook.remove()


@pytest.mark.slow
def test_gisp_activation_under_activation_checkpointing_gives_the_same_order(tmp_path) -> None:
    config = tiny_config(method="gisp-activation")
    expected = prune(tiny_model(), tmp_path / "a", config=config).trajectory
    found = prune(
        tiny_model(),
        tmp_path / "b",
        config=config,
        activation_checkpointing=True,
        activation_checkpointing_kwargs={"use_reentrant": False},
    )
    assert_equal_orders(found.trajectory, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_flap_equals_its_definition(family) -> None:
    model, ids = tiny_model(family, num_hidden_layers=2), tokens()
    _, found = scored(model, "flap", ids[:1], ids[1:])
    for number, ((module, width), x, scores) in enumerate(zip(projections(model), inputs_of(model, ids), found)):
        values = []
        for column in range(x.shape[1]):
            entries = [float(value) for value in x[:, column]]
            squares = sum(float(weight) ** 2 for weight in module.weight.detach()[:, column])
            values.append(statistics.variance(entries) * squares)
        if number % 2 == 0:  # attention
            values = [value**2 for value in values]
        mean, deviation = statistics.mean(values), statistics.stdev(values)
        values = [(value - mean) / deviation for value in values]
        expected = [sum(values[first : first + width]) / width for first in range(0, len(values), width)]
        torch.testing.assert_close(scores, torch.tensor(expected), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_second_order_equals_the_error_of_a_real_refit(family) -> None:
    """Least squares on the inputs themselves, damped by extra rows, without the columns of one structure at a time."""
    model, ids = tiny_model(family, num_hidden_layers=2), tokens(8)
    _, found = scored(model, "second-order", ids[:3], ids[3:])
    for (module, width), x, scores in zip(projections(model), inputs_of(model, ids), found):
        x, weight = x.double(), module.weight.detach().double()
        damping = 1e-2 * sum(float(x[:, c].square().sum()) for c in range(x.shape[1])) / x.shape[1]
        rows = torch.cat([x, damping**0.5 * torch.eye(x.shape[1], dtype=x.dtype)])
        expected = []
        for first in range(0, x.shape[1], width):
            others = [c for c in range(x.shape[1]) if not first <= c < first + width]
            target = rows @ weight.T
            refit = torch.linalg.lstsq(rows[:, others], target).solution
            expected.append(float((rows[:, others] @ refit - target).square().sum()) / 2)
        torch.testing.assert_close(scores, torch.tensor(expected), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_tyr_adds_the_output_along_the_whole_output(family) -> None:
    """Token by token on the inputs themselves, damped by extra rows as for the re-fit."""
    model, ids = tiny_model(family, num_hidden_layers=2), tokens(8)
    _, found = scored(model, "second-order-tyr", ids[:3], ids[3:])
    _, second = scored(model, "second-order", ids)
    for (module, width), x, scores, refit in zip(projections(model), inputs_of(model, ids), found, second):
        x, weight = x.double(), module.weight.detach().double()
        damping = 1e-2 * sum(float(x[:, c].square().sum()) for c in range(x.shape[1])) / x.shape[1]
        rows = torch.cat([x, damping**0.5 * torch.eye(x.shape[1], dtype=x.dtype)])
        expected = []
        for first in range(0, x.shape[1], width):
            columns = slice(first, first + width)
            total = 0.0
            for row in rows:
                total += float((weight[:, columns] @ row[columns]) @ (weight @ row))
            expected.append(total)
        expected = torch.tensor(expected) + refit
        torch.testing.assert_close(scores, expected, rtol=1e-3, atol=1e-5)


def test_a_duplicate_costs_nothing_to_refit() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(200, 4), torch.randn(3, 4)
    x[:, 3] = x[:, 0]
    errors = refit_errors(x.T @ x, weight, torch.arange(4)[:, None])
    assert errors[[0, 3]].max() < 0.1 * errors[[1, 2]].min()


def test_gram_matrices_are_float32_under_autocast() -> None:
    model, ids = tiny_model(num_hidden_layers=2), tokens()
    layout = discover(model)
    criterion, seen = Refit(), []
    model.train()
    with criterion.watch(model, layout), torch.autocast("cpu", dtype=torch.bfloat16):
        handle = model.model.layers[0].mlp.down_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        model(ids)
        handle.remove()
        found = criterion.sums(layout, [1])
    x = seen[0].flatten(0, 1).double()
    gram = found[1, "model.layers.0.mlp.down_proj.weight"]
    assert gram.dtype == torch.float32
    torch.testing.assert_close(gram.double(), x.T @ x, rtol=1e-5, atol=1e-5)


def test_local_taylor_takes_the_same_share_of_each_layer_by_gisps_scores(tmp_path) -> None:
    config = tiny_config(method="local-taylor", num_steps=1)
    local = prune(tiny_model(), tmp_path / "local", config=config).trajectory
    gisp = prune(tiny_model(), tmp_path / "gisp", config=tiny_config(method="one-shot", num_steps=1)).trajectory
    assert GISPConfig(method="local-taylor").num_steps == 1
    for number in local.layout.of_kind("mlp")[1:-1]:
        both = (local.order[number] >= 0) & (gisp.order[number] >= 0)
        ours, theirs = local.order[number][both], gisp.order[number][both]
        assert torch.equal(ours.argsort(), theirs.argsort())
    shares = [len(local.kept(0.5)[n]) / 24 for n in local.layout.of_kind("mlp")[1:-1]]
    assert max(shares) - min(shares) <= 1 / 24 + 1e-9
    assert all(len(local.kept(0.5)[n]) == local.layout.blocks[n].size for n in (0, 1, 10, 11))  # first and last layer


# ---- what all of them share ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_passes_in_eval_mode_or_without_gradients_do_not_count(method) -> None:
    model, ids = tiny_model(num_hidden_layers=2), tokens()
    _, expected = scored(model, method, ids)
    engine = Engine(model, discover(model), GISPConfig(method=method, sparsity_levels=(0.2,), protect_last=0))
    with engine.watch():
        model.eval()
        model(input_ids=ids.flip(1), labels=ids).loss.backward()
        model.train()
        with torch.no_grad():
            model(ids.flip(1))
        with pytest.raises(ValueError, match="self_attn.o_proj.weight has seen no training pass"):
            engine.accumulate()
        model(input_ids=ids, labels=ids).loss.backward()
        model.eval()
        model(ids.flip(1))
        engine.accumulate()
    for a, b in zip(engine.scores, expected):
        assert torch.equal(a, b)


@pytest.mark.parametrize("method", METHODS)
def test_padding_does_not_count(method) -> None:
    model, ids = tiny_model(num_hidden_layers=2), tokens()
    _, expected = scored(model, method, ids)
    model = tiny_model(num_hidden_layers=2)
    padded = torch.cat([ids, torch.zeros_like(ids[:, :5])], dim=1)
    labels = torch.cat([ids, torch.full_like(ids[:, :5], -100)], dim=1)
    engine = Engine(model, discover(model), GISPConfig(method=method, sparsity_levels=(0.2,), protect_last=0))
    model.train()
    with engine.watch():
        model(input_ids=padded, labels=labels, attention_mask=(padded > 0).long()).loss.backward()
        engine.accumulate()
    for a, b in zip(engine.scores, expected):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_sums_start_anew_and_fit_the_smaller_model(method) -> None:
    model, ids = tiny_model(num_hidden_layers=2), tokens()
    engine, _ = scored(model, method, ids)
    engine.advance(0.2)
    fresh = tiny_model(num_hidden_layers=2)
    for block, keep in zip(engine.layout.blocks, engine.kept()):
        gone = torch.ones(block.size, dtype=torch.bool)
        gone[keep] = False
        zero_structures(fresh, block, gone.nonzero().squeeze(1))
    _, expected = scored(fresh, method, ids.flip(1))
    model.train()
    with engine.watch():
        model(input_ids=ids.flip(1), labels=ids.flip(1)).loss.backward()
        engine.accumulate()
    for scores, other, keep in zip(engine.scores, expected, engine.kept()):
        torch.testing.assert_close(scores[keep], other[keep], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("method", RUNS)
def test_only_blocks_that_can_lose_structures_are_watched(method) -> None:
    model = tiny_model()
    config = tiny_config(method=method, prune="channels", protect_first=2, sparsity_levels=(0.1,))
    engine = Engine(model, discover(model), config)
    with engine.watch():
        hooked = {name for name, module in model.named_modules() if module._forward_pre_hooks}
    hooked.remove("model")  # there the attention mask is taken
    layers = {name.split(".")[2] for name in hooked}
    assert layers == {"2", "3", "4"} and not any("self_attn" in name for name in hooked)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("method", RUNS)
def test_zeros_and_slices_give_the_same_order(method, family, tmp_path) -> None:
    config = tiny_config(method=method)
    sliced = prune(tiny_model(family), tmp_path / "a", config=config)
    zeros = GISPPruner(config, tmp_path / "b" / "levels", shrink=False)
    prune(tiny_model(family), tmp_path / "b", pruner=zeros)
    assert_equal_orders(zeros.trajectory, sliced.trajectory)


@pytest.mark.slow
@pytest.mark.parametrize("method", RUNS)
def test_a_run_leaves_no_hook_and_an_evaluation_changes_nothing(method, tmp_path) -> None:
    config = tiny_config(method=method)
    expected = prune(tiny_model(), tmp_path / "plain", config=config).trajectory
    model = tiny_model()

    def evaluate(pruned) -> dict[str, float]:
        with torch.no_grad():
            return {"size": float(pruned(tokens(2)).logits.sum())}

    pruner = GISPPruner(config, tmp_path / "evaluated" / "levels", evaluate=evaluate)
    found = prune(model, tmp_path / "evaluated", pruner=pruner)
    assert all("size" in metrics for metrics in found.level_metrics.values())
    assert_equal_orders(found.trajectory, expected)
    assert [m for m in model.modules() if m._forward_pre_hooks or m._forward_hooks] == []
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("method", RUNS)
def test_accumulation_gives_the_order_of_one_batch(method, tmp_path) -> None:
    config = tiny_config(method=method)
    whole = prune(
        tiny_model(), tmp_path / "a", config=config, per_device_train_batch_size=16, gradient_accumulation_steps=1
    )
    parts = prune(
        tiny_model(), tmp_path / "b", config=config, per_device_train_batch_size=2, gradient_accumulation_steps=8
    )
    assert_equal_orders(parts.trajectory, whole.trajectory)


@pytest.mark.slow
@pytest.mark.parametrize("method", RUNS)
def test_two_processes_remove_what_one_removes(method, tmp_path) -> None:
    expected = prune(tiny_model(), tmp_path / "one", config=tiny_config(method=method)).trajectory
    result = launch("ddp", tmp_path, processes=2, method=method)
    assert result.returncode == 0, result.stderr
    assert_equal_orders(Trajectory.load(tmp_path / "levels"), expected)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_sharded_parameters_give_the_order_of_one_process(method, tmp_path) -> None:
    model, ids = tiny_model(), tokens(16)
    engine = Engine(model, discover(model), tiny_config(sparsity_levels=(0.2, 0.4), method=method), shrink=False)
    model.train()
    with engine.watch():
        for target in (0.1, 0.2, 0.3, 0.4):
            model(input_ids=ids, labels=ids).loss.backward()
            engine.accumulate()
            engine.advance(target)
    result = launch("fsdp2", tmp_path, processes=2, family="llama", method=method)
    assert result.returncode == 0, result.stderr
    found = Trajectory.load(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(found.order, engine.order))
