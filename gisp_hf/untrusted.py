"""Validates untrusted JSON before anything is computed from it, and makes strange text safe to print.

A run's folder may be a download, and a repository may hold anything. Every JSON file is read by ``read_json``, which
bounds its size, its nesting and its numbers; then the check of its kind bounds what stands in it.
"""

import json
import math
import reprlib
import unicodedata
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError

# Far beyond any model there is; small enough that nothing below them hangs or fills the memory.
LARGEST_FILE = 2**26  # bytes of a JSON file
DEEPEST = 32  # nesting of lists and objects
DIGITS = 40  # of a whole number: tokenizers write 10**30 for "no limit"
LAYERS = 10**4
BLOCKS = 10**6
MEMBERS = 64  # of one block
STRUCTURES = 2**28  # of all blocks
SIZE = 2**31 - 1  # one dimension, one count of structures
TOTAL = 2**53 - 1  # any count of parameters: exact as a float, too
TEXT = 200  # characters of a name
PATH = 4096  # characters of a path

_SIZES = ("hidden_size", "intermediate_size", "vocab_size", "max_position_embeddings")
_HEADS = ("num_attention_heads", "num_key_value_heads", "head_dim")
_CALIBRATION_TEXTS = ("name", "hub_id", "config", "split", "revision")


# ---- reading ---------------------------------------------------------------------------------------------------------


def read_json(path: str | Path, *, largest: int = LARGEST_FILE) -> dict[str, Any]:
    """The object in a JSON file: at most ``largest`` bytes, ``DEEPEST`` levels of nesting, ``DIGITS`` digits a number.

    Raises:
        FileNotFoundError: if there is no such regular file.
        ValueError: if the file is anything else. The message calls it "it": the caller names the file.
    """
    found = _read_bounded(Path(path), largest)
    if not isinstance(found, dict):
        raise ValueError(f"it must hold an object, got {type(found).__name__}")
    return found


def read_json_rows(path: str | Path, *, largest: int = LARGEST_FILE) -> list[dict[str, Any]]:
    """The list of objects in a JSON file, with the bounds and errors of ``read_json``."""
    rows = check_list(_read_bounded(Path(path), largest), "it", longest=LAYERS)
    return [check_object(row, f"row {number}") for number, row in enumerate(rows)]


def _read_bounded(path: Path, largest: int) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    with path.open("rb") as file:
        data = file.read(largest + 1)
    if len(data) > largest:
        raise ValueError(f"it is larger than {largest:,} bytes")
    try:
        found = json.loads(data.decode("utf-8"), parse_int=_parse_whole)
    except RecursionError:  # before the nesting could be counted
        raise ValueError(f"it nests deeper than {DEEPEST} levels") from None
    except ValueError as error:
        raise ValueError(f"it is no JSON that can be read: {error}") from error
    _check_nesting(found)
    return found


@contextmanager
def odd_contents(label: str) -> Iterator[None]:
    """Turns what a library raises over the contents of a file into one ValueError that begins with ``label``.

    Only for a call whose every input is that file: these types of error would otherwise hide faults of our own.
    """
    try:
        yield
    except (
        *(ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, RuntimeError, TypeError),
        *(ValueError, StrictDataclassError),
    ) as error:
        reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise ValueError(f"{label} cannot be used: {reason}") from error


def _parse_whole(digits: str) -> int:
    if len(digits) > DIGITS:
        raise ValueError(f"a whole number of {len(digits):,} digits is too large")
    return int(digits)


def _check_nesting(found: Any) -> None:
    level = [found]
    for _ in range(DEEPEST + 1):
        containers = [value for value in level if isinstance(value, (dict, list))]
        if not containers:
            return
        level = [child for value in containers for child in (value.values() if isinstance(value, dict) else value)]
    raise ValueError(f"it nests deeper than {DEEPEST} levels")


# ---- one value -------------------------------------------------------------------------------------------------------


def check_whole(value: Any, what: str, *, least: int = 0, most: int = TOTAL) -> int:
    """A whole number between two bounds; True and 3.0 are none."""
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{what} must be a whole number from {least} to {most}, got {_shown(value)}")
    return value


def check_number(value: Any, what: str, *, least: float = -math.inf, most: float = math.inf) -> float:
    """A finite number between two bounds."""
    if type(value) not in (int, float) or not math.isfinite(value) or not least <= value <= most:
        bounds = f" from {least:g} to {most:g}" if most < math.inf else ""
        raise ValueError(f"{what} must be a number{bounds}, got {_shown(value)}")
    return float(value)


def check_text(value: Any, what: str, *, longest: int = TEXT) -> str:
    """A text of at most ``longest`` characters, none of them a control character."""
    if not isinstance(value, str):
        raise ValueError(f"{what} must be a text, got {_shown(value)}")
    if len(value) > longest:
        raise ValueError(f"{what} has {len(value):,} characters, more than {longest}: {_shown(value)}")
    if any(unicodedata.category(letter) in ("Cc", "Cs") for letter in value):
        raise ValueError(f"{what} holds control characters: {_shown(value)}")
    return value


