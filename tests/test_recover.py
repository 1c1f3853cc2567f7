"""Recovery by LoRA: adapters trained on a level, merged, and saved as a level."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel, TrainerCallback, TrainerControl

import gisp_hf.recovery.time_limit as time_limit
from gisp_hf import RestoreConfig, restore_level
from gisp_hf.cli.main import main
from gisp_hf.data import load_calibration
from gisp_hf.hub.plan import make_plan
from gisp_hf.hub.run_cards import card_writer
from gisp_hf.levels.info import levels_json, read_levels
from gisp_hf.levels.manifest import check_manifest
from gisp_hf.losses import Distillation, margin_loss
from gisp_hf.losses.distillation import check_teacher
from gisp_hf.models.fingerprint import fingerprint
from gisp_hf.pruning.trajectory import Trajectory
from gisp_hf.recovery.lora import merge, merge_adapters
from gisp_hf.recovery.lora_record import Recovery
from gisp_hf.recovery.time_limit import TimeLimit
from gisp_hf.recovery.training import train_on
from gisp_hf.recovery.vectors import attach_vectors
from tests.lora import Watch, data_of, logits_of, recover, words
from tests.restoring import ids_of, pair
from tests.runs import prune, tiny_config
from tests.test_distributed import launch
from tests.tiny import tiny_model, tiny_tokenizer

LEVEL = "sparsity-0.20"


class Made(NamedTuple):
    base: Path
    plain: Path
    restored: Path
    distilled: Path  # from the restored level
    watch: Watch


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Made:
    folder = tmp_path_factory.mktemp("recover")
    tiny_model().save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    pruner = prune(base, folder / "run", config=tiny_config(num_steps=1, sparsity_levels=(0.2,)))
    plain = pruner.level_folders[0.2]
    config = RestoreConfig(data=str(words(folder)), tokens=1024)
    restored = restore_level(plain.parent, folder / "restored" / LEVEL, sparsity=0.2, config=config, progress=False)
    watch = Watch()
    teacher = AutoModelForCausalLM.from_pretrained(folder / "base")
    distilled = recover(restored, folder / "distilled" / LEVEL, teacher=teacher, callbacks=[watch])
    return Made(folder / "base", plain, restored, distilled, watch)


def is_adapted(name: str) -> bool:
    return name.endswith(("q_proj.weight", "v_proj.weight"))  # the modules that PEFT has for the family


def test_the_saved_level_is_the_trained_one(made) -> None:
    model = AutoModelForCausalLM.from_pretrained(made.distilled)
    torch.testing.assert_close(logits_of(model), made.watch.logits, rtol=1e-4, atol=1e-5)
    before = AutoModelForCausalLM.from_pretrained(made.restored)
    assert (logits_of(before) - logits_of(model)).abs().max() > 1e-2


def test_only_adapted_weights_change(made) -> None:
    before, after = (load_file(folder / "model.safetensors") for folder in (made.restored, made.distilled))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]) != is_adapted(name), name
    others = {path.name for path in made.restored.iterdir()} - {"model.safetensors", "manifest.json"}
    for name in others:
        assert (made.restored / name).read_bytes() == (made.distilled / name).read_bytes(), name
    assert "restoration.json" in others
    assert check_manifest(made.distilled) >= {"recovery.json", "restoration.json", "model.safetensors"}
    assert [path.name for path in made.distilled.parent.iterdir()] == [LEVEL]


def test_the_record(made) -> None:
    record = Recovery.load(made.distilled)
    tensors = load_file(made.distilled / "model.safetensors")
    assert set(record.changed) == {name for name in tensors if is_adapted(name)}
    assert record.fingerprint == fingerprint((name, tensors[name]) for name in record.changed)
    assert (record.objective, record.restored, record.steps, record.tokens) == ("distillation", True, 4, 4 * 8 * 16)
    base = Trajectory.load(made.distilled).base
    assert record.teacher == {"class": "LlamaForCausalLM", "name": "base", "fingerprint": base.fingerprint}
    assert record.base["fingerprint"] == base.fingerprint
    assert record.lora["r"] == 8 and record.lora["target_modules"] == ["q_proj", "v_proj"]
    assert record.training["learning_rate"] == 1e-2 and record.training["world_size"] == 1
    assert record.loss == pytest.approx(sum(made.watch.losses) / 4, abs=1e-3)
    assert record.data["tokens"] == 512
    damaged = made.distilled.parent.parent / "damaged"
    damaged.mkdir()
    (damaged / "recovery.json").write_text(json.dumps({**record.to_dict(), "steps": -1}))
    with pytest.raises(ValueError, match="cannot be used: steps must be a whole number"):
        Recovery.load(damaged)


def test_levels_cards_and_a_push_say_so(made, capsys) -> None:
    run = made.distilled.parent
    levels = read_levels(run)
    assert [(level.restored, level.recovered) for level in levels] == [(True, True)]
    assert b'"recovered": true' in levels_json(levels)
    assert b"recovered" not in levels_json(read_levels(made.restored.parent))
    card = card_writer(run, levels, repo_id="me/tiny")
    plain = card_writer(made.restored.parent, read_levels(made.restored.parent), repo_id="me/tiny")
    for branch in ("main", LEVEL):
        text = card(branch, levels)
        assert "recovery.json" in text and "restoration.json" in text
        assert "Nothing was trained" not in text and "No training followed" not in text
        assert text.count("All other weights are those of the base model") == 1
        assert "recovery.json" not in plain(branch, read_levels(made.restored.parent))
    assert main(["levels", str(run)]) == 0
    assert "recovered" in capsys.readouterr().out.splitlines()[0]
    assert "recovery.json" in make_plan(run, tag=None, card=card, metrics=None).files[LEVEL]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merged_weight_is_rounded_once(dtype) -> None:
    _, level = pair("qwen2", dtype=dtype)
    before = {name: parameter.detach().clone() for name, parameter in level.named_parameters()}
    torch.manual_seed(0)
    adapted = get_peft_model(level, LoraConfig(init_lora_weights=False, lora_alpha=3)).eval()
    expected = dict(before)
    for name, module in adapted.get_base_model().named_modules():
        if hasattr(module, "lora_A"):
            change = module.lora_B["default"].weight @ module.lora_A["default"].weight * (3 / 8)
            expected[f"{name}.weight"] = before[f"{name}.weight"].float() + change.detach().float()
    logits = logits_of(adapted)
    merged = merge_adapters(adapted)
    assert isinstance(merged, PreTrainedModel)
    for name, parameter in merged.named_parameters():
        torch.testing.assert_close(parameter.float(), expected[name].float(), rtol=1e-6, atol=1e-6)
        assert torch.equal(parameter.to(dtype), before[name]) != (name.endswith(("q_proj.weight", "v_proj.weight")))
    if dtype == torch.float32:
        torch.testing.assert_close(logits_of(merged), logits, rtol=1e-4, atol=1e-4)


def is_vector(name: str, train: str) -> bool:
    return name.endswith("norm.weight" if train == "norms" else ("o_proj.weight", "down_proj.weight"))


@pytest.mark.parametrize("train", ["norms", "scales"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_folded_vectors_are_their_definition(family, dtype, train) -> None:
    _, level = pair(family, dtype=dtype)
    before = {name: parameter.detach().clone() for name, parameter in level.named_parameters()}
    plain = logits_of(level)
    attach_vectors(level, train)
    trained = {name: p for name, p in level.named_parameters() if p.requires_grad}
    assert {n.partition(".parametrizations")[0] + ".weight" for n in trained} == {
        n for n in before if is_vector(n, train)
    }
    assert torch.equal(logits_of(level), plain)  # vectors change nothing yet
    torch.manual_seed(0)
    expected = dict(before)
    for name, change in trained.items():
        change.data.normal_(std=0.3)
        weight = name.partition(".parametrizations")[0] + ".weight"
        own = before[weight].float()
        changed = own.clone()
        for column in range(len(change)):  # of a matrix: one factor for each input
            changed[..., column] = (
                own[..., column] * (1 + change[column]) if own.ndim == 2 else own[column] + change[column]
            )
        expected[weight] = changed.to(dtype)
    logits = logits_of(level)
    folded = merge(level)
    assert dict(folded.named_parameters()).keys() == before.keys()
    for name, parameter in folded.named_parameters():
        assert parameter.dtype == dtype and torch.equal(parameter, expected[name]), name
    assert torch.equal(logits_of(folded), logits) and not torch.equal(logits, plain)


def test_scaled_weights_equal_scaled_inputs() -> None:
    _, level = pair("llama")
    projection = level.model.layers[0].mlp.down_proj
    x, own = torch.randn(5, projection.in_features), projection.weight.detach().clone()
    attach_vectors(level, "scales")
    change = projection.parametrizations.weight[0].change
    change.data.normal_()
    merge(level)
    torch.testing.assert_close(projection(x), (x * (1 + change)) @ own.T)


@pytest.mark.parametrize("train", ["norms", "scales"])
def test_trained_vectors_are_saved_as_a_level(train, made, tmp_path) -> None:
    watch = Watch()
    data = load_calibration(str(words(tmp_path)), tiny_tokenizer(), tokens=128, block_size=16)  # the same in each step
    options = {"callbacks": [watch], "data": data, "learning_rate": 0.03}
    folder = recover(made.restored, tmp_path / "run" / LEVEL, train=train, **options)
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(logits_of(model), watch.logits, rtol=1e-4, atol=1e-5)
    assert watch.losses[-1] < watch.losses[0]
    before, after = (load_file(path / "model.safetensors") for path in (made.restored, folder))
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]) != is_vector(name, train), name
    record = Recovery.load(folder)
    assert (record.train, record.lora, record.restored) == (train, {}, True)
    assert set(record.changed) == {name for name in before if is_vector(name, train)}
    assert check_manifest(folder) >= {"recovery.json", "restoration.json"}


class Spoil(TrainerCallback):
    def on_train_end(self, args, state, control, model=None, **kwargs):
        with torch.no_grad():
            next(parameter for parameter in model.parameters() if parameter.requires_grad).fill_(math.nan)


def test_a_weight_that_is_not_finite_leaves_nothing(made, tmp_path) -> None:
    with pytest.raises(FloatingPointError, match=r"q_proj.weight is not finite in torch.float32"):
        recover(made.plain, tmp_path / "run" / LEVEL, callbacks=[Spoil()], max_steps=1)
    assert not list((tmp_path / "run").iterdir())


def test_impossible_requests_fail_before_work(made, tmp_path) -> None:
    def refuse(match: str, error: type[Exception] = ValueError, level: Path = made.plain, **options) -> None:
        with pytest.raises(error, match=match):
            recover(level, options.pop("output", tmp_path / "run" / LEVEL), callbacks=[Stop()], **options)

    class Stop(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            raise AssertionError("training began")

    refuse("exists already", FileExistsError, output=made.restored)
    refuse("is recovered already", level=made.distilled)
    refuse("80 entries in its vocabulary and the student 64", teacher=tiny_model(vocab_size=80))
    data = data_of(tmp_path)
    refuse("targets that are tokens", data=SimpleNamespace(loss=margin_loss, provenance={"objective": "margin"}))
    refuse("train must be one of lora, norms, scales, got 'all'", train="all")
    refuse("lora= has settings of adapters, and train='norms' trains none", train="norms", lora=LoraConfig())
    refuse("modules_to_save", lora=LoraConfig(modules_to_save=["lm_head"]), data=data)
    refuse("holds no trajectory", FileNotFoundError, level=tmp_path / "nothing")
    with pytest.raises(ValueError, match="trained after pruning"):
        config = RestoreConfig(data="words.txt")
        restore_level(made.distilled.parent, tmp_path / "run" / "again", sparsity=0.2, config=config)
    teacher = tiny_model()
    teacher.sparsity = 0.3  # as elastic models have it
    with pytest.raises(ValueError, match=r"sparsity 0.3; call teacher.set_sparsity\(0\)"):
        check_teacher(tiny_model(), teacher)
    assert not list((tmp_path / "run").iterdir())


def test_adapters_on_tied_weights_are_refused(tmp_path) -> None:
    model = tiny_model(tie_word_embeddings=True)
    pruner = prune(model, tmp_path / "run", config=tiny_config(num_steps=1, sparsity_levels=(0.2,)))
    with pytest.raises(ValueError, match="the adapter would change both"):
        recover(
            pruner.level_folders[0.2],
            tmp_path / "out" / LEVEL,
            lora=LoraConfig(target_modules=["lm_head"]),
            max_steps=1,
        )


def test_an_elastic_model_at_full_width_teaches_as_the_base_does() -> None:
    from tests.test_elastic import elastic_of

    elastic, _ = elastic_of()
    base, student = elastic.at(0), elastic.at(0.3)
    ids = ids_of(2)
    losses = []
    for teacher in (base, elastic):
        with Distillation(student, teacher) as loss:
            losses.append(loss(student(input_ids=ids), ids))
    assert losses[0].item() > 0
    torch.testing.assert_close(losses[0], losses[1])


def test_a_time_limit_ends_training_and_lowers_the_rate(monkeypatch) -> None:
    clock = iter([100.0, 104.0, 108.0, 112.0])  # the beginning, and the ends of three steps
    monkeypatch.setattr(time_limit.time, "monotonic", lambda: next(clock))
    limit, control = TimeLimit(10), TrainerControl()
    args = SimpleNamespace(device=torch.device("cpu"), learning_rate=1.0)
    optimizer = SimpleNamespace(param_groups=[{"lr": 1.0, "initial_lr": 2.0}])
    limit.on_train_begin(args, None, control)
    rates = []
    while not control.should_training_stop:
        limit.on_pre_optimizer_step(args, None, control, optimizer=optimizer)
        rates.append(optimizer.param_groups[0]["lr"])
        limit.on_step_end(args, None, control)
    assert rates == pytest.approx([2.0, 1.2, 0.4])
    with pytest.raises(ValueError, match="seconds must be above 0, got 0"):
        TimeLimit(0)


@pytest.mark.slow
def test_two_processes_train_as_one_does(made, tmp_path) -> None:
    result = launch("recover", tmp_path / "two", processes=2, level=str(made.restored), base=str(made.base))
    assert result.returncode == 0, result.stderr
    found = Recovery.load(tmp_path / "two" / "out")
    losses = json.loads((tmp_path / "two" / "losses.json").read_text())
    assert losses == pytest.approx(made.watch.losses, rel=1e-3)
    assert found.training["world_size"] == 2 and found.tokens == 4 * 8 * 16
    tensors, wanted = (load_file(f / "model.safetensors") for f in (tmp_path / "two" / "out", made.distilled))
    for name, tensor in wanted.items():
        torch.testing.assert_close(tensors[name], tensor, rtol=1e-2, atol=1e-3)


def test_processes_that_are_not_connected_train_nothing(monkeypatch) -> None:
    for name, value in {"LOCAL_RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="2 processes were launched, and they are not connected"):
        train_on(tiny_model(), None, SimpleNamespace(world_size=1))  # type: ignore[arg-type]
