"""Restored levels as folders: in a run, from a saved level, and in between."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import gisp_hf.recovery.stage as stage_module
from gisp_hf import GISPPruner, RestoreConfig, Trajectory, load_level, restore, restore_level
from gisp_hf.cli.main import main
from gisp_hf.data import load_calibration
from gisp_hf.hub.run_cards import card_writer
from gisp_hf.levels.info import levels_json, read_levels
from gisp_hf.levels.manifest import check_manifest
from gisp_hf.levels.materialize import materialize
from gisp_hf.recovery.record import Restoration
from tests.runs import LEVELS, make_trainer, prune, tiny_config
from tests.tiny import tiny_blocks, tiny_model, tiny_tokenizer

CONFIG = RestoreConfig(tokens=256, batch_size=8)


def is_refitted(name: str) -> bool:
    return name.endswith(("o_proj.weight", "down_proj.weight"))


def logits_of(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tiny_blocks(1)[0]["input_ids"][None]).logits


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "words.txt"
    tokenizer = tiny_tokenizer()
    path.write_text("\n\n".join(tokenizer.decode(block["input_ids"]) for block in tiny_blocks(200, 32)))
    return path


@pytest.fixture(scope="module")
def plain(tmp_path_factory, base_folder) -> GISPPruner:
    """A run without restoration."""
    model = AutoModelForCausalLM.from_pretrained(base_folder)
    return prune(model, tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def restored(tmp_path_factory, base_folder) -> tuple[GISPPruner, torch.nn.Module]:
    """The same run with restoration, its evaluation being a number of the model's output."""
    folder = tmp_path_factory.mktemp("restored")
    model = AutoModelForCausalLM.from_pretrained(base_folder)
    pruner = GISPPruner(
        tiny_config(),
        folder / "levels",
        restore=CONFIG,
        evaluate=lambda model: {"norm": float(logits_of(model).norm())},
    )
    prune(model, folder, pruner=pruner)
    return pruner, model


def test_a_run_keeps_its_order_and_its_model(plain, restored) -> None:
    pruner, model = restored
    assert all(torch.equal(one, two) for one, two in zip(pruner.trajectory.order, plain.trajectory.order))
    assert [step.loss for step in pruner.trajectory.steps] == [step.loss for step in plain.trajectory.steps]
    last = AutoModelForCausalLM.from_pretrained(plain.level_folders[LEVELS[-1]])
    for (name, found), wanted in zip(model.named_parameters(), last.parameters()):
        assert torch.equal(found, wanted), name


@pytest.mark.parametrize("level", LEVELS)
def test_a_level_of_a_run_equals_the_restoration_of_the_plain_level(level, plain, restored, base_folder) -> None:
    pruner, _ = restored
    wanted = AutoModelForCausalLM.from_pretrained(plain.level_folders[level])
    record = restore(wanted, base_folder, tiny_blocks(16), CONFIG, progress=False)
    found = load_file(pruner.level_folders[level] / "model.safetensors")
    before = load_file(plain.level_folders[level] / "model.safetensors")
    for name, tensor in wanted.state_dict().items():
        if name in found:
            assert torch.equal(found[name], tensor), name
            assert torch.equal(found[name], before[name]) != is_refitted(name), name
    written = Restoration.load(pruner.level_folders[level])
    assert (written.errors, written.fingerprint, written.tokens) == (record.errors, record.fingerprint, 256)
    assert written.base["fingerprint"] == pruner.trajectory.base.fingerprint
    assert pruner.levels[level].changed == set(record.changed)
    assert check_manifest(pruner.level_folders[level]) >= {"restoration.json", "model.safetensors"}


def test_the_numbers_of_a_run_are_those_of_the_restored_levels(restored) -> None:
    pruner, _ = restored
    for level, folder in pruner.level_folders.items():
        wanted = float(logits_of(AutoModelForCausalLM.from_pretrained(folder)).norm())
        assert pruner.level_metrics[level] == {"norm": pytest.approx(wanted, rel=1e-5)}


def test_levels_and_cards_say_so(plain, restored, capsys) -> None:
    for pruner, expected in ((plain, False), (restored[0], True)):
        folder = pruner.output_dir
        levels = read_levels(folder)
        assert [level.restored for level in levels] == [expected] * len(LEVELS)
        assert (b'"restored": true' in levels_json(levels)) == expected == (b"restored" in levels_json(levels))
        card = card_writer(folder, levels, repo_id="me/tiny")
        for branch in ("main", levels[0].name):
            shown = card(branch, levels)
            assert ("restoration.json" in shown) == expected
            assert ("The weights that stay are those of the base model" in shown) != expected
        assert main(["levels", str(folder)]) == 0
        assert ("restored" in capsys.readouterr().out.splitlines()[0]) == expected


