"""What is read is bounded, what is printed is harmless, and honest files pass unchanged."""

import copy
import json
import time
from pathlib import Path
from typing import Any

import pytest

from gisp_hf.untrusted import (
    BLOCKS,
    LAYERS,
    check_list,
    check_model_config,
    check_number,
    check_object,
    check_progress,
    check_text,
    check_trajectory,
    check_weight_map,
    check_whole,
    odd_contents,
    printable,
    printable_lines,
    read_json,
)

# As version 0.1 wrote it: format 1.
TRAJECTORY: dict[str, Any] = {
    "format": 1,
    "architecture": "llama",
    "num_layers": 2,
    "total": 1000,
    "base": {"id": "/home/me/m\u00f6dels/SmolLM2", "revision": None, "fingerprint": "0" * 64},
    "blocks": [
        {
            "layer": 1,
            "kind": "mlp",
            "size": 24,
            "cost": 96,
            "reference_cost": 72,
            "members": [{"parameter": "model.layers.1.mlp.gate_proj.weight", "dim": 0, "width": 1}],
        }
    ],
    "config": {"sparsity_levels": [0.2, 0.5], "num_steps": 80, "schedule": "linear", "protect_first": 0.1},
    "steps": [
        {"step": 1, "target": 0.1, "sparsity": 0.11, "parameters": 890, "groups": 1, "channels": 0, "loss": None},
        {"step": 2, "target": 0.2, "sparsity": 0.2, "parameters": 800, "groups": 1, "channels": 0, "loss": 3.25},
    ],
    "calibration": {
        "name": "c4",
        "tokens": 512_000,
        "correct": None,
        "note": "two\nlines",
        "sources": [{"hub_id": "allenai/c4", "revision": None, "records": 7, "skipped": {"too long": 3}}],
    },
}
CONFIG: dict[str, Any] = {
    "model_type": "gisp_llama",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": None,
    "bos_token_id": 1,
    "rope_parameters": {"rope_theta": 1e4},
    "per_layer_config": {"1": {"intermediate_size": 16, "num_attention_heads": 6, "num_key_value_heads": 3}},
    "template": "a\n\tb",
}


def changed(facts: dict[str, Any], *keys: str | int, value: Any) -> dict[str, Any]:
    facts = copy.deepcopy(facts)
    place: Any = facts
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    return facts


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "facts.json"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


# ---- reading ---------------------------------------------------------------------------------------------------------


def test_honest_json_is_read_as_it_stands(tmp_path: Path) -> None:
    facts = {"a": [1, -2, 0.5, None, True], "b": {"\u00e4": "x\ny"}, "limit": 1000000000000000019884624838656}
    assert read_json(write(tmp_path, json.dumps(facts))) == facts


@pytest.mark.parametrize(
    ("contents", "reason"),
    [
        (b"", "it is no JSON that can be read: Expecting value"),
        (b"{", "it is no JSON"),
        (b'{"a": "\xff"}', "it is no JSON .* can't decode byte 0xff"),
        (b"[1]", "it must hold an object, got list"),
        (b"null", "it must hold an object, got NoneType"),
        (b'{"a": ' + b"[" * 10**5 + b"]" * 10**5 + b"}", "it nests deeper than 32 levels"),
        (b'{"a": ' + b"[" * 32 + b"]" * 32 + b"}", "it nests deeper than 32 levels"),
        (b'{"a": 1' + b"0" * 40 + b"}", "a whole number of 41 digits is too large"),
        (b'{"a": -1' + b"0" * 5000 + b"}", "a whole number of 5,002 digits is too large"),
        (b'{"a": "' + b"x" * 200 + b'"}', "it is larger than 200 bytes"),
    ],
)
def test_other_json_is_refused(tmp_path: Path, contents: bytes, reason: str) -> None:
    largest = 200 if b"xxx" in contents else 2**26
    with pytest.raises(ValueError, match=reason):
        read_json(write(tmp_path, contents), largest=largest)


def test_the_deepest_and_the_largest_that_are_allowed(tmp_path: Path) -> None:
    text = '{"a": ' + "[" * 31 + "]" * 31 + "}"
    assert json.dumps(read_json(write(tmp_path, text), largest=len(text))) == text


