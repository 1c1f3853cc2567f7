"""A kind, a family, a criterion, a method and a stage from outside: nothing in the package is touched for them."""

import copy
import json
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from gisp_hf import GISPConfig, GISPPruner, Trajectory
from gisp_hf.criteria.base import Criterion, share_out
from gisp_hf.models import KINDS, Kind, discover, register_kind
from gisp_hf.models.families import FAMILIES
from gisp_hf.models.surgery import slice_structures, zero_structures
from gisp_hf.pruning.methods import METHODS, Method, register_method
from gisp_hf.training.stages import Stage
from tests import toy_family
from tests.runs import LEVELS, prune, tiny_config
from tests.tiny import tiny_blocks, tiny_model


@pytest.fixture
def toy():
    toy_family.register()
    yield toy_family.toy_model
    del KINDS["bottleneck"]
    FAMILIES.pop()


def random_keeps(layout, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    counts = [int(torch.randint(1, block.size + 1, (1,), generator=generator)) for block in layout.blocks]
    return [
        torch.randperm(block.size, generator=generator)[:n].sort().values for block, n in zip(layout.blocks, counts)
    ]


def test_a_toy_family_is_discovered_with_exact_counts(toy) -> None:
    model = toy()
    layout = discover(model)
    assert [(b.kind, b.size) for b in layout.blocks[:3]] == [("attention", 4), ("mlp", 24), ("bottleneck", 10)]
    assert layout.blocks[1].cost == 2 * 32 + 2 + 32  # rows of gate and up with their biases, a column of down
    assert layout.blocks[2].cost == 2 * 32
    fused = [member for member in layout.blocks[1].members if member.parameter.endswith("gate_up_proj.weight")]
    assert [(member.offset, member.width) for member in fused] == [(0, 1), (24, 1)]
    assert layout.total == sum(p.numel() for p in model.model.layers.parameters())


@pytest.mark.parametrize("seed", range(3))
def test_mask_equals_slice_with_fused_projections_and_a_kind_of_its_own(toy, seed) -> None:
    masked, sliced = toy(), toy()
    layout = discover(masked)
    keeps = random_keeps(layout, seed)
    for block, keep in zip(layout.blocks, keeps):
        gone = torch.ones(block.size, dtype=torch.bool)
        gone[keep] = False
        zero_structures(masked, block, gone.nonzero().squeeze(1))
    slice_structures(sliced, layout, keeps)
    ids = torch.stack([block["input_ids"] for block in tiny_blocks(3)])
    torch.testing.assert_close(sliced(ids).logits, masked(ids).logits, rtol=1e-4, atol=1e-5)
    assert discover(sliced) == layout.reduced(keeps)


def test_slicing_a_fused_projection_in_two_goes_equals_one(toy) -> None:
    once, twice = toy(), toy()
    layout = discover(once)
    keeps = random_keeps(layout, 5)
    slice_structures(once, layout, keeps)
    first = [torch.cat([keep, torch.arange(b.size)]).unique() for keep, b in zip(keeps, layout.blocks)]
    first = [keep if n % 2 else f for n, (keep, f) in enumerate(zip(keeps, first))]
    slice_structures(twice, layout, first)
    now = layout.reduced(first)
    slice_structures(twice, now, [torch.searchsorted(f, keep) for f, keep in zip(first, keeps)])
    for (name, a), b in zip(once.named_parameters(), twice.parameters()):
        assert torch.equal(a, b), name


def test_a_toy_family_is_pruned_saved_and_loaded(toy, tmp_path, capsys) -> None:
    model = toy()
    base = copy.deepcopy(model)
    trajectory = prune(model, tmp_path).trajectory
    removed = trajectory.steps[-1].removed
    assert set(removed) == {"attention", "mlp", "bottleneck"}
    assert sum(step.removed["bottleneck"] for step in trajectory.steps) > 0
    assert "units" in capsys.readouterr().out
    ids = tiny_blocks(1)[0]["input_ids"][None]
    for level in LEVELS:
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "levels" / f"sparsity-{level:.2f}")
        applied = Trajectory.load(tmp_path / "levels").apply(copy.deepcopy(base), sparsity=level)
        assert torch.equal(loaded(ids).logits, applied(ids).logits)
        sizes = [loaded.config.per_layer_config[n].bottleneck_size for n in range(6)]
        assert sizes == [layer.widen.in_features for layer in loaded.model.layers]


