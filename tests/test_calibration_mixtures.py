"""Mixtures of calibration data: shares of the budget, and what is refused."""

import json
from fractions import Fraction

import pytest

from gisp_hf.data.calibration import load_calibration
from gisp_hf.data.shares import share_tokens, split_mixture
from gisp_hf.losses.objectives import decode_weights
from tests.test_calibration import cache, digest, hub, openbook, order, words, write  # noqa: F401  fixtures
from tests.tiny import tiny_tokenizer


@pytest.fixture
def texts(tmp_path):
    """Three files of texts, one of which has the words of no other."""
    paths = {}
    for number, name in enumerate(("a", "b", "c")):
        rows = [{"text": words(30, 100 * number + row)} for row in range(60)]
        paths[name] = write(tmp_path / f"{name}.jsonl", rows)
    return paths


def test_a_mixture_holds_the_blocks_that_each_part_gives_alone(texts):
    tokenizer = tiny_tokenizer()
    name = f"{texts['a']}:0.5,{texts['b']}:0.3,{texts['c']}:0.2"
    mixed = load_calibration(name, tokenizer, tokens=640, block_size=16, seed=4)
    alone = [
        load_calibration(texts[part], tokenizer, tokens=tokens, block_size=16, seed=4)
        for part, tokens in {"a": 320, "b": 192, "c": 128}.items()
    ]
    blocks = [block for calibration in alone for block in calibration.dataset["input_ids"]]
    expected = [blocks[index] for index in order(40, seed=4)]
    assert mixed.dataset["input_ids"][:] == mixed.dataset["labels"][:] == expected
    assert mixed.provenance["sha256"] == digest(expected)
    assert mixed.provenance["tokens"] == 640 and mixed.provenance["name"] == "a.jsonl:1/2,b.jsonl:3/10,c.jsonl:1/5"
    assert mixed.provenance["sources"] == [source for c in alone for source in c.provenance["sources"]]
    for part, calibration, share in zip(mixed.provenance["parts"], alone, ("1/2", "3/10", "1/5"), strict=True):
        counts = {key: calibration.provenance[key] for key in ("name", "tokens", "sequences", "items", "sha256")}
        assert part == {**counts, "share": share}
    assert json.loads(json.dumps(mixed.provenance)) == mixed.provenance
    assert load_calibration(name, tokenizer, tokens=640, block_size=16, seed=4).provenance == mixed.provenance
    other = load_calibration(name, tokenizer, tokens=640, block_size=16, seed=5).provenance
    assert other["sha256"] != mixed.provenance["sha256"]


@pytest.mark.parametrize("tokens", [16 * 3, 16 * 7, 16 * 40, 16 * 61])
@pytest.mark.parametrize("shares", [("1/3", "1/3", "1/3"), ("0.6", ".25", "0.15")])
def test_every_part_is_less_than_a_block_from_its_share(tokens, shares):
    names = dict(zip("abc", map(Fraction, shares), strict=True))
    if tokens // 16 * min(names.values()) < Fraction(1, 2):
        with pytest.raises(ValueError, match=r"'c' has 0.15 of tokens=48, less than one block of 16: raise tokens to"):
            share_tokens(names, tokens=tokens, unit=16)
        return
    counts = share_tokens(names, tokens=tokens, unit=16)
    assert sum(counts.values()) == tokens and all(count % 16 == 0 for count in counts.values())
    assert all(abs(counts[part] - tokens * share) < 16 for part, share in names.items())


