"""Scoring the layers in groups, one pass each, changes the memory and nothing else."""

import pytest
import torch

from gisp_hf import GISPPruner
from gisp_hf.models import discover
from gisp_hf.pruning.engine import Engine
from tests.runs import make_trainer, prune, tiny_config
from tests.tiny import tiny_blocks, tiny_model


def run(folder, groups: int, **arguments):
    pruner = GISPPruner(tiny_config(), folder / "levels", layer_passes=groups)
    model = tiny_model("gemma2")
    prune(model, folder, pruner=pruner, max_steps=5 * groups, **arguments)
    return pruner.trajectory, model


@pytest.mark.slow
@pytest.mark.parametrize("groups", [2, 3, 4])
def test_groups_give_the_same_order(groups, tmp_path) -> None:
    expected, dense = run(tmp_path / "one", 1)
    found, model = run(tmp_path / "groups", groups)
    assert all(torch.equal(a, b) for a, b in zip(found.order, expected.order))
    for a, b in zip(found.steps, expected.steps):
        assert (a.step, a.sparsity, a.groups, a.channels) == (b.step, b.sparsity, b.groups, b.channels)
        assert a.loss == pytest.approx(b.loss, rel=1e-5)
    ids = tiny_blocks(1)[0]["input_ids"][None]
    assert torch.equal(model(ids).logits, dense(ids).logits)


def test_only_one_group_has_gradients_at_a_time(tmp_path) -> None:
    from transformers import TrainerCallback

    seen = []

    class Witness(TrainerCallback):
        def on_substep_end(self, args, state, control, model=None, **kwargs):  # in the last batch they are freed
            seen.append({int(n.split(".")[2]) for n, p in model.named_parameters() if p.grad is not None})

    pruner = GISPPruner(tiny_config(num_steps=2), tmp_path / "levels", layer_passes=2)
    trainer = make_trainer(tiny_model(), tmp_path, pruner=pruner, max_steps=4)
    trainer.callback_handler.callbacks.insert(0, Witness())
    trainer.train()
    assert seen == [{1, 2}, {3, 4}] * 2


def test_early_scores_equal_late_ones(tmp_path) -> None:
    # one batch a step: scored inside the backward pass; two half batches: after it
    early = prune(tiny_model(), tmp_path / "a", gradient_accumulation_steps=1, per_device_train_batch_size=16)
    late = prune(tiny_model(), tmp_path / "b", gradient_accumulation_steps=2, per_device_train_batch_size=8)
    assert all(torch.equal(a, b) for a, b in zip(early.trajectory.order, late.trajectory.order))


def test_early_scoring_frees_each_gradient_at_once() -> None:
    model = tiny_model()
    engine = Engine(model, discover(model), tiny_config(sparsity_levels=(0.3,)))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in engine.scored_parameters())
    with engine.watch(micro_batches=1):
        alive = []
        last = model.get_parameter(engine.scored_parameters()[0])  # the first layer is reached last
        last.register_post_accumulate_grad_hook(
            lambda _: alive.extend(n for n in engine.scored_parameters() if model.get_parameter(n).grad is not None)
        )
        ids = torch.stack([block["input_ids"] for block in tiny_blocks(4)])
        for _ in range(2):  # the hooks live on after the parameters have shrunk
            model(input_ids=ids, labels=ids).loss.backward()
            assert len(alive) <= 1
            engine.accumulate()
            engine.advance(0.3)


def test_bad_group_counts_and_data_are_refused(tmp_path) -> None:
    def trainer(groups, **arguments):
        pruner = GISPPruner(tiny_config(), tmp_path / "levels", layer_passes=groups)
        return make_trainer(tiny_model(), tmp_path, pruner=pruner, **arguments)

    with pytest.raises(ValueError, match="must lie between 1 and the 4 layers that are pruned, got 5"):
        trainer(5)
    with pytest.raises(ValueError, match="got 0"):
        trainer(0)
    with pytest.raises(ValueError, match=r"5 pruning steps of 2 passes each.*max_steps=10"):
        trainer(2, max_steps=9).train()
    with pytest.raises(ValueError, match="goes over the same data 2 times.*16 examples at 8 per step are not"):
        trainer(2, max_steps=10, gradient_accumulation_steps=1).train()
