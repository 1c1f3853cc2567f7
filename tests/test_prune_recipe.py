"""recipes/prune.py as its header shows it, on a tiny model and a local file."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from gisp_hf import GISPConfig, Trajectory
from gisp_hf.data.shares import split_mixture
from gisp_hf.data.sources import choose_objective, find_sources
from recipes import prune
from tests.tiny import tiny_model, tiny_tokenizer

ROOT = Path(__file__).parents[1]
MODELS = sorted(ROOT.glob("recipes/*/prune.yaml"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("prune")
    tiny_model().save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    torch.manual_seed(0)
    rows = [{"text": " ".join(f"w{i}" for i in torch.randint(4, 64, (40,)).tolist())} for _ in range(20)]
    (folder / "text.jsonl").write_text("\n".join(map(json.dumps, rows)))
    questions = [
        {"prompt": f"w{4 + i} w{5 + i}", "correct": [f" w{6 + i}"], "incorrect": [f" w{9 + i} w5", f" w{20 + i}"]}
        for i in range(24)
    ]
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, questions)))
    return folder


def options(folder: Path, name: str) -> dict:
    return {
        "model_name": str(folder / "model"),
        "dtype": "float32",
        "data": str(folder / "text.jsonl"),
        "block_length": 16,
        "num_blocks": 16,
        "sparsity_levels": [0.2, 0.4],
        "num_steps": 4,
        "protect_first": 1,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 2,
        "use_cpu": True,
        "output_dir": str(folder / name),
    }


def command_line(values: dict) -> list[str]:
    words = []
    for name, value in values.items():
        words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return words


def run_on_two(values: dict) -> subprocess.CompletedProcess:
    command = [str(Path(sys.executable).with_name("accelerate")), "launch"]
    command += ["--config_file", "recipes/accelerate/cpu.yaml", "recipes/prune.py", *command_line(values)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def launch_on_two(values: dict) -> None:
    result = run_on_two(values)
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_command_line_and_yaml_do_the_same(folder) -> None:
    first = prune.main(command_line(options(folder, "by-words")))
    assert first.calibration["tokens"] == 256 and first.trajectory.base.id == str(folder / "model")
    (folder / "prune.yaml").write_text(yaml.safe_dump(options(folder, "overridden")))
    second = prune.main([str(folder / "prune.yaml"), "--output_dir", str(folder / "by-file")])
    assert all(torch.equal(a, b) for a, b in zip(first.trajectory.order, second.trajectory.order))
    for run in ("by-words", "by-file"):
        assert (folder / run / "levels" / "sparsity-0.40" / "model.safetensors").is_file()
    assert Trajectory.load(folder / "by-file" / "levels").calibration["sha256"] == first.calibration["sha256"]
    assert not (folder / "overridden").exists()


@pytest.mark.slow
@pytest.mark.skipif(torch.accelerator.is_available(), reason="the processes would take an accelerator each")
def test_processes_that_are_not_told_to_use_the_cpu_are_refused(folder) -> None:
    result = run_on_two({**options(folder, "apart"), "use_cpu": False})
    assert result.returncode != 0
    assert "2 processes were launched, and they are not connected" in result.stderr
    assert not (folder / "apart" / "levels").exists()


@pytest.mark.slow
def test_accelerate_launch_on_two_processes_gives_the_same(folder) -> None:
    launch_on_two(options(folder, "launched") | {"per_device_train_batch_size": 4})
    single = prune.main(command_line(options(folder, "single")))
    found = Trajectory.load(folder / "launched" / "levels")
    assert all(torch.equal(a, b) for a, b in zip(found.order, single.trajectory.order))


@pytest.mark.slow
def test_questions_are_all_seen_in_each_step_however_they_are_cut(folder) -> None:
    task = {"data": str(folder / "questions.jsonl"), "objective": "margin", "num_blocks": 15}  # all 24
    at_once = prune.main(command_line(options(folder, "at-once") | task | {"per_device_train_batch_size": 24}))
    assert (at_once.calibration["objective"], at_once.calibration["items"]) == ("margin", 24)
    pieces = prune.main(command_line(options(folder, "pieces") | task | {"per_device_train_batch_size": 5}))
    assert all(torch.equal(a, b) for a, b in zip(at_once.trajectory.order, pieces.trajectory.order))

    values = options(folder, "task-launched") | task | {"per_device_train_batch_size": 4}
    launch_on_two(values)
    found = Trajectory.load(folder / "task-launched" / "levels")
    assert all(torch.equal(a, b) for a, b in zip(found.order, at_once.trajectory.order))

    text = prune.main(command_line(options(folder, "not-the-task")))
    assert any(not torch.equal(a, b) for a, b in zip(text.trajectory.order, at_once.trajectory.order))


@pytest.mark.slow
def test_own_answers_given_anew_on_two_processes_are_those_of_one(folder) -> None:
    task = {
        "data": str(folder / "questions.jsonl"),
        "objective": "self",
        "method": "gisp-activation",
        "max_new_tokens": 4,
        "num_blocks": 4,  # 64 tokens: 16 answers
        "num_steps": 5,
        "sparsity_levels": [0.2, 0.5],
        "regenerate_every": 0.2,
        "per_device_train_batch_size": 16,
    }
    single = prune.main(command_line(options(folder, "own") | task))
    rounds = single.calibration["answers"]["rounds"]
    assert [round(entry["sparsity"], 1) for entry in rounds] == [0.0, 0.2, 0.4]
    assert rounds[1]["sha256"] != rounds[0]["sha256"]

    launch_on_two(options(folder, "own-launched") | task | {"per_device_train_batch_size": 8})
    found = Trajectory.load(folder / "own-launched" / "levels")
    assert all(torch.equal(a, b) for a, b in zip(found.order, single.trajectory.order))
    assert found.calibration["answers"]["rounds"] == rounds
    names = sorted(path.name for path in (folder / "own" / "answers").iterdir())
    assert sorted(path.name for path in (folder / "own-launched" / "answers").iterdir()) == names and len(names) == 3


def test_new_answers_need_own_answers(folder) -> None:
    with pytest.raises(ValueError, match="regenerate_every=0.2 .* objective 'language_modeling' has no answers"):
        prune.main(command_line(options(folder, "refused") | {"regenerate_every": 0.2}))


def test_unknown_and_missing_options_are_named(folder, capsys) -> None:
    (folder / "bad.yaml").write_text(yaml.safe_dump(options(folder, "bad") | {"sparsity": 0.5}))
    with pytest.raises(SystemExit):
        prune.main([str(folder / "bad.yaml")])
    assert "unknown options in the YAML file: sparsity" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        prune.main(["--data", "c4"])
    assert "--model_name" in capsys.readouterr().err


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.parent.name)
def test_model_recipes_are_valid_and_as_published(path, tmp_path) -> None:
    chosen, args = prune.parse([str(path), "--output_dir", str(tmp_path), "--use_cpu"])
    assert chosen.block_length == 256 and chosen.num_blocks == 2000 and chosen.data == "c4"
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps == chosen.num_blocks
    assert chosen.num_steps == (280 if "13b" in path.parent.name else 112)
    assert prune.config_of(chosen).sparsity_levels == (0.2, 0.3, 0.4, 0.5)
    header = path.read_text().split("model_name")[0]
    assert all(word in header for word in ("Hardware:", "Time:", "Memory:", "Command:", "estimate"))


@pytest.mark.parametrize(
    ("path", "data", "objective"),
    [("llama-2-7b/prune_cmqa", "cmqa", "margin"), ("deepseek-r1-distill-llama-8b/prune_gsm8k", "gsm8k", "completion")],
)
def test_task_recipes_are_valid_and_have_the_published_budget(path, data, objective, tmp_path) -> None:
    file = ROOT / "recipes" / f"{path}.yaml"
    chosen, _ = prune.parse([str(file), "--output_dir", str(tmp_path), "--use_cpu"])
    assert (chosen.data, chosen.objective, chosen.num_steps) == (data, objective, 112)
    assert chosen.num_blocks * chosen.block_length == 512_000
    header = file.read_text().split("model_name")[0]
    assert all(word in header for word in ("Hardware:", "Time:", "Memory:", "Command:", "estimate", f"{path}.yaml"))


def test_every_field_of_the_config_is_an_option() -> None:
    words = ["--model_name", "x", "--output_dir", "y", "--use_cpu", "--minimum_kept", "attention=2", "mlp=8"]
    words += ["--sparsity_levels", "0.1", "0.3", "--method", "magnitude", "--prune", "heads", "--protect_last", "2"]
    chosen, _ = prune.parse(words)
    assert prune.config_of(chosen) == GISPConfig(
        sparsity_levels=(0.1, 0.3),
        method="magnitude",
        prune="heads",
        protect_last=2,
        minimum_kept={"attention": 2, "mlp": 8},
    )
    defaults, _ = prune.parse(words[:5])
    assert prune.config_of(defaults) == GISPConfig()


def test_minima_that_are_no_counts_are_named() -> None:
    chosen, _ = prune.parse(["--model_name", "x", "--use_cpu", "--minimum_kept", "attention=two"])
    with pytest.raises(ValueError, match="minimum_kept needs words such as attention=2 mlp=64, got attention"):
        prune.config_of(chosen)


def test_a_file_of_version_0_1_is_read(tmp_path) -> None:
    (tmp_path / "old.yaml").write_text("model_name: x\nlayer_groups: 4\nprune: both\nnum_steps: 5\n")
    chosen, _ = prune.parse([str(tmp_path / "old.yaml"), "--use_cpu"])
    assert chosen.layer_passes == 4 and prune.config_of(chosen).num_steps == 5
    chosen, _ = prune.parse(["--model_name", "x", "--use_cpu", "--layer_groups", "3"])
    assert chosen.layer_passes == 3


def test_there_is_a_recipe_for_each_published_model() -> None:
    assert len(MODELS) == 6


@pytest.mark.parametrize("path", sorted(ROOT.glob("recipes/accelerate/*.yaml")), ids=lambda path: path.stem)
def test_launch_files_are_what_accelerate_reads(path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    assert config.num_processes >= 1
    if path.stem.startswith("fsdp2"):
        assert config.fsdp_config["fsdp_version"] == 2


def test_slurm_script_is_shell() -> None:
    subprocess.run(["bash", "-n", str(ROOT / "recipes" / "accelerate" / "slurm.sh")], check=True)


def test_the_default_data_are_a_mixture_that_language_modelling_can_use() -> None:
    chosen, _ = prune.parse(["--model_name", "a/b", "--output_dir", "out", "--use_cpu", "true"])
    shares = split_mixture(chosen.data)
    assert len(shares) > 1 and sum(shares.values()) == 1
    for part in shares:
        assert choose_objective(part, find_sources(part, revision=None), "language_modeling") == "language_modeling"