def test_zeros_in_place_give_the_levels_of_a_sliced_run(restored, base_folder, tmp_path) -> None:
    pruner, _ = restored
    model = AutoModelForCausalLM.from_pretrained(base_folder)
    masked = GISPPruner(
        tiny_config(),
        tmp_path / "levels",
        shrink=False,
        restore=CONFIG,
        evaluate=lambda model: {"norm": float(logits_of(model).norm())},
    )
    prune(model, tmp_path, pruner=masked)
    for level, folder in masked.level_folders.items():
        found, wanted = (load_file(f / "model.safetensors") for f in (folder, pruner.level_folders[level]))
        for name in wanted:
            torch.testing.assert_close(found[name], wanted[name], rtol=1e-4, atol=1e-5)
        assert masked.level_metrics[level]["norm"] == pytest.approx(pruner.level_metrics[level]["norm"], rel=1e-4)
    dense = AutoModelForCausalLM.from_pretrained(base_folder).state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, torch.where(tensor == 0, 0, dense[name])), name


def test_a_base_in_memory_gives_the_same_levels(restored, tmp_path, capsys) -> None:
    pruner, _ = restored
    other = GISPPruner(tiny_config(), tmp_path / "levels", restore=CONFIG)
    prune(tiny_model(), tmp_path, pruner=other)  # has no folder
    assert "a copy of the weights" in "".join(capsys.readouterr())
    for level, folder in other.level_folders.items():
        name = "model.safetensors"
        assert (folder / name).read_bytes() == (pruner.level_folders[level] / name).read_bytes()


def test_a_text_of_its_own(base_folder, text, tmp_path) -> None:
    config = RestoreConfig(data=str(text), tokens=1024)
    pruner = GISPPruner(tiny_config(sparsity_levels=(0.3,)), tmp_path / "levels", restore=config)
    prune(AutoModelForCausalLM.from_pretrained(base_folder), tmp_path, pruner=pruner)
    record = Restoration.load(pruner.level_folders[0.3])
    drawn = load_calibration(str(text), tiny_tokenizer(), tokens=1024)
    assert record.calibration["sha256"] == drawn.provenance["sha256"] and record.tokens == 1024
    for file in ("restoration.json", "trajectory.json"):
        facts = json.loads((pruner.level_folders[0.3] / file).read_text())
        assert str(text.parent) not in json.dumps(facts)
    assert facts["restoration"]["data"] == "words.txt"  # of the trajectory
    assert Trajectory.load(pruner.output_dir).restoration == facts["restoration"]


def test_a_failure_leaves_the_level_whole_and_the_model_as_it_was(base_folder, tmp_path, monkeypatch) -> None:
    def fail(*args, **kwargs):
        raise FloatingPointError("not finite")

    model = AutoModelForCausalLM.from_pretrained(base_folder)
    pruner = GISPPruner(tiny_config(sparsity_levels=(0.3,)), tmp_path / "levels", restore=CONFIG)
    trainer = make_trainer(model, tmp_path, pruner=pruner)
    monkeypatch.setattr(stage_module, "restored_fits", fail)
    with pytest.raises(FloatingPointError, match="not finite"):
        trainer.train()
    folder = tmp_path / "levels" / "sparsity-0.30"
    assert check_manifest(folder) and not (folder / "restoration.json").exists()
    saved = AutoModelForCausalLM.from_pretrained(folder)
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), saved.parameters()))


# ---- folders ---------------------------------------------------------------------------------------------------------


