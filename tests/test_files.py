"""Local files as calibration data, and JSONL files of records."""

import json

import datasets
import numpy as np
import pytest

from gisp_hf.data import load_calibration
from gisp_hf.data.files import read_json_lines
from tests.test_encoding import CHAT
from tests.tiny import tiny_tokenizer


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def words(count, seed=0):
    numbers = np.random.default_rng(seed).integers(40, 64, count)  # one token each; the tokenizer splits w30 ... w39
    return " ".join(f"w{number}" for number in numbers)


def test_text_file_is_one_running_text(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("w5 w6\n\nw7\nw8 w9 w10 w11")
    calibration = load_calibration(str(path), tiny_tokenizer(), tokens=None, block_size=3)
    assert sorted(calibration.dataset["input_ids"][:]) == [[5, 6, 7], [8, 9, 10]]  # w11 fills no block


def test_parquet_is_read_like_json(tmp_path):
    rows = [{"text": words(20, number)} for number in range(8)]
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "a.parquet"))
    stored = load_calibration(str(tmp_path / "a.parquet"), tiny_tokenizer(), tokens=64, block_size=32)
    lines = load_calibration(write(tmp_path / "a.jsonl", rows), tiny_tokenizer(), tokens=64, block_size=32)
    assert stored.provenance["sha256"] == lines.provenance["sha256"]


@pytest.mark.parametrize(
    "row, reason",
    [
        ({"prompt": "w5", "correct": [" w6"], "incorrect": []}, "the question has no incorrect candidate: add one"),
        ({"prompt": "w5", "correct": [], "incorrect": [" w6"]}, "the question has no correct candidate"),
        ({"prompt": "w5", "correct": [" w6"], "incorrect": [" "]}, "completion ' ' is empty"),
        ({"prompt": "", "correct": [" w6"], "incorrect": [" w7"]}, "prompt '' has no token before completion"),
        ({"prompt": None, "correct": [" w6"], "incorrect": [" w7"]}, "no value in prompt"),
    ],
)
def test_a_broken_row_of_a_file_is_named(tmp_path, row, reason):
    good = {"prompt": "w5", "correct": [" w6"], "incorrect": [" w7"]}
    path = write(tmp_path / "own.jsonl", [good, row, good])
    with pytest.raises(ValueError, match=f"own.jsonl, row 1: {reason}"):
        load_calibration(path, tiny_tokenizer(), tokens=None)


def test_messages_in_a_file(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT
    path = write(tmp_path / "chat.jsonl", [{"prompt": [{"role": "user", "content": "w20"}], "completion": "w40 w41"}])
    unknown = 3  # both role names
    assert load_calibration(path, tokenizer, tokens=None).dataset[:] == {
        "input_ids": [[unknown, 9, 20, 2, unknown, 9, 40, 41, 2]],
        "labels": [[-100] * 6 + [40, 41, 2]],
    }


def test_an_empty_file_is_refused(tmp_path):
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(ValueError, match="empty.jsonl is empty"):
        load_calibration(str(tmp_path / "empty.jsonl"), tiny_tokenizer())


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"question": "w5", "answer": "w6"}, "own.jsonl: columns answer, question fit no schema"),
        ({"prompt": "w5", "completion": "w6", "text": "w7"}, "own.jsonl: columns .* fit more than one schema"),
    ],
)
def test_columns_that_fit_not_exactly_one_schema_are_refused(tmp_path, row, reason):
    with pytest.raises(ValueError, match=reason):
        load_calibration(write(tmp_path / "own.jsonl", [row]), tiny_tokenizer())


# --- JSONL


def test_json_lines_are_the_objects_in_order(tmp_path):
    rows = [{"a": 1}, {"b": [None, "x\u2028y"]}, {"c": {}}]
    path = tmp_path / "rows.jsonl"
    # raw U+2028 is valid in JSON and ends no line; so are empty lines between records, and a byte order mark
    path.write_text("\ufeff" + "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    assert read_json_lines(path) == rows
    assert read_json_lines(str(path), 2) == rows[:2]


def test_lines_beyond_the_limit_are_not_read(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\nnot json\n', encoding="utf-8")
    assert read_json_lines(tmp_path / "rows.jsonl", 1) == [{"a": 1}]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'{"a": 1}\nnot json\n', "rows.jsonl, line 2 is no JSON"),
        (b"[1]\n", "rows.jsonl, line 1 is no object but list"),
        (b"[" * 100_000, "rows.jsonl, line 1 is no JSON"),
        (b"\n \n", "rows.jsonl holds no records"),
        (b'{"a": "\xff"}', "rows.jsonl is not UTF-8 text"),
    ],
    ids=["no JSON", "no object", "too deep", "empty", "no UTF-8"],
)
def test_other_files_are_refused_by_name_and_line(tmp_path, content, reason):
    (tmp_path / "rows.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=reason):
        read_json_lines(tmp_path / "rows.jsonl")


def test_a_missing_file_is_named():
    with pytest.raises(FileNotFoundError, match="there is no file missing.jsonl"):
        read_json_lines("missing.jsonl")
