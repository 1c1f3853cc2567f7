"""The losses, checked against gradients that are computed one unpadded sequence at a time."""

import os
import socket
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from gisp_hf.data.encoding import CandidateCollator
from gisp_hf.losses.objectives import (
    completion_losses,
    decode_weights,
    encode_weight,
    language_modeling_loss,
    margin_loss,
)
from tests.tiny import VOCAB_SIZE, tiny_model, tiny_tokenizer


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Threads only get into each other's way in models this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Answer(NamedTuple):
    ids: list[int]
    start: int  # of the completion
    correct: bool


# Correct and incorrect answers of each question: uneven on purpose.
SIDES = ((1, 1), (1, 3), (2, 1), (1, 4), (1, 2), (3, 2), (1, 1), (1, 5))


def make_questions(sides=SIDES, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def number(low, high):
        return int(torch.randint(low, high, (1,), generator=generator))

    questions = []
    for correct, incorrect in sides:
        prompt = [number(3, VOCAB_SIZE) for _ in range(number(2, 9))]
        answers = [[number(3, VOCAB_SIZE) for _ in range(number(1, 6))] for _ in range(correct + incorrect)]
        questions.append([Answer(prompt + ids, len(prompt), at < correct) for at, ids in enumerate(answers)])
    return questions


class Items(Dataset):
    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


def masked(answer):
    return [-100] * answer.start + answer.ids[answer.start :]


def margin_items(questions):
    answers = [answer for question in questions for answer in question]
    correct = sum(answer.correct for answer in answers)
    counts = {True: correct, False: len(answers) - correct}
    return Items(
        [
            {
                "input_ids": [answer.ids for answer in question],
                "labels": [
                    [encode_weight(correct=a.correct, count=counts[a.correct]), *masked(a)[1:]] for a in question
                ],
            }
            for question in questions
        ]
    )


def completion_items(questions):
    return Items([{"input_ids": a.ids, "labels": masked(a)} for question in questions for a in question])


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def answer_losses(model, answer):
    """Cross-entropy of each completion token, from the definition."""
    logits = model(input_ids=torch.tensor([answer.ids])).logits[0]
    log_probabilities = torch.log_softmax(logits, dim=-1)
    return torch.stack([-log_probabilities[at - 1, answer.ids[at]] for at in range(answer.start, len(answer.ids))])


@cache
def margin_oracle():
    """g+ - g- of `make_questions()`, each side in a backward pass of its own."""
    return margin_gradients(tiny_model(), make_questions())


@cache
def token_oracle():
    """Gradient of the mean over all completion tokens of `make_questions()`."""
    model = tiny_model()
    losses = [answer_losses(model, answer) for question in make_questions() for answer in question]
    return gradients(model, torch.cat(losses).mean())


def margin_gradients(model, questions):
    answers = [answer for question in questions for answer in question]
    sides = []
    for correct in (True, False):
        means = [answer_losses(model, answer).mean() for answer in answers if answer.correct is correct]
        sides.append(gradients(model, torch.stack(means).mean()))
    return {name: sides[0][name] - sides[1][name] for name in sides[0]}


class KeepGradients(TrainerCallback):
    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        model = getattr(model, "module", model)  # DDP wraps it
        self.steps.append({name: p.grad.detach().clone() for name, p in model.named_parameters()})


def train(model, items, loss, folder, *, batch_size, accumulation, workers=0):
    """Gradients of each optimizer step of one epoch; the weights do not move."""
    keep = KeepGradients()
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        num_train_epochs=1,
        optim="sgd",
        learning_rate=0.0,
        max_grad_norm=0.0,
        dataloader_num_workers=workers,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    Trainer(
        model,
        arguments,
        train_dataset=items,
        data_collator=CandidateCollator(tiny_tokenizer()),
        compute_loss_func=loss,
        callbacks=[keep],
    ).train()
    return keep.steps


def assert_same_gradients(found, expected, scale=1.0):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        size = float(gradient.abs().max())
        torch.testing.assert_close(found[name], gradient * scale, rtol=1e-4, atol=1e-5 * size, msg=name)


def one_batch(items):
    return CandidateCollator(tiny_tokenizer())([items[index] for index in range(len(items))])


# --- language modelling


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_language_modeling_is_the_mean_over_targets_in_float32(dtype):
    generator = torch.Generator().manual_seed(0)
    logits = (5 * torch.randn(3, 7, 11, generator=generator)).to(dtype)
    labels = torch.randint(0, 11, (3, 7), generator=generator)
    labels[0, :4] = labels[2, 5:] = -100

    loss = language_modeling_loss({"logits": logits}, labels)

    log_probabilities = logits.double().log_softmax(-1)
    expected = [
        -log_probabilities[row, at - 1, labels[row, at]]
        for row in range(3)
        for at in range(1, 7)
        if labels[row, at] != -100
    ]
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), torch.stack(expected).mean(), rtol=1e-6, atol=0)
    torch.testing.assert_close(language_modeling_loss((logits,), labels), loss)  # return_dict=False


