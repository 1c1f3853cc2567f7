"""Calibration data: what is drawn, how it is encoded, budgets to the token, and what is refused or skipped."""

import hashlib
import json
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from datasets import Features
from datasets.packaged_modules.parquet.parquet import Parquet
from transformers import Trainer, TrainerCallback, TrainingArguments

from gisp_hf.data.calibration import load_calibration
from gisp_hf.data.encoding import CandidateCollator
from gisp_hf.data.sources import MIXTURES, SOURCES
from gisp_hf.losses.objectives import decode_weights, language_modeling_loss, margin_loss
from tests.test_sources import HUB
from tests.tiny import tiny_model, tiny_tokenizer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def hub(monkeypatch):
    """A Hub of small data sets: ``hub.rows[name] = [...]``; every call is kept in ``hub.calls``."""

    hub = SimpleNamespace(rows={}, calls=[])

    class Builder:
        """The public half of `datasets.DatasetBuilder` that is used."""

        hash = COMMIT

        def __init__(self, path, config=None, *, revision):
            self.call = {"hub_id": path, "config": config, "revision": revision}
            (self.name,) = [n for n, s in SOURCES.items() if (s.hub_id, s.config) == (path, config)]
            self.prepared = False

        def download_and_prepare(self):
            self.prepared = True

        def as_dataset(self, *, split):
            assert self.prepared
            hub.calls.append({**self.call, "split": split, "streaming": False})
            return self._rows()

        def as_streaming_dataset(self, *, split):
            assert not self.prepared
            hub.calls.append({**self.call, "split": split, "streaming": True})
            return self._rows().to_iterable_dataset()

        def _rows(self):
            features = Features(HUB[self.name][0])
            columns = {column: [row[column] for row in hub.rows[self.name]] for column in features}
            return datasets.Dataset.from_dict(columns, features=features)

    monkeypatch.setattr(datasets, "load_dataset_builder", Builder)
    return hub


def words(count, seed=0):
    numbers = np.random.default_rng(seed).integers(40, 64, count)  # one token each; the tokenizer splits w30 ... w39
    return " ".join(f"w{number}" for number in numbers)


def openbook(number, *, choices=4, length=5):
    """A question of ``length`` tokens with answers of one token each."""
    return {
        "id": str(number),
        "question_stem": words(length, number),
        "choices": {"text": [f"w{40 + number % 15 + at}" for at in range(choices)], "label": list("ABCDE"[:choices])},
        "answerKey": "ABCDE"[number % choices],
    }


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def digest(sequences):
    return hashlib.sha256(np.concatenate(sequences).astype("<i8").tobytes()).hexdigest()


def order(length, seed=0):
    return torch.randperm(length, generator=torch.Generator().manual_seed(seed)).tolist()


# --- loading


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_hub_is_asked_for_the_training_split_only(hub, name):
    hub.rows[name] = [HUB[name][1]] * 40
    text = SOURCES[name].objective == "language_modeling"
    calibration = load_calibration(name, tiny_tokenizer(), tokens=16 if text else None, block_size=8 if text else 64)

    (call,) = hub.calls
    source = SOURCES[name]
    assert call == {
        "hub_id": source.hub_id,
        "config": source.config,
        "revision": source.revision,
        "split": "train",
        "streaming": name == "c4",
    }
    (recorded,) = calibration.provenance["sources"]
    assert {key: recorded[key] for key in ("name", "hub_id", "config", "split", "revision", "skipped")} == {
        "name": name,
        "hub_id": source.hub_id,
        "config": source.config,
        "split": "train",
        "revision": COMMIT,
        "skipped": {},
    }
    assert json.loads(json.dumps(calibration.provenance)) == calibration.provenance


def test_revision_replaces_the_tables(hub):
    hub.rows["piqa"] = [HUB["piqa"][1]]
    calibration = load_calibration("piqa", tiny_tokenizer(), tokens=None, revision="abc")
    assert hub.calls[0]["revision"] == "abc"
    assert calibration.provenance["sources"][0]["revision"] == COMMIT  # of that branch


def test_a_revision_is_for_one_data_set_of_the_hub():
    with pytest.raises(ValueError, match="revision 'abc' is for one data set of the Hub, 'cmqa' is not"):
        load_calibration("cmqa", tiny_tokenizer(), revision="abc")


