"""A run gives the model back, whatever happens: flags, dropout, LM head, loss, modes, hooks, a config that fits."""

import copy
import errno
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

import gisp_hf
from gisp_hf import GISPPruner
from gisp_hf.levels import save
from gisp_hf.models import discover
from tests.runs import LEVELS, make_trainer, prune, tiny_config
from tests.tiny import tiny_blocks, tiny_model, tiny_tokenizer

IDS = torch.stack([block["input_ids"] for block in tiny_blocks(4)])


def state_of(model) -> dict:
    """Everything that a run touches, apart from the structures that it removes."""
    return {
        "flags": {name: p.requires_grad for name, p in model.named_parameters()},
        "gradients": [name for name, p in model.named_parameters() if p.grad is not None],
        "training": [module.training for module in model.modules()],
        "dropout": [layer.self_attn.attention_dropout for layer in model.model.layers],
        "head": sorted(set(vars(model.lm_head)) & {"forward"}),
        "loss": sorted(set(vars(model)) & {"_loss_function", "loss_function"}),
        "hooks": [
            name
            for name, module in model.named_modules()
            if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
        ]
        + [name for name, p in model.named_parameters() if p._post_accumulate_grad_hooks],
    }


def odd_model():
    """With dropout, a frozen parameter and one module in train mode: states that must come back."""
    model = tiny_model(attention_dropout=0.25)
    model.model.layers[3].mlp.up_proj.weight.requires_grad_(False)
    model.model.layers[2].train()
    return model


def trainer_of(model, folder, **arguments) -> Trainer:
    defaults = {
        "output_dir": str(folder / "trainer"),
        "max_steps": 5,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 2,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
    }
    arguments = {**defaults, **arguments}
    data = arguments.pop("train_dataset", tiny_blocks(16))
    options = {key: arguments.pop(key) for key in ("compute_loss_func", "eval_dataset") if key in arguments}
    args = TrainingArguments(**arguments)
    return Trainer(model, args, train_dataset=data, processing_class=tiny_tokenizer(), **options)


def assert_consistent(model, base) -> None:
    """The config describes the layers: a saved copy loads, and says the same as the model."""
    sizes = [block.size for block in discover(model).blocks]
    if sizes == [block.size for block in discover(base).blocks]:
        assert type(model) is type(base)
        return
    for layer, (groups, channels) in enumerate(zip(sizes[::2], sizes[1::2])):
        described = model.config.per_layer_config[layer]
        assert (described.num_key_value_heads, described.intermediate_size) == (groups, channels)


# ---- errors of every kind --------------------------------------------------------------------------------------------


class RaiseAt(TrainerCallback):
    def __init__(self, moment: str, error: BaseException, step: int = 2) -> None:
        self.moment, self.error, self.step = moment, error, step

    def __getattribute__(self, name):
        if name.startswith("on_") and name == object.__getattribute__(self, "moment"):
            return self.strike
        return object.__getattribute__(self, name)

    def strike(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise self.error


MOMENTS = ["on_step_begin", "on_substep_end", "on_pre_optimizer_step", "on_step_end", "on_log"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("CUDA out of memory")], ids=["ctrl-c", "oom"])
@pytest.mark.parametrize("moment", MOMENTS)
def test_prune_gives_the_model_back_after_an_error_anywhere(moment, error, tmp_path) -> None:
    model = odd_model()
    base, before = copy.deepcopy(model), state_of(model)
    trainer = trainer_of(model, tmp_path)
    trainer.add_callback(RaiseAt(moment, error))
    with pytest.raises(type(error)):
        gisp_hf.prune(trainer, tiny_config(), tmp_path / "levels", chunk_tokens=8)
    assert state_of(model) == before
    assert trainer.args.max_grad_norm == 1.0
    assert_consistent(model, base)
    assert model(IDS).logits.shape[-1] == 64  # logits, not hidden states
    assert not [cb for cb in trainer.callback_handler.callbacks if isinstance(cb, GISPPruner)]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("user code"), OSError(errno.ENOSPC, "disk full")])
