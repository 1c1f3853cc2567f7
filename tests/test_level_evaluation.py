import io
import json
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from gisp_hf.cli.main import main
from gisp_hf.evaluation import evaluate_levels, multiple_choice_accuracy, perplexity
from gisp_hf.hub import read_levels
from tests.runs import prune, tiny_config
from tests.tiny import tiny_model, tiny_tokenizer

QUESTIONS = [
    {"prompt": f"w{10 + i} w{20 + i}", "choices": [f" w{30 + i}", f" w{40 + i} w5"], "label": i % 2} for i in range(12)
]
ANSWERS = [{"prompt": "w5 w6", "completion": "w7 #### 12"}]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("eval")
    prune(tiny_model(), folder, config=tiny_config(num_steps=2, sparsity_levels=(0.2, 0.4)))
    torch.manual_seed(0)
    (folder / "text.txt").write_text(" ".join(f"w{i}" for i in torch.randint(4, 64, (300,)).tolist()))
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)) + "\n")
    (folder / "answers.jsonl").write_text("\n".join(map(json.dumps, ANSWERS)) + "\n")
    return folder


@pytest.fixture(scope="module")
def evaluated(run) -> tuple[Path, str]:
    """The run's folder after `gisp-hf eval`, and what that printed."""
    arguments = ["eval", str(run / "levels"), "--text", str(run / "text.txt"), "--window", "16", "32"]
    arguments += ["--questions", str(run / "questions.jsonl"), "--answers", str(run / "answers.jsonl")]
    output = io.StringIO()
    with redirect_stdout(output):
        assert main([*arguments, "--max-new-tokens", "8"]) == 0
    return run / "levels", output.getvalue()


def test_numbers_are_those_of_the_functions(run, evaluated) -> None:
    folder, _ = evaluated
    tokenizer = tiny_tokenizer()
    ids = torch.tensor(tokenizer((run / "text.txt").read_text())["input_ids"])
    for level in read_levels(folder):
        model = AutoModelForCausalLM.from_pretrained(folder / level.name)
        assert level.metrics["perplexity_16"] == perplexity(model, ids, window=16)
        assert level.metrics["perplexity_32"] == perplexity(model, ids, window=32)
        expected = multiple_choice_accuracy(model, tokenizer, QUESTIONS)
        assert level.metrics["accuracy"] == expected["accuracy"]
        assert level.metrics["accuracy_normalized"] == expected["accuracy_normalized"]


def test_numbers_are_printed(evaluated) -> None:
    folder, output = evaluated
    for level in read_levels(folder):
        assert f"{level.metrics['perplexity_16']:,.4f}" in output and level.name in output


def test_numbers_stay_with_the_levels(evaluated) -> None:
    folder, _ = evaluated
    for level in read_levels(folder):
        assert json.loads((folder / level.name / "metrics.json").read_text()) == dict(level.metrics)


def test_numbers_reach_the_list_of_levels(evaluated, capsys) -> None:
    assert main(["levels", str(evaluated[0])]) == 0
    assert "perplexity_16" in capsys.readouterr().out


def test_numbers_reach_new_cards(evaluated, capsys) -> None:
    folder, _ = evaluated
    assert main(["card", str(folder), "--new-cards"]) == 0
    assert f"{read_levels(folder)[-1].metrics['perplexity_16']:.4g}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to measure"),
        (["--text", "missing.txt"], "there is no text file missing.txt"),
        (["--questions", "missing.jsonl"], "there is no file missing.jsonl"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(run, arguments, message, capsys) -> None:
    assert main(["eval", str(run / "levels"), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("gisp-hf: error:") and error.count("\n") == 1


@pytest.mark.parametrize("argument", ["questions", "answers"])
def test_bad_records_name_their_line_before_a_model_is_loaded(run, tmp_path, argument) -> None:
    (tmp_path / "bad.jsonl").write_text('{"prompt": "w5"}\nnot json\n')
    with pytest.raises(ValueError, match="bad.jsonl, line 2 is no JSON"):
        evaluate_levels(str(run / "levels"), **{argument: str(tmp_path / "bad.jsonl")})


def test_questions_without_choices_are_refused(run, tmp_path) -> None:
    (tmp_path / "lacks.jsonl").write_text('{"prompt": "w5"}\n')
    with pytest.raises(ValueError, match="question 0 lacks"):
        list(evaluate_levels(str(run / "levels"), questions=str(tmp_path / "lacks.jsonl")))


def test_limit(run) -> None:
    questions = str(run / "questions.jsonl")
    rows = list(evaluate_levels(str(run / "levels"), questions=questions, limit=1))
    assert all(metrics["accuracy"] in (0.0, 1.0) for _, metrics in rows)