def test_micro_batches_add_up_to_the_step():
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(5, 6, 11, generator=generator)
    labels = torch.randint(0, 11, (5, 6), generator=generator)
    labels[0, :5] = labels[3] = -100  # a micro-batch without any target is in order
    count = labels[:, 1:].ne(-100).sum()

    parts = [language_modeling_loss((logits[at : at + 1],), labels[at : at + 1], count) for at in range(5)]

    torch.testing.assert_close(sum(parts), language_modeling_loss((logits,), labels))
    assert parts[3] == 0


@pytest.mark.slow
@pytest.mark.parametrize("batch_size, accumulation", [(64, 1), (10, 4), (3, 16)])
def test_trainer_token_mean_is_exact_under_accumulation(tmp_path, batch_size, accumulation):
    (found,) = train(
        tiny_model(),
        completion_items(make_questions()),
        language_modeling_loss,
        tmp_path,
        batch_size=batch_size,
        accumulation=accumulation,
    )

    assert_same_gradients(found, token_oracle())


# --- margin


def test_margin_is_the_difference_of_the_two_means():
    model, questions = tiny_model(), make_questions()
    batch = one_batch(margin_items(questions))
    labels = batch.pop("labels")

    with torch.no_grad():
        outputs = model(**batch)
        loss = margin_loss(outputs, labels)
        answers = [answer for question in questions for answer in question]
        means = {side: [answer_losses(model, a).mean() for a in answers if a.correct is side] for side in (True, False)}

    expected = torch.stack(means[True]).mean() - torch.stack(means[False]).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    rows = torch.stack([answer_losses(model, a).mean() for a in answers])
    torch.testing.assert_close(completion_losses(outputs, labels), rows, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cut", [1, 2, 7, 17])
def test_margin_does_not_care_where_rows_are_cut(cut):
    """Rows may be sliced anywhere, as Accelerate does when it dispatches batches, and in the middle of a question."""
    batch = one_batch(margin_items(make_questions()))
    labels, rows = batch["labels"], len(batch["labels"])
    logits = torch.randn(*labels.shape, 11, generator=torch.Generator().manual_seed(2))
    labels = torch.where((labels >= 11) & (labels < VOCAB_SIZE), 3, labels)

    whole = margin_loss((logits,), labels, 3)
    parts = [margin_loss((logits[at : at + cut],), labels[at : at + cut], 99) for at in range(0, rows, cut)]

    torch.testing.assert_close(sum(parts), whole)


@pytest.mark.slow
@pytest.mark.parametrize(
    "batch_size, accumulation, workers", [(8, 1, 0), (2, 4, 0), (3, 3, 0), (1, 8, 0), (2, 4, 1)], ids=str
)
def test_trainer_margin_is_exact_under_accumulation(tmp_path, batch_size, accumulation, workers):
    (found,) = train(
        tiny_model(),
        margin_items(make_questions()),
        margin_loss,
        tmp_path,
        batch_size=batch_size,
        accumulation=accumulation,
        workers=workers,
    )

    assert_same_gradients(found, margin_oracle())


def test_a_step_over_half_the_questions_gives_its_share(tmp_path):
    questions = make_questions([(1, 2)] * 8)

    steps = train(tiny_model(), margin_items(questions), margin_loss, tmp_path, batch_size=2, accumulation=2)

    whole = margin_gradients(tiny_model(), questions)
    assert len(steps) == 2
    assert_same_gradients({name: steps[0][name] + steps[1][name] for name in whole}, whole)


def run_one_process(folder):
    """What each of the two processes of the test below does."""
    questions = make_questions()
    for name, items, loss, batch_size in (
        ("margin", margin_items(questions), margin_loss, 2),
        ("tokens", completion_items(questions), language_modeling_loss, 3),
    ):
        (found,) = train(
            tiny_model(), items, loss, folder, batch_size=batch_size, accumulation=5 if name == "tokens" else 2
        )
        if os.environ["RANK"] == "0":
            save_file(found, f"{folder}/{name}.safetensors")


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    questions = make_questions()
    assert sum(map(len, questions)) == 30  # 2 processes x 3 rows x 5 micro-batches: no row is repeated
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", f"from tests.test_objectives import *; run_one_process({str(tmp_path)!r})"]
    root = Path(__file__).parents[1]
    processes = [
        subprocess.Popen(
            command,
            cwd=root,
            env={**os.environ, **common, "RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in ("0", "1")
    ]
    try:
        logs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(logs)

    assert_same_gradients(load_file(tmp_path / "margin.safetensors"), margin_oracle())
    assert_same_gradients(load_file(tmp_path / "tokens.safetensors"), token_oracle())


def test_weights_survive_the_integer_layout():
    counts = [1, 2, 100, 12_345, 1_000_000]  # 100: -100 is no weight's code, though it marks what is no target
    codes = [encode_weight(correct=correct, count=count) for correct in (True, False) for count in counts]
    labels = torch.full((len(codes), 3), -100)
    labels[:, 0] = torch.tensor(codes)

    expected = torch.tensor([1 / count for count in counts] + [-1 / count for count in counts])
    assert decode_weights(labels).tolist() == expected.tolist()
    assert -100 not in codes


# --- a loss of the user's own


def preference_loss(outputs, labels, num_items_in_batch=None):
    """Of each correct/incorrect pair of rows: -log sigmoid(how much likelier the correct one is), summed."""
    losses, weights = completion_losses(outputs, labels), decode_weights(labels)
    correct, incorrect = losses[weights > 0], losses[weights < 0]
    return -F.logsigmoid(incorrect - correct).sum()


def test_a_users_own_loss_goes_through_the_same_trainer(tmp_path):
    questions = make_questions([(1, 1)] * 6)
    model = tiny_model()
    terms = []
    for good, bad in questions:
        gap = answer_losses(model, bad).mean() - answer_losses(model, good).mean()
        terms.append(-torch.log(torch.sigmoid(gap)))
    expected = gradients(model, torch.stack(terms).sum())

    (found,) = train(tiny_model(), margin_items(questions), preference_loss, tmp_path, batch_size=2, accumulation=3)

    assert_same_gradients(found, expected)


# --- what is refused


def test_masked_labels_are_refused():
    logits, labels = torch.zeros(2, 4, 5), torch.full((2, 4), -100)
    labels[:, 0] = 3  # position 0 is never a target
    with pytest.raises(ValueError, match=r"no target among labels of shape \(2, 4\)"):
        language_modeling_loss((logits,), labels)
    with pytest.raises(ValueError, match="no target among labels"):
        language_modeling_loss((logits,), labels, torch.tensor(0))
    labels[0, 2] = 1
    with pytest.raises(ValueError, match="row 1 of the batch has no completion token"):
        completion_losses((logits,), labels)


def test_labels_without_weights_are_refused():
    labels = torch.tensor([[encode_weight(correct=True, count=2), 3], [-100, 3]])
    with pytest.raises(ValueError, match=r"labels\[1, 0\] is -100, which is no candidate weight"):
        margin_loss((torch.zeros(2, 2, 5),), labels)
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        encode_weight(correct=True, count=0)


def test_logits_of_another_length_are_refused():
    with pytest.raises(ValueError, match=r"logits \(2, 3, 5\) must be .* for labels \(2, 4\)"):
        language_modeling_loss((torch.zeros(2, 3, 5),), torch.zeros(2, 4, dtype=torch.long))