@pytest.mark.slow
def test_shrinking_and_zeroing_a_toy_family_remove_the_same(toy, tmp_path) -> None:
    a = prune(toy(), tmp_path / "a").trajectory
    pruner = GISPPruner(tiny_config(), tmp_path / "b" / "levels", shrink=False)
    b = prune(toy(), tmp_path / "b", pruner=pruner).trajectory
    assert all(torch.equal(x, y) for x, y in zip(a.order, b.order))


def test_one_kind_alone_can_be_pruned(toy, tmp_path) -> None:
    config = GISPConfig(
        prune="bottleneck", sparsity_levels=(0.03,), num_steps=2, protect_first=0, minimum_kept={"bottleneck": 3}
    )
    trajectory = prune(toy(), tmp_path, config=config).trajectory
    kept = trajectory.kept(0.03)
    for block, keep in zip(trajectory.layout.blocks, kept):
        assert len(keep) == block.size if block.kind != "bottleneck" else len(keep) >= 3


def test_a_kind_cannot_take_anothers_name() -> None:
    with pytest.raises(ValueError, match="kind 'mlp' exists already"):
        register_kind(Kind("mlp", "neuron", "neurons"))
    register_kind(KINDS["mlp"])  # again, the same: no harm


# ---- a criterion and its method --------------------------------------------------------------------------------------


class InputSquare(Criterion):
    """The mean square of what enters a structure's columns: from forward passes alone."""

    needs = "activations"

    @contextmanager
    def watch(self, model, layout, *, micro_batches=0):
        self.squares: dict[str, torch.Tensor] = {}
        names = {m.parameter for block in layout.blocks for m in block.members if m.dim == 1}
        handles = [
            model.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(self._hook(name))
            for name in names
        ]
        yield
        for handle in handles:
            handle.remove()

    def _hook(self, name: str):
        def add(module, args):
            square = args[0].detach().float().square().flatten(0, -2).sum(dim=0)
            self.squares[name] = self.squares[name] + square if name in self.squares else square

        return add

    def sums(self, layout, blocks):
        found = {}
        for number in blocks:
            block = layout.blocks[number]
            for member in block.members:
                if member.dim == 1:
                    found[number, member.parameter] = share_out(self.squares[member.parameter], member, block.size)
        self.squares = {}
        return found


@pytest.fixture
def input_square():
    register_method("input-square", Method(InputSquare, normalization="none", num_steps=1))
    yield
    del METHODS["input-square"]


def test_a_criterion_from_outside_removes_what_its_definition_says(input_square, tmp_path) -> None:
    model = tiny_model()
    base = copy.deepcopy(model)
    config = GISPConfig(
        method="input-square", sparsity_levels=(0.3,), protect_first=0, protect_last=0, prune="channels"
    )
    assert config.num_steps == 1 and config.normalization == "none"
    trajectory = prune(model, tmp_path, config=config).trajectory

    inputs = {}
    for number, layer in enumerate(base.model.layers):
        layer.mlp.down_proj.register_forward_pre_hook(lambda _, args, number=number: inputs.update({number: args[0]}))
    base(torch.stack([block["input_ids"] for block in tiny_blocks(16)]))
    scores = torch.stack([inputs[number].square().sum(dim=(0, 1)) for number in range(6)]).flatten()
    order = torch.cat([trajectory.order[number] for number in trajectory.layout.of_kind("mlp")])
    expected = scores.argsort()[: len(trajectory)]
    assert torch.equal(order.argsort()[len(order) - len(trajectory) :], expected)


def test_a_criterion_without_gradients_trains_nothing_but_one_small_parameter(input_square, tmp_path) -> None:
    model = tiny_model()
    before = {name: p.clone() for name, p in model.named_parameters() if "layers" not in name}
    prune(model, tmp_path, config=tiny_config(method="input-square"))
    assert all(torch.equal(dict(model.named_parameters())[name], p) for name, p in before.items())
    hooks = [m for m in model.modules() if m._forward_pre_hooks]
    assert hooks == []


def test_unknown_methods_name_those_there_are(tmp_path) -> None:
    with pytest.raises(ValueError, match="method must be one of gisp, one-shot, magnitude, random.*got 'wanda'"):
        GISPPruner(GISPConfig(method="wanda"))
    with pytest.raises(ValueError, match="method 'gisp' exists already"):
        register_method("gisp", Method(InputSquare))


def test_a_trajectory_of_a_method_from_outside_loads_without_it(input_square, tmp_path) -> None:
    trajectory = prune(tiny_model(), tmp_path, config=tiny_config(method="input-square")).trajectory
    del METHODS["input-square"]
    assert Trajectory.load(tmp_path / "levels").config == trajectory.config
    register_method("input-square", Method(InputSquare))


# ---- a stage ---------------------------------------------------------------------------------------------------------


