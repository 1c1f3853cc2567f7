"""Calibration by the model's own answers: generated, cached, given anew."""

import json

import pytest
import torch

from gisp_hf import GISPPruner
from gisp_hf.data import AnswerSettings, load_calibration
from gisp_hf.data.self_answers import generate
from gisp_hf.training.regenerate import RegenerateAnswers
from tests.runs import make_trainer, tiny_config
from tests.test_distributed import launch
from tests.tiny import tiny_model, tiny_tokenizer

PROMPTS = [" ".join(f"w{4 + (7 * row + step) % 50}" for step in range(2 + row % 4)) for row in range(8)]
SETTINGS = AnswerSettings(max_new_tokens=6, batch_size=3)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt, "completion": " w9"}) + "\n" for prompt in PROMPTS))
    return path


def greedy(model, ids: list[int], count: int) -> list[int]:
    """The definition: the most likely token, again and again, up to the end token."""
    answer: list[int] = []
    while len(answer) < count and answer[-1:] != [2]:
        with torch.no_grad():
            answer.append(int(model(torch.tensor([ids + answer])).logits[0, -1].argmax()))
    return answer


def load(file, model, **options):
    settings = AnswerSettings(**{"max_new_tokens": 6, "batch_size": 3, **options})
    return load_calibration(str(file), tiny_tokenizer(), objective="self", model=model, answers=settings, block_size=16)


def test_answers_are_the_most_likely_tokens_and_prompts_no_targets(file) -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    calibration = load(file, model)
    assert len(calibration.dataset) == len(PROMPTS)
    seen = []
    for item, prompt in zip(calibration.dataset, calibration.dataset.prompts):
        assert item["input_ids"][: len(prompt)] == prompt and item["labels"][: len(prompt)] == [-100] * len(prompt)
        answer = item["input_ids"][len(prompt) :]
        assert item["labels"][len(prompt) :] == answer == greedy(model, prompt, 6)
        seen.append(tokenizer.decode(prompt))
    assert sorted(seen) == sorted(PROMPTS)
    facts = calibration.provenance
    assert facts["objective"] == "self" and facts["answers"]["max_new_tokens"] == 6
    answered = sum(len(answer) for answer in calibration.dataset.answers)
    assert facts["answers"]["rounds"][0]["answer_tokens"] == answered
    assert facts["tokens"] == answered + sum(map(len, calibration.dataset.prompts))


def test_an_answer_ends_with_its_end_token() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    prompts = [[5, 6, 7], [9], [11, 12]]
    plain = generate(model, prompts, tokenizer, settings=SETTINGS, seed=0)
    model.generation_config.eos_token_id = plain[1][2]
    ended = generate(model, prompts, tokenizer, settings=SETTINGS, seed=0)
    end = plain[1].index(plain[1][2])
    assert ended[1] == plain[1][: end + 1]


def test_sampling_is_seeded_and_leaves_the_random_numbers_alone(file) -> None:
    model = tiny_model()
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    first = load(file, model, temperature=1.0).dataset.answers
    assert torch.equal(torch.rand(2), expected)
    assert load(file, model, temperature=1.0).dataset.answers == first
    assert load(file, model).dataset.answers != first
    assert not model.training


def test_the_cache_answers_for_the_same_model_only(file, tmp_path, monkeypatch) -> None:
    cache = tmp_path / "cache"
    first = load(file, tiny_model(), cache_dir=cache).dataset.answers
    stored = json.loads(next(cache.iterdir()).read_text())
    assert stored["answers"] == first and stored["provenance"]["max_new_tokens"] == 6
    monkeypatch.setattr("gisp_hf.data.self_answers.generate", lambda *_, **__: pytest.fail("generated again"))
    assert load(file, tiny_model(), cache_dir=cache).dataset.answers == first
    with pytest.raises(pytest.fail.Exception, match="generated again"):
        load(file, tiny_model(seed=1), cache_dir=cache)
    path = next(cache.iterdir())
    path.write_text(json.dumps({**stored, "answers": [["x"]]}))
    with pytest.raises(ValueError, match="holds no answers; remove it"):
        load(file, tiny_model(), cache_dir=cache)


