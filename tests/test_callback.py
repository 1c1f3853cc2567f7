import contextlib
import copy
import io
import json
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from gisp_hf import GISPPruner, Trajectory
from gisp_hf.models import discover
from tests.runs import LEVELS, make_trainer, prune, tiny_config
from tests.tiny import FAMILIES, tiny_blocks, tiny_model


def pruner_of(trainer) -> GISPPruner:
    return next(cb for cb in trainer.callback_handler.callbacks if isinstance(cb, GISPPruner))


def assert_survivors_are_bit_identical(model, base, trajectory: Trajectory) -> None:
    """Every weight of ``model`` must be one of ``base``, and the ones that the trajectory says."""
    expected = trajectory.apply(copy.deepcopy(base), sparsity=trajectory.config.sparsity_levels[-1])
    found, wanted = dict(model.named_parameters()), dict(expected.named_parameters())
    assert found.keys() == wanted.keys()
    for name, parameter in wanted.items():
        assert torch.equal(found[name], parameter), name


class Finished:
    """A run on a tiny model of one family, and what it left."""

    def __init__(self, family: str, folder) -> None:
        self.model = tiny_model(family)
        self.base = copy.deepcopy(self.model)
        lines = io.StringIO()
        with contextlib.redirect_stdout(lines):
            self.trajectory = prune(self.model, folder).trajectory
        self.lines = [line for line in lines.getvalue().splitlines() if line.startswith("GISP step")]
        self.loaded = Trajectory.load(folder / "levels")
        names = (f"sparsity-{level:.2f}" for level in LEVELS)
        self.levels = [AutoModelForCausalLM.from_pretrained(folder / "levels" / name) for name in names]


@pytest.fixture(scope="module", params=FAMILIES)
def finished(request, tmp_path_factory) -> Finished:
    return Finished(request.param, tmp_path_factory.mktemp("finished"))


def test_the_model_in_memory_is_cut_out_of_the_base(finished) -> None:
    assert_survivors_are_bit_identical(finished.model, finished.base, finished.trajectory)


def test_the_trajectory_on_disk_is_that_of_the_run(finished) -> None:
    loaded, trajectory = finished.loaded, finished.trajectory
    assert all(torch.equal(a, b) for a, b in zip(loaded.order, trajectory.order))
    assert (loaded.steps, loaded.config, loaded.base, loaded.layout) == (
        trajectory.steps,
        trajectory.config,
        trajectory.base,
        trajectory.layout,
    )


def test_levels_on_disk_equal_the_trajectory_applied_to_the_base(finished) -> None:
    ids = torch.stack([block["input_ids"] for block in tiny_blocks(2)])
    for level, on_disk in zip(LEVELS, finished.levels):
        applied = finished.loaded.apply(copy.deepcopy(finished.base), sparsity=level)
        for (name, a), b in zip(applied.named_parameters(), on_disk.named_parameters()):
            assert name == b[0] and torch.equal(a, b[1]), (level, name)
        assert torch.equal(applied(ids).logits, on_disk(ids).logits)
    assert torch.equal(finished.model(ids).logits, on_disk(ids).logits)


def test_levels_are_nested(finished) -> None:
    left = [set(names_kept(finished.loaded, level)) for level in LEVELS]
    assert all(smaller < larger for larger, smaller in pairwise(left))


def test_levels_are_within_one_structure_of_their_sparsity(finished) -> None:
    dense, loaded = discover(finished.base), finished.loaded
    largest = max(block.cost for block in dense.blocks)
    for level in LEVELS:
        reached = loaded.sparsity_at(loaded.prefix(level))
        assert level <= reached < level + largest / dense.total


def test_parameters_are_accounted_for_exactly(finished) -> None:
    last, step = finished.levels[-1], finished.trajectory.steps[-1]
    held = sum(parameter.numel() for parameter in last.model.layers.parameters())
    assert held == step.parameters == round((1 - step.sparsity) * discover(finished.base).total)


def test_protected_layers_are_untouched(finished) -> None:
    for layer in (0, 5):
        before, after = (m.model.layers[layer].parameters() for m in (finished.base, finished.levels[-1]))
        assert all(torch.equal(a, b) for a, b in zip(before, after))