def test_a_plain_callback_gives_the_model_back_after_an_error_of_evaluate(error, tmp_path) -> None:
    def evaluate(model):
        raise error

    model = odd_model()
    base, before = copy.deepcopy(model), state_of(model)
    pruner = GISPPruner(tiny_config(), tmp_path / "levels", evaluate=evaluate, chunk_tokens=8)
    with pytest.raises(type(error)):
        make_trainer(model, tmp_path, pruner=pruner).train()
    assert state_of(model) == before
    assert_consistent(model, base)


def test_a_model_whose_run_was_stopped_saves_and_loads_as_what_it_is(tmp_path) -> None:
    model = tiny_model()
    trainer = trainer_of(model, tmp_path)
    trainer.add_callback(RaiseAt("on_step_begin", KeyboardInterrupt(), step=3))
    with pytest.raises(KeyboardInterrupt):
        gisp_hf.prune(trainer, tiny_config(), tmp_path / "levels")
    model.save_pretrained(tmp_path / "stopped")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "stopped")
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    assert [b.size for b in discover(loaded).blocks] != [b.size for b in discover(tiny_model()).blocks]


def test_close_gives_back_what_a_plain_train_cannot(tmp_path) -> None:
    model = odd_model()
    before = state_of(model)
    pruner = GISPPruner(tiny_config(), tmp_path / "levels", chunk_tokens=8)
    trainer = make_trainer(model, tmp_path, pruner=pruner)
    trainer.add_callback(RaiseAt("on_step_begin", KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    pruner.close()
    pruner.close()
    assert state_of(model) == before


def test_building_a_trainer_changes_nothing_in_a_single_process(tmp_path) -> None:
    model = odd_model()
    before = state_of(model)
    make_trainer(model, tmp_path)
    assert state_of(model) == before


# ---- after a run -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_same_model_object_can_be_fine_tuned_afterwards(accumulation, tmp_path) -> None:
    model = tiny_model()
    prune(model, tmp_path, gradient_accumulation_steps=accumulation, per_device_train_batch_size=16 // accumulation)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer_of(model, tmp_path / "tuning", learning_rate=1e-2, lr_scheduler_type="constant").train()
    still = [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
    assert still == []


def test_prune_equals_the_callback(tmp_path) -> None:
    one = prune(tiny_model(), tmp_path / "one").trajectory
    trainer = trainer_of(tiny_model(), tmp_path / "two")
    two = gisp_hf.prune(trainer, tiny_config(), tmp_path / "two" / "levels").trajectory
    assert all(torch.equal(a, b) for a, b in zip(one.order, two.order))
    assert [step.loss for step in one.steps] == [step.loss for step in two.steps]


def test_prune_takes_any_subclass_and_its_numbers_reach_the_trackers(tmp_path) -> None:
    class MyTrainer(Trainer):
        pass

    seen = []

    class Tracker(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(logs.get("sparsity"))

    args = trainer_of(tiny_model(), tmp_path).args
    trainer = MyTrainer(tiny_model(), args, train_dataset=tiny_blocks(16), callbacks=[Tracker()])
    pruner = gisp_hf.prune(trainer, tiny_config(), tmp_path / "levels")
    assert seen[:5] == [step.sparsity for step in pruner.trajectory.steps]


def test_prune_refuses_a_trainer_that_has_a_pruner(tmp_path) -> None:
    trainer = make_trainer(tiny_model(), tmp_path)
    with pytest.raises(ValueError, match="has a GISPPruner already"):
        gisp_hf.prune(trainer, tiny_config())


def test_two_pruners_in_one_trainer_are_refused(tmp_path) -> None:
    model = tiny_model()
    before = state_of(model)
    trainer = make_trainer(model, tmp_path)
    trainer.add_callback(GISPPruner(tiny_config(), tmp_path / "more"))
    with pytest.raises(ValueError, match="the Trainer has several GISPPruners"):
        trainer.train()
    assert state_of(model) == before


def test_a_second_run_on_a_model_that_is_being_pruned_is_refused(tmp_path) -> None:
    model = tiny_model()

    def evaluate(model):
        config = tiny_config(sparsity_levels=(0.05,))
        gisp_hf.prune(trainer_of(model, tmp_path / "two"), config, tmp_path / "more")

    with pytest.raises(ValueError, match="another GISPPruner is pruning this model already"):
        prune(model, tmp_path, pruner=GISPPruner(tiny_config(), tmp_path / "levels", evaluate=evaluate))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"auto_find_batch_size": True}, "auto_find_batch_size=True starts the run again"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha=5 puts noise into the embeddings"),
        ({"save_strategy": "best", "metric_for_best_model": "loss", "eval_strategy": "steps"}, "no best checkpoint"),
    ],
)
def test_arguments_that_would_spoil_a_run_are_refused_by_name(arguments, message, tmp_path) -> None:
    extra = {"eval_dataset": tiny_blocks(4)} if "eval_strategy" in arguments else {}
    trainer = trainer_of(tiny_model(), tmp_path, **arguments, **extra)
    with pytest.raises(ValueError, match=message):
        gisp_hf.prune(trainer, tiny_config(), tmp_path / "levels")
    assert not (tmp_path / "levels").exists()


@pytest.mark.parametrize("method", ["gisp-activation", "wanda-sp", "flap-compensated"])
def test_a_compiled_model_is_refused_where_activations_are_watched(method, tmp_path) -> None:
    trainer = trainer_of(tiny_model(), tmp_path, torch_compile=True, torch_compile_backend="eager")
    with pytest.raises(ValueError, match="torch_compile=True leaves out the hooks"):
        gisp_hf.prune(trainer, tiny_config(method=method), tmp_path / "levels")
    assert not (tmp_path / "levels").exists()


# ---- clipping --------------------------------------------------------------------------------------------------------


def times_100(outputs, labels, num_items_in_batch=None):
    from gisp_hf.losses import language_modeling_loss

    return 100 * language_modeling_loss(outputs, labels, num_items_in_batch)


@pytest.mark.slow
@pytest.mark.parametrize("passes", [2, 3, 4])
def test_active_clipping_does_not_touch_the_order_of_layer_passes(passes, tmp_path, capsys) -> None:
    orders = []
    for count in (1, passes):
        trainer = trainer_of(tiny_model(), tmp_path / str(count), compute_loss_func=times_100, max_steps=5 * count)
        assert trainer.args.max_grad_norm == 1.0
        pruner = gisp_hf.prune(trainer, tiny_config(), tmp_path / str(count) / "levels", layer_passes=count)
        orders.append(pruner.trajectory.order)
        assert trainer.args.max_grad_norm == 1.0
    assert all(torch.equal(a, b) for a, b in zip(*orders))
    assert "max_grad_norm=1 is off for this run" in capsys.readouterr().out


class _Poison(TrainerCallback):
    """Spoils one gradient where clipping would spread it: before the optimizer step, in the backward pass."""

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 1:
            parameter = model.model.layers[2].mlp.up_proj.weight
            self.handle = parameter.register_hook(lambda gradient: gradient * math.nan)


def test_one_nan_is_named_with_active_clipping(tmp_path) -> None:
    trainer = trainer_of(tiny_model(), tmp_path)
    trainer.add_callback(_Poison())
    message = r"step 2 of 5: the gradient of model.layers.2.mlp.up_proj.weight is not finite \(nor that of 0 others\)"
    with pytest.raises(FloatingPointError, match=message):
        gisp_hf.prune(trainer, tiny_config(), tmp_path / "levels")


# ---- data ------------------------------------------------------------------------------------------------------------


def test_steps_on_leftovers_are_refused_with_numbers_that_fit(tmp_path) -> None:
    trainer = trainer_of(tiny_model(), tmp_path, train_dataset=tiny_blocks(18))
    with pytest.raises(ValueError, match=r"18 examples at 16 per step leave 2 .* give 16 or 32 examples"):
        gisp_hf.prune(trainer, tiny_config(), tmp_path / "levels")
    assert not (tmp_path / "levels").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("examples", "arguments"),
    [
        (32, {}),  # two whole steps an epoch
        (11, {}),  # one step is the whole data set, each time
        (90, {}),  # the run ends within the first epoch
        (18, {"dataloader_drop_last": True}),
    ],
)
def test_steps_of_one_size_are_accepted(examples, arguments, tmp_path) -> None:
    trainer = trainer_of(tiny_model(), tmp_path, train_dataset=tiny_blocks(examples), **arguments)
    assert len(gisp_hf.prune(trainer, tiny_config(), tmp_path / "levels").trajectory.steps) == 5


def test_labels_that_are_all_ignored_stop_the_run(tmp_path) -> None:
    blocks = [{**block, "labels": torch.full_like(block["labels"], -100)} for block in tiny_blocks(16)]

    def zero_loss(outputs, labels, num_items_in_batch=None):
        return torch.nn.functional.cross_entropy(
            outputs["logits"].flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum"
        )

    trainer = trainer_of(tiny_model(), tmp_path, train_dataset=blocks, compute_loss_func=zero_loss)
    with pytest.raises(ValueError, match="step 1 of 5: all scores are zero: .*labels -100"):
        gisp_hf.prune(trainer, tiny_config(), tmp_path / "levels")


# ---- levels ----------------------------------------------------------------------------------------------------------


def test_a_full_disk_names_the_folder_the_space_and_the_way_on(tmp_path, monkeypatch) -> None:
    write, calls = save.save_file, []

    def full(tensors, path, **kwargs):
        calls.append(path)
        if len(calls) == 2:
            path.write_bytes(b"half a file")
            raise save.SafetensorError("No space left on device (os error 28)")
        return write(tensors, path, **kwargs)

    monkeypatch.setattr(save, "save_file", full)
    model = tiny_model()
    before = state_of(model)
    message = r"the level .*sparsity-0.30 could not be written: No space left.*needs about 0\.\d MB, and .* MB are free"
    with pytest.raises(OSError, match=message):
        prune(model, tmp_path)
    assert [path.name for path in (tmp_path / "levels").iterdir()] == ["sparsity-0.20"]
    assert state_of(model) == before


def test_an_early_stop_says_how_to_publish_what_there_is(tmp_path) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step >= 3

    trainer = make_trainer(tiny_model(), tmp_path)
    trainer.add_callback(Stop())
    with pytest.raises(RuntimeError, match=r"sparsity-0.20, sparsity-0.30; `gisp-hf push .*levels --repo USER/NAME`"):
        trainer.train()


def test_levels_of_an_added_callback_are_saved_with_the_cache_on(tmp_path) -> None:
    trainer = trainer_of(tiny_model(), tmp_path)
    trainer.add_callback(GISPPruner(tiny_config(), tmp_path / "levels"))
    trainer.train()
    for level in LEVELS:
        assert AutoModelForCausalLM.from_pretrained(tmp_path / "levels" / f"sparsity-{level:.2f}").config.use_cache


@pytest.mark.slow
@pytest.mark.parametrize("value", [math.inf, math.nan, torch.tensor(2.5), 2])
def test_any_real_number_is_a_result_of_evaluate(value, tmp_path) -> None:
    import numpy as np

    pruner = GISPPruner(tiny_config(), tmp_path / "levels", evaluate=lambda model: {"a": value, "b": np.float32(0.5)})
    prune(tiny_model(), tmp_path, pruner=pruner)
    expected = float(value) if math.isfinite(value) else None
    assert pruner.level_metrics == {level: {"a": expected, "b": 0.5} for level in LEVELS}


def test_evaluation_by_the_trainer_sees_logits_in_a_chunked_run(tmp_path) -> None:
    shapes = []

    def compute_metrics(prediction):
        shapes.append(prediction.predictions.shape)
        return {}

    args = trainer_of(tiny_model(), tmp_path, eval_strategy="steps", eval_steps=2, eval_dataset=tiny_blocks(4)).args
    trainer = Trainer(
        tiny_model(),
        args,
        train_dataset=tiny_blocks(16),
        eval_dataset=tiny_blocks(4),
        compute_metrics=compute_metrics,
        callbacks=[GISPPruner(tiny_config(), tmp_path / "levels", chunk_tokens=8)],
    )
    trainer.train()
    assert set(shapes) == {(4, 16, 64)} and len(shapes) >= 2