def test_commit_of_a_cached_data_set_is_recorded_without_the_hub(tmp_path, monkeypatch):
    """`datasets` itself reads the cache, and its builder knows the commit."""
    features, row, _ = HUB["piqa"]
    datasets.Dataset.from_list([row], features=Features(features)).to_parquet(str(tmp_path / "train.parquet"))
    folder = tmp_path / "cache" / "ybisk___piqa" / "default" / "0.0.0" / COMMIT  # as after a download
    Parquet(dataset_name="piqa", data_files=str(tmp_path / "train.parquet")).download_and_prepare(str(folder))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    calibration = load_calibration("piqa", tiny_tokenizer(), tokens=None)
    assert calibration.provenance["sources"][0]["revision"] == COMMIT


# --- packed blocks


def test_blocks_are_the_shuffled_documents_end_to_end(tmp_path):
    tokenizer = tiny_tokenizer()
    documents = [words(40 + number, number) for number in range(20)] + ["", "  "]
    path = write(tmp_path / "documents.jsonl", [{"text": text, "id": 1} for text in documents])

    calibration = load_calibration(path, tokenizer, tokens=96, block_size=16, seed=3)

    stream = []
    for index in order(22, seed=3):
        if documents[index].strip():
            stream += [int(word[1:]) for word in documents[index].split()] + [tokenizer.eos_token_id]
    blocks = [stream[start : start + 16] for start in range(0, 96, 16)]
    assert calibration.dataset["input_ids"][:] == blocks
    assert calibration.dataset["labels"][:] == blocks
    assert calibration.loss is language_modeling_loss
    kept = {"name": "documents.jsonl", "tokens": 96, "sequences": 6, "items": 6, "block_size": 16, "seed": 3}
    assert kept.items() <= calibration.provenance.items()
    assert calibration.provenance["sha256"] == digest(blocks)


def test_streamed_documents_fill_the_budget_to_the_token(hub):
    hub.rows["c4"] = [{"text": words(9, number), "timestamp": "", "url": ""} for number in range(50)]
    first, again, other = (
        load_calibration("c4", tiny_tokenizer(), tokens=128, block_size=32, seed=seed) for seed in (0, 0, 1)
    )
    assert [len(block) for block in first.dataset["input_ids"]] == [32] * 4
    assert first.provenance["tokens"] == first.provenance["sources"][0]["tokens"] == 128
    assert first.provenance == again.provenance
    assert first.provenance["sha256"] != other.provenance["sha256"]
    flat = [token for block in first.dataset["input_ids"] for token in block]
    allowed = {tuple(int(word[1:]) for word in row["text"].split()) for row in hub.rows["c4"]}
    whole = " ".join(map(str, flat)).split(" 2 ")[:-1]  # 2 is <eos>
    assert len(whole) == 12 and {tuple(map(int, document.split())) for document in whole} <= allowed


