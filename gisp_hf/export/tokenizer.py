"""The tokenizer of a checkpoint as keys of a GGUF file.

llama.cpp has its own implementation of each pre-tokenizer, chosen by the name in ``tokenizer.ggml.pre``. The name is
found here from the pre-tokenizer's own description in ``tokenizer.json``, so that a tokenizer with another vocabulary
or an altered pre-tokenizer is never taken for one that it is not (``src/llama-vocab.cpp`` of ggml-org/llama.cpp).
"""

import json
from enum import IntEnum
from typing import TYPE_CHECKING, Any, NamedTuple

from transformers import PreTrainedTokenizerBase

if TYPE_CHECKING:
    from gguf import GGUFWriter  # an extra

# Of the steps of `tokenizers`, Prepend puts a space before every piece of text, as llama.cpp does; Metaspace does not.
METASPACE_NOTE = (
    "llama.cpp puts a space before every piece of text; this tokenizer does not where the text begins with a space or "
    "follows a special token, so the first token may differ there"
)
_SPACE = "\u2581"  # the space of sentencepiece
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3_PATTERN = _WORDS + r"\p{N}{1,3}" + _REST
QWEN2_PATTERN = _WORDS + r"\p{N}" + _REST

Steps = tuple[tuple[str, ...], ...]
# (steps of the pre-tokenizer, whether a word in the vocabulary is one token whatever the merges) -> name in llama.cpp
PRE_TOKENIZERS: dict[tuple[Steps, bool], str] = {
    ((("words", "gpt2"),), False): "gpt-2",
    ((("digits", "each"), ("words", "gpt2")), False): "smollm",
    ((("split", LLAMA3_PATTERN), ("bytes",)), True): "llama-bpe",
    ((("split", LLAMA3_PATTERN), ("bytes",)), False): "smaug-bpe",
    ((("split", QWEN2_PATTERN), ("bytes",)), False): "qwen2",
}


class TokenType(IntEnum):
    """Types of tokens in a GGUF file (``gguf.TokenType``)."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


class Vocabulary(NamedTuple):
    """``model`` and ``pre`` of ``tokenizer.ggml.*``; token texts, their types, and what the model needs besides."""

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str] | None
    scores: list[float] | None
    space_prefix: bool | None
    notes: tuple[str, ...]


def read_vocabulary(tokenizer: PreTrainedTokenizerBase, size: int) -> Vocabulary:
    """The vocabulary in the terms of llama.cpp.

    Args:
        size: rows of the embeddings; ids beyond the tokenizer's are filled with unused tokens.

    Raises:
        ValueError: if llama.cpp has no such tokenizer, or it has more tokens than the model has embeddings.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(f"{type(tokenizer).__name__} has no tokenizer.json, from which the tokenizer is exported")
    facts = json.loads(backend.to_str())
    model = facts["model"]
    if model["type"] != "BPE":
        raise ValueError(f"a tokenizer of type {model['type']} cannot be exported; BPE can")
    tokens, types = _tokens(
        facts, size, sentencepiece=model["byte_fallback"], unknown=model["unk_token"] or tokenizer.unk_token
    )
    merges = [pair.split(" ", 1) if isinstance(pair, str) else pair for pair in model["merges"]]
    if model["byte_fallback"]:
        prefix, notes = _space_prefix(facts)
        return Vocabulary("llama", "default", tokens, types, None, _scores(tokens, merges), prefix, notes)
    pre, notes = _pre_tokenizer(facts)
    return Vocabulary("gpt2", pre, tokens, types, [" ".join(pair) for pair in merges], None, None, notes)


def write_tokenizer(writer: "GGUFWriter", tokenizer: PreTrainedTokenizerBase, vocabulary: Vocabulary) -> None:
    """Adds the vocabulary, the special tokens and the chat template to a GGUF file."""
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.merges is not None:
        writer.add_token_merges(vocabulary.merges)
    if vocabulary.scores is not None:
        writer.add_token_scores(vocabulary.scores)
    if vocabulary.space_prefix is not None:
        writer.add_add_space_prefix(vocabulary.space_prefix)
    for name in ("bos", "eos", "unk", "pad"):
        if (token := getattr(tokenizer, f"{name}_token_id")) is not None:
            getattr(writer, f"add_{name}_token_id")(token)
    # The tokenizer itself tells what it puts around a text; without the keys llama.cpp would guess.
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    around = tokenizer("a", add_special_tokens=True)["input_ids"]
    writer.add_add_bos_token(around[: len(around) - len(plain)][:1] == [tokenizer.bos_token_id])
    writer.add_add_eos_token(len(around) > len(plain) and around[-1] == tokenizer.eos_token_id != plain[-1])
    template = tokenizer.chat_template
    if isinstance(template, dict):
        writer.add_chat_template([{"name": name, "template": text} for name, text in template.items()])
    elif template:
        writer.add_chat_template(template)


