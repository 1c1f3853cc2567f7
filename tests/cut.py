"""Checkpoints of tiny pruned models without a run, and tiny tokenizers of the kinds that real models have."""

import json
import string
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from gisp_hf.export.tokenizer import LLAMA3_PATTERN, QWEN2_PATTERN
from gisp_hf.models import discover
from gisp_hf.models.surgery import as_pruned_model, slice_structures
from tests.tiny import tiny_model


def cut_model(family: str, *, seed: int = 0, **changes) -> PreTrainedModel:
    """A tiny model whose layers differ in size: random structures are sliced out, from none to half of a block."""
    model = tiny_model(family, seed=seed, **changes)
    layout = discover(model)
    generator = torch.Generator().manual_seed(seed)
    kept = []
    for number, block in enumerate(layout.blocks):
        count = max(1, block.size - number % (block.size // 2 + 1))
        kept.append(torch.randperm(block.size, generator=generator)[:count].sort().values)
    slice_structures(model, layout, kept)
    return as_pruned_model(model, layout, [len(keep) for keep in kept]).eval()


def save_cut(folder: Path, family: str, *, tokenizer: PreTrainedTokenizerFast | None = None, **changes) -> Path:
    """Saves ``cut_model``; with a tokenizer the model has as many embeddings as it has tokens, and five more."""
    if tokenizer is not None:
        changes = {"vocab_size": len(tokenizer) + 5, **changes}
    cut_model(family, **changes).save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder


_BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
PRE_TOKENIZERS = {
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    "smollm": pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    ),
    "llama-bpe": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA3_PATTERN), "isolated"), _BYTES]),
    "smaug-bpe": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA3_PATTERN), "isolated"), _BYTES]),
    "qwen2": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(QWEN2_PATTERN), "isolated"), _BYTES]),
}


def bpe_tokenizer(pre: str, lines: list[str], *, size: int = 600) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer, trained on ``lines``, with the pre-tokenizer that llama.cpp calls ``pre``."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=pre == "llama-bpe"))
    tokenizer.pre_tokenizer = PRE_TOKENIZERS[pre]
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, special_tokens=["<bos>", "<eos>"])
    tokenizer.train_from_iterator(lines, trainer)
    if pre == "llama-bpe":
        tokenizer.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 0)])
    return _wrapped(tokenizer)


def sentencepiece_tokenizer(lines: list[str], *, prefix: str = "prepend", size: int = 600) -> PreTrainedTokenizerFast:
    """A BPE tokenizer as that of Llama 2: spaces replaced, unknown letters as bytes; merges in the order of ids.

    Args:
        prefix: ``prepend`` a space always (Llama 2), ``metaspace`` (Transformers 5) only if there is none, or ``none``.
    """
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    replace = normalizers.Replace(" ", "\u2581")
    if prefix == "metaspace":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        prepend = [normalizers.Prepend("\u2581")] if prefix == "prepend" else []
        tokenizer.normalizer = normalizers.Sequence([*prepend, replace])
    special = ["<unk>", "<bos>", "<eos>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=special,
        initial_alphabet=sorted({*string.printable, "\u2581"} - {" "}),
        limit_alphabet=120,
        max_token_length=8,
    )
    tokenizer.train_from_iterator([line.replace("  ", " ") for line in lines], trainer)
    facts = tokenizer.to_str()
    tokenizer = Tokenizer.from_str(_without_special_bytes(facts))
    tokenizer.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 1)])
    return _wrapped(tokenizer, unk_token="<unk>")


def _without_special_bytes(text: str) -> str:
    """Bytes are tokens of the vocabulary, not special tokens that are searched for in a text."""
    facts = json.loads(text)
    facts["added_tokens"] = [token for token in facts["added_tokens"] if not token["content"].startswith("<0x")]
    return json.dumps(facts)


def _wrapped(tokenizer: Tokenizer, **more: str) -> PreTrainedTokenizerFast:
    tokenizer.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", **more)
    made.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return made


WORDS = """
def return the and Zürich naïve façade Привет мир 你好世界 こんにちは 안녕하세요 مرحبا שלום नमस्ते สวัสดี 🚀 👩\u200d💻
don't I'M we'LL x+=1; f(a,b) {'key': [1, 2]} https://example.org/a?b=c 3.14159 1234567 2024-05-17 <tag/> __init__
CamelCase snake_case ÄÖÜ ß ﬁ ½ ² Ⅷ ∑ → “quoted” … — ' " `` $100 #hash @me 50% a_b-c
"""


def mixed_lines(count: int = 1000) -> list[str]:
    """Lines of code, prose, numbers, white space, and many alphabets; the same in every Python."""
    words = WORDS.split()
    generator = torch.Generator().manual_seed(0)
    lines = []
    for _ in range(count):
        length = int(torch.randint(1, 12, (1,), generator=generator))
        picks = torch.randint(len(words), (length,), generator=generator).tolist()
        gaps = torch.randint(8, (length,), generator=generator).tolist()
        spaces = [{5: "  ", 6: "\n", 7: "\t"}.get(gap, " ") for gap in gaps]
        lines.append("".join(words[pick] + space for pick, space in zip(picks, spaces)))
    return lines
