import pytest
import torch

from gisp_hf import GISPPruner
from gisp_hf.losses.chunked import ChunkedLoss
from tests.runs import make_trainer, prune, tiny_config
from tests.tiny import tiny_blocks, tiny_model


def batch() -> dict[str, torch.Tensor]:
    ids = torch.stack([block["input_ids"] for block in tiny_blocks(3)])
    labels = ids.clone()
    labels[0, :7] = -100
    return {"input_ids": ids, "labels": labels}


@pytest.mark.parametrize("size", [1, 7, 48, 1000])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
def test_loss_and_gradients_equal_the_models_own(size, family) -> None:
    plain, chunked = tiny_model(family), tiny_model(family)
    for model in (plain, chunked):
        model.lm_head.weight.requires_grad_(False)
    loss = ChunkedLoss(chunked, size)
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
    loss.detach()
    assert torch.equal(chunked(**batch()).logits, plain(**batch()).logits)
    assert torch.equal(chunked(**batch()).loss, plain(**batch()).loss)


def test_a_run_removes_the_same(tmp_path) -> None:
    expected = prune(tiny_model("qwen2"), tmp_path / "plain")
    pruner = GISPPruner(
        tiny_config(),
        tmp_path / "levels",
        chunk_tokens=10,
        evaluate=lambda m: {"v": m(batch()["input_ids"]).logits.shape[-1]},
    )
    model = tiny_model("qwen2")
    prune(model, tmp_path, pruner=pruner)
    assert all(torch.equal(a, b) for a, b in zip(pruner.trajectory.ranks, expected.trajectory.ranks))
    assert [step.loss for step in pruner.trajectory.steps] == pytest.approx(
        [s.loss for s in expected.trajectory.steps], rel=1e-5
    )
    assert set(v["v"] for v in pruner.level_metrics.values()) == {64}  # evaluation sees logits
    assert model(batch()["input_ids"]).logits.shape[-1] == 64


def test_what_it_cannot_do_is_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="caps its logits"):
        ChunkedLoss(tiny_model("gemma2"), 8)
    with pytest.raises(ValueError, match="chunk_tokens must be at least 1, got 0"):
        ChunkedLoss(tiny_model(), 0)
    pruner = GISPPruner(tiny_config(), tmp_path / "levels", chunk_tokens=10)
    trainer = make_trainer(tiny_model(), tmp_path, pruner=pruner)
    trainer.compute_loss_func = lambda outputs, labels, num_items_in_batch=None: outputs.logits.square().mean()
    with pytest.raises(ValueError, match="step 1 of 5: chunk_tokens needs the model's own loss"):
        trainer.train()