def test_each_step_has_a_line_and_a_row(finished) -> None:
    assert len(finished.lines) == 5 and all("removed" in line and "loss" in line for line in finished.lines)
    steps = finished.trajectory.steps
    assert [step.step for step in steps] == [1, 2, 3, 4, 5]
    assert all(step.loss is not None and step.loss > 0 for step in steps)


def names_kept(trajectory: Trajectory, sparsity: float) -> list[str]:
    kept = trajectory.kept(sparsity)
    return [f"{block.name}.{i}" for block, keep in zip(trajectory.layout.blocks, kept) for i in keep.tolist()]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_shrinking_and_zeroing_remove_the_same(family, tmp_path) -> None:
    small, zeroed = tiny_model(family), tiny_model(family)
    ids = tiny_blocks(1)[0]["input_ids"][None]
    a = prune(small, tmp_path / "a").trajectory
    b = prune(
        zeroed, tmp_path / "b", pruner=GISPPruner(tiny_config(), tmp_path / "b" / "levels", shrink=False)
    ).trajectory
    assert all(torch.equal(x, y) for x, y in zip(a.order, b.order))
    torch.testing.assert_close(zeroed(ids).logits, small(ids).logits, rtol=1e-4, atol=1e-5)
    assert sum(p.numel() for p in zeroed.parameters()) == sum(p.numel() for p in tiny_model(family).parameters())
    for level in LEVELS:  # what is written is sliced either way
        x, y = (
            (tmp_path / run / "levels" / f"sparsity-{level:.2f}" / "model.safetensors").read_bytes() for run in "ab"
        )
        assert x == y


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        {"optim": "adamw_torch", "weight_decay": 0.1, "learning_rate": 0.1},
        {"optim": "adamw_torch_fused", "weight_decay": 0.1, "learning_rate": 0.1},
        {"optim": "sgd", "optim_args": "momentum=0.9", "learning_rate": 0.1, "weight_decay": 0.1},
        {"optim": "adafactor", "learning_rate": 0.1},
        {"max_grad_norm": 0.0},
        {"max_grad_norm": 0.01},
        {"gradient_accumulation_steps": 1},
        {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 4},
        {"activation_checkpointing": True},
        {"bf16": True},
    ],
    ids=lambda arguments: "-".join(f"{key}={value}" for key, value in arguments.items()),
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_survivors_are_bit_identical(arguments, dtype, tmp_path) -> None:
    model = tiny_model("qwen2", dtype=dtype)
    base = copy.deepcopy(model)
    pruner = prune(model, tmp_path, **arguments)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert_survivors_are_bit_identical(model, base, pruner.trajectory)


@pytest.mark.slow
def test_accumulation_clipping_and_checkpointing_do_not_change_the_order(tmp_path) -> None:
    runs = [
        {},
        {"gradient_accumulation_steps": 1, "per_device_train_batch_size": 16},
        {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 4},
        {"max_grad_norm": 0.0},
        {"activation_checkpointing": True},
        {"weight_decay": 0.5, "learning_rate": 1.0},
    ]
    orders = [prune(tiny_model(), tmp_path / str(i), **run).trajectory.order for i, run in enumerate(runs)]
    for order in orders[1:]:
        assert all(torch.equal(a, b) for a, b in zip(order, orders[0]))