class Biggest(Stage):
    """Writes the largest weight of each level beside it, and hands it on."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, float, bool]] = []
        self.finished: list[float] = []

    def begin(self, run) -> None:
        super().begin(run)
        assert not (run.output_dir / "sparsity-0.20").exists() and run.main_process

    def __call__(self, level):
        biggest = max(float(p.abs().max()) for p in level.model.parameters())
        (level.folder / "biggest.json").write_text(json.dumps(biggest))
        self.seen.append((level.folder.name, level.metrics["one"], (level.folder / "config.json").is_file()))
        return replace(level, metrics={**level.metrics, "biggest": biggest})

    def finish(self, trajectory, levels) -> None:
        self.finished = list(levels)
        assert trajectory.highest_sparsity() >= max(levels)


def test_a_stage_from_outside_sees_each_level_after_saving_and_evaluation(tmp_path) -> None:
    stage = Biggest()
    pruner = GISPPruner(tiny_config(), tmp_path / "levels", evaluate=lambda model: {"one": 1}, stages=[stage])
    prune(tiny_model(), tmp_path, pruner=pruner)
    assert stage.seen == [(f"sparsity-{level:.2f}", 1.0, True) for level in LEVELS]
    assert stage.finished == list(LEVELS)
    for level in LEVELS:
        loaded = AutoModelForCausalLM.from_pretrained(pruner.level_folders[level])
        biggest = max(float(p.abs().max()) for p in loaded.parameters())
        assert pruner.level_metrics[level] == {"one": 1.0, "biggest": biggest}
        assert json.loads((pruner.level_folders[level] / "biggest.json").read_text()) == biggest


# ---- the other rows --------------------------------------------------------------------------------------------------


def test_magnitude_removes_the_structures_with_the_smallest_weights(tmp_path) -> None:
    model = tiny_model("qwen2")
    base = copy.deepcopy(model)
    trajectory = prune(model, tmp_path, config=GISPConfig(method="magnitude", sparsity_levels=(0.3,))).trajectory
    assert trajectory.config.num_steps == 1
    worth = []
    for number, block in enumerate(trajectory.layout.blocks):
        for index in range(block.size):
            total = 0.0
            for member in block.members:
                weight = base.get_parameter(member.parameter).detach()
                rows = weight.narrow(member.dim, index * member.width, member.width)
                total += float(rows.abs().sum())
            if 0 < block.layer < 5 or (block.layer == 0 and 0.1 * 6 < 1):
                worth.append((total / block.cost, number, index))
    protected = {n for n, block in enumerate(trajectory.layout.blocks) if block.layer == 5}
    worth = [(w, n, i) for w, n, i in worth if n not in protected]
    first = sorted(worth)[:20]
    found = sorted((int(p), n, i) for n, o in enumerate(trajectory.order) for i, p in enumerate(o.tolist()) if p >= 0)
    assert [(n, i) for _, n, i in found[:20]] == [(n, i) for _, n, i in first]


@pytest.mark.slow
def test_random_is_the_same_twice_and_with_zeros(tmp_path) -> None:
    config = tiny_config(method="random", num_steps=4)
    runs = [
        prune(tiny_model(), tmp_path / "a", config=config),
        prune(tiny_model(seed=3), tmp_path / "b", config=config),
    ]
    zeros = GISPPruner(config, tmp_path / "c" / "levels", shrink=False)
    runs.append(prune(tiny_model(), tmp_path / "c", pruner=zeros))
    for run in runs[1:]:
        assert all(torch.equal(x, y) for x, y in zip(run.trajectory.order, runs[0].trajectory.order))


def test_the_scope_layer_takes_the_same_share_of_every_block(tmp_path) -> None:
    register_method("uniform", Method(METHODS["magnitude"].criterion, scope="layer", num_steps=1))
    try:
        config = GISPConfig(method="uniform", sparsity_levels=(0.25, 0.5), protect_first=0, protect_last=0)
        trajectory = prune(tiny_model(), tmp_path, config=config).trajectory
    finally:
        del METHODS["uniform"]
    for level in (0.25, 0.5):
        shares = [len(keep) / b.size for keep, b in zip(trajectory.kept(level), trajectory.layout.blocks)]
        mlp = [share for share, b in zip(shares, trajectory.layout.blocks) if b.kind == "mlp"]
        assert max(mlp) - min(mlp) <= 1 / 24 + 1e-9
        attention = [share for share, b in zip(shares, trajectory.layout.blocks) if b.kind == "attention"]
        assert max(attention) - min(attention) <= 1 / 4 + 1e-9