def test_a_file_that_is_not_there_and_one_that_is_no_file(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing.json", tmp_path):
        with pytest.raises(FileNotFoundError, match="there is no file"):
            read_json(path)


def test_a_terabyte_is_not_read(tmp_path: Path) -> None:
    with write(tmp_path, "{}").open("ab") as file:
        file.truncate(2**40)
    start = time.perf_counter()
    with pytest.raises(ValueError, match="larger than 67,108,864 bytes"):
        read_json(tmp_path / "facts.json")
    assert time.perf_counter() - start < 2


def test_errors_of_libraries_name_the_file() -> None:
    with (
        pytest.raises(ValueError, match=r"^config.json of x cannot be used: KeyError: 'nonsense'$"),
        odd_contents("config.json of x"),
    ):
        {}["nonsense"]


def test_errors_of_the_machine_pass() -> None:
    """They are not about the contents of the file."""
    with pytest.raises(PermissionError), odd_contents("config.json of x"):
        raise PermissionError("no")
    with pytest.raises(KeyboardInterrupt), odd_contents("config.json of x"):
        raise KeyboardInterrupt


# ---- one value -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [True, 3.0, "3", None, -1, 2**53, [3]])
def test_whole_numbers(value: object) -> None:
    assert check_whole(3, "size") == 3
    with pytest.raises(ValueError, match="size must be a whole number from 0 to 9007199254740991, got "):
        check_whole(value, "size")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "1", True, None, 1.5])
def test_numbers(value: object) -> None:
    assert check_number(1, "share", least=0, most=1) == 1.0
    with pytest.raises(ValueError, match="share must be a number from 0 to 1, got "):
        check_number(value, "share", least=0, most=1)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (5, "name must be a text, got 5"),
        ("x" * 201, "name has 201 characters, more than 200"),
        ("a\x1b[2J", r"name holds control characters: 'a\\x1b\[2J'"),
        ("a\0", "control characters"),
        ("\udcff", "control characters"),
    ],
)
def test_texts(value: object, reason: str) -> None:
    assert check_text("m\u00f6del \u6a21\u578b", "name") == "m\u00f6del \u6a21\u578b"
    with pytest.raises(ValueError, match=reason):
        check_text(value, "name")


def test_containers() -> None:
    assert check_list([1], "steps", longest=1) == [1] and check_object({}, "base") == {}
    with pytest.raises(ValueError, match="steps must be a list of at most 1 entries, got 2 entries"):
        check_list([1, 2], "steps", longest=1)
    with pytest.raises(ValueError, match="base must be an object, got 'me'"):
        check_object("me", "base")


# ---- one kind of file ------------------------------------------------------------------------------------------------


def test_an_honest_trajectory_passes() -> None:
    check_trajectory(TRAJECTORY)


def test_what_a_later_version_may_add_passes() -> None:
    facts = changed(TRAJECTORY, "kinds", value=[{"name": "mlp", "unit": "channel"}])
    facts["blocks"][0]["members"][0] |= {"offset": 24, "stride": None}
    facts["steps"][0]["removed"] = {"mlp": 3}
    facts["steps"][0]["loss"] = float("nan")
    facts["config"]["scope"] = "model"
    check_trajectory(facts)


@pytest.mark.parametrize("key", sorted(TRAJECTORY))
def test_a_trajectory_lacks_a_key(key: str) -> None:
    with pytest.raises(ValueError, match=f"it lacks {key}"):
        check_trajectory({name: value for name, value in TRAJECTORY.items() if name != key})


BLOCK, MEMBER = ("blocks", 0), ("blocks", 0, "members", 0)