def test_a_mixture_of_questions_weighs_all_of_them_together(hub, tmp_path):  # noqa: F811
    hub.rows["openbookqa"] = [openbook(number) for number in range(40)]
    rows = [{"prompt": words(4, n), "correct": [" w5"], "incorrect": [" w6", " w7"]} for n in range(40)]
    path = write(tmp_path / "own.jsonl", rows)
    mixed = load_calibration(f"openbookqa:0.25,{path}:0.75", tiny_tokenizer(), tokens=480)
    first, second = mixed.provenance["parts"]
    assert (first["tokens"], second["tokens"]) == (120, 360)  # 5 questions of 4 x 6 tokens, 24 of 3 x 5
    assert (first["items"], second["items"]) == (5, 24)
    correct, incorrect = mixed.provenance["correct"], mixed.provenance["incorrect"]
    assert (correct, incorrect) == (29, 5 * 3 + 24 * 2) and mixed.provenance["items"] == 29
    batch = mixed.collator([mixed.dataset[index] for index in range(29)])
    weights = decode_weights(batch["labels"]).tolist()
    assert sorted(set(weights)) == pytest.approx([-1 / incorrect, 1 / correct])
    alone = load_calibration(path, tiny_tokenizer(), tokens=360)
    assert second["sha256"] == alone.provenance["sha256"]


def test_the_share_stands_after_the_last_colon(tmp_path, monkeypatch):
    assert split_mixture("owner/name:config:0.25, wikitext2:.75") == {
        "owner/name:config": Fraction(1, 4),
        "wikitext2": Fraction(3, 4),
    }
    for single in ("owner/name:config", "c4", "owner/name:0.5"):
        assert split_mixture(single) == {single: 1}
    monkeypatch.chdir(tmp_path)
    (tmp_path / "news, 2001:0.5.txt").write_text("w5")
    assert split_mixture("news, 2001:0.5.txt") == {"news, 2001:0.5.txt": 1}


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("c4:0.5,wikitext2", {}, "part 'wikitext2' of the mixture 'c4:0.5,wikitext2' has no share: write name:share"),
        ("c4:0.5,wikitext2:half", {}, "the share of 'wikitext2' must be a number between 0 and 1 .*, got 'half'"),
        ("c4:1,wikitext2:0", {}, "the share of 'c4' must be a number between 0 and 1 .*, got '1'"),
        ("c4:-0.5,wikitext2:1.5", {}, "the share of 'c4' .*, got '-0.5'"),
        ("c4:1e-1,wikitext2:0.9", {}, "the share of 'c4' .*, got '1e-1'"),
        ("c4:0.5,wikitext2:0.3", {}, r"'c4:0.5,wikitext2:0.3' must add up to 1, got 0.5 \+ 0.3 = 0.8: change them"),
        ("c4:0.5,c4:0.5", {}, "'c4' stands twice in the mixture"),
        ("c4:0.5,c5:0.5", {}, "unknown calibration data 'c5'"),
        ("c4:0.5,gsm8k:0.5", {}, "same objective, and c4 is for language_modeling, gsm8k is for completion"),
        ("c4:0.5,gsm8k:0.5", {"objective": "completion"}, "c4 cannot be calibrated with objective 'completion'"),
        ("piqa:0.5,boolq:0.5", {"tokens": None}, "the shares of 'piqa:0.5,boolq:0.5' are shares of tokens: give them"),
        ("piqa:0.5,boolq:0.5", {"revision": "abc"}, "revision 'abc' is for one data set of the Hub"),
        (
            "c4:0.999,wikitext2:0.001",
            {"tokens": 2560},
            "has 0.001 of .* block of 256: raise tokens to 256000",
        ),
        ("c4:0.5,wikitext2:0.5", {"tokens": 1000}, r"tokens \(1000\) must be a multiple of block_size \(256\)"),
    ],
)
def test_impossible_mixtures_are_refused_before_anything_is_loaded(hub, name, options, message):  # noqa: F811
    with pytest.raises(ValueError, match=message):
        load_calibration(name, tiny_tokenizer(), **options)
    assert not hub.calls


def test_a_part_that_holds_too_little_is_named(texts):
    with pytest.raises(ValueError, match="b.jsonl held only 1860 of tokens=2048"):
        load_calibration(f"{texts['a']}:1/3,{texts['b']}:2/3", tiny_tokenizer(), tokens=3072, block_size=1024)