def _tokens(
    facts: dict[str, Any], size: int, *, sentencepiece: bool, unknown: str | None
) -> tuple[list[str], list[int]]:
    vocabulary: dict[str, int] = facts["model"]["vocab"]
    added = {token["id"]: token for token in facts["added_tokens"]}
    most = max([*vocabulary.values(), *added])
    if most >= size:
        raise ValueError(f"the tokenizer has ids up to {most}, and the model has {size} embeddings")
    tokens = [f"[PAD{number}]" for number in range(size)]
    types = [int(TokenType.UNUSED)] * size
    for text, number in vocabulary.items():
        tokens[number] = text
        is_byte = sentencepiece and len(text) == 6 and text.startswith("<0x")
        is_unknown = sentencepiece and text == unknown
        kind = TokenType.BYTE if is_byte else TokenType.UNKNOWN if is_unknown else TokenType.NORMAL
        types[number] = int(kind)
    for number, token in added.items():
        tokens[number] = token["content"].replace(_SPACE, " ") if sentencepiece else token["content"]
        if types[number] not in (TokenType.UNKNOWN, TokenType.BYTE):
            types[number] = int(TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED)
    return tokens, types


def _scores(tokens: list[str], merges: list[list[str]]) -> list[float]:
    """The scores of sentencepiece, as far as they matter: a merge that comes earlier has the higher one."""
    first: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        first.setdefault(left + right, rank)
    return [-float(first.get(token, len(merges))) for token in tokens]


def _flat(part: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, which may be a sequence of them."""
    if part is None:
        return []
    return [step for one in part[key] for step in _flat(one, key)] if part["type"] == "Sequence" else [part]


def _pre_tokenizer(facts: dict[str, Any]) -> tuple[str, tuple[str, ...]]:
    """The name of a byte-level pre-tokenizer in llama.cpp, and notes on the normalizer."""
    steps: list[tuple[str, ...]] = []
    for step in _flat(facts["pre_tokenizer"], "pretokenizers"):
        match step:
            case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}:
                steps.append(("split", pattern))
            case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Removed", "invert": True}:
                steps.append(("split", pattern))  # the pattern covers all text: the same pieces
            case {"type": "Digits", "individual_digits": True}:
                steps.append(("digits", "each"))
            case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": use_regex}:
                steps.append(("words", "gpt2") if use_regex else ("bytes",))
            case _:
                steps.append((json.dumps(step, sort_keys=True),))
    key = (tuple(steps), bool(facts["model"].get("ignore_merges")))
    if key not in PRE_TOKENIZERS:
        names = ", ".join(PRE_TOKENIZERS.values())
        raise ValueError(
            f"the pre-tokenizer {json.dumps(facts['pre_tokenizer'])[:300]} is none that can be exported ({names}): "
            "llama.cpp would split text differently"
        )
    normalizers = [step["type"] for step in _flat(facts["normalizer"], "normalizers")]
    if set(normalizers) - {"NFC"}:
        raise ValueError(f"the tokenizer normalises text ({', '.join(normalizers)}), and llama.cpp does not")
    note = "the tokenizer normalises text to NFC, and llama.cpp does not: decomposed letters get other ids"
    return PRE_TOKENIZERS[key], (note,) if normalizers else ()


def _space_prefix(facts: dict[str, Any]) -> tuple[bool, tuple[str, ...]]:
    """Whether a sentencepiece tokenizer puts a space before the text, and notes on differences.

    Raises:
        ValueError: if it does more than to replace spaces.
    """
    prefix, replaces = False, False
    notes: tuple[str, ...] = ()
    for step in [*_flat(facts["normalizer"], "normalizers"), *_flat(facts["pre_tokenizer"], "pretokenizers")]:
        match step:
            case {"type": "Prepend", "prepend": "\u2581"}:
                prefix = True
            case {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}:
                replaces = True
            case {"type": "Metaspace", "replacement": "\u2581", "split": False, "prepend_scheme": scheme}:
                replaces, prefix = True, scheme != "never"
                notes = (METASPACE_NOTE,) if prefix else ()
            case {"type": "Split", "pattern": {"String": " "}}:
                pass  # spaces are replaced before: there are none
            case _:
                raise ValueError(f"the tokenizer has a step that llama.cpp lacks: {json.dumps(step)[:200]}")
    if not replaces:
        raise ValueError("the tokenizer has byte fallback and does not replace spaces: llama.cpp has none of that kind")
    return prefix, notes
