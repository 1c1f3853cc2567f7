"""The task recipes' own functions, on a tiny model and local data: everything but the size is real."""

import json
import random
import statistics
import sys

import pytest
import torch

from gisp_hf import GISPConfig
from gisp_hf.data import load_calibration
from gisp_hf.pruning.trajectory import Trajectory
from recipes import prune_multiple_choice, prune_reasoning
from tests.tiny import tiny_model, tiny_tokenizer

CONFIG = GISPConfig(num_steps=3, protect_first=1, sparsity_levels=(0.2, 0.4))


def make_articles(count: int) -> list[str]:
    """Articles of three paragraphs; the words of no two articles are the same."""
    width = 60 // count
    generator = random.Random(0)
    return [
        "\n\n".join(
            " ".join(f"w{4 + width * article + generator.randrange(width)}" for _ in range(25)) for _ in range(3)
        )
        for article in range(count)
    ]


def article_of(text: str, *, count: int) -> set[int]:
    return {(int(word[1:]) - 4) // (60 // count) for word in text.split()}


def test_questions_have_one_right_choice_and_wrong_ones_from_other_articles() -> None:
    questions = prune_multiple_choice.make_questions(make_articles(6), count=30, prompt_words=4, choice_words=3)
    assert len(questions) == 30
    for question in questions:
        (own,) = article_of(question["prompt"], count=6)
        articles = [article_of(choice, count=6) for choice in question["choices"]]
        assert articles[question["label"]] == {own}
        assert len(set.union(*articles)) == len(question["choices"]) == 4
    assert {question["label"] for question in questions} == {0, 1, 2, 3}
    with pytest.raises(ValueError, match="6 articles hold 54 passages of 7 words in 6 of them; 55 in at least 4"):
        prune_multiple_choice.make_questions(make_articles(6), count=55, prompt_words=4, choice_words=3)


@pytest.mark.slow
def test_multiple_choice_recipe_measures_both_objectives(tmp_path, capsys) -> None:
    sizes = {"prompt_words": 4, "choice_words": 3}
    articles = make_articles(6)
    torch.manual_seed(0)
    results = prune_multiple_choice.run(
        tiny_model(),
        tiny_tokenizer(),
        calibration_questions=prune_multiple_choice.make_questions(articles, count=54, **sizes),
        test_questions=prune_multiple_choice.make_questions(articles[::-1], count=20, **sizes),
        held_out=torch.randint(4, 64, (512,)),
        output_dir=tmp_path / "mc",
        config=CONFIG,
        tokens=256,
        seeds=(0, 1),
        keep_checkpoints=True,
    )
    assert len(results["runs"]) == 1 + 2 * 2 * 2
    budgets = {(entry["objective"], entry["seed"]): entry["tokens"] for entry in results["calibration"]}
    assert budgets["language_modeling", 0] == 256
    assert 256 - 14 < budgets["margin", 0] <= 256  # whole questions: two candidates of 7 tokens
    assert all(entry["correct"] == entry["incorrect"] for entry in results["calibration"] if "correct" in entry)
    assert results["calibration"][0]["sha256"] != results["calibration"][2]["sha256"]

    rows = {(row["objective"], row["level"]): row for row in results["rows"]}
    values = [row["accuracy"] for row in results["runs"] if (row["objective"], row["level"]) == ("margin", 0.4)]
    assert rows["margin", 0.4]["accuracy"] == pytest.approx(statistics.fmean(values))
    assert rows["margin", 0.4]["accuracy_std"] == pytest.approx(statistics.stdev(values))
    assert rows["dense", 0.0]["accuracy_std"] is None
    assert rows["dense", 0.0]["removed_alike"] is None
    assert json.loads((tmp_path / "mc" / "results.json").read_text()) == results
    assert (tmp_path / "mc" / "results.md").read_text().strip() in capsys.readouterr().out
    assert (tmp_path / "mc" / "accuracy.png").stat().st_size > 10_000

    # the two objectives are told apart down to what they remove
    orders = [Trajectory.load(tmp_path / "mc" / f"{name}-seed0").order for name in prune_multiple_choice.OBJECTIVES]
    assert any(not torch.equal(one, other) for one, other in zip(*orders))

    # how far the seeds agree, counted here one by one
    pair = [Trajectory.load(tmp_path / "mc" / f"margin-seed{seed}") for seed in (0, 1)]
    one, other = (
        {
            (number, index)
            for number, (block, kept) in enumerate(zip(trajectory.layout.blocks, trajectory.kept(0.4)))
            for index in set(range(block.size)) - set(kept.tolist())
        }
        for trajectory in pair
    )
    assert rows["margin", 0.4]["removed_alike"] == pytest.approx(2 * len(one & other) / (len(one) + len(other)))
    assert prune_multiple_choice.removed_alike([pair[0], pair[0]], 0.4) == 1


def make_sums(count: int) -> list[dict[str, str]]:
    return [{"prompt": f"w{4 + i} w{5 + i}", "completion": f" w{6 + i} #### {i}"} for i in range(count)]


@pytest.mark.slow
def test_reasoning_recipe_runs_as_its_header_says(tmp_path, monkeypatch, capsys) -> None:
    for name, count in (("train", 24), ("test", 5)):
        lines = "\n".join(map(json.dumps, make_sums(count)))
        (tmp_path / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    command = ["--model", "model", "--calibration", "train.jsonl", "--test", "test.jsonl", "--output-dir", "out"]
    sizes = ["--tokens", "100", "--num-steps", "2", "--levels", "0.2", "0.4", "--max-new-tokens", "4"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["prune_reasoning", *command, *sizes])
    prune_reasoning.main()
    rows = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [row["level"] for row in rows] == ["dense", "sparsity-0.20", "sparsity-0.40"]
    assert all(row["exact_match_strict"] == 0 for row in rows)  # a model of w4 ... w63 writes no number behind ####
    assert (tmp_path / "out" / "results.md").read_text().strip() in capsys.readouterr().out
    calibration = Trajectory.load(tmp_path / "out").calibration
    assert (calibration["objective"], calibration["name"]) == ("completion", "train.jsonl")
    assert calibration["tokens"] <= 100


def test_reasoning_takes_the_loss_on_the_answers_only(tmp_path) -> None:
    file = tmp_path / "train.jsonl"
    file.write_text("\n".join(map(json.dumps, make_sums(4))), encoding="utf-8")
    calibration = load_calibration(str(file), tiny_tokenizer(), objective="completion", tokens=None)
    for item in calibration.dataset:
        assert item["labels"][:2] == [-100, -100] and item["labels"][2:] == item["input_ids"][2:]


def test_reasoning_refuses_files_without_answers(tmp_path) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text('{"prompt": "w5", "completion": "#### 1"}\n{"prompt": "w5"}\n', encoding="utf-8")
    with pytest.raises(ValueError, match="bad.jsonl, record 1: prompt and completion are needed"):
        prune_reasoning.load_records(str(file))
    assert len(prune_reasoning.load_records(str(file), count=1)) == 1
    file.write_text("\n", encoding="utf-8")
    with pytest.raises(ValueError, match="bad.jsonl holds no record"):
        prune_reasoning.load_records(str(file))