def test_running_text_is_cut_before_it_is_shuffled(hub):
    hub.rows["wikitext2"] = [{"text": words(11, number) if number % 3 else ""} for number in range(30)]
    text = [int(word[1:]) for row in hub.rows["wikitext2"] for word in row["text"].split()]
    calibration = load_calibration("wikitext2", tiny_tokenizer(), tokens=80, block_size=8, seed=5)
    expected = [text[at * 8 : at * 8 + 8] for at in order(len(text) // 8, seed=5)[:10]]
    assert calibration.dataset["input_ids"][:] == expected


# --- questions


def test_questions_are_whole_and_the_budget_is_kept(hub):
    hub.rows["openbookqa"] = [openbook(number, length=3 + number % 6) for number in range(60)]
    calibration = load_calibration("openbookqa", tiny_tokenizer(), tokens=500, block_size=16, seed=2)

    taken, total = [], 0
    for index in order(60, seed=2):
        cost = 4 * (3 + index % 6 + 1)
        if total + cost > 500:
            break
        taken, total = [*taken, index], total + cost
    assert 470 < total <= 500
    kept = {"tokens": total, "items": len(taken), "sequences": 4 * len(taken), "correct": len(taken)}
    assert kept.items() <= calibration.provenance.items()
    assert calibration.provenance["incorrect"] == 3 * len(taken)
    stems = [hub.rows["openbookqa"][index]["question_stem"] for index in taken]
    assert [item[0][:-1] for item in calibration.dataset["input_ids"]] == [
        [int(word[1:]) for word in stem.split()] for stem in stems
    ]
    assert calibration.provenance["sha256"] == digest([s for item in calibration.dataset["input_ids"] for s in item])


def test_margin_labels_carry_the_two_means(hub):
    hub.rows["openbookqa"] = [openbook(number, choices=2 + number % 4) for number in range(12)]
    calibration = load_calibration("openbookqa", tiny_tokenizer(), tokens=None)
    batch = calibration.collator([calibration.dataset[index] for index in range(12)])

    weights = decode_weights(batch["labels"])
    correct, incorrect = calibration.provenance["correct"], calibration.provenance["incorrect"]
    assert (correct, incorrect) == (12, sum(1 + number % 4 for number in range(12)))
    golds = [
        label == row["answerKey"]
        for row in (hub.rows["openbookqa"][index] for index in order(12))
        for label in row["choices"]["label"]
    ]
    expected = [1 / correct if gold else -1 / incorrect for gold in golds]
    torch.testing.assert_close(weights, torch.tensor(expected))
    assert calibration.loss is margin_loss
    targets = batch["labels"][:, 1:] != -100
    assert (targets.sum(1) == 1).all()  # one-token answers, and nothing of the prompt
    assert torch.equal(batch["labels"][:, 1:][targets], batch["input_ids"][:, 1:][targets])


def test_mixture_shares_one_budget_equally(hub):
    for name in MIXTURES["cmqa"]:
        hub.rows[name] = [HUB[name][1]] * 200
    hub.rows["boolq"] = hub.rows["boolq"][:5]  # runs out
    calibration = load_calibration("cmqa", tiny_tokenizer(), tokens=9_000, block_size=64)

    sources = {source["name"]: source for source in calibration.provenance["sources"]}
    assert list(sources) == list(MIXTURES["cmqa"])
    assert {call["split"] for call in hub.calls} == {"train"} and len(hub.calls) == 7
    costs = {name: source["tokens"] // source["records"] for name, source in sources.items()}
    assert sources["boolq"]["records"] == 5
    others = [source["tokens"] for name, source in sources.items() if name != "boolq"]
    assert max(others) - min(others) <= max(costs.values())
    total = sum(others) + sources["boolq"]["tokens"]
    assert total == calibration.provenance["tokens"] <= 9_000 < total + max(costs.values())


def test_other_objectives_of_a_decision_task(hub):
    hub.rows["openbookqa"] = [openbook(number) for number in range(6)]
    answers = load_calibration("openbookqa", tiny_tokenizer(), objective="completion", tokens=None)
    text = load_calibration("openbookqa", tiny_tokenizer(), objective="language_modeling", tokens=35, block_size=7)

    right = []
    for index in order(6):
        row = hub.rows["openbookqa"][index]
        gold = row["choices"]["text"][row["choices"]["label"].index(row["answerKey"])]
        right.append([int(word[1:]) for word in f"{row['question_stem']} {gold}".split()])
    assert answers.dataset["input_ids"][:] == right
    assert answers.dataset["labels"][:] == [[-100] * 5 + ids[5:] for ids in right]
    assert text.dataset["input_ids"][:] == [[*ids, 2] for ids in right[:5]]


# --- prompts and completions


class KeepGradients(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("accumulation", [1, 3])
def test_trainer_takes_the_calibration_as_it_is(tmp_path, accumulation):
    """From a file to the gradients of ``L+ - L-``; the oracle sees only the words."""
    rows = [
        {"prompt": words(4, number), "correct": [f" {words(2, number + 50)}"], "incorrect": wrong}
        for number, wrong in enumerate(
            [[" w5", " w6 w7 w8"], [" w9"], [" w10 w11"], [" w12", " w13", " w14"], [" w15"]]
        )
    ]
    tokenizer = tiny_tokenizer()
    calibration = load_calibration(write(tmp_path / "rows.jsonl", rows), tokenizer, tokens=None)
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=-(-5 // accumulation),
        gradient_accumulation_steps=accumulation,
        num_train_epochs=1,
        optim="sgd",
        learning_rate=0.0,
        max_grad_norm=0.0,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    keep = KeepGradients()
    Trainer(
        tiny_model(),
        arguments,
        train_dataset=calibration.dataset,
        data_collator=calibration.collator,
        compute_loss_func=calibration.loss,
        callbacks=[keep],
    ).train()

    model = tiny_model()
    sides = {}
    for side in ("correct", "incorrect"):
        means = []
        for row in rows:
            for answer in row[side]:
                ids = torch.tensor([[int(word[1:]) for word in (row["prompt"] + answer).split()]])
                labels = ids.clone()
                labels[:, :4] = -100
                means.append(model(input_ids=ids, labels=labels).loss)  # the model's own loss
        model.zero_grad()
        torch.stack(means).mean().backward()
        sides[side] = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    for name, gradient in keep.gradients.items():
        expected = sides["correct"][name] - sides["incorrect"][name]
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()), msg=name)


# --- what is refused, and what is skipped and counted


def test_unknown_name_lists_what_there_is():
    with pytest.raises(
        ValueError, match="unknown calibration data 'c5': choose one of arc_challenge, .*cmqa.*winogrande"
    ):
        load_calibration("c5", tiny_tokenizer())
    with pytest.raises(ValueError, match="unknown calibration data 'absent.jsonl'"):
        load_calibration("absent.jsonl", tiny_tokenizer())


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "c4",
            {"tokens": 1000},
            r"tokens \(1000\) must be a multiple of block_size \(256\), as blocks are full: use 1024",
        ),
        ("piqa", {"tokens": 0}, "tokens must be at least 1, got 0"),
        ("piqa", {"block_size": 1}, "block_size must be at least 2, got 1"),
        ("c4", {"tokens": None}, "c4 is streamed and practically endless"),
        (
            "c4",
            {"objective": "margin"},
            "c4 cannot be .* 'margin': choose one of language_modeling",
        ),
        ("gsm8k", {"objective": "margin"}, "gsm8k cannot .* choose one of completion, language_modeling"),
    ],
)
def test_impossible_requests_are_refused_before_anything_is_loaded(hub, name, options, message):
    with pytest.raises(ValueError, match=message):
        load_calibration(name, tiny_tokenizer(), **options)
    assert not hub.calls


