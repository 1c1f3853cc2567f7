"""TRL's trainers prune as they are. Skipped where trl is not installed (``pip install 'gisp_hf[trl]'``)."""

import copy
import math

import pytest
import torch
from datasets import Dataset
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PrinterCallback, Trainer, TrainingArguments

from gisp_hf import GISPPruner
from gisp_hf.models import discover
from gisp_hf.pruning.engine import Engine
from tests.runs import tiny_config
from tests.tiny import tiny_model, tiny_tokenizer

trl = pytest.importorskip("trl", reason="trl is not installed")

pytestmark = pytest.mark.filterwarnings("default::FutureWarning", "default::DeprecationWarning")


def words(seed: int, count: int) -> str:
    numbers = torch.randint(4, 64, (count,), generator=torch.Generator().manual_seed(seed))
    return " ".join(f"w{number}" for number in numbers.tolist())


def arguments(folder, **changes):
    return {
        "output_dir": str(folder / "trainer"),
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        **changes,
    }


def pruner(folder, steps: int = 2, **options) -> GISPPruner:
    return GISPPruner(tiny_config(num_steps=steps, sparsity_levels=(0.4,)), folder / "levels", **options)


def sft(folder, dataset, *, callback, **changes):
    args = trl.SFTConfig(**arguments(folder, max_length=16, shuffle_dataset=False, **changes))
    trainer = trl.SFTTrainer(
        tiny_model(), args=args, train_dataset=dataset, processing_class=tiny_tokenizer(), callbacks=[callback]
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


CASES = {
    "packing": ({"text": [words(seed, 5 + seed % 9) for seed in range(16)]}, {"packing": True, "max_steps": 2}),
    "completion-only": (
        {
            "prompt": [words(seed, 6) for seed in range(8)],
            "completion": [" " + words(99 + seed, 2 + seed % 5) for seed in range(8)],
        },
        {},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_sft_prunes_like_a_trainer_on_the_same_batches(case, tmp_path) -> None:
    """Oracle: a plain Trainer with the model's own loss, on the batches that TRL has made."""
    rows, changes = CASES[case]
    ours = pruner(tmp_path)
    trainer = sft(tmp_path, Dataset.from_dict(rows), callback=ours, **{"gradient_accumulation_steps": 1, **changes})
    batches = list(trainer.get_train_dataloader())
    labels = torch.cat([batch["labels"].flatten() for batch in batches])
    if case == "completion-only":
        assert (labels == -100).sum() > 8 * 5  # the prompts
    else:
        assert all(int((batch["position_ids"] == 0).sum()) > 1 for batch in batches)  # several texts in a row
    count = len(trainer.train_dataset)
    trainer.args.gradient_accumulation_steps = len(batches)
    trainer.train()
    expected = pruner(tmp_path / "plain")
    args = TrainingArguments(**arguments(tmp_path / "plain", gradient_accumulation_steps=len(batches)))
    args.remove_unused_columns = False
    plain = Trainer(
        tiny_model(),
        args,
        train_dataset=trainer.train_dataset,
        data_collator=trainer.data_collator,
        callbacks=[expected],
    )
    plain.train()
    assert count >= 4
    for a, b in zip(ours.trajectory.steps, expected.trajectory.steps):
        assert math.isclose(a.loss, b.loss, rel_tol=1e-4)
    assert all(torch.equal(a, b) for a, b in zip(ours.trajectory.order, expected.trajectory.order))
    trainer.save_model(tmp_path / "saved")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    level = AutoModelForCausalLM.from_pretrained(ours.level_folders[0.4])
    ids = torch.arange(4, 20)[None]
    assert torch.equal(saved(ids).logits, level(ids).logits)


@pytest.mark.slow
def test_chunk_tokens_with_sft_names_trl(tmp_path) -> None:
    rows, _ = CASES["completion-only"]
    trainer = sft(tmp_path, Dataset.from_dict(rows), callback=pruner(tmp_path, chunk_tokens=8))
    with pytest.raises(ValueError, match=r"a trainer of TRL \(SFTTrainer, DPOTrainer\).*use chunk_tokens=None"):
        trainer.train()


@pytest.mark.slow
def test_dpo_scores_what_sets_chosen_and_rejected_apart(tmp_path) -> None:
    """Oracle: at its start DPO's loss is log 2, and its gradient that of the difference of log-likelihoods."""
    rows = {
        "prompt": [words(seed, 4) for seed in range(8)],
        "chosen": [" " + words(50 + seed, 4) for seed in range(8)],
        "rejected": [" " + words(150 + seed, 4) for seed in range(8)],
    }
    model = tiny_model()
    ours = pruner(tmp_path, steps=1)
    args = trl.DPOConfig(**arguments(tmp_path, max_steps=1, beta=0.1, max_length=16))
    trainer = trl.DPOTrainer(
        model,
        ref_model=copy.deepcopy(model),
        args=args,
        train_dataset=Dataset.from_dict(rows),
        processing_class=tiny_tokenizer(),
        callbacks=[ours],
    )
    trainer.remove_callback(PrinterCallback)
    data = [dict(row) for row in trainer.train_dataset]
    trainer.train()
    assert math.isclose(ours.trajectory.steps[0].loss, math.log(2), rel_tol=1e-4)

    by_hand = tiny_model()
    engine = Engine(by_hand, discover(by_hand), ours.config)

    def log_likelihood(prompt: list[int], completion: list[int]) -> torch.Tensor:
        ids = torch.tensor([prompt + completion])
        log_probs = F.log_softmax(by_hand(ids).logits[0, :-1], dim=-1)
        return log_probs.gather(1, ids[0, 1:, None])[len(prompt) - 1 :].sum()

    with engine.watch(micro_batches=0):
        for row in data:
            prompt = row["prompt_ids"] if "prompt_ids" in row else row["prompt_input_ids"]
            chosen = row["chosen_ids"] if "chosen_ids" in row else row["chosen_input_ids"]
            rejected = row["rejected_ids"] if "rejected_ids" in row else row["rejected_input_ids"]
            margin = log_likelihood(prompt, chosen) - log_likelihood(prompt, rejected)
            (-0.5 * 0.1 * margin / len(data)).backward()  # d softplus(-x) / dx at 0 is -1/2
        engine.accumulate()
    engine.advance(0.4)
    assert all(torch.equal(a, b) for a, b in zip(ours.trajectory.order, engine.order))
