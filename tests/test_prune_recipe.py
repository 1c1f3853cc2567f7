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


def test_command_line_and_yaml_do_the_same(folder) -> None:
    first = prune.main(command_line(options(folder, "by-words")))
    assert first.calibration["tokens"] == 256 and first.trajectory.base.id == str(folder / "model")
    (folder / "prune.yaml").write_text(yaml.safe_dump(options(folder, "overridden")))
    second = prune.main([str(folder / "prune.yaml"), "--output_dir", str(folder / "by-file")])
    assert all(torch.equal(a, b) for a, b in zip(first.trajectory.ranks, second.trajectory.ranks))
    for run in ("by-words", "by-file"):
        assert (folder / run / "levels" / "sparsity-0.40" / "model.safetensors").is_file()
    assert Trajectory.load(folder / "by-file" / "levels").calibration["sha256"] == first.calibration["sha256"]
    assert not (folder / "overridden").exists()


def test_accelerate_launch_on_two_processes_gives_the_same(folder) -> None:
    values = options(folder, "launched") | {"per_device_train_batch_size": 4}
    command = [str(Path(sys.executable).with_name("accelerate")), "launch"]
    command += ["--config_file", "recipes/accelerate/cpu.yaml", "recipes/prune.py", *command_line(values)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    single = prune.main(command_line(options(folder, "single")))
    found = Trajectory.load(folder / "launched" / "levels")
    assert all(torch.equal(a, b) for a, b in zip(found.ranks, single.trajectory.ranks))


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
    GISPConfig(sparsity_levels=tuple(chosen.sparsity_levels), num_steps=chosen.num_steps, schedule=chosen.schedule)
    header = path.read_text().split("model_name")[0]
    assert all(word in header for word in ("Hardware:", "Time:", "Memory:", "Command:", "estimate"))


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