@pytest.mark.parametrize(
    "use", [lambda tokenizer: load_calibration("c4", tokenizer), CandidateCollator], ids=["calibration", "collator"]
)
def test_a_tokenizer_without_a_pad_token_is_refused_before_anything_is_loaded(hub, use):
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match="the tokenizer has no pad token: set one"):
        use(tokenizer)
    assert not hub.calls


@pytest.mark.parametrize(
    ("rows", "tokens", "message"),
    [
        (1, 100, "gsm8k held only 6 of tokens=100 .*: lower tokens, or use tokens=None"),
        (1, 5, "gsm8k gave nothing for tokens=5"),
        (0, 100, "openai/gsm8k has no rows in 'train'"),
    ],
)
def test_too_little_data_is_refused(hub, rows, tokens, message):
    hub.rows["gsm8k"] = [{"question": "w5", "answer": "w6"}] * rows
    with pytest.raises(ValueError, match=message):
        load_calibration("gsm8k", tiny_tokenizer(), tokens=tokens)


@pytest.mark.parametrize(
    "name, changes, reason",
    [
        ("piqa", {"label": -1}, "label -1 is outside its 2 choices"),
        ("hellaswag", {"label": "4"}, "label 4 is outside its 4 choices"),
        ("hellaswag", {"label": ""}, "label '' is not a number"),
        ("winogrande", {"answer": "3"}, "label '3' is outside its choices '1' and '2'"),
        ("winogrande", {"sentence": "no gap"}, "sentence 'no gap' has no blank '_'"),
        ("arc_easy", {"answerKey": "E"}, r"label 'E' is outside its choices \['1', '2'\]"),
        ("medqa", {"answer_idx": "Z"}, "label 'Z' is outside its choices"),
        ("arc_easy", {"choices": {"text": ["sun"], "label": ["1"]}}, "the question has no incorrect candidate"),
        ("openbookqa", {"question_stem": None}, "no value in question_stem"),
    ],
)
def test_a_broken_row_is_named(hub, name, changes, reason):
    good = HUB[name][1]
    hub.rows[name] = [good, good, {**good, **changes}, good]
    with pytest.raises(ValueError, match=f"{name}, row 2: {reason}"):
        load_calibration(name, tiny_tokenizer(), tokens=None)


def test_skipped_rows_are_counted(hub):
    hub.rows["openbookqa"] = [openbook(number) for number in range(5)]
    hub.rows["openbookqa"][1]["choices"]["text"][2] = words(30)
    hub.rows["openbookqa"][3]["choices"]["text"][0] = "  "
    calibration = load_calibration("openbookqa", tiny_tokenizer(), tokens=None, block_size=16)
    (source,) = calibration.provenance["sources"]
    assert source["skipped"] == {"answer longer than block_size": 1, "empty answer": 1}
    assert (source["records"], calibration.provenance["items"]) == (3, 3)
    hub.rows["openbookqa"] = hub.rows["openbookqa"][3:4]
    with pytest.raises(ValueError, match=r"gave nothing .* \(skipped: .*'empty answer': 1"):
        load_calibration("openbookqa", tiny_tokenizer(), tokens=None)
