"""Files of a run that are damaged or hostile: each command answers with one printable line, fast, and exit code 2."""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gisp_hf.cli.main import main
from gisp_hf.hub import PushReport
from gisp_hf.levels.materialize import materialize
from tests.test_materialize import random_trajectory, save_base
from tests.tiny import tiny_model

LEVEL = "sparsity-0.20"
SECONDS = 5.0  # of one answer; an honest run of this size takes a fraction of a second

COMMANDS: dict[str, Callable[[Path], list[str]]] = {
    "levels": lambda run: ["levels", str(run)],
    "card": lambda run: ["card", str(run), "--license", "mit", "--new-cards"],
    "push": lambda run: ["push", str(run), "--repo", "me/x", "--license", "mit"],
    "eval": lambda run: ["eval", str(run), "--text", str(run.parent / "text.txt"), "--window", "8"],
    "materialize": lambda run: ["materialize", str(run), "--sparsity", "0.2", "--output", str(run.parent / "cut")],
}

PUSHED = PushReport("url", {}, {}, (), 0)

Change = Callable[[Path], None]


def edit(name: str, change: Callable[[dict[str, Any]], None]) -> Change:
    """Changes the object in a JSON file."""

    def apply(folder: Path) -> None:
        facts = json.loads((folder / name).read_text())
        change(facts)
        (folder / name).write_text(json.dumps(facts))

    return apply


def put(name: str, *keys: str | int, value: object) -> Change:
    """Sets one value, by its path in a JSON file."""

    def change(facts: Any) -> None:
        for key in keys[:-1]:
            facts = facts[key]
        facts[keys[-1]] = value

    return edit(name, change)


def drop(name: str, *keys: str | int) -> Change:
    def change(facts: Any) -> None:
        for key in keys[:-1]:
            facts = facts[key]
        del facts[keys[-1]]

    return edit(name, change)


def write(name: str, contents: str | bytes) -> Change:
    data = contents.encode() if isinstance(contents, str) else contents

    def apply(folder: Path) -> None:
        (folder / name).write_bytes(data)

    return apply


def grow(name: str) -> Change:
    """A terabyte of nothing, which takes no room on the disk."""

    def apply(folder: Path) -> None:
        with (folder / name).open("ab") as file:
            file.truncate(2**40)

    return apply


def replace_text(name: str, old: str, new: str) -> Change:
    """For what ``json.dumps`` would not write."""

    def apply(folder: Path) -> None:
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new, 1))

    return apply


