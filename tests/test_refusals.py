"""What a run refuses at its start, with the way out; nothing is written and the model is as before."""

from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model

from gisp_hf import GISPPruner
from gisp_hf.training.checks import check_arguments, check_model
from tests.runs import make_trainer, prune, tiny_config
from tests.tiny import tiny_model


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_steps": 3}, r"5 pruning steps were asked for, but this run has only 3 .*max_steps=5.*num_steps=3"),
        ({"max_steps": -1, "num_train_epochs": 2}, r"only 2 \(16 examples, 16 per step, 2 epochs\)"),
        ({"train_dataset": []}, "data set is empty"),
    ],
)
def test_runs_that_cannot_work_are_refused_at_the_start(arguments, message, tmp_path) -> None:
    model = tiny_model()
    before = {name: (p.requires_grad, p.clone()) for name, p in model.named_parameters()}
    if not arguments.get("train_dataset", True):  # the Trainer's own sampler refuses an empty list first
        with pytest.raises(ValueError, match="num_samples|empty"):
            make_trainer(model, tmp_path, **arguments).train()
        return
    with pytest.raises(ValueError, match=message):
        make_trainer(model, tmp_path, **arguments).train()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == before[name][0] and torch.equal(parameter, before[name][1])
    assert not (tmp_path / "levels").exists()


PLAIN = {"fp16": False, "deepspeed": None, "n_gpu": 1}
PLAIN |= {"activation_checkpointing": False, "activation_checkpointing_kwargs": None}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fp16": True}, "use bf16=True"),
        ({"deepspeed": "ds.json"}, "accelerate launch"),
        ({"n_gpu": 2}, "accelerate launch"),
        (
            {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}},
            "use_reentrant",
        ),
    ],
)
def test_unsupported_arguments_say_what_to_do_instead(change, message) -> None:
    with pytest.raises(ValueError, match=message):
        check_arguments(SimpleNamespace(**{**PLAIN, **change}))  # type: ignore[arg-type]


def test_processes_that_are_not_connected_are_refused(monkeypatch) -> None:
    """As `accelerate launch` starts them on a CPU, when the script does not say that it is one."""
    for name, value in {"LOCAL_RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=r"2 processes were launched, and they are not connected.*use_cpu=True"):
        check_arguments(SimpleNamespace(**PLAIN, world_size=1))  # type: ignore[arg-type]


def test_adapters_around_the_model_are_refused(tmp_path) -> None:
    adapted = get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="merge_and_unload"):
        make_trainer(adapted, tmp_path)


def test_adapters_inside_the_model_are_refused() -> None:
    model = tiny_model()
    # As model.add_adapter does, which transformers 5.24 refuses before peft 0.22.
    inject_adapter_in_model(LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"), model)
    with pytest.raises(ValueError, match="merge_and_unload"):
        check_model(model)


def test_weights_made_under_inference_mode_are_refused(tmp_path) -> None:
    with torch.inference_mode():
        inference = tiny_model()
    with pytest.raises(ValueError, match="cannot have a gradient.*inference_mode"):
        make_trainer(inference, tmp_path)


def test_quantized_models_are_refused() -> None:
    quantized = tiny_model()
    quantized.hf_quantizer = object()
    with pytest.raises(ValueError, match="quantize the pruned level"):
        check_model(quantized)


def test_shrinking_a_compiled_model_is_refused(tmp_path) -> None:
    pruner = GISPPruner(tiny_config(), tmp_path / "l", shrink=True)
    with pytest.raises(ValueError, match="shrink=True needs a single process, without torch_compile"):
        make_trainer(tiny_model(), tmp_path, pruner=pruner, torch_compile=True)


def test_a_sparsity_that_cannot_be_reached_is_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="cannot be reached"):
        make_trainer(tiny_model(), tmp_path, config=tiny_config(sparsity_levels=(0.9,)))


@pytest.mark.slow
def test_output_folders(tmp_path) -> None:
    (tmp_path / "levels").mkdir()
    (tmp_path / "levels" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is not empty .*notes.txt"):
        make_trainer(tiny_model(), tmp_path).train()
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot write to the output folder.*choose another"):
        make_trainer(tiny_model(), tmp_path, pruner=GISPPruner(tiny_config(), tmp_path / "file" / "levels")).train()
    # without output_dir it is the Trainer's own, where other files may lie, but no earlier run
    (tmp_path / "trainer").mkdir(exist_ok=True)
    (tmp_path / "trainer" / "log.txt").write_text("")
    prune(tiny_model(), tmp_path, pruner=GISPPruner(tiny_config()))
    assert (tmp_path / "trainer" / "sparsity-0.50" / "config.json").is_file()
    with pytest.raises(FileExistsError, match="sparsity-0.20"):
        make_trainer(tiny_model(), tmp_path, pruner=GISPPruner(tiny_config())).train()


def test_a_pruner_prunes_once(tmp_path) -> None:
    trainer = make_trainer(tiny_model(), tmp_path)
    trainer.train()
    with pytest.raises(ValueError, match="has pruned already"):
        trainer.train()
    with pytest.raises(RuntimeError, match="no trajectory before"):
        _ = GISPPruner().trajectory