@pytest.mark.parametrize(
    ("keys", "value", "reason"),
    [
        (("num_layers",), LAYERS + 1, "num_layers must be a whole number from 1 to 10000, got 10001"),
        (("total",), 2**53, "total must be a whole number from 1 to"),
        (("blocks",), [1] * (BLOCKS + 1), "blocks must be a list of at most 1,000,000 entries, got 1,000,001 entries"),
        ((*BLOCK, "layer"), 2, r"blocks\[0\].layer must be a whole number from 0 to 1, got 2"),
        ((*BLOCK, "size"), 2**31, r"blocks\[0\].size must be a whole number from 1 to 2147483647"),
        ((*BLOCK, "size"), 2**31 - 1, "the number of structures in all blocks"),
        ((*BLOCK, "cost"), "96", r"blocks\[0\].cost must be a whole number .*got '96'"),
        ((*BLOCK, "reference_cost"), 10**30, r"blocks\[0\].reference_cost must be a whole number"),
        ((*BLOCK, "kind"), "\x07", r"blocks\[0\].kind holds control characters"),
        ((*BLOCK, "members"), [], r"blocks\[0\].members is empty"),
        ((*BLOCK, "\x1b"), 1, r"a key of blocks\[0\] holds control characters"),
        ((*MEMBER, "parameter"), None, r"members\[0\].parameter must be a text"),
        ((*MEMBER, "dim"), 8, r"members\[0\].dim must be a whole number from 0 to 7"),
        ((*MEMBER, "width"), 0, r"members\[0\].width must be a whole number from 1"),
        ((*MEMBER, "offset"), -1, r"members\[0\].offset must be a whole number"),
        (("base", "id"), "x" * 4097, "base.id has 4,097 characters"),
        (("base", "revision"), 7, "base.revision must be a text"),
        (("config", "num_steps"), 2**31, "config.num_steps must be a whole number"),
        (("config", "protect_first"), float("inf"), "config.protect_first must be a number, got inf"),
        (("steps", 1, "sparsity"), 1.5, r"steps\[1\].sparsity must be a number from 0 to 1, got 1.5"),
        (("steps", 1, "loss"), "low", r"steps\[1\].loss must be a number, got 'low'"),
        (("calibration", "sources"), 5, "calibration.sources must be a list"),
        (("calibration", "sources", 0, "hub_id"), [1], r"calibration.sources\[0\].hub_id must be a text"),
    ],
)
def test_a_trajectory_beyond_the_bounds(keys: tuple[str | int, ...], value: object, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        check_trajectory(changed(TRAJECTORY, *keys, value=value))


PROGRESS = {"global_step": 4, "world_size": 1, "examples_per_step": 16, "layer_groups": 1, "order": "0" * 64}


def test_an_honest_progress_passes() -> None:
    check_progress(PROGRESS)


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("global_step", "4", "global_step must be a whole number from 0 to 2147483647, got '4'"),
        ("world_size", 10**30, "world_size must be a whole number"),
        ("examples_per_step", None, "examples_per_step must be a whole number"),
        ("order", 5, "order must be a text, got 5"),
        ("layer_groups", 10**30, "the progress.layer_groups must be a whole number"),
    ],
)
def test_a_progress_beyond_the_bounds(key: str, value: object, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        check_progress({**PROGRESS, key: value})


def test_an_honest_config_passes() -> None:
    check_model_config(CONFIG)


@pytest.mark.parametrize(
    ("keys", "value", "reason"),
    [
        (("model_type",), None, "model_type must be a text"),
        (("hidden_size",), 2**31, "hidden_size must be a whole number from 1 to 2147483647"),
        (("num_hidden_layers",), 10**7, "num_hidden_layers must be a whole number from 1 to 10000, got 10000000"),
        (("num_key_value_heads",), 3, r"num_attention_heads \(8\) must be divisible by num_key_value_heads \(3\)"),
        (("vocab_size",), "many", "vocab_size must be a whole number"),
        (("per_layer_config",), [], "per_layer_config must be an object"),
        (("per_layer_config", "2"), {}, "per_layer_config has the key '2', which is no layer of 2"),
        (("per_layer_config", "1", "intermediate_size"), 0, "per_layer_config.1.intermediate_size must be a whole"),
        (("rope_parameters", "rope_type"), "\x1b[0m", "rope_parameters.rope_type holds control characters"),
    ],
)
def test_a_config_beyond_the_bounds(keys: tuple[str, ...], value: object, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        check_model_config(changed(CONFIG, *keys, value=value))


def test_an_honest_index_passes() -> None:
    index = {"a.weight": "model-00001-of-00002.safetensors", "b.weight": "model-00002-of-00002.safetensors"}
    assert check_weight_map({"metadata": {"total_size": 7}, "weight_map": index}) == index


@pytest.mark.parametrize(
    "filename", ["../a.safetensors", "/a.safetensors", "a/b.safetensors", "a.bin", ".safetensors", "..safetensors", 7]
)
def test_an_index_names_only_safetensors_beside_it(filename: object) -> None:
    with pytest.raises(ValueError, match="which is no safetensors file beside it"):
        check_weight_map({"weight_map": {"a.weight": filename}})


@pytest.mark.parametrize("weight_map", [None, [], "a", {}])
def test_an_index_without_a_map(weight_map: object) -> None:
    with pytest.raises(ValueError, match="weight_map"):
        check_weight_map({"weight_map": weight_map})


# ---- printing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("m\u00f6del \u6a21\u578b \U0001f600", "m\u00f6del \u6a21\u578b \U0001f600"),
        ("two\n lines\t and a tab", "two lines and a tab"),
        ("\x1b[2J\x1b]0;owned\x07", "\\x1b[2J\\x1b]0;owned\\x07"),
        ("\x9b2J\x7f\x00", "\\x9b2J\\x7f\\x00"),
        ("exe\u202egpj.txt", "exe\\u202egpj.txt"),
        ("\udcff", "\\udcff"),
    ],
)
def test_printable(text: str, shown: str) -> None:
    assert printable(text) == shown and shown.isprintable()


def test_printable_lines_keep_their_shape() -> None:
    text = "# Title\n\n\tcode \U0001f469\u200d\U0001f4bb\n"
    assert printable_lines(text) == text
    assert printable_lines("a\rb\x1b[0m\u2066\nc\x85") == "a\\rb\\x1b[0m\\u2066\nc\\x85"