def truncate(name: str) -> Change:
    def apply(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: len(data) // 2])

    return apply


def order(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    """Changes one tensor of the removal order."""

    def apply(folder: Path) -> None:
        tensors = load_file(folder / "trajectory.safetensors")
        tensors = {key: tensor.clone() for key, tensor in tensors.items()}
        tensors[name] = change(tensors[name])
        save_file(tensors, folder / "trajectory.safetensors")

    return apply


def no_blocks(folder: Path) -> None:
    put("trajectory.json", "blocks", value=[])(folder)
    save_file({}, folder / "trajectory.safetensors")


DEEP = "[" * 100_000 + "]" * 100_000
DEEP_OBJECT = '{"a":' * 100_000 + "1" + "}" * 100_000
BLOCK = ("trajectory.json", "blocks", 3)

# Of the trajectory of the level and of the run alike.
TRAJECTORY: dict[str, Change] = {
    "empty file": write("trajectory.json", b""),
    "no JSON": write("trajectory.json", "removal order: all of it"),
    "cut off": truncate("trajectory.json"),
    "no UTF-8": write("trajectory.json", b'{"format": "\xff\xfe"}'),
    "a list": write("trajectory.json", "[1, 2, 3]"),
    "deep list": write("trajectory.json", DEEP),
    "deep object": write("trajectory.json", DEEP_OBJECT),
    "nested below the recursion limit": write("trajectory.json", "[" * 200 + "]" * 200),
    "too large": grow("trajectory.json"),
    "huge number": replace_text("trajectory.json", '"total": ', '"total": 1' + "0" * 400),
    "number beyond Python's limit": replace_text("trajectory.json", '"total": ', '"total": 1' + "0" * 5000),
    "infinite total": replace_text("trajectory.json", '"total": ', '"total": 1e999, "x": '),
    "other format": put("trajectory.json", "format", value=[]),
    "no format": drop("trajectory.json", "format"),
    "no blocks": put("trajectory.json", "blocks", value=[]),
    "blocks that are a text": put("trajectory.json", "blocks", value="all"),
    "a block that is a number": put(*BLOCK, value=7),
    "a size that is a text": put(*BLOCK, "size", value="many"),
    "a negative size": put(*BLOCK, "size", value=-4),
    "a size that is true": put(*BLOCK, "size", value=True),
    "a size that is a fraction": put(*BLOCK, "size", value=4.5),
    "a size beyond int32": put(*BLOCK, "size", value=2**40),
    "a cost that is null": put(*BLOCK, "cost", value=None),
    "a cost beyond 2**53": put(*BLOCK, "cost", value=10**30),
    "a layer that does not exist": put(*BLOCK, "layer", value=10**7),
    "a kind that is a list": put(*BLOCK, "kind", value=["mlp"]),
    "a kind with an escape sequence": put(*BLOCK, "kind", value="\x1b[2J\x1b]0;owned\x07"),
    "a long kind": put(*BLOCK, "kind", value="x" * 10**6),
    "no members": put(*BLOCK, "members", value=[]),
    "members that are texts": put(*BLOCK, "members", value=["a", "b"]),
    "a width of zero": put(*BLOCK, "members", 0, "width", value=0),
    "a dim that is a text": put(*BLOCK, "members", 0, "dim", value="0"),
    "a parameter that is a number": put(*BLOCK, "members", 0, "parameter", value=5),
    "an unknown key with a line end": put(*BLOCK, "a\nb\x1b[0m", value=1),
    "ten million layers": put("trajectory.json", "num_layers", value=10**7),
    "layers that are a text": put("trajectory.json", "num_layers", value="six"),
    "a total of zero": put("trajectory.json", "total", value=0),
    "a total that is a text": put("trajectory.json", "total", value="32640"),
    "an architecture that is an object": put("trajectory.json", "architecture", value={}),
    "a base that is a text": put("trajectory.json", "base", value="me/base"),
    "a base id that is a number": put("trajectory.json", "base", "id", value=5),
    "a base id with a null": put("trajectory.json", "base", "id", value="a\0b"),
    "a revision that is a list": put("trajectory.json", "base", "revision", value=[]),
    "a fingerprint that is null": put("trajectory.json", "base", "fingerprint", value=None),
    "a config that is a list": put("trajectory.json", "config", value=[]),
    "an unknown setting": put("trajectory.json", "config", "\x1b[31mred", value=1),
    "levels that are texts": put("trajectory.json", "config", "sparsity_levels", value=["a"]),
    "an infinite protection": put("trajectory.json", "config", "protect_first", value=float("inf")),
    "a multiple that is huge": put("trajectory.json", "config", "channel_multiple", value=10**30),
    "a schedule that is an object": put("trajectory.json", "config", "schedule", value={"a": 1}),
    "steps that are a number": put("trajectory.json", "steps", value=3),
    "a step that is a text": put("trajectory.json", "steps", value=["first"]),
    "a step whose sparsity is a text": put(
        "trajectory.json",
        "steps",
        value=[{"step": 1, "target": 0.1, "sparsity": "x", "parameters": 1, "groups": 0, "channels": 0}],
    ),
    "a calibration that is a list": put("trajectory.json", "calibration", value=[]),
    "sources that are a number": put("trajectory.json", "calibration", value={"sources": 5}),
    "a data set whose id is a list": put("trajectory.json", "calibration", value={"sources": [{"hub_id": [1]}]}),
    "no blocks and no order": no_blocks,
    "an order that is empty": write("trajectory.safetensors", b""),
    "an order that is cut off": truncate("trajectory.safetensors"),
    "an order of floats": order("layers.1.mlp", lambda ranks: ranks.float()),
    "an order with a position twice": order("layers.1.mlp", lambda ranks: torch.zeros_like(ranks)),
    "an order of another shape": order("layers.1.mlp", lambda ranks: ranks[:5].clone()),
}

LEVEL_FILES: dict[str, Change] = {
    "metrics: deep": write("metrics.json", '{"a": ' + DEEP + "}"),
    "metrics: a list": write("metrics.json", "[1]"),
    "metrics: huge number": write("metrics.json", '{"perplexity": 1' + "0" * 400 + "}"),
    "metrics: NaN": write("metrics.json", '{"perplexity": NaN}'),
    "metrics: a text": write("metrics.json", '{"perplexity": "12"}'),
    "metrics: an escape sequence": write("metrics.json", json.dumps({"\x1b[2J": 1})),
    "metrics: too large": grow("metrics.json"),
    "config: empty": write("config.json", b""),
    "config: deep": write("config.json", '{"model_type": "llama", "a": ' + DEEP + "}"),
    "config: ten million layers": put("config.json", "num_hidden_layers", value=10**7),
    "config: no heads": put("config.json", "num_key_value_heads", value=0),
    "config: heads that do not divide": put("config.json", "per_layer_config", "1", "num_key_value_heads", value=5),
    "config: a layer that does not exist": put("config.json", "per_layer_config", "99", value={}),
    "config: layers that are a list": put("config.json", "per_layer_config", value=[1]),
    "config: a type with an escape sequence": put("config.json", "model_type", value="\x1b]0;owned\x07"),
    "index: a text": write("model.safetensors.index.json", '"model"'),
    "index: another folder": write("model.safetensors.index.json", '{"weight_map": {"a": "../x.safetensors"}}'),
    "index: a number": write("model.safetensors.index.json", '{"weight_map": {"a": 7}}'),
    "index: deep": write("model.safetensors.index.json", '{"weight_map": ' + DEEP + "}"),
    "weights: cut off": truncate("model.safetensors"),
}


def deep_index(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    write("model.safetensors.index.json", DEEP_OBJECT)(folder)


# Files that only the loading of a level or of the base model reads.
MODEL_FILES: dict[str, Change] = {
    "unknown type": put("config.json", "model_type", value="nonsense"),
    "no type": drop("config.json", "model_type"),
    "a size that is a text": put("config.json", "hidden_size", value="big"),
    "a size beyond all": put("config.json", "hidden_size", value=10**30),
    "an activation that does not exist": put("config.json", "hidden_act", value="nonsense"),
    "an activation that is a number": put("config.json", "hidden_act", value=3),
    "a norm that is a text": put("config.json", "rms_norm_eps", value="small"),
    "rope that is a list": put("config.json", "rope_parameters", value=[1]),
    "rope of an unknown type": put("config.json", "rope_parameters", value={"rope_type": "x", "rope_theta": 1}),
    "padding beyond the vocabulary": put("config.json", "pad_token_id", value=10**9),
    "padding beyond int64": put("config.json", "pad_token_id", value=10**30),
    "layers of unknown types": put("config.json", "layer_types", value=["x"] * 6),
    "a dtype that does not exist": put("config.json", "dtype", value="float7"),
    "a quantization that is a text": put("config.json", "quantization_config", value="int4"),
    "generation config: deep": write("generation_config.json", DEEP_OBJECT),
    "generation config: a list": write("generation_config.json", "[1]"),
    "tokenizer config: deep": write("tokenizer_config.json", DEEP_OBJECT),
    "tokenizer config: an unknown class": put("tokenizer_config.json", "tokenizer_class", value={"a": 1}),
    "tokenizer: no JSON": write("tokenizer.json", "words"),
    "tokenizer: another shape": write("tokenizer.json", '{"model": 3}'),
}
BASE_FILES: dict[str, Change] = {
    "ten million layers": put("config.json", "num_hidden_layers", value=10**7),
    "one layer too many": put("config.json", "num_hidden_layers", value=7),
    "ten thousand layers": put("config.json", "num_hidden_layers", value=10**4),
    "no head": put("config.json", "num_attention_heads", value=0),
    "index: deep": deep_index,
    "weights cut off": truncate("model.safetensors"),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an honest run in ``run``, its base model in ``base``, and a text in ``text.txt``."""
    folder = tmp_path_factory.mktemp("hostile")
    model = tiny_model()
    random_trajectory(model, save_base(model, folder / "base")).save(folder / "run")
    materialize(folder / "run", folder / "run" / LEVEL, sparsity=0.2)
    (folder / "text.txt").write_text("w5 w6 w7 w8 " * 20)
    return folder


@pytest.fixture
def copy(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of all that, and no network: nothing hostile may get as far as a request."""
    monkeypatch.setenv("HF_TOKEN", "hf_owner")
    monkeypatch.setattr("gisp_hf.cli.push.push_levels", lambda *a, **k: pytest.fail("the push was begun"))
    shutil.copytree(whole, tmp_path / "copy")
    put("trajectory.json", "base", "id", value=str(tmp_path / "copy" / "base"))(tmp_path / "copy" / "run")
    return tmp_path / "copy"


def check_refused(command: str, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Everything that the process writes is looked at, so that a warning of a library counts, too."""
    capfd.readouterr()
    start = time.perf_counter()
    assert main(COMMANDS[command](folder / "run")) == 2
    seconds = time.perf_counter() - start
    out, err = capfd.readouterr()
    lines = [line for line in err.replace("\r", "\n").split("\n") if line.startswith("gisp-hf: error: ")]
    assert out == "" and len(lines) == 1 and err.endswith(lines[0] + "\n")
    assert lines[0].isprintable() and len(lines[0]) < 1500
    assert "Traceback" not in err and "\x1b" not in err and "\x07" not in err
    assert seconds < SECONDS


@pytest.mark.parametrize("command", ["levels", "card", "push", "eval", "materialize"])
def test_the_honest_run_is_accepted(
    command: str, copy: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the tests below would show nothing."""
    monkeypatch.setattr("gisp_hf.cli.push.push_levels", lambda *a, **k: PUSHED)
    assert main(COMMANDS[command](copy / "run")) == 0, capfd.readouterr().err


@pytest.mark.parametrize("name", TRAJECTORY)
def test_the_trajectory_of_a_run(name: str, copy: Path, capfd: pytest.CaptureFixture[str]) -> None:
    TRAJECTORY[name](copy / "run")
    for command in ("materialize", "card"):
        check_refused(command, copy, capfd)


@pytest.mark.parametrize("name", TRAJECTORY)
def test_the_trajectory_of_a_level(name: str, copy: Path, capfd: pytest.CaptureFixture[str]) -> None:
    TRAJECTORY[name](copy / "run" / LEVEL)
    for command in ("levels", "push", "eval"):
        check_refused(command, copy, capfd)


@pytest.mark.parametrize("name", LEVEL_FILES)
def test_the_files_of_a_level(name: str, copy: Path, capfd: pytest.CaptureFixture[str]) -> None:
    LEVEL_FILES[name](copy / "run" / LEVEL)
    for command in ("levels", "push", "eval", "card"):
        check_refused(command, copy, capfd)


@pytest.mark.parametrize("name", MODEL_FILES)
def test_a_level_that_cannot_be_loaded(name: str, copy: Path, capfd: pytest.CaptureFixture[str]) -> None:
    MODEL_FILES[name](copy / "run" / LEVEL)
    check_refused("eval", copy, capfd)


@pytest.mark.parametrize("name", [*MODEL_FILES, *BASE_FILES])
def test_a_base_model_that_cannot_be_loaded(name: str, copy: Path, capfd: pytest.CaptureFixture[str]) -> None:
    {**MODEL_FILES, **BASE_FILES}[name](copy / "base")
    check_refused("materialize", copy, capfd)
    assert not (copy / "cut").exists()
