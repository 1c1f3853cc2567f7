"""The chunked loss against the model's own, in training and evaluation mode, alone and in a run."""

import pytest
import torch
from torch.nn import functional as F
from transformers import Trainer
from transformers.trainer_utils import IntervalStrategy

from gisp_hf import GISPPruner
from gisp_hf.losses import ChunkedLoss
from gisp_hf.losses.chunked import chunked_cross_entropy
from tests.runs import make_trainer, prune, tiny_config
from tests.tiny import VOCAB_SIZE, tiny_blocks, tiny_model


def batch() -> dict[str, torch.Tensor]:
    ids = torch.stack([block["input_ids"] for block in tiny_blocks(3)])
    labels = ids.clone()
    labels[0, :7] = -100
    return {"input_ids": ids, "labels": labels}


def attributes(model) -> tuple[dict, dict]:
    return dict(vars(model)), dict(vars(model.lm_head))


def own_loss(logits, labels, vocab_size, **kwargs) -> torch.Tensor:
    return 2 * F.cross_entropy(logits.flatten(0, 1), labels.flatten())


# --- the function


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_sum_and_gradient_equal_float64(dtype, bias) -> None:
    """The loss stays in float32 with bfloat16 inputs: that of a step must not be rounded to 8 bits."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(50, 16, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(VOCAB_SIZE, 16, generator=generator).to(dtype)
    offset = torch.randn(VOCAB_SIZE, generator=generator).to(dtype) if bias else None
    targets = torch.randint(VOCAB_SIZE, (50,), generator=generator)
    targets[::3] = -100
    loss = chunked_cross_entropy(hidden, weight, offset, targets, size=8)
    (gradient,) = torch.autograd.grad(3 * loss, hidden)

    wide = hidden.detach().double().requires_grad_()
    # what the head computes is rounded to its dtype; the loss is taken of the rounded logits
    rounded = F.linear(hidden, weight, offset).detach().double()
    logits = F.linear(wide, weight.double(), None if offset is None else offset.double())
    expected = F.cross_entropy(logits + (rounded - logits).detach(), targets, reduction="sum")
    (expected_gradient,) = torch.autograd.grad(3 * expected, wide)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.detach().double(), expected.detach(), rtol=1e-5, atol=0)
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=tolerance, atol=tolerance)


# --- in a model


@pytest.mark.parametrize("size", [1, 7, 48, 1000])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
def test_loss_and_gradients_equal_the_models_own(size, family) -> None:
    plain, chunked = tiny_model(family).train(), tiny_model(family).train()
    for model in (plain, chunked):
        model.lm_head.weight.requires_grad_(False)
    with ChunkedLoss(chunked, size) as loss:
        for arguments in ({}, {"num_items_in_batch": torch.tensor(100)}):
            plain.zero_grad()
            chunked.zero_grad()
            expected = plain(**batch(), **arguments).loss
            found = chunked(**batch(), **arguments).loss
            torch.testing.assert_close(found, expected)
            expected.backward()
            found.backward()
            for (name, a), b in zip(plain.named_parameters(), chunked.parameters()):
                if "embed" not in name and a.grad is not None:
                    torch.testing.assert_close(b.grad, a.grad, rtol=1e-4, atol=1e-7, msg=name)
        loss.check_used()


def test_no_logits_exist_in_training_mode() -> None:
    model = tiny_model().train()
    with ChunkedLoss(model, 8):
        assert model(**batch()).logits.shape[-1] == model.config.hidden_size


def test_evaluation_mode_is_the_models_own_while_attached() -> None:
    plain, chunked = tiny_model(), tiny_model()
    expected = plain(**batch())
    with ChunkedLoss(chunked, 8) as loss:
        for _ in range(2):  # before and after a step in training mode
            chunked.eval()
            found = chunked(**batch())
            assert torch.equal(found.logits, expected.logits)
            assert torch.equal(found.loss, expected.loss)
            last = chunked(batch()["input_ids"], logits_to_keep=1).logits
            assert torch.equal(last, plain(batch()["input_ids"], logits_to_keep=1).logits)
            with pytest.raises(ValueError, match="another one was used"):
                loss.check_used()  # an evaluation is no step
            chunked.train()
            chunked(**batch())
            loss.check_used()


def test_evaluation_mode_takes_the_users_own_loss() -> None:
    model = tiny_model()
    model.loss_function = own_loss
    expected = model(**batch()).loss
    with ChunkedLoss(model, 8):
        assert torch.equal(model(**batch()).loss, expected)


# --- what it gives back


@pytest.mark.parametrize("has_loss", [False, True], ids=["default loss", "own loss"])
@pytest.mark.parametrize("has_forward", [False, True], ids=["default head", "wrapped head"])
def test_everything_is_given_back_at_the_end(has_loss, has_forward) -> None:
    model = tiny_model().train()
    if has_loss:
        model.loss_function = own_loss
    if has_forward:
        head = model.lm_head
        head.forward = lambda input: F.linear(input, head.weight) + 1
    before, expected = attributes(model), model(**batch())
    with ChunkedLoss(model, 8):
        assert attributes(model) != before
    assert attributes(model) == before
    after = model(**batch())
    assert torch.equal(after.logits, expected.logits) and torch.equal(after.loss, expected.loss)


def test_everything_is_given_back_after_an_error() -> None:
    model = tiny_model().train()
    before = attributes(model)
    with pytest.raises(KeyboardInterrupt), ChunkedLoss(model, 8):
        raise KeyboardInterrupt
    assert attributes(model) == before


def test_a_second_detach_does_nothing() -> None:
    model = tiny_model()
    before = attributes(model)
    loss = ChunkedLoss(model, 8)
    loss.detach()
    model.loss_function = own_loss
    loss.detach()
    assert model.loss_function is own_loss
    del model._loss_function
    assert attributes(model) == before


# --- in a run


@pytest.mark.slow
def test_a_run_removes_the_same(tmp_path) -> None:
    expected = prune(tiny_model("qwen2"), tmp_path / "plain")
    pruner = GISPPruner(tiny_config(), tmp_path / "levels", chunk_tokens=10)
    prune(tiny_model("qwen2"), tmp_path, pruner=pruner)
    assert all(torch.equal(a, b) for a, b in zip(pruner.trajectory.order, expected.trajectory.order))
    assert [step.loss for step in pruner.trajectory.steps] == pytest.approx(
        [s.loss for s in expected.trajectory.steps], rel=1e-5
    )


def test_levels_are_evaluated_on_logits(tmp_path) -> None:
    model, widths = tiny_model("qwen2"), []
    pruner = GISPPruner(
        tiny_config(),
        tmp_path / "levels",
        chunk_tokens=10,
        evaluate=lambda m: {"width": m(batch()["input_ids"]).logits.shape[-1]},
    )
    prune(model, tmp_path, pruner=pruner)
    widths = {metrics["width"] for metrics in pruner.level_metrics.values()}
    assert widths == {VOCAB_SIZE}
    assert model(batch()["input_ids"]).logits.shape[-1] == VOCAB_SIZE


def test_the_trainers_own_evaluation_sees_logits(tmp_path) -> None:
    """With ``eval_strategy="steps"`` predictions have the vocabulary's width, and the loss is the plain one."""
    widths: list[int] = []
    pruner = GISPPruner(tiny_config(), tmp_path / "levels", chunk_tokens=10)
    trainer = make_trainer(tiny_model(), tmp_path, pruner=pruner, eval_steps=1)
    trainer.args.eval_strategy = IntervalStrategy.STEPS  # a Trainer is refused that has it and no eval_dataset
    trainer.eval_dataset = tiny_blocks(4, seed=1)
    trainer.compute_metrics = lambda prediction: widths.append(prediction.predictions.shape[-1]) or {}
    trainer.train()
    assert set(widths) == {VOCAB_SIZE} and len(widths) == tiny_config().num_steps
    logged = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
    plain = Trainer(pruner.engine.model, trainer.args, eval_dataset=trainer.eval_dataset).evaluate()
    assert logged[-1] == pytest.approx(plain["eval_loss"], rel=1e-5)


# --- what is refused


def test_capped_logits_are_refused() -> None:
    with pytest.raises(ValueError, match="caps its logits"):
        ChunkedLoss(tiny_model("gemma2"), 8)


def test_a_chunk_has_at_least_one_token() -> None:
    with pytest.raises(ValueError, match="chunk_tokens must be at least 1, got 0"):
        ChunkedLoss(tiny_model(), 0)


def test_a_refused_model_is_left_alone() -> None:
    model = tiny_model()
    before = attributes(model)
    with pytest.raises(ValueError):
        ChunkedLoss(model, 0)
    assert attributes(model) == before


def test_a_run_with_another_loss_is_refused(tmp_path) -> None:
    pruner = GISPPruner(tiny_config(), tmp_path / "levels", chunk_tokens=10)
    trainer = make_trainer(tiny_model(), tmp_path, pruner=pruner)
    trainer.compute_loss_func = lambda outputs, labels, num_items_in_batch=None: outputs.logits.square().mean()
    with pytest.raises(ValueError, match="step 1 of 5: chunk_tokens needs the model's own loss"):
        trainer.train()