def test_only_what_is_scored_requires_a_gradient_and_all_is_given_back(tmp_path) -> None:
    model = tiny_model("llama", attention_dropout=0.25)
    model.config.use_cache = True
    model.get_input_embeddings().weight.requires_grad_(False)
    model.model.layers[3].mlp.up_proj.weight.requires_grad_(False)  # the user's own flags, odd ones too
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    seen = []

    class Witness(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            seen.append(
                (
                    {name for name, parameter in model.named_parameters() if parameter.requires_grad},
                    {name for name, parameter in model.named_parameters() if parameter.grad is not None},
                    model.model.layers[0].self_attn.attention_dropout,
                    model.training,
                )
            )

    trainer = make_trainer(model, tmp_path)
    trainer.add_callback(Witness())  # runs after the pruner
    trainer.train()
    expected = {
        f"model.layers.{layer}.{part}.weight"
        for layer in range(1, 5)
        for part in (
            *(f"self_attn.{p}_proj" for p in "qkvo"),
            *(f"mlp.{p}_proj" for p in ("gate", "up", "down")),
        )
    }
    assert len(seen) == 5
    assert all(step == (expected, set(), 0.0, True) for step in seen)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
    assert model.model.layers[0].self_attn.attention_dropout == 0.25
    assert model.config.use_cache is True and not model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    config = json.loads((tmp_path / "levels" / "sparsity-0.20" / "config.json").read_text())
    assert config["use_cache"] is True and config["attention_dropout"] == 0.25


def test_training_stops_by_itself_and_levels_between_steps_are_met(tmp_path) -> None:
    trainer = make_trainer(tiny_model(), tmp_path, config=tiny_config(sparsity_levels=(0.05, 0.33, 0.5)), max_steps=50)
    trainer.train()
    assert trainer.state.global_step == 5
    names = {path.name for path in (tmp_path / "levels").iterdir()}
    assert names == {"sparsity-0.05", "sparsity-0.33", "sparsity-0.50", "trajectory.json", "trajectory.safetensors"}
    trajectory = pruner_of(trainer).trajectory
    level = Trajectory.load(tmp_path / "levels" / "sparsity-0.33")  # each level carries the order that led to it
    assert len(level) == trajectory.prefix(0.33)
    for short, whole in zip(level.order, trajectory.order):
        assert torch.equal(short, torch.where(whole < len(level), whole, -1))


def test_numbers_reach_the_history_and_the_trackers(tmp_path) -> None:
    logged = []

    class Tracker(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            logged.append(dict(logs))

    trainer = make_trainer(tiny_model(), tmp_path)
    # Trackers of report_to stand before the callbacks of callbacks=[...]: put one where they are.
    handler = trainer.callback_handler
    assert [type(callback).__name__ for callback in handler.callbacks][:2] == ["DefaultFlowCallback", "GISPPruner"]
    handler.callbacks.insert(2, Tracker())
    trainer.train()
    steps = pruner_of(trainer).trajectory.steps
    for entries in (logged, trainer.state.log_history):
        rows = [entry for entry in entries if "sparsity" in entry]
        assert [row["sparsity"] for row in rows] == [step.sparsity for step in steps]
        assert [row["loss"] for row in rows] == [step.loss for step in steps]
        assert [row["groups_removed"] for row in rows] == [step.groups for step in steps]
        assert [row["channels_removed"] for row in rows] == [step.channels for step in steps]


def test_the_pruner_comes_before_a_real_tracker(tmp_path) -> None:
    # any integration from report_to is added before user callbacks; "none" leaves DefaultFlowCallback alone
    pruner = GISPPruner(tiny_config(), tmp_path / "levels")
    args = TrainingArguments(output_dir=str(tmp_path / "t"), use_cpu=True, report_to="none", max_steps=5)
    trainer = Trainer(model=tiny_model(), args=args, train_dataset=tiny_blocks(8))
    trainer.add_callback(TrainerCallback())
    trainer.add_callback(pruner)  # after on_init_end
    trainer.train()
    assert len(pruner.trajectory.steps) == 5
    assert trainer.callback_handler.callbacks.index(pruner) == 1


def test_evaluation_at_each_level_reaches_log_and_folders(tmp_path) -> None:
    modes = []

    def evaluate(model) -> dict[str, float]:
        modes.append((model.training, torch.is_grad_enabled()))
        return {"parameters": float(sum(p.numel() for p in model.model.layers.parameters()))}

    pruner = GISPPruner(tiny_config(), tmp_path / "levels", evaluate=evaluate)
    trainer = make_trainer(tiny_model(), tmp_path, pruner=pruner)
    trainer.train()
    assert modes == [(False, False)] * len(LEVELS)
    logged = {entry["level"]: entry["parameters"] for entry in trainer.state.log_history if "level" in entry}
    assert logged == {level: numbers["parameters"] for level, numbers in pruner.level_metrics.items()}
    for level in LEVELS:
        folder = tmp_path / "levels" / f"sparsity-{level:.2f}"
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        assert logged[level] == sum(p.numel() for p in loaded.model.layers.parameters())
        assert json.loads((folder / "metrics.json").read_text()) == {"parameters": logged[level]}
    with pytest.raises(ValueError, match=r"list of tasks, got 'piqa'; write \['piqa'\]"):
        make_trainer(tiny_model(), tmp_path, pruner=GISPPruner(tiny_config(), tmp_path / "x", evaluate="piqa"))


def test_calibration_loss_of_the_first_step_is_that_of_the_dense_model(tmp_path) -> None:
    model = tiny_model()
    ids = torch.stack([block["input_ids"] for block in tiny_blocks(16)])
    with torch.no_grad():
        dense = model(input_ids=ids, labels=ids).loss.item()
    assert prune(model, tmp_path).trajectory.steps[0].loss == pytest.approx(dense, rel=1e-5)


class _Poison(TrainerCallback):
    """Spoils one gradient at one step, after its first batch: the pruner reads it in the last one."""

    def __init__(self, step: int, value: float) -> None:
        self.step, self.value = step, value

    def on_substep_end(self, args, state, control, model=None, **kwargs):
        if state.global_step + 1 == self.step:
            model.model.layers[2].mlp.up_proj.weight.grad[0, 0] = self.value


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_gradients_stop_the_run(value, tmp_path) -> None:
    model = tiny_model()
    trainer = make_trainer(model, tmp_path)
    trainer.callback_handler.callbacks.insert(0, _Poison(4, value))
    message = (
        r"step 4 of 5: the gradient of model.layers.2.mlp.up_proj.weight is not finite.*sparsity-0.20, sparsity-0.30"
    )
    with pytest.raises(FloatingPointError, match=message):
        trainer.train()
    saved = sorted(path.name for path in (tmp_path / "levels").iterdir())
    assert saved == ["sparsity-0.20", "sparsity-0.30"]
    for name in saved:
        AutoModelForCausalLM.from_pretrained(tmp_path / "levels" / name)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_loss_without_gradients_names_the_parameter(tmp_path) -> None:
    trainer = make_trainer(tiny_model(), tmp_path)
    model = trainer.model
    trainer.compute_loss_func = lambda outputs, labels, num_items_in_batch=None: (
        outputs.logits.detach().sum() * 0 + model.model.layers[1].mlp.up_proj.weight.sum()
    )
    with pytest.raises(ValueError, match=r"step 1 of 5: model.layers.1.self_attn.q_proj.weight has no gradient"):
        trainer.train()


def test_stopping_early_is_an_error_that_keeps_what_was_saved(tmp_path) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step >= 3

    trainer = make_trainer(tiny_model(), tmp_path)
    trainer.add_callback(Stop())
    with pytest.raises(RuntimeError, match=r"ended after 3 of 5 pruning steps.*sparsity-0.20, sparsity-0.30"):
        trainer.train()
    assert len(Trajectory.load(tmp_path / "levels").steps) == 3


KILLED = """
import os, signal, sys
from pathlib import Path
import safetensors.torch
from tests.runs import prune
from tests.tiny import tiny_model
import gisp_hf.levels.save as checkpoint

folder, moment = Path(sys.argv[1]), int(sys.argv[2])
write, calls = checkpoint.save_file, []

def killing(*args, **kwargs):
    calls.append(1)
    if len(calls) == moment:
        Path(args[1]).write_bytes(b"half a file")
        os.kill(os.getpid(), signal.SIGKILL)
    return write(*args, **kwargs)

checkpoint.save_file = killing
prune(tiny_model(), folder)
"""


@pytest.mark.slow
def test_a_killed_process_leaves_whole_levels_or_a_temporary_folder(tmp_path) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path), "3"]
    result = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert result.returncode == -9, result.stderr
    names = sorted(path.name for path in (tmp_path / "levels").iterdir())
    assert len(names) == 3 and re.fullmatch(r"\.sparsity-0\.40\.[0-9a-f]{16}\.tmp", names[0])
    for name in names[1:]:
        AutoModelForCausalLM.from_pretrained(tmp_path / "levels" / name)
        Trajectory.load(tmp_path / "levels" / name)


def test_sparsity_never_falls_along_a_run(tmp_path) -> None:
    config = tiny_config(num_steps=12, channel_multiple=8, sparsity_levels=(0.25, 0.45), schedule="cosine")
    model = tiny_model()
    trajectory = prune(model, tmp_path, config=config).trajectory
    assert all(a.sparsity <= b.sparsity for a, b in pairwise(trajectory.steps))
    for level in (0.25, 0.45):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "levels" / f"sparsity-{level:.2f}")
        sizes = [layer.mlp.up_proj.out_features for layer in loaded.model.layers]
        assert all(size % 8 == 0 for size in sizes) and trajectory.sparsity_at(trajectory.prefix(level)) >= level