def run(file, folder, *, every: float | None, kept=None, **arguments):
    model = tiny_model()
    calibration = load(file, model)
    pruner = GISPPruner(tiny_config(method="gisp-activation"), folder / "levels")
    options = {"train_dataset": calibration.dataset, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
    trainer = make_trainer(model, folder, pruner=pruner, **options, **arguments)
    trainer.data_collator, trainer.compute_loss_func = calibration.collator, calibration.loss
    callback = None
    if every is not None:
        callback = RegenerateAnswers(pruner, calibration.dataset, every=every, folder=kept)
        trainer.add_callback(callback)
    return trainer, pruner, calibration, callback


def test_the_pruned_model_answers_anew_at_milestones(file, tmp_path) -> None:
    trainer, pruner, calibration, _ = run(file, tmp_path, every=0.2, kept=tmp_path / "answers")
    before = calibration.dataset.answers
    trainer.train()
    rounds = calibration.provenance["answers"]["rounds"]
    assert [round(entry["sparsity"], 1) for entry in rounds] == [0.0, 0.2, 0.4]
    assert calibration.dataset.answers != before and len(calibration.dataset) == len(before)
    # The last answers are those of the level of 40 %.
    from gisp_hf import load_level

    tiny_model().save_pretrained(tmp_path / "base")
    level = load_level(tmp_path / "levels", sparsity=rounds[-1]["sparsity"], base_model=tmp_path / "base")
    expected = generate(level, calibration.dataset.prompts, tiny_tokenizer(), settings=SETTINGS, seed=0)
    assert calibration.dataset.answers == expected
    assert pruner.trajectory.calibration == {}


@pytest.mark.slow
def test_every_process_gets_the_answers_of_the_first(tmp_path) -> None:
    answers = [[[5, 6, 7], [], [8]], [[9], [9, 9], []]]
    result = launch("answers", tmp_path, processes=2, answers=answers)
    assert result.returncode == 0, result.stderr
    assert [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)] == [answers[0]] * 2


def test_without_a_pruner_and_under_fsdp_it_is_refused(file, tmp_path, monkeypatch) -> None:
    trainer, pruner, calibration, callback = run(file, tmp_path, every=0.2)
    with pytest.raises(ValueError, match="has no GISPPruner; start it by gisp_hf.prune"):
        RegenerateAnswers(None, calibration.dataset).on_train_begin(trainer.args, trainer.state, trainer.control)
    monkeypatch.setattr("gisp_hf.training.regenerate.will_shard", lambda args, model: True)
    with pytest.raises(ValueError, match="FSDP shards the model over all of them; use DDP or a single process"):
        callback.on_train_begin(trainer.args, trainer.state, trainer.control, model=trainer.model)


@pytest.mark.slow
def test_a_run_that_goes_on_reads_its_answers(file, tmp_path) -> None:
    kept = tmp_path / "answers"
    trainer, whole, calibration, _ = run(file, tmp_path, every=0.2, kept=kept, save_strategy="steps", save_steps=1)
    trainer.train()
    for number in (4, 5):
        folder = tmp_path / "trainer" / f"checkpoint-{number}"
        for path in sorted(folder.rglob("*")):
            path.unlink()
        folder.rmdir()
    again, resumed, data, callback = run(file, tmp_path, every=0.2, kept=kept, save_strategy="steps", save_steps=1)
    again.train(resume_from_checkpoint=True)
    assert callback.done == 2 and data.dataset.answers == calibration.dataset.answers
    assert all(torch.equal(a, b) for a, b in zip(resumed.trajectory.order, whole.trajectory.order))
    lost, *_ = run(file, tmp_path, every=0.2, kept=tmp_path / "elsewhere", save_strategy="steps", save_steps=1)
    with pytest.raises(ValueError, match="are not in .*elsewhere"):
        lost.train(resume_from_checkpoint=str(tmp_path / "trainer" / "checkpoint-4"))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"model": None}, "give model="),
        ({"answers": AnswerSettings(max_new_tokens=16)}, "leaves no room for a prompt in block_size=16"),
    ],
)
def test_requests_that_cannot_be_met(options, message, file) -> None:
    options = {"model": tiny_model(), "answers": SETTINGS, **options}
    with pytest.raises(ValueError, match=message):
        load_calibration(str(file), tiny_tokenizer(), objective="self", block_size=16, **options)


def test_values_out_of_range_and_files_without_prompts(tmp_path) -> None:
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1, got 0"):
        AnswerSettings(max_new_tokens=0)
    with pytest.raises(ValueError, match="temperature must be 0"):
        AnswerSettings(temperature=-1)
    with pytest.raises(ValueError, match=r"every must lie in \(0, 1\), got 10"):
        RegenerateAnswers(None, None, every=10)
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "w4 w5"}\n')
    with pytest.raises(ValueError, match="has columns text; objective='self' needs prompt"):
        load_calibration(str(path), tiny_tokenizer(), objective="self", model=tiny_model())
