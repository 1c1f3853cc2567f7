"""The distillation loss, checked against its definition, and in the Trainer."""

import math

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from gisp_hf.losses import Distillation, forward_kl
from tests.restoring import pruned_copy
from tests.tiny import VOCAB_SIZE, tiny_blocks, tiny_model


def random_case(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits of student and teacher (2, 5, 7), and labels of which some are no target."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(2, 5, 7, generator=generator).to(dtype) for _ in range(2))
    labels = torch.randint(0, 7, (2, 5), generator=generator)
    labels[0, 2] = labels[1, 3] = labels[1, 4] = -100
    return student, teacher, labels


def by_loops(student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor) -> tuple[float, int]:
    """The sum of the divergences of all targets, in Python's floats, and how many there are."""
    total, count = 0.0, 0
    for row in range(labels.shape[0]):
        for position in range(labels.shape[1] - 1):
            if labels[row, position + 1] == -100:
                continue
            s, t = student[row, position].tolist(), teacher[row, position].tolist()
            log_zs, log_zt = (math.log(sum(math.exp(value) for value in values)) for values in (s, t))
            for one, other in zip(s, t):
                log_q, log_p = one - log_zs, other - log_zt
                total += math.exp(log_p) * (log_p - log_q)
            count += 1
    return total, count


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_is_its_definition(dtype) -> None:
    student, teacher, labels = random_case(dtype)
    total, count = by_loops(student, teacher, labels)
    assert count == 5
    found = forward_kl({"logits": student}, {"logits": teacher}, labels)
    assert found.dtype == torch.float32 and found.item() == pytest.approx(total / count, rel=1e-5)
    assert forward_kl((student,), (teacher,), labels, 20).item() == pytest.approx(total / 20, rel=1e-5)


def test_the_gradient_is_the_difference_of_the_distributions() -> None:
    student, teacher, labels = random_case()
    student.requires_grad_()
    teacher.requires_grad_()
    forward_kl((student,), (teacher,), labels).backward()
    is_target = torch.zeros(2, 5, dtype=torch.bool)
    is_target[:, :-1] = labels[:, 1:] != -100
    expected = (student.softmax(-1) - teacher.softmax(-1)) * is_target[..., None] / is_target.sum()
    torch.testing.assert_close(student.grad, expected.detach())
    assert teacher.grad is None
    numbers = student.detach()
    for at in ((0, 0, 3), (1, 1, 6), (1, 4, 2)):  # the last predicts nothing
        ends = []
        for step in (1e-2, -1e-2):
            moved = numbers.clone()
            moved[at] += step
            total, count = by_loops(moved, teacher, labels)
            ends.append(total / count)
        assert student.grad[at].item() == pytest.approx((ends[0] - ends[1]) / 2e-2, abs=1e-4)


def test_a_teacher_that_is_the_student_gives_zero() -> None:
    student, _, labels = random_case()
    student.requires_grad_()
    loss = forward_kl((student,), (student.detach(),), labels)
    loss.backward()
    assert abs(loss.item()) < 1e-6 and student.grad.abs().max() < 1e-6


def test_wrong_input_is_refused() -> None:
    student, teacher, labels = random_case()
    with pytest.raises(ValueError, match="must both be"):
        forward_kl((student,), (teacher[..., :-1],), labels)
    with pytest.raises(ValueError, match="must both be"):
        forward_kl((student[:, -1:],), (teacher[:, -1:],), labels)
    with pytest.raises(ValueError, match="no target among labels"):
        forward_kl((student,), (teacher,), torch.full_like(labels, -100))


# ---- the Trainer -----------------------------------------------------------------------------------------------------


class KeepGradients(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def uneven_blocks() -> list[dict[str, torch.Tensor]]:
    blocks = tiny_blocks(8)
    for number, block in enumerate(blocks):
        block["labels"][: 2 * number] = -100
    return blocks


@pytest.mark.parametrize(("batch_size", "accumulation"), [(8, 1), (4, 2), (1, 8)])
def test_a_step_does_not_depend_on_its_micro_batches(tmp_path, batch_size, accumulation) -> None:
    teacher = tiny_model()
    student, wanted = pruned_copy(teacher), pruned_copy(teacher)
    blocks = uneven_blocks()
    ids, labels = (torch.stack([block[key] for block in blocks]) for key in ("input_ids", "labels"))
    sums = [
        by_loops(wanted(row[None]).logits, teacher(row[None]).logits, row_labels[None])
        for row, row_labels in zip(ids, labels)
    ]
    expected = sum(total for total, _ in sums) / sum(count for _, count in sums)
    forward_kl(wanted(ids), teacher(ids), labels).backward()
    keep = KeepGradients()
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        max_grad_norm=0.0,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
    )
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    with Distillation(student, teacher) as loss:
        trainer = Trainer(student, arguments, train_dataset=blocks, compute_loss_func=loss, callbacks=[keep])
        found = trainer.train().training_loss
    assert found == pytest.approx(expected, rel=1e-4)
    for name, parameter in wanted.named_parameters():
        torch.testing.assert_close(keep.found[name], parameter.grad, rtol=1e-3, atol=1e-5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    assert not any(parameter.grad is not None for parameter in teacher.parameters())


def test_the_hook_is_gone_afterwards() -> None:
    teacher = tiny_model()
    student = pruned_copy(teacher)
    with Distillation(student, teacher) as loss:
        ids = torch.stack([block["input_ids"] for block in tiny_blocks(2)])
        outputs = student(input_ids=ids)
        assert loss(outputs, ids).item() > 0
        with pytest.raises(ValueError, match="has not run since"):
            loss(outputs, ids)
    student(input_ids=ids)
    assert not student._forward_pre_hooks


def test_another_vocabulary_is_refused() -> None:
    student = tiny_model()
    with pytest.raises(ValueError, match=f"the teacher has 80 entries in its vocabulary and the student {VOCAB_SIZE}"):
        Distillation(student, tiny_model(vocab_size=80))
    assert not student._forward_pre_hooks