def check_object(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{what} must be an object, got {_shown(value)}")
    return value


def check_list(value: Any, what: str, *, longest: int) -> list[Any]:
    if not isinstance(value, list) or len(value) > longest:
        found = f"{len(value):,} entries" if isinstance(value, list) else _shown(value)
        raise ValueError(f"{what} must be a list of at most {longest:,} entries, got {found}")
    return value


def _shown(value: Any) -> str:
    return printable(reprlib.repr(value))


# ---- one kind of file ------------------------------------------------------------------------------------------------


def check_trajectory(facts: Mapping[str, Any]) -> None:
    """Bounds all that stands in a ``trajectory.json``, so that what is built from it neither hangs nor overflows.

    Keys that it does not know are left alone, as far as their values are plain: a later version may add some.

    Raises:
        ValueError: with the place in the file, the value, and the bounds.
    """
    for key in ("format", "architecture", "base", "num_layers", "total", "blocks", "config", "steps", "calibration"):
        if key not in facts:
            raise ValueError(f"it lacks {key}")
    check_text(facts["architecture"], "architecture")
    base = check_object(facts["base"], "base")
    check_text(base.get("id"), "base.id", longest=PATH)
    check_text(base.get("fingerprint"), "base.fingerprint")
    if base.get("revision") is not None:
        check_text(base["revision"], "base.revision")
    check_layout(facts)
    if base.get("unpruned") is not None:
        check_whole(base["unpruned"], "base.unpruned", least=facts["total"])
    config = check_object(facts["config"], "config")
    _check_plain(config, "config", most=SIZE)
    steps = check_list(facts["steps"], "steps", longest=BLOCKS)
    for number, step in enumerate(steps):
        _check_step(check_object(step, f"steps[{number}]"), f"steps[{number}]")
    _check_calibration(check_object(facts["calibration"], "calibration"))


def check_layout(facts: Mapping[str, Any]) -> None:
    """Bounds the blocks, the number of layers and the total of a ``trajectory.json``.

    Raises:
        ValueError: with the place in the file, the value, and the bounds.
    """
    layers = check_whole(facts["num_layers"], "num_layers", least=1, most=LAYERS)
    check_whole(facts["total"], "total", least=1)
    blocks = check_list(facts["blocks"], "blocks", longest=BLOCKS)
    structures = 0
    for number, block in enumerate(blocks):
        place = f"blocks[{number}]"
        check_object(block, place)
        check_whole(block.get("layer"), f"{place}.layer", most=layers - 1)
        check_text(block.get("kind"), f"{place}.kind")
        structures += check_whole(block.get("size"), f"{place}.size", least=1, most=SIZE)
        check_whole(block.get("cost"), f"{place}.cost")
        parts = check_whole(block.get("parts", 1), f"{place}.parts", least=1, most=block["size"])
        if block["size"] % parts:
            raise ValueError(f"{place}.parts is {parts}, which does not divide its {block['size']} structures")
        members = check_list(block.get("members"), f"{place}.members", longest=MEMBERS)
        if not members:
            raise ValueError(f"{place}.members is empty: no parameter belongs to this block")
        for index, member in enumerate(members):
            _check_member(check_object(member, f"{place}.members[{index}]"), f"{place}.members[{index}]")
        _check_plain({key: value for key, value in block.items() if key != "members"}, place)
    check_whole(structures, "the number of structures in all blocks", most=STRUCTURES)
    for kind, sizes in check_object(facts.get("plain_sizes", {}), "plain_sizes").items():
        place = f"plain_sizes.{check_text(kind, 'a key of plain_sizes')}"
        for size in check_list(sizes, place, longest=BLOCKS):
            check_whole(size, f"an entry of {place}", least=1, most=SIZE)


def _check_member(member: Mapping[str, Any], place: str) -> None:
    check_text(member.get("parameter"), f"{place}.parameter")
    check_whole(member.get("dim"), f"{place}.dim", most=7)
    check_whole(member.get("width"), f"{place}.width", least=1, most=SIZE)
    _check_plain(member, place)
    for key in ("offset", "stride"):
        if member.get(key) is not None:
            check_whole(member[key], f"{place}.{key}")


def _check_step(step: Mapping[str, Any], place: str) -> None:
    check_whole(step.get("step"), f"{place}.step")
    check_whole(step.get("parameters"), f"{place}.parameters")
    for key in ("target", "sparsity"):
        check_number(step.get(key), f"{place}.{key}", least=0, most=1)
    loss = step.get("loss")
    if loss is not None and type(loss) not in (int, float):  # a loss that is not finite is a fact of the run
        raise ValueError(f"{place}.loss must be a number, got {_shown(loss)}")
    _check_plain({key: value for key, value in step.items() if key != "loss"}, place)


def _check_calibration(calibration: Mapping[str, Any]) -> None:
    """What the user gave as provenance may have any keys; the ones that cards read have known types."""
    sources = calibration.get("sources")
    sources = [] if sources is None else check_list(sources, "calibration.sources", longest=LAYERS)
    for number, source in enumerate(sources):
        place = f"calibration.sources[{number}]"
        for key in _CALIBRATION_TEXTS:
            if check_object(source, place).get(key) is not None:
                check_text(source[key], f"{place}.{key}", longest=PATH)


def _check_plain(values: Mapping[str, Any], place: str, *, most: int = TOTAL) -> None:
    """Every value is bounded: a whole number, a finite number, a short text, true, false, null, or a list of such."""
    for key, value in values.items():
        where = f"{place}.{check_text(key, f'a key of {place}')}"
        if isinstance(value, list):
            _check_plain({str(n): entry for n, entry in enumerate(check_list(value, where, longest=LAYERS))}, where)
        elif isinstance(value, dict):
            _check_plain(value, where, most=most)
        elif isinstance(value, str):
            check_text(value, where)
        elif type(value) is int:
            check_whole(value, where, least=-most, most=most)
        elif isinstance(value, float):
            check_number(value, where)


def check_progress(facts: Mapping[str, Any]) -> None:
    """Bounds the counts in the ``gisp.json`` of a checkpoint; every other value must be plain.

    Raises:
        ValueError: with the key, its value, and the bounds.
    """
    for key in ("global_step", "world_size", "examples_per_step"):
        check_whole(facts.get(key), key, most=SIZE)
    check_text(facts.get("order"), "order")
    _check_plain(facts, "the progress")


def check_model_config(facts: Mapping[str, Any]) -> None:
    """Bounds the sizes in the ``config.json`` of a model, before a library allocates or builds anything from them.

    Raises:
        ValueError: with the key, its value, and the bounds.
    """
    _check_texts(facts, "")
    check_text(facts.get("model_type"), "model_type")
    _check_sizes(facts, "")
    layers = facts.get("num_hidden_layers")
    per_layer = facts.get("per_layer_config")
    if per_layer is not None:
        for key, sizes in check_object(per_layer, "per_layer_config").items():
            if not key.isdecimal() or (isinstance(layers, int) and int(key[:10]) >= layers):
                raise ValueError(f"per_layer_config has the key {_shown(key)}, which is no layer of {layers}")
            _check_sizes(check_object(sizes, f"per_layer_config.{key}"), f"per_layer_config.{key}.")


def _check_sizes(facts: Mapping[str, Any], place: str) -> None:
    bounds = {**dict.fromkeys(_SIZES, SIZE), **dict.fromkeys(_HEADS, 2**20), "num_hidden_layers": LAYERS}
    for key, most in bounds.items():
        if facts.get(key) is not None:
            check_whole(facts[key], f"{place}{key}", least=1, most=most)
    heads, groups = facts.get("num_attention_heads"), facts.get("num_key_value_heads")
    if heads is not None and groups is not None and heads % groups:
        raise ValueError(f"{place}num_attention_heads ({heads}) must be divisible by num_key_value_heads ({groups})")


def _check_texts(value: Any, place: str) -> None:
    """No text may steer a terminal. The depth is bounded by ``read_json``."""
    if isinstance(value, Mapping):
        for key, child in value.items():
            check_text(key, f"a key of {place or 'the config'}")
            _check_texts(child, f"{place}.{key}".lstrip("."))
    elif isinstance(value, list):
        for child in value:
            _check_texts(child, place)
    elif isinstance(value, str) and any(
        unicodedata.category(letter) in ("Cc", "Cs") and letter not in "\t\n\r" for letter in value
    ):
        raise ValueError(f"{place} holds control characters: {_shown(value)}")


def check_weight_map(facts: Mapping[str, Any]) -> dict[str, str]:
    """Tensor -> file, of a safetensors index, whose files can only lie beside it.

    Raises:
        ValueError: if it is no such index.
    """
    weight_map = check_object(facts.get("weight_map"), "weight_map")
    if not weight_map or len(weight_map) > BLOCKS:
        raise ValueError(f"weight_map has {len(weight_map):,} entries, not 1 to {BLOCKS:,}")
    for name, filename in weight_map.items():
        check_text(name, "the name of a tensor")
        stem = filename.removesuffix(".safetensors") if isinstance(filename, str) else ""
        if stem == filename or not stem.strip(".") or len(stem) > TEXT or not _is_plain_name(stem):
            raise ValueError(f"it names {_shown(filename)}, which is no safetensors file beside it")
    return dict(weight_map)


def _is_plain_name(name: str) -> bool:
    return name.isascii() and all(letter.isalnum() or letter in "._-" for letter in name)


# ---- printing --------------------------------------------------------------------------------------------------------


def printable(text: object) -> str:
    """One line that a terminal shows as it is: white space becomes one space, other odd characters ``\\x1b``."""
    return _escape(" ".join(str(text).split()))


def printable_lines(text: str) -> str:
    """A text of several lines, without control characters and marks that turn the direction of writing.

    Letters that join others (in emoji, in Persian) stay, and so do tabs.
    """
    return "\n".join(_escape(line, keep="\t\u200c\u200d\u00a0\u202f\u3000") for line in text.split("\n"))


def _escape(text: str, *, keep: str = "") -> str:
    return "".join(
        letter if letter.isprintable() or letter in keep else letter.encode("unicode_escape").decode("ascii")
        for letter in text
    )