def test_a_saved_level_is_restored_into_another_folder(plain, base_folder, text, tmp_path) -> None:
    config = RestoreConfig(data=str(text), tokens=1024)
    source = plain.level_folders[0.4]
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    folder = restore_level(plain.output_dir, tmp_path / "out", sparsity=0.4, config=config, progress=False)
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before
    wanted = AutoModelForCausalLM.from_pretrained(source)
    record = restore(wanted, base_folder, load_calibration(str(text), tiny_tokenizer(), tokens=1024), config)
    found = AutoModelForCausalLM.from_pretrained(folder)
    assert all(torch.equal(one, two) for one, two in zip(found.parameters(), wanted.parameters()))
    written = Restoration.load(folder)
    assert (written.errors, written.fingerprint) == (record.errors, record.fingerprint)
    for path in folder.iterdir():
        if path.name not in ("model.safetensors", "manifest.json", "restoration.json"):
            assert path.read_bytes() == before[path.name], path.name
    assert check_manifest(folder) >= {"restoration.json"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_level_in_between(plain, base_folder, text, tmp_path) -> None:
    config = RestoreConfig(data=str(text), tokens=1024)
    folder = restore_level(plain.output_dir, tmp_path / "out", sparsity=0.37, config=config, progress=False)
    unrestored = materialize(plain.output_dir, tmp_path / "plain", sparsity=0.37)
    wanted = AutoModelForCausalLM.from_pretrained(unrestored)
    restore(wanted, base_folder, load_calibration(str(text), tiny_tokenizer(), tokens=1024), config, progress=False)
    found = AutoModelForCausalLM.from_pretrained(folder)
    assert all(torch.equal(one, two) for one, two in zip(found.parameters(), wanted.parameters()))
    loaded = load_level(plain.output_dir, sparsity=0.37, restore=config)
    assert all(torch.equal(one, two) for one, two in zip(loaded.parameters(), wanted.parameters()))
    assert Trajectory.load(folder).highest_sparsity() == Trajectory.load(unrestored).highest_sparsity()


def test_load_level_says_that_a_level_is_not_restored(plain, restored, caplog) -> None:
    load_level(plain.output_dir, sparsity=0.37)
    assert "restored" not in caplog.text
    load_level(restored[0].output_dir, sparsity=0.37)
    assert "are restored, and this one is not" in caplog.text


def test_restoration_of_a_run_without_text_is_refused(plain) -> None:
    with pytest.raises(ValueError, match=r"RestoreConfig\(data=...\) names it"):
        load_level(plain.output_dir, sparsity=0.3, restore=RestoreConfig())


def test_impossible_requests_leave_nothing(plain, restored, text, tmp_path) -> None:
    config = RestoreConfig(data=str(text), tokens=1024)
    tiny_model(seed=1).save_pretrained(tmp_path / "other")
    tiny_tokenizer().save_pretrained(tmp_path / "other")
    (tmp_path / "there").mkdir()
    out = tmp_path / "out"
    with pytest.raises(FileExistsError, match="exists already"):
        restore_level(plain.output_dir, tmp_path / "there", sparsity=0.3, config=config)
    with pytest.raises(ValueError, match="is restored already"):
        restore_level(restored[0].output_dir, out, sparsity=0.3, config=config)
    with pytest.raises(ValueError, match="are not those that the level was made from"):
        restore_level(plain.output_dir, out, sparsity=0.3, config=config, base_model=tmp_path / "other")
    with pytest.raises(ValueError, match="lies beyond this trajectory"):
        restore_level(plain.output_dir, out, sparsity=0.9, config=config)
    with pytest.raises(ValueError, match="must be a multiple"):
        restore_level(plain.output_dir, out, sparsity=0.3, config=RestoreConfig(data=str(text), tokens=1000))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "there"]


def test_nan_leaves_nothing(plain, text, tmp_path, monkeypatch) -> None:
    import gisp_hf.recovery.fit as fit

    calls: list[int] = []

    def solve(gram, cross, ridge):
        calls.append(1)
        return torch.full_like(cross, float("nan") if len(calls) > 5 else 0.0).double()

    monkeypatch.setattr(fit, "solve_ridge", solve)
    config = RestoreConfig(data=str(text), tokens=1024)
    with pytest.raises(FloatingPointError, match="layers.2.mlp.down_proj.weight overflows"):
        restore_level(plain.output_dir, tmp_path / "out", sparsity=0.3, config=config, progress=False)
    assert not list(tmp_path.iterdir())


def test_the_command(plain, text, tmp_path, capsys) -> None:
    argv = ["restore", str(plain.output_dir), "--sparsity", "0.5", "--data", f"{text}:1/2,{text}:1/2"]
    argv = [*argv[:5], str(text), "--tokens", "1024", "--blend", "0.5", "--ridge", "0.1", "0.01"]
    assert main([*argv, "--output", str(tmp_path / "out"), "--plot", str(tmp_path / "errors.svg")]) == 0
    out = capsys.readouterr().out
    assert "restored on 1,024 tokens" in out and "->" in out
    facts = json.loads((tmp_path / "out" / "restoration.json").read_text())
    assert facts["config"]["ridge"] == [0.1, 0.01] and facts["blend"] == 0.5
    assert "down_proj after" in (tmp_path / "errors.svg").read_text()
    assert main([*argv, "--output", str(tmp_path / "out")]) == 2
    assert "exists already" in capsys.readouterr().err
